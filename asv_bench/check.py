"""Compare the speed of two commits. Exit with 1 if two measurements both find the second one more than 15 % slower.

    python asv_bench/check.py main HEAD

asv measures both commits in turn, each in several rounds, and its statistics mark slower benchmarks. On a busy machine some of
the marks are chance, so the marked benchmarks are measured again, in more rounds, and only those marked twice count.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from configuration import FOLDER, scratch

FACTOR = 1.15
# Rounds for each commit: of the first measurement, and of the second one of the marked benchmarks.
ROUNDS, ROUNDS_AGAIN = 4, 8


def marked(table: str) -> list[str]:
    """Return the benchmarks, with their parameters, that asv's table marks as slower (``+``) or as failing now (``!``)."""
    rows = (line.strip().strip("|").split("|") for line in table.splitlines() if line.lstrip().startswith("|"))
    return [row[-1].strip() for row in rows if row[0].strip() in ("+", "!")]


def exactly(benchmark: str) -> str:
    """Return asv's expression for one benchmark with its parameters."""
    return f"^{re.escape(benchmark)}$"


def slower(measure: Callable[[Sequence[str], int], str], benchmarks: Sequence[str]) -> list[str]:
    """Return the benchmarks that two measurements both mark; the second one measures only those that the first one marked.

    Args:
        measure: takes expressions for benchmarks and a number of rounds, and returns asv's table.
        benchmarks: expressions for the benchmarks of the first measurement.
    """
    first = marked(measure(benchmarks, ROUNDS))
    if not first:
        return []
    print(f"\n{len(first)} marked; measuring again ...\n", flush=True)
    second = set(marked(measure([exactly(name) for name in first], ROUNDS_AGAIN)))
    return [name for name in first if name in second]


def asv_continuous(base: str, head: str, machine: str) -> Callable[[Sequence[str], int], str]:
    """Return a function that measures with ``asv continuous``, each time into an empty folder."""

    def measure(benchmarks: Sequence[str], rounds: int) -> str:
        shutil.rmtree(FOLDER / ".asv" / "check", ignore_errors=True)
        command = [sys.executable, "-m", "asv", "continuous", "--config", str(scratch("check")), "--machine", machine]
        command += ["--factor", str(FACTOR), "--interleave-rounds", "--show-stderr", "--attribute", f"rounds={rounds}"]
        for benchmark in benchmarks:
            command += ["--bench", benchmark]
        lines = []
        with subprocess.Popen([*command, base, head], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if process.returncode not in (0, 1):  # 1: something is slower
            raise SystemExit(f"asv could not measure {base} and {head}: exit status {process.returncode}")
        return "".join(lines)

    return measure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("head", nargs="?", default="HEAD", help="the commit that may be slower")
    parser.add_argument("--bench", action="append", help="only what matches this expression; by default every time")
    parser.add_argument("--machine", default="local", help="the name under which asv knows this machine")
    options = parser.parse_args()
    found = slower(asv_continuous(options.base, options.head, options.machine), options.bench or [r"\.time"])
    if found:
        print(f"\n{options.head} is more than {FACTOR - 1:.0%} slower than {options.base}, measured twice:")
        print("\n".join(f"  {name}" for name in found))
        return 1
    print(f"\n{options.head} is nowhere more than {FACTOR - 1:.0%} slower than {options.base}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
