"""Side-by-side benchmark: the same function of the same weights, ours and other people's, interleaved in one process.

A peer whose output is off gets no time, and the command fails.
"""

import argparse
import re
import sys
from importlib.util import find_spec

from fusedonemoe.bench.workloads import SUITES, Cell

__all__ = ["add_arguments", "run"]

EXIT_DISAGREE = 1
EXIT_USAGE = 2


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser.

    Args:
        parser: the parser of the command or subcommand.
    """
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--suite", choices=sorted(SUITES), default="quick", help="which set of cells (default: %(default)s)")
    which.add_argument("--quick", action="store_const", dest="suite", const="quick", help="short for --suite quick")
    parser.add_argument("--cells", type=_regex, metavar="REGEX", help="only the cells whose name matches, as in 'block-.*E32-'")
    parser.add_argument("--threads", type=_count, metavar="N", help="threads of torch's pool (default: torch's choice)")
    parser.add_argument("--no-rt", action="store_true", help="do not ask for real-time priority while timing")
    parser.add_argument("--json", metavar="FILE", help="also write the results and what they were measured with")


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Args:
        args: what :func:`add_arguments` parsed.

    Returns:
        The exit status: 0; 1 when a peer's outputs disagreed or it raised; 2 when nothing could be run.
    """
    if find_spec("rich") is None:
        print("the benchmark prints with rich, which is missing: pip install fusedonemoe[bench]", file=sys.stderr)
        return EXIT_USAGE
    cells = [cell for cell in SUITES[args.suite] if args.cells is None or args.cells.search(cell.name)]
    if not cells:
        names = "\n  ".join(cell.name for cell in SUITES[args.suite])
        print(f"--cells {args.cells.pattern!r} matches none of\n  {names}", file=sys.stderr)
        return EXIT_USAGE
    return _run_cells(cells, args)


def _run_cells(cells: list[Cell], args: argparse.Namespace) -> int:
    # Here, not at the top: this module is imported whenever the command line is, to read the options.
    import torch

    from fusedonemoe.bench import report, runner
    from fusedonemoe.bench.ceilings import Ceilings

    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        settings = report.describe_run(suite=args.suite)
        report.print_heading(settings)
        results = []
        ceilings = Ceilings()
        with report.progress(len(cells)) as advance:
            for cell in cells:
                advance(cell.name)
                results.append(runner.run_cell(cell, ceilings, real_time=not args.no_rt))
                report.print_cell(results[-1])
    finally:
        torch.set_num_threads(threads)
    if args.json:
        report.write_json(args.json, settings, results)
    return EXIT_DISAGREE if any(row.failed for result in results for row in result.rows) else 0
