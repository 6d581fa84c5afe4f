"""Side-by-side benchmark: the same function of the same weights, ours and other people's, interleaved in one process.

A peer whose output is off gets no time, and the command fails.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fusedonemoe.bench.gpu_cells import SUITE as GPU
from fusedonemoe.bench.workloads import ISOLATED_SUITES, SUITES, Cell

if TYPE_CHECKING:
    from fusedonemoe.bench.results import CellResult

__all__ = ["add_arguments", "run"]

EXIT_DISAGREE = 1
EXIT_USAGE = 2
DIAL = "dial"  # what a training step holds at each save_percent, and what that costs
LORA = "lora"  # a training step of adapters on experts, beside PEFT's
MODEL = "transformers"  # a whole model of transformers, with its experts and with ours
QUANTIZED = "quantized"  # weights of 8 and 4 bits beside those of 16


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser.

    Args:
        parser: the parser of the command or subcommand.
    """
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--suite",
        choices=sorted([*SUITES, GPU, DIAL, LORA, MODEL, QUANTIZED]),
        default="quick",
        help="which set of cells (default: %(default)s)",
    )
    which.add_argument("--quick", action="store_const", dest="suite", const="quick", help="short for --suite quick")
    parser.add_argument("--cells", type=_regex, metavar="REGEX", help="only the cells whose name matches, as in 'block-.*E32-'")
    parser.add_argument("--peers", type=_regex, metavar="REGEX", help="beside ours, only the peers whose name matches")
    parser.add_argument("--threads", type=_count, metavar="N", help="threads of torch's pool (default: torch's choice)")
    parser.add_argument("--no-rt", action="store_true", help="do not ask for real-time priority while timing")
    parser.add_argument("--json", metavar="FILE", help="also write the results and what they were measured with")
    gpu = parser.add_argument_group("with --suite gpu")
    gpu.add_argument("--dry", action="store_true", help="run every code path at small sizes on the CPU, and time nothing")
    gpu.add_argument("--resume", action="store_true", help="go on with the file of --json: measure what is missing in it")
    gpu.add_argument(
        "--minutes", type=_minutes, metavar="N", default=8.0, help="begin no cell after so long (default: %(default)g)"
    )
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="also draw them, in multiples of the floor")


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
    if args.picture and find_spec("matplotlib") is None:
        print("--picture is drawn with matplotlib, which is missing: pip install fusedonemoe[plot]", file=sys.stderr)
        return EXIT_USAGE
    if problem := _misused(args):
        print(problem, file=sys.stderr)
        return EXIT_USAGE
    if args.suite == GPU:
        from fusedonemoe.bench import gpu_suite

        return gpu_suite.run(args)
    if args.suite == DIAL:
        from fusedonemoe.bench import dial

        return dial.run(args)
    if args.suite == LORA:
        from fusedonemoe.bench import lora

        return lora.run(args)
    if args.suite == MODEL:
        from fusedonemoe.bench import hf_model

        return hf_model.run(args)
    if args.suite == QUANTIZED:
        from fusedonemoe.bench import quantized

        return quantized.run(args)
    cells = [cell for cell in SUITES[args.suite] if args.cells is None or args.cells.search(cell.name)]
    if not cells:
        names = "\n  ".join(cell.name for cell in SUITES[args.suite])
        print(f"--cells {args.cells.pattern!r} matches none of\n  {names}", file=sys.stderr)
        return EXIT_USAGE
    return _run_cells(cells, args)


def _misused(args: argparse.Namespace) -> str:
    """What is wrong with options that are each right."""
    if args.suite != GPU and (args.dry or args.resume):
        return f"--dry and --resume go with --suite {GPU}"
    if args.suite in (DIAL, LORA, MODEL, QUANTIZED) and (args.cells or args.peers or args.picture):
        return f"--suite {args.suite} is a table of its own, without --cells, --peers and --picture"
    if args.resume and not args.json:
        return "--resume needs the file of --json"
    return "--picture shows times, and --dry has none" if args.dry and args.picture else ""


def _run_cells(cells: list[Cell], args: argparse.Namespace) -> int:
    # Here, not at the top: this module is imported whenever the command line is, to read the options.
    from fusedonemoe.bench import fine_grained, report
    from fusedonemoe.bench.libraries import line_up
    from fusedonemoe.bench.peers import PEERS
    from fusedonemoe.bench.runner import threads

    contenders = PEERS | fine_grained.PEERS
    isolated = args.suite in ISOLATED_SUITES
    names = {peer.name for cell in cells for peer in (line_up(cell) if isolated else contenders[cell.operator])}
    if args.peers and not any(map(args.peers.search, names)):
        print(f"--peers {args.peers.pattern!r} matches none of\n  " + "\n  ".join(sorted(names)), file=sys.stderr)
        return EXIT_USAGE

    with threads(args.threads):
        settings = report.describe_run(suite=args.suite)
        report.print_heading(settings)
        measure = _in_processes(args) if isolated else _in_this_process(args)
        results: list[CellResult] = []
        with (
            report.progress(len(cells), in_pipes=isolated) as advance,
            report.kept_while_running(args.json, settings, results, wanted=isolated) as keep,
        ):
            for cell in cells:
                advance(cell.name)
                results.append(measure(cell))
                keep()
                report.print_cell(results[-1])
    if isolated:
        report.print_summary(results)
    if args.json:
        report.write_json(args.json, settings, results)
    if args.picture:
        from fusedonemoe.bench.picture import draw

        draw(args.picture, report.to_json(settings, results))
    return EXIT_DISAGREE if any(row.failed for result in results for row in result.rows) else 0


def _in_this_process(args: argparse.Namespace) -> "Callable[[Cell], CellResult]":
    from fusedonemoe.bench import fine_grained, runner
    from fusedonemoe.bench.ceilings import Ceilings
    from fusedonemoe.bench.peers import PEERS, chosen

    contenders = PEERS | fine_grained.PEERS
    measure = partial(runner.run_cell, ceilings=Ceilings(), real_time=not args.no_rt)
    return lambda cell: measure(cell, peers=chosen(contenders[cell.operator], args.peers))


def _in_processes(args: argparse.Namespace) -> "Callable[[Cell], CellResult]":
    import torch

    from fusedonemoe.bench.ceilings import Ceilings
    from fusedonemoe.bench.isolated import Job, run_job

    job = partial(Job, ceilings=Ceilings(), threads=torch.get_num_threads(), peers=args.peers, real_time=not args.no_rt)
    return lambda cell: run_job(job(cell))
