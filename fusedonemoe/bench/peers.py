"""The peers in torch: each is the same function of the same weights, written the way its own users run it."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fusedonemoe import MoE
from fusedonemoe import functional as F
from fusedonemoe.bench.workloads import MODES, Cell, Named

OURS = "fusedonemoe"
GROUPED = "fusedonemoe grouped"
PREPACKED = "fusedonemoe prepacked"
TRANSFORMERS = "transformers grouped_mm"
LOOP = "per-expert loop"
EINSUM = "original einsum"
PLAIN = "torch grouped_mm"
TORCH_ROUTER = "torch softmax, topk"
GATHER = "torch gather"
ALL_PAIRS = "torch topk of all sums"
# By operator, the peer whose time "times faster" divides.
YARDSTICK = {"block": TRANSFORMERS, "merged": EINSUM, "experts": PLAIN, "quantized": f"{OURS} bfloat16", "router": TORCH_ROUTER}
YARDSTICK |= {"neurons": GATHER, "values": GATHER, "keys": ALL_PAIRS}
# Of the tables of other projects: what they compare themselves with.
YARDSTICK |= {"original": EINSUM, "topk": "softmax, sort, gather", "mlp": LOOP}
YARDSTICK |= {"moekernel": "NumPy, per expert", "product-keys": ALL_PAIRS}

# ||y - y64|| / ||y64|| that a right answer may have. Right answers are off by about 3e-7 and 5e-3 (transformers rounds the
# routing weights to bfloat16 as well); zeros are off by 1, and one wrong token of 512 by 4e-2.
BUDGET = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# A formulation whose work or memory is beyond these is no contender, and would hold up all others.
MOST_TIMES_THE_WORK = 40
MOST_FLOPS = 3e11
# Of gathered weights, and of zeros written: on a CPU and on a GPU.
MOST_GATHERED_BYTES = {"cpu": 2e9, "cuda": 16e9}
MOST_ZEROED_BYTES = {"cpu": 4e9, "cuda": 2e11}
# swiglu_oai as GPT-OSS has it.
ALPHA, LIMIT = 1.702, 7.0

Weights = dict[str, Tensor]
# From the tensors of a draw to the output; a router's to weights and ids.
Forward = Callable[..., Tensor | tuple[Tensor, Tensor]]


class UnavailableError(Exception):
    """The peer cannot run here, for example because a package is not installed; that is no failure."""


class WithWeights(NamedTuple):
    """A forward whose parameters are not the shared ones, or have another form."""

    forward: Forward  # of the peer
    weights: dict[str, Tensor | list[Tensor]]  # by the names of the shared ones; a list has one parameter for each expert
    nbytes: int = 0  # of all experts' weights in the peer's form; 0 where the peers of a cell do not differ in it
    reads: Callable[[], Weights] | None = None  # returns the rounded weights that it computes with; None for the shared ones


@dataclass(frozen=True)
class Peer:
    """One contender."""

    name: str  # as printed
    # From a cell and its weights, parameters that all peers share, to the forward that is timed. It may keep copies made once.
    build: Callable[[Cell, Weights], Forward | WithWeights]
    modes: tuple[str, ...] = ("forward",)  # of the cells that it can run
    copies: int = 0  # the number of copies of the weights that it keeps
    metered: bool = True  # whether its memory is allocated by torch or by this library, so that its peak can be measured


def is_ours(name: str) -> bool:
    """Tell whether a peer of this name is this library."""
    return name.startswith(OURS)


P = TypeVar("P", bound=Named)


def chosen(peers: Iterable[P], pattern: re.Pattern[str] | None) -> list[P]:
    """Return the peers whose name matches, and ours, with which all are compared."""
    return [peer for peer in peers if pattern is None or peer.name == OURS or pattern.search(peer.name)]


def relative_error(y: Tensor, exact: Tensor) -> float:
    """Return ``||y - exact|| / ||exact||`` in float64; infinity for another shape."""
    if y.shape != exact.shape:
        return float("inf")
    return float((y.double() - exact).norm() / exact.norm())


def interpreted() -> bool:
    """Tell whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def our_impl(device: torch.device) -> str:
    """Return the implementation that is measured as ours: Triton's kernels wherever they run."""
    return "triton" if device.type == "cuda" or interpreted() else "auto"


