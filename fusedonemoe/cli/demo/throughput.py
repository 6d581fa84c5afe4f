"""The training speed of one MoE layer and of the usual ways to write it in PyTorch, measured by the benchmark's runner."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedonemoe.bench.peers import LOOP, OURS, PEERS, Forward, Peer, Weights, cheap_route
from fusedonemoe.bench.results import CellResult
from fusedonemoe.bench.runner import run_cell
from fusedonemoe.bench.timing import GpuTimer, Timer
from fusedonemoe.bench.workloads import Cell

_BLOCKS = {peer.name: peer.build for peer in PEERS["block"]}
Build = Callable[[Cell, Weights], Forward]


def all_experts(cell: Cell, weights: Weights) -> Forward:
    """Compute every token by every expert, and mask the sum: the formulation with a static graph that the original used."""
    router, gate_up_EGD, down_EDF = weights.values()

    def forward(x_TD: Tensor) -> Tensor:
        weights_TK, experts_TK = cheap_route(x_TD, router, cell.K)
        weights_TE = x_TD.new_zeros(x_TD.shape[0], cell.E).scatter(1, experts_TK, weights_TK)
        gate_TEF, up_TEF = torch.einsum("td,egd->teg", x_TD, gate_up_EGD).chunk(2, dim=-1)
        h_TEF = nn.functional.silu(gate_TEF) * up_TEF * weights_TE[:, :, None]
        return torch.einsum("tef,edf->td", h_TEF, down_EDF)

    return forward


def _peer(name: str, build: Build, *, compiled: bool = False) -> Peer:
    def built(cell: Cell, weights: Weights) -> Forward:
        return torch.compile(build(cell, weights), fullgraph=True, dynamic=False) if compiled else build(cell, weights)

    return Peer(f"{name}, {'compiled' if compiled else 'eager'}", built, ("training",), metered=False)


def line_up(*, compiled: bool) -> list[Peer]:
    """Return the ways to compute the layer, this library first. The loop is no single graph, so it is never compiled."""
    both = (True, False) if compiled else (False,)
    ours, masked = (
        [_peer(name, build, compiled=each) for each in both]  # type: ignore[arg-type]
        for name, build in ((OURS, _BLOCKS[OURS]), ("all experts, masked", all_experts))
    )
    return [*ours, _peer(LOOP, _BLOCKS[LOOP]), *masked]  # type: ignore[arg-type]


def compare(cell: Cell, *, peers: list[Peer], device: torch.device, rounds: int) -> CellResult:
    """Check every peer against float64, then time those that agree, in turns."""
    timer = GpuTimer(device) if device.type == "cuda" else Timer(real_time=False)
    return run_cell(cell, timer, peers=peers, rounds=rounds, seconds=0.0)
