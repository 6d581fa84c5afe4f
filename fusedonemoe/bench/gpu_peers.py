"""Who is measured on GPUs: every peer is the same function of the same inputs and weights, as its own users run it."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.bench.gpu_cells import MODES, GpuCell
from fusedonemoe.bench.peers import GROUPED, OURS, PLAIN, TORCH_ROUTER, TRANSFORMERS, UnavailableError, is_ours
from fusedonemoe.ops.choice import IMPLEMENTATIONS

# From the tensors of a draw to the output; a router's to weights and ids.
Forward = Callable[..., Tensor | tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]

# Without what cannot stand in a CUDA graph: a peer that asks the device for a number.
NO_GRAPH = tuple(mode for mode in MODES if mode != "decode")
# A batch of gathered weights beyond this is no contender, and would push the others out of memory.
MOST_GATHERED_BYTES = 16e9
MOST_ZEROED_BYTES = 2e11


@dataclass(frozen=True)
class GpuPeer:
    """One contender.

    Attributes:
        name: as printed.
        build: from a cell and its weights to the forward that is timed. It may keep copies that its users would make once.
        modes: of the cells that it can run.
    """

    name: str
    build: Callable[[GpuCell, Weights], Forward]
    modes: tuple[str, ...] = MODES

    @property
    def is_ours(self) -> bool:
        """Whether this library computes it."""
        return is_ours(self.name)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def our_impl(device: torch.device) -> str:
    """The implementation that is measured as ours: Triton's kernels wherever they run."""
    if "triton" in IMPLEMENTATIONS and (device.type == "cuda" or interpreted()):
        return "triton"
    if device.type == "cuda":
        raise UnavailableError("this version has no Triton kernels")
    return "grouped"


def _device_of(weights: Weights) -> torch.device:
    return next(iter(weights.values())).device


def _our_experts(cell: GpuCell, weights: Weights, impl: str | None = None) -> Forward:
    impl = impl or our_impl(_device_of(weights))

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = _our_router(cell, weights)(logits)
        return F.experts_mlp(
            x,
            experts,
            scores,
            weights["gate_up_proj"],
            weights["down_proj"],
            gate_up_bias=weights.get("gate_up_bias"),
            down_bias=weights.get("down_bias"),
            activation=cell.activation,
            gated=cell.gated,
            gate_up_layout=cell.layout,
            transposed=cell.transposed,
            save_percent=cell.save_percent,
            impl=impl,
        )

    return forward


def _our_router(cell: GpuCell, weights: Weights) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return partial(F.route, top_k=cell.K, score_first=cell.score_first, norm_topk_prob=cell.norm_topk_prob)


def _our_merged(cell: GpuCell, weights: Weights, impl: str | None = None) -> Forward:
    impl = impl or our_impl(_device_of(weights))
    return lambda x, experts, scores: F.experts_merged(x, experts, scores, weights["proj"], impl=impl)


