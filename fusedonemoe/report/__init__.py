"""Results of the benchmark as one page: pictures and tables in a single HTML file that loads nothing from anywhere."""

import argparse
import sys
from pathlib import Path

from fusedonemoe import files
from fusedonemoe.cli import options

__all__ = ["add_arguments", "run"]

EXIT_USAGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add, told = parser.add_argument, "what bench --json wrote; several make one page"
    add("results", nargs="+", type=options.path, metavar="RESULTS.json", help=told)
    add("-o", "--output", type=options.path, default=Path("report.html"), metavar="FILE.html", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Write the page.

    Returns:
        The exit status: 0; 2 when a file holds no results with times, or the page cannot be written.
    """
    # Here, not at the top: this module is imported whenever the command line is, to read the options.
    from fusedonemoe.bench.records import DamagedError
    from fusedonemoe.report.page import page_of
    from fusedonemoe.report.runs import load

    try:
        runs = [load(path) for path in args.results]
        if files.stamp_of(args.output) in [files.stamp_of(path) for path in args.results]:
            raise files.UnwritableError(f"cannot write {files.shown(args.output)}: its results are what the page is made of")
        files.check(args.output)
        # A page on stdout is all that is there.
        told = sys.stderr if files.is_stream(args.output) else sys.stdout
        files.write(args.output, page_of(runs).encode("utf-8"))
    except (DamagedError, files.UnwritableError) as reason:
        print(reason, file=sys.stderr)
        return EXIT_USAGE
    cells = sum(len(run.cells) for run in runs)
    print(f"{files.shown(args.output)}: {cells} cells of {len(runs)} file{'s' if len(runs) > 1 else ''}", file=told)
    return 0
