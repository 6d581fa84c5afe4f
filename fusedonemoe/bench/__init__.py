"""Side-by-side benchmark: the same function of the same weights, ours and other people's, interleaved in one process.

A peer whose output is off gets no time, and the command fails.
"""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from fusedonemoe.bench.suites import REGISTRY
from fusedonemoe.cli import options

__all__ = ["add_arguments", "run"]

EXIT_DISAGREE = 1
EXIT_USAGE = 2
# Not given; where an option is given that the suite does not take, the command says so.
ABSENT = (None, False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser.

    Args:
        parser: the parser of the command or subcommand.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "suites:\n" + "\n".join(f"  {name:14s}{suite.purpose}" for name, suite in REGISTRY.items())
    parser.epilog += "\n\nexit status: 0; 1 a peer's outputs disagree; 2 nothing could be run, or a file cannot be read or"
    parser.epilog += "\nwritten; 3 slower than --compare; 130 interrupted; 141 the reader of the output went away"
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--suite",
        choices=list(REGISTRY),
        metavar="SUITE",
        default="quick",
        help="of those listed below (%(default)s)",
    )
    which.add_argument("--quick", action="store_const", dest="suite", const="quick", help="short for --suite quick")
    parser.add_argument(
        "--cells", type=options.regex, metavar="REGEX", help="only the cells whose name matches, as in 'block-.*E32-'"
    )
    parser.add_argument("--peers", type=options.regex, metavar="REGEX", help="beside ours, only the peers whose name matches")
    parser.add_argument(
        "--threads",
        type=options.whole(1, options.MOST_THREADS),
        metavar="N",
        help="threads of torch's pool (default: torch's choice)",
    )
    parser.add_argument("--no-rt", action="store_true", help="do not ask for real-time priority while timing")
    parser.add_argument(
        "--json",
        type=options.path,
        metavar="FILE",
        help="write the results, and what they were measured with, after every cell; to a pipe once, at the end",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the file of --json if there is one: measure what is missing in it"
    )
    parser.add_argument(
        "--compare", type=options.path, metavar="OLD.json", help="beside an older run on this machine; 3 where ours became slower"
    )
    parser.add_argument(
        "--minutes", type=options.above_zero, metavar="N", help="begin no cell after so long (gpu: 8; else no limit)"
    )
    parser.add_argument("--dry", action="store_true", help="run every code path at small sizes on the CPU, and time nothing")
    parser.add_argument("--picture", metavar="FILE.png", type=options.path, help="also draw them, in multiples of the floor")
    targets = parser.add_argument_group("with --suite serving")
    targets.add_argument("--target-ms", type=options.above_zero, metavar="MS", help="for 95 %% of the requests (100)")
    targets.add_argument("--target-tokens", type=options.above_zero, metavar="N", help="in a second (1000)")


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Args:
        args: what :func:`add_arguments` parsed.

    Returns:
        The exit status: 0; 1 when a peer's outputs disagreed or it raised; 2 when nothing could be run; 3 when ours is slower
        than in the file of ``--compare``.
    """
    if find_spec("rich") is None:
        print("the benchmark prints with rich, which is missing: pip install 'fusedonemoe[bench]'", file=sys.stderr)
        return EXIT_USAGE
    if args.picture and find_spec("matplotlib") is None:
        print("--picture is drawn with matplotlib, which is missing: pip install 'fusedonemoe[plot]'", file=sys.stderr)
        return EXIT_USAGE
    if problem := _misused(args):
        print(problem, file=sys.stderr)
        return EXIT_USAGE
    # Here, not at the top: this module is imported whenever the command line is, to read the options.
    with _without_remarks():
        suite = importlib.import_module(f"fusedonemoe.bench.{REGISTRY[args.suite].module}")
        return int(suite.run(args))


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps off the terminal what other libraries log below an error, and what they announce for versions to come.

    Libraries that the peers import log which of their extensions this machine cannot load, in the midst of the tables.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.disable(before)


def _misused(args: argparse.Namespace) -> str:
    """What is wrong with options that are each right."""
    given = {
        "cells": args.cells,
        "peers": args.peers,
        "resume": args.resume,
        "compare": args.compare,
        "minutes": args.minutes,
        "dry": args.dry,
        "picture": args.picture,
        "targets": args.target_ms or args.target_tokens,
    }
    for option, value in given.items():
        if value not in ABSENT and option not in REGISTRY[args.suite].options:
            takers = ", ".join(name for name, suite in REGISTRY.items() if option in suite.options)
            name = "--target-ms and --target-tokens" if option == "targets" else f"--{option}"
            return f"{name}: not with --suite {args.suite}, but with {takers}"
    if args.picture and args.json and os.path.realpath(args.picture) == os.path.realpath(args.json):
        return "--picture and --json name the same file"
    if args.resume and not args.json:
        return "--resume needs the file of --json"
    if args.dry and args.compare:
        return "--compare compares times, and --dry has none"
    return "--picture shows times, and --dry has none" if args.dry and args.picture else ""
