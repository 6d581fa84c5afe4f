"""Side-by-side benchmark: the same function of the same weights, ours and other people's, interleaved in one process.

A peer whose output is off gets no time, and the command fails.
"""

import argparse
import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from fusedonemoe.bench.suites import REGISTRY

__all__ = ["add_arguments", "run"]

EXIT_DISAGREE = 1
EXIT_USAGE = 2
# Not given; where an option is given that the suite does not take, the command says so.
ABSENT = (None, False)


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser.

    Args:
        parser: the parser of the command or subcommand.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "suites:\n" + "\n".join(f"  {name:14s}{suite.purpose}" for name, suite in REGISTRY.items())
    parser.epilog += "\n\nexit status: 0; 1 a peer's outputs disagree; 2 nothing could be run; 3 slower than --compare"
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--suite",
        choices=list(REGISTRY),
        metavar="SUITE",
        default="quick",
        help="of those listed below (%(default)s)",
    )
    which.add_argument("--quick", action="store_const", dest="suite", const="quick", help="short for --suite quick")
    parser.add_argument("--cells", type=_regex, metavar="REGEX", help="only the cells whose name matches, as in 'block-.*E32-'")
    parser.add_argument("--peers", type=_regex, metavar="REGEX", help="beside ours, only the peers whose name matches")
    parser.add_argument("--threads", type=_count, metavar="N", help="threads of torch's pool (default: torch's choice)")
    parser.add_argument("--no-rt", action="store_true", help="do not ask for real-time priority while timing")
    parser.add_argument("--json", metavar="FILE", help="write the results, and what they were measured with, after every cell")
    parser.add_argument("--resume", action="store_true", help="go on with the file of --json: measure what is missing in it")
    parser.add_argument("--compare", metavar="OLD.json", help="beside an older run on this machine; 3 where ours became slower")
    parser.add_argument("--minutes", type=_positive, metavar="N", help="begin no cell after so long (gpu: 8; else no limit)")
    parser.add_argument("--dry", action="store_true", help="run every code path at small sizes on the CPU, and time nothing")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="also draw them, in multiples of the floor")
    targets = parser.add_argument_group("with --suite serving")
    targets.add_argument("--target-ms", type=_positive, metavar="MS", help="for 95 %% of the requests (100)")
    targets.add_argument("--target-tokens", type=_positive, metavar="N", help="in a second (1000)")


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
    suite = importlib.import_module(f"fusedonemoe.bench.{REGISTRY[args.suite].module}")
    return int(suite.run(args))


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
    if args.resume and not args.json:
        return "--resume needs the file of --json"
    if args.dry and args.compare:
        return "--compare compares times, and --dry has none"
    return "--picture shows times, and --dry has none" if args.dry and args.picture else ""
