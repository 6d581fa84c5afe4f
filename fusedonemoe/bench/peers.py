"""Who is measured: every peer is the same function of the same weights, written the way its own users would run it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe import MoE
from fusedonemoe import functional as F
from fusedonemoe.bench.workloads import BlockInputs, Cell, Inputs, MergedInputs

Call = Callable[[int], Tensor]
OURS = "fusedonemoe"
GROUPED = "fusedonemoe grouped"

# ||y - y64|| / ||y64|| that a right answer may have. Right answers are off by about 3e-7 and 5e-3 (transformers rounds
# the routing weights to bfloat16 as well); zeros are off by 1, and one wrong token of 512 by 4e-2.
BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class UnavailableError(Exception):
    """The peer cannot run here for a reason that is nobody's mistake, such as a package that is not installed."""


@dataclass(frozen=True)
class Peer:
    """One contender.

    Attributes:
        name: as printed.
        build: from a cell and its inputs to the timed call, which takes the index of an input.
    """

    name: str
    build: Callable[[Cell, Inputs], Call]


def relative_error(y: Tensor, exact: Tensor) -> float:
    """``||y - exact|| / ||exact||`` in float64; infinity for another shape."""
    if y.shape != exact.shape:
        return float("inf")
    return float((y.double() - exact).norm() / exact.norm())


def agrees(error: float, dtype: torch.dtype) -> bool:
    """Whether an output with this :func:`relative_error` is right in this dtype; NaN is not."""
    return error <= BUDGET[dtype]


def _block_inputs(inputs: Inputs) -> BlockInputs:
    assert isinstance(inputs, BlockInputs)
    return inputs


def _merged_inputs(inputs: Inputs) -> MergedInputs:
    assert isinstance(inputs, MergedInputs)
    return inputs


def _frozen(weight: Tensor) -> nn.Parameter:
    """A parameter over the very same memory, so that no peer has a copy in fresher or hotter pages."""
    return nn.Parameter(weight, requires_grad=False)


def _our_block(cell: Cell, inputs: Inputs, impl: str = "auto") -> Call:
    given = _block_inputs(inputs)
    sizes: dict[str, Any] = {"hidden_size": cell.D, "intermediate_size": cell.F, "num_experts": cell.E, "top_k": cell.K}
    with torch.device("meta"):
        moe = MoE(**sizes, dtype=cell.dtype, impl=impl)
    moe.gate.weight = _frozen(given.router)
    moe.experts.gate_up_proj = _frozen(given.gate_up_proj)
    moe.experts.down_proj = _frozen(given.down_proj)
    return lambda i: moe(given.xs[i])


def _transformers_block(cell: Cell, inputs: Inputs) -> Call:
    if find_spec("transformers") is None:
        raise UnavailableError("transformers is not installed: pip install fusedonemoe[bench]")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    given = _block_inputs(inputs)
    settings: dict[str, Any] = {
        "hidden_size": cell.D,
        "moe_intermediate_size": cell.F,
        "num_experts": cell.E,
        "num_experts_per_tok": cell.K,
        "norm_topk_prob": True,
        "experts_implementation": "grouped_mm",
    }
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**settings))
    block.gate.weight = _frozen(given.router)
    block.experts.gate_up_proj = _frozen(given.gate_up_proj)
    block.experts.down_proj = _frozen(given.down_proj)
    block.eval()
    return lambda i: block(given.xs[i][None])[0]


def _loop_block(cell: Cell, inputs: Inputs) -> Call:
    """A loop over all experts, each looking for its tokens: what most people write first."""
    given = _block_inputs(inputs)
    gate_up, down = given.gate_up_proj.unbind(), given.down_proj.unbind()

    def call(i: int) -> Tensor:
        x = given.xs[i]
        probabilities = nn.functional.linear(x, given.router).softmax(-1, dtype=torch.float32)
        weights, experts = probabilities.topk(cell.K)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)
        for e in range(cell.E):
            token, choice = torch.where(experts == e)
            if token.numel():
                gate, up = nn.functional.linear(x[token], gate_up[e]).chunk(2, dim=-1)
                out = nn.functional.linear(nn.functional.silu(gate) * up, down[e])
                y.index_add_(0, token, out * weights[token, choice, None])
        return y

    return call


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


PEERS: dict[str, tuple[Peer, ...]] = {
    "block": (
        Peer(OURS, _our_block),
        Peer(GROUPED, partial(_our_block, impl="grouped")),
        Peer("transformers grouped_mm", _transformers_block),
        Peer("per-expert loop", _loop_block),
    ),
    "merged": (
        Peer(OURS, _our_merged),
        Peer(GROUPED, partial(_our_merged, impl="grouped")),
        Peer("original einsum", _einsum_merged),
    ),
}
# Whose time each row's "times faster" is relative to.
YARDSTICK = {"block": "transformers grouped_mm", "merged": "original einsum"}
