"""Write a copy of asv.conf.json whose results folder is under .asv/, for results that are not committed; print its path."""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def scratch(name: str) -> Path:
    """Write a configuration whose results go to ``.asv/NAME``, apart from the committed ones, and return its path."""
    import json5  # asv reads its configuration with it, because of the comments; imported here so that tests need no asv

    settings = json5.loads((FOLDER / "asv.conf.json").read_text(encoding="utf-8"))
    for key in ("repo", "benchmark_dir", "env_dir", "html_dir"):
        settings[key] = str((FOLDER / settings[key]).resolve())
    settings["results_dir"] = str(FOLDER / ".asv" / name)
    path = FOLDER / ".asv" / f"{name}.conf.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(settings, indent=4), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(scratch(sys.argv[1]))