def torch_router(cell: GpuCell, weights: Weights) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Routing as models write it in torch: float32 weights and int64 ids."""

    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        if not cell.score_first:
            picked, experts = logits.topk(cell.K, dim=-1)
            return picked.softmax(-1, dtype=torch.float32), experts
        scores, experts = logits.softmax(-1, dtype=torch.float32).topk(cell.K, dim=-1)
        return (scores / scores.sum(-1, keepdim=True) if cell.norm_topk_prob else scores), experts

    return forward


def activated(z: Tensor, cell: GpuCell) -> Tensor:
    """What an expert hands to its down-projection, in torch."""
    if not cell.gated:
        return nn.functional.gelu(z) if cell.activation == "gelu" else nn.functional.silu(z)
    gate, up = (z[..., ::2], z[..., 1::2]) if cell.layout == "interleaved" else z.chunk(2, dim=-1)
    if cell.activation == "swiglu_oai":
        gate = gate.clamp(max=7.0)
        return (up.clamp(-7.0, 7.0) + 1) * (gate * torch.sigmoid(1.702 * gate))
    return nn.functional.silu(gate) * up


def columns_last(cell: GpuCell, weights: Weights) -> tuple[Tensor, Tensor]:
    """Views of the weights as ``[E, D, G]`` and ``[E, F, D]``: what a row is multiplied by from its right."""
    up, down = weights["gate_up_proj"], weights["down_proj"]
    return (up, down) if cell.transposed else (up.transpose(1, 2), down.transpose(1, 2))


def _plain_experts(cell: GpuCell, weights: Weights) -> Forward:
    """Sort, gather, two grouped products, weigh, put back, sum: what there is without kernels of one's own."""
    if any(n * cell.dtype.itemsize % 16 for n in (cell.D, cell.F)):
        raise UnavailableError("torch's grouped_mm takes rows of whole 16 bytes only")
    route, (up, down) = torch_router(cell, weights), columns_last(cell, weights)
    up_bias, down_bias = weights.get("gate_up_bias"), weights.get("down_bias")

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(logits)
        ids, order = experts.flatten().sort(stable=True)
        counts = torch.zeros(cell.E, dtype=torch.int32, device=x.device)
        offsets = counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        z = nn.functional.grouped_mm(x[order // cell.K], up, offs=offsets)
        hidden = activated(z if up_bias is None else z + up_bias[ids], cell)
        out = nn.functional.grouped_mm(hidden, down, offs=offsets)
        out = out if down_bias is None else out + down_bias[ids]
        out = out * scores.flatten()[order, None].to(x.dtype)
        return torch.empty_like(out).index_copy(0, order, out).view(cell.T, cell.K, cell.D).sum(1)

    return forward


def _transformers_experts(cell: GpuCell, weights: Weights, implementation: str) -> Forward:
    if find_spec("transformers") is None:
        raise UnavailableError("transformers is not installed: pip install 'fusedonemoe[bench]'")
    if implementation == "grouped_mm" and any(n * cell.dtype.itemsize % 16 for n in (cell.D, cell.F)):
        raise UnavailableError("torch's grouped_mm takes rows of whole 16 bytes only")
    size = cell.T * cell.K * cell.weight_bytes / cell.E * (2 if cell.mode == "training" else 1)
    if implementation == "batched_mm" and size > MOST_GATHERED_BYTES:
        raise UnavailableError(f"gathers {size / 1e9:.0f} GB of weights")
    # The gradient of `weight[e]` is a zero tensor of the size of all experts, for each expert that was hit.
    size = min(cell.E, cell.T * cell.K) * cell.weight_bytes
    if implementation == "eager" and cell.mode == "training" and size > MOST_ZEROED_BYTES:
        raise UnavailableError(f"writes {size / 1e9:.0f} GB of zeros: its backward fills all gradients once for each expert")
    experts: Any = _transformers_module(cell, implementation)
    experts.gate_up_proj, experts.down_proj = (_parameter(weights[name]) for name in ("gate_up_proj", "down_proj"))
    if cell.bias:
        experts.gate_up_proj_bias, experts.down_proj_bias = (_parameter(weights[n]) for n in ("gate_up_bias", "down_bias"))
    route = torch_router(cell, weights)

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, ids = route(logits)
        y: Tensor = experts(x, ids, scores.to(x.dtype))
        return y

    return forward


def _transformers_module(cell: GpuCell, implementation: str) -> nn.Module:
    """The experts of a model whose options are the cell's, without memory of their own."""
    settings: dict[str, Any] = {"hidden_size": cell.D, "num_experts_per_tok": cell.K, "experts_implementation": implementation}
    plain = (cell.activation, cell.gated, cell.bias, cell.layout, cell.transposed)
    with torch.device("meta"):
        if plain == ("silu", True, False, "gate_up", False):
            from transformers import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

            return Qwen3MoeExperts(Qwen3MoeConfig(**settings, moe_intermediate_size=cell.F, num_experts=cell.E))
        if plain == ("swiglu_oai", True, True, "interleaved", True):
            from transformers import GptOssConfig
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

            return GptOssExperts(GptOssConfig(**settings, intermediate_size=cell.F, num_local_experts=cell.E))
    raise UnavailableError("no model in transformers has experts with these options")


def _parameter(weight: Tensor) -> nn.Parameter:
    """The very tensor that gradients are asked for, where it is a parameter already."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def _einsum_merged(cell: GpuCell, weights: Weights) -> Forward:
    """The original's formulation: a sparse matrix of weights, and one einsum over all experts."""
    proj = weights["proj"]

    def forward(x: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        dense = x.new_zeros(cell.T, cell.E).scatter(1, experts, scores.to(x.dtype))
        return torch.einsum("td,te,edf->tf", x, dense, proj)

    return forward


TORCH_LINE_UP: dict[str, tuple[GpuPeer, ...]] = {
    "experts": (
        GpuPeer(OURS, _our_experts),
        GpuPeer(GROUPED, partial(_our_experts, impl="grouped")),
        GpuPeer(PLAIN, _plain_experts),
        GpuPeer(TRANSFORMERS, partial(_transformers_experts, implementation="grouped_mm")),
        GpuPeer("transformers batched_mm", partial(_transformers_experts, implementation="batched_mm")),
        GpuPeer("transformers eager", partial(_transformers_experts, implementation="eager"), NO_GRAPH),
    ),
    "merged": (
        GpuPeer(OURS, _our_merged),
        GpuPeer(GROUPED, partial(_our_merged, impl="grouped")),
        GpuPeer("original einsum", _einsum_merged),
    ),
    "router": (GpuPeer(OURS, _our_router), GpuPeer(TORCH_ROUTER, torch_router)),
}


def chosen(peers: Iterable[GpuPeer], pattern: re.Pattern[str] | None) -> list[GpuPeer]:
    """The peers whose name matches; ours in any case."""
    return [peer for peer in peers if pattern is None or peer.name == OURS or pattern.search(peer.name)]
