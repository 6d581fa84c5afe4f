"""Write the measured figures of the README again: ``python docs/_ext/readme.py``.

Such a part begins with a comment that describes it, and ends with another::

    <!-- results quick
    where: operator=block; peer=fusedonemoe
    E: E
    ours / floor: floors | .1f
    -->
    <!-- end of results -->

``<!-- measured quick -->`` gives a sentence instead of a table. ``records`` explains the lines.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# The script also runs in a clone that is not installed.
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import records  # noqa: E402

PART = re.compile(r"(<!-- (results|measured) ([\w-]+)\s*(.*?)-->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


def _part(match: "re.Match[str]") -> str:
    opening, kind, suite, asked, _, closing = match.groups()
    if kind == "measured":
        return f"{opening}\n{records.measured(suite)}\n\n{closing}"
    where, _, columns = asked.partition("\n")
    lines = "\n".join(records.table(suite, where.removeprefix("where: "), columns))
    return f"{opening}\n{lines}\n\n{closing}"


def rewritten(text: str) -> str:
    """Return a text with every measured part filled in from the committed files."""
    return PART.sub(_part, text)


def without(text: str) -> str:
    """Return a text with its measured parts replaced by blank lines."""
    return PART.sub(lambda match: "\n" * match[0].count("\n"), text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text(encoding="utf-8")), encoding="utf-8")