def device_of(weights: Weights) -> torch.device:
    """Return the device of all weights."""
    return next(iter(weights.values())).device


def _our_block(cell: Cell, weights: Weights, impl: str = "auto", prepack: bool = False) -> Forward:
    sizes: dict[str, Any] = {"hidden_size": cell.D, "intermediate_size": cell.F, "num_experts": cell.E, "top_k": cell.K}
    with torch.device("meta"):
        moe: Any = MoE(**sizes, dtype=cell.dtype, impl=impl)
    moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj = weights.values()
    if prepack:
        for parameter in moe.experts.parameters():  # the shared weights, which other peers read, are not packed
            parameter.data = parameter.data.clone()
        moe.prepack()
    return moe


def _our_router(cell: Cell, weights: Weights) -> Forward:
    return partial(F.route, top_k=cell.K, score_first=cell.score_first, norm_topk_prob=cell.norm_topk_prob)


def _our_experts(cell: Cell, weights: Weights, impl: str | None = None) -> Forward:
    options: dict[str, Any] = {name: getattr(cell, name) for name in ("activation", "gated", "transposed", "save_percent")}
    options |= {"gate_up_layout": cell.layout, "impl": impl or our_impl(device_of(weights)), **weights}
    return routed(_our_router(cell, weights), partial(F.experts_mlp, **options))


def _our_merged(cell: Cell, weights: Weights, impl: str | None = None) -> Forward:
    impl = impl or our_impl(device_of(weights))
    return lambda x, experts, scores: F.experts_merged(x, experts, scores, weights["proj"], impl=impl)


