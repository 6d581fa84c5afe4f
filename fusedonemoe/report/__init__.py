"""Results of the benchmark as one page: pictures and tables in a single HTML file that loads nothing from anywhere."""

import argparse
import sys
from pathlib import Path

__all__ = ["add_arguments", "run"]

EXIT_USAGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser.

    Args:
        parser: of the command or subcommand.
    """
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS.json", help="what bench --json wrote; several make one page"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE.html", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page.

    Args:
        args: what :func:`add_arguments` parsed.

    Returns:
        The exit status: 0; 2 when a file holds no results with times.
    """
    # Here, not at the top: this module is imported whenever the command line is, to read the options.
    from fusedonemoe.report.page import page_of
    from fusedonemoe.report.runs import NoResultsError, load

    try:
        runs = [load(path) for path in args.results]
    except NoResultsError as reason:
        print(reason, file=sys.stderr)
        return EXIT_USAGE
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page_of(runs), encoding="utf-8")
    cells = sum(len(run.cells) for run in runs)
    print(f"{args.output}: {cells} cells of {len(runs)} file{'s' if len(runs) > 1 else ''}")
    return 0
