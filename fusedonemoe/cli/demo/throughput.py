"""The training speed of one MoE layer and of the usual ways to write it in PyTorch, measured by the benchmark's runner."""

import torch

from fusedonemoe.bench.peers import LOOP, OURS, PEERS, Forward, Peer, Weights, masked_block
from fusedonemoe.bench.results import CellResult
from fusedonemoe.bench.runner import run_cell
from fusedonemoe.bench.timing import Timer, gpu_timer
from fusedonemoe.bench.workloads import Cell

_BUILDS = {**{peer.name: peer.build for peer in PEERS["block"]}, "all experts, masked": masked_block}


def line_up(*, compiled: bool) -> list[Peer]:
    """Return the ways to compute the layer, this library first. The loop is no single graph, so it is never compiled."""
    peers = []
    for name in (OURS, LOOP, "all experts, masked"):
        build = _BUILDS[name]

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