def route(cell: Cell, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Route as models write it in torch: weights in the dtype of the logits and int64 ids ``[T, K]``, best first."""
    if not cell.score_first:
        picked, experts = logits.topk(cell.K, dim=-1)
        return picked.softmax(-1), experts
    scores, experts = logits.softmax(-1).topk(cell.K, dim=-1)
    return (scores / scores.sum(-1, keepdim=True) if cell.norm_topk_prob else scores), experts


def routed(router: Callable[..., Any], experts: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Forward:
    """Put a router in front of experts, which take rows, ids and weights."""

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, ids = router(logits)
        return experts(x, ids, scores)

    return forward


def cheap_route(x: Tensor, router: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Route at the least cost in torch: float32 softmax over the selected logits, and int64 ids, ``[T, K]`` both."""
    logits, experts = nn.functional.linear(x, router).topk(K, dim=-1, sorted=False)
    return logits.softmax(-1, dtype=torch.float32), experts


def activated(z: Tensor, cell: Cell) -> Tensor:
    """Return the input of an expert's down-projection, in torch."""
    if not cell.gated:
        return nn.functional.gelu(z) if cell.activation == "gelu" else nn.functional.silu(z)
    gate, up = (z[..., ::2], z[..., 1::2]) if cell.layout == "interleaved" else z.chunk(2, dim=-1)
    if cell.activation == "swiglu_oai":
        gate = gate.clamp(max=LIMIT)
        return (up.clamp(-LIMIT, LIMIT) + 1) * (gate * torch.sigmoid(ALPHA * gate))
    return nn.functional.silu(gate) * up


def columns_last(cell: Cell, weights: Weights) -> tuple[Tensor, Tensor]:
    """Return views of the weights as ``[E, D, G]`` and ``[E, F, D]``, by which rows are multiplied from the right."""
    up, down = weights["gate_up_proj"], weights["down_proj"]
    return (up, down) if cell.transposed else (up.transpose(1, 2), down.transpose(1, 2))


def _check_rows(cell: Cell) -> None:
    if any(n * cell.dtype.itemsize % 16 for n in (cell.D, cell.F)):
        raise UnavailableError("torch's grouped_mm takes rows of whole 16 bytes only")


def sorted_experts(
    cell: Cell,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    product_of: Callable[[Tensor, Tensor], Callable[[Tensor, Tensor, Tensor | None], Tensor]],
) -> Forward:
    """Sort, gather, two grouped products with up ``[E, D, G]`` and down ``[E, F, D]``, weigh, put back, sum.

    ``product_of`` makes the product of rows and matrices, with a bias, from the sorted ids and each expert's number of rows.
    """
    (up, down), (up_bias, down_bias) = matrices, biases

    def compute(x: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        ids, order = experts.flatten().sort(stable=True)
        counts = torch.zeros(cell.E, dtype=torch.int32, device=x.device)
        product = product_of(ids, counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32)))
        out = product(activated(product(x[order // cell.K], up, up_bias), cell), down, down_bias)
        out = out * scores.flatten()[order, None].to(x.dtype)
        return torch.empty_like(out).index_copy(0, order, out).view(cell.T, cell.K, cell.D).sum(1)

    return routed(partial(route, cell), compute)


def _plain_experts(cell: Cell, weights: Weights) -> Forward:
    """Return the usual experts in torch without kernels of their own."""
    _check_rows(cell)

    def product_of(ids: Tensor, counts: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        offsets = counts.cumsum(0, dtype=torch.int32)

        def product(rows: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
            out = nn.functional.grouped_mm(rows, matrices, offs=offsets)
            return out if bias is None else out + bias[ids]

        return product

    biases = (weights.get("gate_up_bias"), weights.get("down_bias"))
    return sorted_experts(cell, columns_last(cell, weights), biases, product_of)


def qwen3_moe_config(D: int, inner: int, E: int, K: int, implementation: str = "grouped_mm") -> Any:
    """Return transformers' configuration of a block of Qwen3-MoE."""
    from transformers import Qwen3MoeConfig

    settings: dict[str, Any] = {"hidden_size": D, "moe_intermediate_size": inner, "num_experts": E, "num_experts_per_tok": K}
    settings |= {"norm_topk_prob": True, "experts_implementation": implementation}
    return Qwen3MoeConfig(**settings)


def _check_transformers(cell: Cell, device: torch.device, implementation: str) -> None:
    if find_spec("transformers") is None:
        raise UnavailableError("transformers is not installed: pip install 'fusedonemoe[bench]'")
    training = cell.mode == "training"
    if implementation == "grouped_mm":
        _check_rows(cell)
    elif implementation == "batched_mm":
        # A set of weights for each routed row; with gradients, as many gathered gradients.
        size = cell.T * cell.K * (cell.of_experts // cell.E) * cell.dtype.itemsize * (2 if training else 1)
        if size > MOST_GATHERED_BYTES[device.type]:
            raise UnavailableError(f"gathers {size / 1e9:.0f} GB of weights")
    elif training:
        # The gradient of `weight[e]` is a zero tensor of the size of all experts, for each expert that was hit.
        size = min(cell.E, cell.T * cell.K) * cell.weight_bytes
        if size > MOST_ZEROED_BYTES[device.type]:
            told = f"writes {size / 1e9:.0f} GB of zeros: its backward fills all experts' gradients once for each expert"
            raise UnavailableError(told)


def _transformers_block(cell: Cell, weights: Weights, implementation: str = "grouped_mm") -> Forward:
    _check_transformers(cell, device_of(weights), implementation)
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    with torch.device("meta"):
        block: Any = Qwen3MoeSparseMoeBlock(qwen3_moe_config(cell.D, cell.F, cell.E, cell.K, implementation))
    block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj = weights.values()
    block.eval()
    return lambda x: block(x[None])[0]


def _transformers_experts(cell: Cell, weights: Weights, implementation: str) -> Forward:
    """Return the experts of a model with the cell's options."""
    _check_transformers(cell, device_of(weights), implementation)
    with torch.device("meta"):
        experts: Any
        if cell.is_plain:
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

            experts = Qwen3MoeExperts(qwen3_moe_config(cell.D, cell.F, cell.E, cell.K, implementation))
        elif (cell.activation, cell.bias, cell.layout, cell.transposed) == ("swiglu_oai", True, "interleaved", True):
            from transformers import GptOssConfig
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

            sizes: dict[str, Any] = {"hidden_size": cell.D, "intermediate_size": cell.F, "num_local_experts": cell.E}
            sizes |= {"num_experts_per_tok": cell.K, "experts_implementation": implementation}
            experts = GptOssExperts(GptOssConfig(**sizes))
        else:
            raise UnavailableError("no model in transformers has experts with these options")
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    for name, parameter in zip(names, weights.values(), strict=False):
        setattr(experts, name, parameter)
    return routed(partial(route, cell), lambda x, ids, scores: experts(x, ids, scores.to(x.dtype)))


def _loop_block(cell: Cell, weights: Weights) -> WithWeights:
    """Loop over all experts, each with parameters of its own and looking for its tokens, as most people write it first."""
    router = weights["router"]
    # Over the same memory, so that no peer has a copy in fresher or hotter pages.
    stacks = {
        name: [w.detach().requires_grad_(cell.has_gradients) for w in weights[name].unbind()]
        for name in ("gate_up_proj", "down_proj")
    }
    gate_up, down = stacks.values()

    def forward(x: Tensor) -> Tensor:
        probabilities = nn.functional.linear(x, router).softmax(-1, dtype=torch.float32)
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

    return WithWeights(forward, {"router": router, **stacks})


def masked_block(cell: Cell, weights: Weights) -> Forward:
    """Compute every token by every expert, and mask the sum by the routing weights: the original's formulation."""
    router, gate_up, down = weights.values()

    def forward(x: Tensor) -> Tensor:
        scores, experts = cheap_route(x, router, cell.K)
        scores_TE = scores.new_zeros(x.shape[0], cell.E, dtype=x.dtype).scatter(1, experts, scores.to(x.dtype))
        # Not torch.einsum: it copies the weights of all experts where T is 1, and is forty times as slow there.
        gate, up = torch.matmul(x, gate_up.transpose(1, 2)).chunk(2, dim=-1)
        hidden = nn.functional.silu(gate) * up * scores_TE.t()[:, :, None]
        return torch.matmul(hidden, down.transpose(1, 2)).sum(0)

    return forward


def _dense_block(cell: Cell, weights: Weights) -> Forward:
    times = cell.E / cell.K
    flops = 6 * cell.T * cell.E * cell.D * cell.F * (3 if cell.mode == "training" else 1)
    if times > MOST_TIMES_THE_WORK:
        raise UnavailableError(f"computes {times:.0f} times the work")
    if flops > MOST_FLOPS:
        raise UnavailableError(f"computes {times:.0f} times the work, {flops / 1e9:.0f} GFLOP")
    return masked_block(cell, weights)


def _einsum_merged(cell: Cell, weights: Weights) -> Forward:
    """Multiply a sparse matrix of weights and all experts in one einsum: the original's formulation."""

    def forward(x: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        dense = x.new_zeros(cell.T, cell.E).scatter(1, experts, scores.to(x.dtype))
        return torch.einsum("td,te,edf->tf", x, dense, weights["proj"])

    return forward


_BOTH = ("forward", "training")
# Without a mode that a CUDA graph cannot hold: the peer asks the device for a number.
NO_GRAPH = tuple(mode for mode in MODES if mode != "decode")
# The line-up of `quick` and of `gpu`, by operator.
PEERS: dict[str, tuple[Peer, ...]] = {
    "block": (
        Peer(OURS, _our_block),
        Peer(GROUPED, partial(_our_block, impl="grouped")),
        Peer(TRANSFORMERS, _transformers_block),
        Peer(LOOP, _loop_block),
    ),
    "merged": (
        Peer(OURS, _our_merged, MODES),
        Peer(GROUPED, partial(_our_merged, impl="grouped"), MODES),
        Peer(EINSUM, _einsum_merged, MODES),
    ),
    "experts": (
        Peer(OURS, _our_experts, MODES),
        Peer(GROUPED, partial(_our_experts, impl="grouped"), MODES),
        Peer(PLAIN, _plain_experts, MODES),
        Peer(TRANSFORMERS, partial(_transformers_experts, implementation="grouped_mm"), MODES),
        Peer("transformers batched_mm", partial(_transformers_experts, implementation="batched_mm"), MODES),
        Peer("transformers eager", partial(_transformers_experts, implementation="eager"), NO_GRAPH),
    ),
    "router": (Peer(OURS, _our_router, MODES), Peer(TORCH_ROUTER, lambda cell, weights: partial(route, cell), MODES)),
}
# The line-up of `cpu` in torch.
TORCH_BLOCKS: tuple[Peer, ...] = (
    Peer(OURS, _our_block, _BOTH),
    Peer(PREPACKED, partial(_our_block, prepack=True), copies=1),
    Peer(TRANSFORMERS, _transformers_block, _BOTH),
    Peer("transformers batched_mm", partial(_transformers_block, implementation="batched_mm"), _BOTH),
    Peer("transformers eager", partial(_transformers_block, implementation="eager"), _BOTH),
    Peer(LOOP, _loop_block, _BOTH),
    Peer("dense, masked", _dense_block, _BOTH),
)
