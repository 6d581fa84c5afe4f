"""Side-by-side benchmark: this library and others compute the same function of the same weights, in turns, in one process.

A peer with a wrong output gets no time, and the command fails.
"""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from fusedonemoe.cli import options

__all__ = ["add_arguments", "run"]

EXIT_DISAGREE = 1
EXIT_USAGE = 2
# `session.run_cells` gives these to every suite.
CELLS = frozenset({"cells", "resume", "compare", "minutes"})
PEERS = CELLS | {"peers", "picture"}
# Suites that only this project needs. They are in its repository, not in the wheel.
IN_THE_REPOSITORY = ("seeds", "serving", "memory", "dial", "lora", "transformers", "fine-grained", "compile")
# Values of an option that was not given.
ABSENT = (None, False)


@dataclass(frozen=True)
class Suite:
    """One entry."""

    module: str  # imported when the suite is asked for; it has ``run(args) -> int``
    purpose: str  # a line of ``--help``
    options: frozenset[str]  # that it takes in addition to ``--json``, ``--threads`` and ``--no-rt``


REGISTRY: dict[str, Suite] = {
    "quick": Suite("fusedonemoe.bench.cell_suite", "the block and the original's up-projection at 32 to 1024 experts", PEERS),
    "cpu": Suite("fusedonemoe.bench.cell_suite", "the block of published models, forward and training, and CPU peers", PEERS),
    "gpu": Suite("fusedonemoe.bench.cell_suite", "expert layers of published models on a GPU", PEERS | {"dry"}),
    "quantized": Suite("fusedonemoe.bench.cell_suite", "8- and 4-bit expert weights and bfloat16, and the rounding error", CELLS),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser."""
    which, told = parser.add_mutually_exclusive_group(), "one of those below (%(default)s)"
    which.add_argument("--suite", type=_suite, choices=list(REGISTRY), metavar="SUITE", default="quick", help=told)
    which.add_argument("--quick", action="store_const", dest="suite", const="quick", help="short for --suite quick")
    add_options(parser, REGISTRY)


def _suite(name: str) -> str:
    if name in IN_THE_REPOSITORY:
        command = f"python -m asv_bench.suites {name}"
        raise argparse.ArgumentTypeError(f"the suite {name} is not in the package: run `{command}` in a checkout of the project")
    return name


def add_options(parser: argparse.ArgumentParser, registry: Mapping[str, Suite]) -> None:
    """Add the options that do not choose the suite, and the list of suites."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "suites:\n" + "\n".join(f"  {name:14s}{suite.purpose}" for name, suite in registry.items())
    parser.epilog += "\n\nexit status: 0; 1 a peer's outputs disagree; 2 nothing could be run, or a file cannot be read or"
    parser.epilog += "\nwritten; 3 slower than --compare; 130 interrupted; 141 the reader of the output went away"
    add, threads = parser.add_argument, options.whole(1, options.MOST_THREADS)
    add("--cells", type=options.regex, metavar="REGEX", help="only the cells whose name matches, as in 'block-.*E32-'")
    add("--peers", type=options.regex, metavar="REGEX", help="ours and the peers whose name matches")
    add("--threads", type=threads, metavar="N", help="threads of torch's pool (default: torch's choice)")
    add("--no-rt", action="store_true", help="do not ask for real-time priority while timing")
    kept = "write the results, and what they were measured with, after every cell; to a pipe once, at the end"
    add("--json", type=options.path, metavar="FILE", help=kept)
    add("--resume", action="store_true", help="go on with the file of --json if there is one: measure what is missing in it")
    compared = "compare with an older run on this machine; 3 if ours is slower"
    add("--compare", type=options.path, metavar="OLD.json", help=compared)
    add("--minutes", type=options.above_zero, metavar="N", help="begin no cell after so long (gpu: 8; else no limit)")
    add("--dry", action="store_true", help="run every code path at small sizes on the CPU, and time nothing")
    add("--picture", metavar="FILE.png", type=options.path, help="also draw them, in multiples of the floor")


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Returns:
        The exit status: 0; 1 when a peer's outputs disagreed or it raised; 2 when nothing could be run; 3 when ours is slower
        than in the file of ``--compare``.
    """
    return run_from(REGISTRY, args)


def run_from(registry: Mapping[str, Suite], args: argparse.Namespace) -> int:
    """Run the suite ``args.suite`` of a registry, and return the exit status, as :func:`run` does."""
    problem = _misused(registry, args)
    if find_spec("rich") is None:
        problem = "the benchmark prints with rich, which is missing: pip install 'fusedonemoe[bench]'"
    elif args.picture and find_spec("matplotlib") is None:
        problem = "--picture is drawn with matplotlib, which is missing: pip install 'fusedonemoe[plot]'"
    if problem:
        print(problem, file=sys.stderr)
        return EXIT_USAGE
    # Other libraries log in the middle of the tables which of their extensions this machine cannot load.
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            warnings.simplefilter("ignore", DeprecationWarning)
            # Here, not at the top: this module is imported whenever the command line is, to read the options.
            return int(importlib.import_module(registry[args.suite].module).run(args))
    finally:
        logging.disable(before)


def _misused(registry: Mapping[str, Suite], args: argparse.Namespace) -> str:
    """Return an error message for a combination of options that is not allowed; else an empty text."""
    suite = registry[args.suite]
    for option in ("cells", "peers", "resume", "compare", "minutes", "dry", "picture"):
        if getattr(args, option) not in ABSENT and option not in suite.options:
            takers = ", ".join(name for name, other in registry.items() if option in other.options)
            return f"--{option}: not with --suite {args.suite}, but with {takers or 'none'}"
    if args.picture and args.json and os.path.realpath(args.picture) == os.path.realpath(args.json):
        return "--picture and --json name the same file"
    if args.resume and not args.json:
        return "--resume needs the file of --json"
    if args.dry and args.compare:
        return "--compare compares times, and --dry has none"
    return "--picture shows times, and --dry has none" if args.dry and args.picture else ""
