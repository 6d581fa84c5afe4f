"""Who is measured: every peer is the same function of the same weights, written the way its own users would run it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fusedonemoe import MoE
from fusedonemoe import functional as F
from fusedonemoe.bench.steps import Call, Weights, call_of, parameter, stacked_weights
from fusedonemoe.bench.workloads import BlockInputs, Cell, Inputs, MergedInputs

OURS = "fusedonemoe"
GROUPED = "fusedonemoe grouped"
PREPACKED = "fusedonemoe prepacked"

# ||y - y64|| / ||y64|| that a right answer may have. Right answers are off by about 3e-7 and 5e-3 (transformers rounds
# the routing weights to bfloat16 as well); zeros are off by 1, and one wrong token of 512 by 4e-2.
BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# A formulation whose work or memory is beyond these is no contender, and would hold up all others.
MOST_TIMES_THE_WORK = 40
MOST_FLOPS = 3e11
MOST_GATHERED_BYTES = 2e9
MOST_ZEROED_BYTES = 4e9


class UnavailableError(Exception):
    """The peer cannot run here for a reason that is nobody's mistake, such as a package that is not installed."""


@dataclass(frozen=True)
class Peer:
    """One contender.

    Attributes:
        name: as printed.
        build: from a cell and its inputs to the timed call, which takes the index of an input.
        modes: of the cells that it can run.
        copies: how many copies of the weights it keeps while it lives.
        metered: whether its memory is torch's or ours, so that its peak can be told.
    """

    name: str
    build: Callable[[Cell, Inputs], Call]
    modes: tuple[str, ...] = ("forward",)
    copies: int = 0
    metered: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether this library computes it."""
        return is_ours(self.name)


def is_ours(name: str) -> bool:
    """Whether a peer of this name is this library."""
    return name.startswith(OURS)


class Contender(Protocol):
    """What has a name."""

    @property
    def name(self) -> str:
        """As printed."""


P = TypeVar("P", bound=Contender)


def chosen(peers: Iterable[P], pattern: re.Pattern[str] | None) -> list[P]:
    """The peers whose name matches; ours, which everyone is compared with, in any case."""
    return [peer for peer in peers if pattern is None or peer.name == OURS or pattern.search(peer.name)]


def relative_error(y: Tensor, exact: Tensor) -> float:
    """``||y - exact|| / ||exact||`` in float64; infinity for another shape."""
    if y.shape != exact.shape:
        return float("inf")
    return float((y.double() - exact).norm() / exact.norm())


def block_inputs(inputs: Inputs) -> BlockInputs:
    """The inputs of a cell whose operator is the block."""
    assert isinstance(inputs, BlockInputs)
    return inputs


def _merged_inputs(inputs: Inputs) -> MergedInputs:
    assert isinstance(inputs, MergedInputs)
    return inputs


def _our_block(cell: Cell, inputs: Inputs, impl: str = "auto", prepack: bool = False) -> Call:
    given = block_inputs(inputs)
    weights = stacked_weights(cell, given)
    sizes: dict[str, Any] = {"hidden_size": cell.D, "intermediate_size": cell.F, "num_experts": cell.E, "top_k": cell.K}
    with torch.device("meta"):
        moe: Any = MoE(**sizes, dtype=cell.dtype, impl=impl)
    moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj = weights
    if prepack:
        for parameter in moe.experts.parameters():  # the inputs, which other peers read, are not packed
            parameter.data = parameter.data.clone()
        moe.prepack()
    return call_of(cell, given, weights, moe)


def qwen3_moe_config(D: int, inner: int, E: int, K: int, implementation: str = "grouped_mm") -> Any:
    """Transformers' configuration of a block of Qwen3-MoE.

    Args:
        D: hidden size.
        inner: F.
        E: experts.
        K: experts per token.
        implementation: of the experts.
    """
    from transformers import Qwen3MoeConfig

    settings: dict[str, Any] = {
        "hidden_size": D,
        "moe_intermediate_size": inner,
        "num_experts": E,
        "num_experts_per_tok": K,
        "norm_topk_prob": True,
        "experts_implementation": implementation,
    }
    return Qwen3MoeConfig(**settings)


def _transformers_block(cell: Cell, inputs: Inputs, implementation: str = "grouped_mm") -> Call:
    if find_spec("transformers") is None:
        raise UnavailableError("transformers is not installed: pip install 'fusedonemoe[bench]'")
    if reason := _transformers_refusal(cell, implementation):
        raise UnavailableError(reason)
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    given = block_inputs(inputs)
    weights = stacked_weights(cell, given)
    with torch.device("meta"):
        block: Any = Qwen3MoeSparseMoeBlock(qwen3_moe_config(cell.D, cell.F, cell.E, cell.K, implementation))
    block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj = weights
    block.eval()
    return call_of(cell, given, weights, lambda x: block(x[None])[0])


def _transformers_refusal(cell: Cell, implementation: str) -> str:
    training = cell.mode == "training"
    if implementation == "grouped_mm" and any(n * cell.dtype.itemsize % 16 for n in (cell.D, cell.F)):
        return "torch's grouped_mm takes rows of whole 16 bytes only"
    if implementation == "batched_mm":
        # A set of weights for each routed row; with gradients, the gathered gradients beside it.
        size = cell.T * cell.K * 3 * cell.D * cell.F * cell.dtype.itemsize * (2 if training else 1)
        if size > MOST_GATHERED_BYTES:
            return f"gathers {size / 1e9:.0f} GB of weights"
    if implementation == "eager" and training:
        # The gradient of `weight[e]` is a zero tensor of the size of all experts, for each expert that was hit.
        size = min(cell.E, cell.T * cell.K) * cell.weight_bytes
        if size > MOST_ZEROED_BYTES:
            return f"writes {size / 1e9:.0f} GB of zeros: its backward fills all experts' gradients once for each expert"
    return ""


def _loop_block(cell: Cell, inputs: Inputs) -> Call:
    """A loop over all experts, each with parameters of its own and looking for its tokens: what most people write first."""
    given = block_inputs(inputs)
    gate_up, down = ([parameter(w, cell) for w in stack.unbind()] for stack in (given.gate_up_proj, given.down_proj))
    weights = Weights(parameter(given.router, cell), gate_up, down)

    def forward(x: Tensor) -> Tensor:
        probabilities = nn.functional.linear(x, weights.router).softmax(-1, dtype=torch.float32)
        scores, experts = probabilities.topk(cell.K)
        scores = (scores / scores.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)
        for e in range(cell.E):
            token, choice = torch.where(experts == e)
            if token.numel():
                gate, up = nn.functional.linear(x[token], gate_up[e]).chunk(2, dim=-1)
                out = nn.functional.linear(nn.functional.silu(gate) * up, down[e])
                y.index_add_(0, token, out * scores[token, choice, None])
        return y

    return call_of(cell, given, weights, forward)


def cheap_route(x: Tensor, router: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The least that torch can do for a router: float32 softmax over the selected logits, and int64 ids, ``[T, K]`` both."""
    logits, experts = nn.functional.linear(x, router).topk(K, dim=-1, sorted=False)
    return logits.softmax(-1, dtype=torch.float32), experts


