"""The command ``python -m asv_bench.suites``."""

import argparse
import sys

from asv_bench.suites import __doc__ as purpose
from asv_bench.suites import add_arguments, run
from fusedonemoe.__main__ import guarded


def main() -> int:
    """Read the options and run the suite."""
    parser = argparse.ArgumentParser(prog="python -m asv_bench.suites", description=purpose)
    add_arguments(parser)
    args = parser.parse_args()
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
