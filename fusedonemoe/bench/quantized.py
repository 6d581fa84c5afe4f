"""The suite ``quantized``: experts with 8- and 4-bit weights and with bfloat16 ones, at the sizes of Qwen3-30B-A3B."""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fusedonemoe import functional as F
from fusedonemoe.bench import report, runner, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.peers import OURS, YARDSTICK, Forward, Peer, Weights, WithWeights
from fusedonemoe.bench.results import CellResult
from fusedonemoe.bench.timing import Timer
from fusedonemoe.bench.workloads import Cell

TOKENS = (1, 16, 512)
SIZES = (2048, 768, 128, 8)  # D, F, E, K
FORMS: dict[str, dict[str, object]] = {
    "int8": {"dtype": "int8"},
    "int4, groups of 128": {"dtype": "int4", "group_size": 128},
    "int4, groups of 32": {"dtype": "int4", "group_size": 32},
}
NAMES = ("gate_up_proj", "down_proj")
SECONDS_PER_PEER = 1.0


@dataclass(frozen=True)
class QuantizedCell(Cell):
    """Experts whose ids and routing weights are an input."""

    @property
    def name(self) -> str:
        """Letters and numbers; the dtype is always bfloat16."""
        return super().name.removeprefix("quantized-").removesuffix("-bfloat16")


def _plain(cell: Cell, weights: Weights) -> WithWeights:
    up, down = (weights[name] for name in NAMES)
    return WithWeights(lambda x, ids, scores: F.experts_mlp(x, ids, scores, up, down), {}, nbytes=up.nbytes + down.nbytes)


def _packed(cell: Cell, weights: Weights) -> WithWeights:
    packed = F.pack_experts(*(weights[name] for name in NAMES))
    return WithWeights(lambda x, ids, scores: F.experts_mlp(x, ids, scores, packed=packed), {}, nbytes=packed.nbytes)


def _rounded(cell: Cell, weights: Weights, form: dict[str, Any]) -> WithWeights:
    made = [F.quantize_weight(weights[name], **form) for name in NAMES]
    forward: Forward = lambda x, ids, scores: F.experts_mlp_quantized(x, ids, scores, *made)  # noqa: E731
    reads = lambda: dict(zip(NAMES, map(F.dequantize_weight, made), strict=True))  # noqa: E731
    return WithWeights(forward, {}, nbytes=sum(weight.nbytes for weight in made), reads=reads)


PEERS = [
    Peer(YARDSTICK["quantized"], _plain),
    Peer(f"{OURS} bfloat16, packed", _packed),
    *(Peer(f"{OURS} {name}", partial(_rounded, form=form)) for name, form in FORMS.items()),
]


def cells() -> list[QuantizedCell]:
    """Return the cells of the suite."""
    return [QuantizedCell("quantized", T, *SIZES, torch.bfloat16) for T in TOKENS]


def to_json(result: CellResult) -> dict[str, Any]:
    """Return a cell as plain values, with the form of each row's weights, and its speed in multiples of bfloat16's."""
    cell = report.cell_to_json(result)
    for row in cell["rows"]:
        row |= {"weights": row["peer"].removeprefix(f"{OURS} "), "speed_up": row["times_faster"]}
    return cell


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 1 when an output was off.
    """
    timer, ceilings = Timer(real_time=not args.no_rt), Ceilings()
    measure = partial(runner.run_cell, timer=timer, ceilings=ceilings, peers=PEERS, seconds=SECONDS_PER_PEER)
    return session.run_suite(args, cells(), measure=lambda cell: measure(cell), to_json=to_json, show=report.print_cell)
