"""The suites ``quick`` and ``cpu``: whole blocks on this machine's processor."""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from fusedonemoe.bench import isolated, report, runner, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.libraries import line_up
from fusedonemoe.bench.peers import PEERS, chosen
from fusedonemoe.bench.results import CellResult
from fusedonemoe.bench.workloads import ISOLATED_SUITES, SUITES, Cell


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Args:
        args: of the command.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 2 also when a pattern matches nothing.
    """
    in_processes = args.suite in ISOLATED_SUITES

    def peers(cell: Cell) -> list[str]:
        return [peer.name for peer in (line_up(cell) if in_processes else PEERS[cell.operator])]

    return session.run_suite(
        args,
        SUITES[args.suite],
        measure=_in_processes(args) if in_processes else _in_this_process(args),
        to_json=report.cell_to_json,
        show=report.print_cell,
        peers=peers,
        summary=report.print_summary if in_processes else lambda results: None,
        long=in_processes,
    )


def _in_this_process(args: argparse.Namespace) -> Callable[[Cell], CellResult]:
    measure = partial(runner.run_cell, ceilings=Ceilings(), real_time=not args.no_rt)
    return lambda cell: measure(cell, peers=chosen(PEERS[cell.operator], args.peers))


def _in_processes(args: argparse.Namespace) -> Callable[[Cell], CellResult]:
    job = partial(
        isolated.Job,
        ceilings=Ceilings(),
        threads=args.threads or torch.get_num_threads(),
        peers=args.peers,
        real_time=not args.no_rt,
    )
    return lambda cell: isolated.run_job(job(cell))
