"""The course of the demo, from the text to the picture."""

import argparse
import dataclasses
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console

from fusedonemoe import files
from fusedonemoe.bench.peers import LOOP, OURS, PEERS, Forward, Peer, Weights, masked_block
from fusedonemoe.bench.results import CellResult
from fusedonemoe.bench.runner import run_cell
from fusedonemoe.bench.timing import Timer, gpu_timer
from fusedonemoe.bench.workloads import Cell
from fusedonemoe.cli.demo import FULL, PICTURE, QUICK, Settings, output
from fusedonemoe.cli.demo.model import ByteTransformer, ParameterCount, count_parameters
from fusedonemoe.cli.demo.parallel import Processes, joined
from fusedonemoe.cli.demo.text import load_corpus, training_batches
from fusedonemoe.cli.demo.train import Trainer, train_side_by_side, verdict

MOE, DENSE = "MoE", "dense"
PROMPT = b'def read_lines(path, encoding="utf-8"):\n    """'
TEMPERATURE = 0.8


@contextmanager
def _measured(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time a part of the run."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def _device(name: str) -> torch.device:
    """The device, or a RuntimeError that says why not."""
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"--device must be cpu or cuda, got {name!r}")
    torch.empty(0, device=device)
    return device


def _build_trainer(
    name: str, settings: Settings, *, seed: int, device: torch.device, compiled: bool, processes: Processes
) -> tuple[Trainer, ParameterCount]:
    torch.manual_seed(seed)
    model = ByteTransformer(settings, use_experts=name == MOE, processes=processes).to(device)
    count = count_parameters(model)  # while it is whole
    return Trainer(name, model, settings, compiled=compiled, processes=processes), count


def line_up(*, compiled: bool) -> list[Peer]:
    """Return the ways to compute the layer, this library first. The loop is no single graph, so it is never compiled."""
    peers = []
    blocks = {peer.name: peer.build for peer in PEERS["block"]}
    for name, build in ((OURS, blocks[OURS]), (LOOP, blocks[LOOP]), ("all experts, masked", masked_block)):

        def compile_built(cell: Cell, weights: Weights, build=build) -> Forward:  # type: ignore[no-untyped-def]
            return torch.compile(build(cell, weights), fullgraph=True, dynamic=False)

        if compiled and name != LOOP:
            peers.append(Peer(f"{name}, compiled", compile_built, ("training",), metered=False))
        peers.append(Peer(f"{name}, eager", build, ("training",), metered=False))
    return peers


def compare(cell: Cell, *, peers: list[Peer], device: torch.device, rounds: int) -> CellResult:
    """Check every peer against float64, then time those that agree, in turns."""
    timer = gpu_timer(device) if device.type == "cuda" else Timer(real_time=False)
    return run_cell(cell, timer, peers=peers, rounds=rounds, seconds=0.0)


def _compare_throughput(console: Console, settings: Settings, *, device: torch.device, compiled: bool) -> list[CellResult]:
    """Show one table for the demo's own layer and one for a layer of more experts."""
    tokens, D, F, K = settings.tokens_per_step, settings.hidden_size, settings.intermediate_size, settings.top_k
    results = []
    for E in (settings.num_experts, settings.throughput_experts):
        cell = Cell("block", tokens, D, F, E, K, torch.float32, mode="training")
        shape = f"{tokens:,} tokens, D={D}, F={F}, E={E}, K={K}"
        with output.working(console, f"Timing one MoE layer: {shape} ..."):
            peers = line_up(compiled=compiled)
            result = compare(cell, peers=peers, device=device, rounds=settings.throughput_rounds)
        output.show_throughput(console, shape, result)
        results.append(result)
    return results


def run(args: argparse.Namespace) -> int:
    """Run the demo; see :func:`fusedonemoe.cli.demo.run`."""
    with joined() as processes:
        return _run(args, processes)


def _run(args: argparse.Namespace, processes: Processes) -> int:
    try:
        device = _device(args.device)
        files.check(args.output / PICTURE)
        corpus = load_corpus()
    except (AssertionError, RuntimeError, FileNotFoundError) as reason:
        print(f"The demo cannot run here: {reason}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = QUICK if args.quick else FULL
    if args.steps:
        settings = dataclasses.replace(settings, steps=args.steps, validations=min(settings.validations, args.steps))
    if settings.batch % processes.world:
        print(f"The demo cannot run here: {processes.world} processes do not divide a batch of {settings.batch}", file=sys.stderr)
        return 2
    compiled = not args.no_compile
    console = Console(quiet=processes.rank > 0, markup=False, emoji=False)  # texts as they are: a path may have brackets
    seconds: dict[str, float] = {}
    measure = partial(_measured, seconds=seconds)
    options: dict[str, Any] = {"seed": args.seed, "device": device, "compiled": compiled, "processes": processes}
    built = [_build_trainer(name, settings, **options) for name in (MOE, DENSE)]
    moe, dense = trainers = [trainer for trainer, _ in built]
    parameters = {trainer.name: count for trainer, count in built}
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    machine += f", Python {platform.python_version()}, torch {torch.__version__}"
    machine += f", {processes.world} processes with a part of the experts each" if processes.world > 1 else ""
    output.show_header(console, settings, corpus, parameters, machine=machine)

    shape = {"batch": settings.batch, "window": settings.window}
    with measure("compiling both models" if compiled else "warm-up"):
        (batch,) = training_batches(corpus.train, **shape, steps=1, seed=args.seed, device=device)
        for trainer in trainers:
            with output.working(console, f"Compiling the {trainer.name} model ..." if compiled else "Warming up ..."):
                trainer.warm_up(batch)
    with measure("training"), output.training_display(console, trainers, settings) as on_step:
        train_side_by_side(trainers, corpus, settings, seed=args.seed, device=device, on_step=on_step)
    console.print(verdict(moe.history.val[-1][1], dense.history.val[-1][1]), style="bold")

    with measure("sample"), output.working(console, "Writing ..."):
        continuation = moe.model.generate(PROMPT, settings.sample_bytes, temperature=TEMPERATURE, seed=args.seed)
    output.show_sample(console, PROMPT, continuation, name=f"{MOE} model")
    if processes.rank > 0:  # one layer is timed, and one picture drawn, in the first process
        return 0

    with measure("timing one layer"):
        results = _compare_throughput(console, settings, device=device, compiled=compiled)

    path = args.output / PICTURE
    with measure("picture"):
        output.draw_picture(path, trainers, settings)
    console.print(f"Picture: {files.shown(path)}", soft_wrap=True)
    parts = ", ".join(f"{part} {taken:.0f} s" for part, taken in seconds.items())
    console.print(f"Time: {sum(seconds.values()):.0f} s in all: {parts}")
    if any(row.failed for result in results for row in result.rows):
        print("A layer of the comparison disagrees with float64; see the table.", file=sys.stderr)
        return 1
    return 0
