"""The suites of this package: the cells of the catalogue on this machine's processor, or on its GPU."""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fusedonemoe.bench import isolated, report, runner, session
from fusedonemoe.bench.catalogue import SUITES
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.libraries import line_up
from fusedonemoe.bench.peers import chosen, our_impl
from fusedonemoe.bench.results import CellResult, Row
from fusedonemoe.bench.timing import Timer, conditions, gpu_timer
from fusedonemoe.bench.workloads import Cell

GPU = "gpu"
GPU_ROUNDS = 3
# Of the timed calls of a peer, over all rounds.
GPU_SECONDS_PER_PEER = 0.1
QUANTIZED_SECONDS_PER_PEER = 1.0
# Without --minutes no cell of `gpu` is begun after so long: GPUs are lent by the minute.
GPU_MINUTES = 8.0
# nvidia-smi takes a while, and clocks drift slowly.
SECONDS_BETWEEN_CONDITIONS = 15.0
# The row of a cell that failed as a whole.
WHOLE_CELL = "(cell)"


def run(args: argparse.Namespace, device: torch.device | None = None) -> int:
    """Run the cells asked for and print them; on this device, by default on the suite's own.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 2 also when a pattern matches nothing, or without a GPU.
    """
    device = device or torch.device("cpu" if args.suite != GPU or args.dry else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device; --dry runs every code path at small sizes on the CPU, without times", file=sys.stderr)
        return session.EXIT_USAGE
    suite = args.suite
    settings = _describe_gpu(device, args) if suite == GPU else {}
    measure: Callable[[Cell], CellResult]
    if suite == GPU:
        measure = _gpu_measure(device, args, settings["conditions"])
    elif suite == "cpu":
        threads, ceilings = args.threads or torch.get_num_threads(), Ceilings()
        job = partial(isolated.Job, ceilings=ceilings, threads=threads, peers=args.peers, real_time=not args.no_rt)
        measure = lambda cell: isolated.run_job(job(cell))  # noqa: E731
    else:
        seconds = QUANTIZED_SECONDS_PER_PEER if suite == "quantized" else runner.SECONDS_PER_PEER
        in_turns = partial(runner.run_cell, timer=Timer(real_time=not args.no_rt), ceilings=Ceilings(), seconds=seconds)
        measure = lambda cell: in_turns(cell, peers=chosen(line_up(suite, cell), args.peers))  # noqa: E731
    long = suite in ("cpu", GPU)
    return session.run_suite(
        args,
        SUITES[suite],
        measure=measure,
        to_json=report.cell_to_json,
        show=report.print_cell,
        peers=lambda cell: [peer.name for peer in line_up(suite, cell)],
        summarised=long and not args.dry,
        described=settings,
        minutes=GPU_MINUTES if suite == GPU and not args.dry else None,
        long=long,
    )


def _describe_gpu(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on besides the processor: the device, its driver, and the libraries for GPUs."""
    gpu: dict[str, Any] | None = None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "cache_bytes": found.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return {"gpu": gpu, "impl": our_impl(device), "dry": args.dry, "tf32": tf32, "conditions": []}


def _gpu_measure(device: torch.device, args: argparse.Namespace, seen: list[dict[str, str]]) -> Callable[[Cell], CellResult]:
    """Return a function that measures a cell of ``gpu``, and adds clocks and temperature to ``seen`` from time to time."""
    timer, last = gpu_timer(device), float("-inf")
    options: dict[str, Any] = {"rounds": GPU_ROUNDS, "seconds": GPU_SECONDS_PER_PEER}
    if args.dry:
        options = {"rounds": 1, "seconds": 0.0, "dry": True}

    def measure(cell: Cell) -> CellResult:
        nonlocal last
        try:
            result = runner.run_cell(cell, timer, peers=chosen(line_up(GPU, cell), args.peers), **options)
        except Exception as error:  # The cell could not be set up; the others are still of use.
            note, failed = runner.note_of(error, WHOLE_CELL)
            result = CellResult(cell, (Row(WHOLE_CELL, note=note, failed=failed),))
        timer.clean()
        # A collection looks at all objects of all modules, for half a second; from here on only at what is new. They stay
        # frozen: this run is the last work of the process.
        gc.freeze()
        if time.monotonic() - last >= SECONDS_BETWEEN_CONDITIONS:
            if found := conditions():
                seen.append({"after": cell.name, **found})
            last = time.monotonic()
        return result

    return measure