def _dense_block(cell: Cell, inputs: Inputs) -> Call:
    """The original's formulation: every expert computes every token, and the routing weights mask the sum."""
    times = cell.E / cell.K
    flops = 6 * cell.T * cell.E * cell.D * cell.F * (3 if cell.mode == "training" else 1)
    if times > MOST_TIMES_THE_WORK:
        raise UnavailableError(f"computes {times:.0f} times the work")
    if flops > MOST_FLOPS:
        raise UnavailableError(f"computes {times:.0f} times the work, {flops / 1e9:.0f} GFLOP")
    given = block_inputs(inputs)
    router, gate_up, down = weights = stacked_weights(cell, given)
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)

    def forward(x: Tensor) -> Tensor:
        scores, experts = cheap_route(x, router, cell.K)
        scores_TE = scores.new_zeros(x.shape[0], cell.E, dtype=x.dtype).scatter(1, experts, scores.to(x.dtype))
        # Not torch.einsum: it copies the weights of all experts where T is 1, and is forty times as slow there.
        gate, up = torch.matmul(x, gate_up.transpose(1, 2)).chunk(2, dim=-1)
        hidden = nn.functional.silu(gate) * up * scores_TE.t()[:, :, None]
        return torch.matmul(hidden, down.transpose(1, 2)).sum(0)

    return call_of(cell, given, weights, forward)


def _our_merged(cell: Cell, inputs: Inputs, impl: str = "auto") -> Call:
    given = _merged_inputs(inputs)
    return lambda i: F.experts_merged(given.xs[i], given.experts[i], given.weights[i], given.proj, impl=impl)


def _einsum_merged(cell: Cell, inputs: Inputs) -> Call:
    """The original's formulation: a sparse matrix of weights, and one einsum over all experts."""
    given = _merged_inputs(inputs)

    def call(i: int) -> Tensor:
        x = given.xs[i]
        weights = x.new_zeros(cell.T, cell.E).scatter_(1, given.experts[i], given.weights[i].to(x.dtype))
        return torch.einsum("td,te,edf->tf", x, weights, given.proj)

    return call


TRANSFORMERS = "transformers grouped_mm"
PEERS: dict[str, tuple[Peer, ...]] = {
    "block": (
        Peer(OURS, _our_block),
        Peer(GROUPED, partial(_our_block, impl="grouped")),
        Peer(TRANSFORMERS, _transformers_block),
        Peer("per-expert loop", _loop_block),
    ),
    "merged": (
        Peer(OURS, _our_merged),
        Peer(GROUPED, partial(_our_merged, impl="grouped")),
        Peer("original einsum", _einsum_merged),
    ),
}
PLAIN = "torch grouped_mm"
TORCH_ROUTER = "torch softmax, topk"
# Whose time each row's "times faster" is relative to; experts alone and routers alone are cells of the suite for GPUs.
GATHER = "torch gather"
ALL_PAIRS = "torch topk of all sums"
YARDSTICK = {
    "block": TRANSFORMERS,
    "merged": "original einsum",
    "experts": PLAIN,
    "router": TORCH_ROUTER,
    "neurons": GATHER,
    "values": GATHER,
    "keys": ALL_PAIRS,
}
# Likewise of the suite for the tables of the reference systems: what those compare themselves with.
YARDSTICK |= {
    "original": "original einsum",
    "topk": "softmax, sort, gather",
    "mlp": "per-expert loop",
    "moekernel": "NumPy, per expert",
    "product-keys": ALL_PAIRS,
}

_BOTH = ("forward", "training")
# Everyone in torch who computes the whole block.
TORCH_BLOCKS: tuple[Peer, ...] = (
    Peer(OURS, _our_block, _BOTH),
    Peer(PREPACKED, partial(_our_block, prepack=True), copies=1),
    Peer(TRANSFORMERS, _transformers_block, _BOTH),
    Peer("transformers batched_mm", partial(_transformers_block, implementation="batched_mm"), _BOTH),
    Peer("transformers eager", partial(_transformers_block, implementation="eager"), _BOTH),
    Peer("per-expert loop", _loop_block, _BOTH),
    Peer("dense, masked", _dense_block, _BOTH),
)
