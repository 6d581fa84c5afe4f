"""Writes asv.conf.json under .asv/ with a results folder of its own, and prints where: runs that are not to be kept use it."""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def scratch(name: str, **changes: object) -> Path:
    """A configuration whose results lie in ``.asv/NAME``, beside the committed ones and not among them."""
    import json5  # asv's own reader of its configuration, which has comments; here: a check or a page may need no asv

    settings = json5.loads((FOLDER / "asv.conf.json").read_text(encoding="utf-8"))
    for key in ("repo", "benchmark_dir", "env_dir", "html_dir"):
        settings[key] = str((FOLDER / settings[key]).resolve())
    settings["results_dir"] = str(FOLDER / ".asv" / name)
    path = FOLDER / ".asv" / f"{name}.conf.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(settings | changes, indent=4), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(scratch(sys.argv[1]))
