"""The peers of the suite ``quantized``: 8- and 4-bit expert weights and bfloat16 ones; ids and routing weights are an input."""

from functools import partial
from typing import Any

from fusedonemoe import functional as F
from fusedonemoe.bench.peers import OURS, YARDSTICK, Peer, Weights, WithWeights
from fusedonemoe.bench.workloads import Cell

FORMS: dict[str, dict[str, object]] = {
    "int8": {"dtype": "int8"},
    "int4, groups of 128": {"dtype": "int4", "group_size": 128},
    "int4, groups of 32": {"dtype": "int4", "group_size": 32},
}


def _plain(cell: Cell, weights: dict[str, Any]) -> WithWeights:
    return WithWeights(partial(F.experts_mlp, **weights), {}, sum(weight.nbytes for weight in weights.values()))


def _packed(cell: Cell, weights: dict[str, Any]) -> WithWeights:
    packed = F.pack_experts(**weights)
    return WithWeights(partial(F.experts_mlp, packed=packed), {}, packed.nbytes)


def _rounded(cell: Cell, weights: Weights, form: dict[str, Any]) -> WithWeights:
    made: dict[str, Any] = {name: F.quantize_weight(weight, **form) for name, weight in weights.items()}
    nbytes = sum(weight.nbytes for weight in made.values())
    forward = partial(F.experts_mlp_quantized, **made)
    return WithWeights(forward, {}, nbytes, lambda: {name: F.dequantize_weight(weight) for name, weight in made.items()})


PEERS: tuple[Peer, ...] = (
    Peer(YARDSTICK["quantized"], _plain),
    Peer(f"{OURS} bfloat16, packed", _packed),
    *(Peer(f"{OURS} {name}", partial(_rounded, form=form)) for name, form in FORMS.items()),
)
