"""The command: ``python -m tests.fuzz --cases 20000 --seed 0``."""

import argparse
import sys
from collections.abc import Sequence

from tests.fuzz.cases import CASES, place_of
from tests.fuzz.run import fuzz, work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 where a case failed, 2 where the command is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random small cases against a loop in float64.")
    parser.add_argument("--cases", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    parser.add_argument("--case", type=int, metavar="ID", help="this one alone")
    parser.add_argument("--only", metavar="OPERATOR", help=f"its cases among them; one of {', '.join(CASES)}")
    parser.add_argument("--triton", action="store_true", help="the GPU kernels, in Triton's interpreter")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seed < 0 or options.cases < 1 or (options.case is not None and options.case < 0):
        parser.error("--seed and --case count from 0, --cases from 1")
    if options.only is not None and options.only not in CASES:
        parser.error(f"--only must be one of {', '.join(CASES)}, got {options.only}")
    if options.worker:
        work(options.seed, [int(line) for line in sys.stdin], options.triton, sys.stdout)
        return 0
    indices = [options.case] if options.case is not None else range(options.cases)
    indices = [index for index in indices if options.only in (None, place_of(index, options.triton)[0])]
    if not indices:
        parser.error("no such case")
    report = fuzz(options.seed, indices, options.triton, on_failure=print, on_progress=lambda text: print(text, flush=True))
    print(report.summary())
    if options.case is not None and not report.failed:
        print("nothing was found in this case")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
