"""Other people's kernels for GPUs, where they are installed: Liger-Kernel, ScatterMoE, triton_kernels and SonicMoE.

None of them is a dependency. Each gets the routing in torch that models have, and the weights in the layout that its users
keep them in; copies of weights are made once, outside the timing.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe.bench.gpu_cells import GpuCell
from fusedonemoe.bench.gpu_peers import (
    NO_GRAPH,
    TORCH_LINE_UP,
    Forward,
    GpuPeer,
    Weights,
    activated,
    columns_last,
    interpreted,
    torch_router,
)
from fusedonemoe.bench.peers import UnavailableError

# What the versions in a result file are of, beside torch and transformers.
PACKAGES = ("triton", "liger-kernel", "scattermoe", "triton-kernels", "sonic-moe")
LIGER = "liger_kernel.ops.fused_moe"
SONIC_ACTIVATIONS = {"silu": "SWIGLU", "gelu": "GEGLU"}


def _required(module: str, install: str) -> Any:
    """A module of an optional package."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed: {install}")
    try:
        return import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported: {error}") from error


def _needs_gpu(weights: Weights) -> None:
    if not interpreted() and next(iter(weights.values())).device.type != "cuda":
        raise UnavailableError("runs on GPUs only")


def _is_usual(cell: GpuCell) -> bool:
    """Whether the experts are the common ones: SiLU, gate rows before up rows, no bias."""
    return (cell.activation, cell.gated, cell.bias, cell.layout, cell.transposed) == ("silu", True, False, "gate_up", False)


def _liger(cell: GpuCell, weights: Weights) -> Forward:
    module = _required(LIGER, "pip install liger-kernel")
    if not _is_usual(cell):
        raise UnavailableError("takes SwiGLU without biases only, gate rows first")
    _needs_gpu(weights)
    apply: Callable[..., Tensor] = module.LigerFusedMoEFunction.apply
    route = torch_router(cell, weights)

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(logits)
        return apply(x, weights["gate_up_proj"], weights["down_proj"], experts.to(torch.int32), scores)

    return forward


def _scattermoe(cell: GpuCell, weights: Weights) -> Forward:
    module = _required("scattermoe.parallel_experts", "pip install git+https://github.com/shawntan/scattermoe")
    _needs_gpu(weights)
    route, (up, down) = torch_router(cell, weights), columns_last(cell, weights)

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(logits)
        plan = module.flatten_sort_count(experts, num_experts=cell.E)
        z = module.parallel_linear(x, up, cell.K, *plan, expert_biases=weights.get("gate_up_bias"), grouped_out=True)
        y: Tensor = module.parallel_linear(
            activated(z, cell),
            down,
            1,
            *plan,
            expert_biases=weights.get("down_bias"),
            gates=scores.to(x.dtype),
            grouped_in=True,
        )
        return y

    return forward


def _triton_kernels(cell: GpuCell, weights: Weights) -> Forward:
    install = "pip install 'git+https://github.com/triton-lang/triton#subdirectory=python/triton_kernels'"
    matmul = _required("triton_kernels.matmul", install).matmul
    make_metadata = import_module("triton_kernels.tensor").make_ragged_tensor_metadata
    _needs_gpu(weights)
    route, (up, down) = torch_router(cell, weights), columns_last(cell, weights)
    # Its kernels want the weights' rows contiguous in the other direction, and biases in float32.
    up, down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (up, down))
    biases = [b.float() if (b := weights.get(name)) is not None else None for name in ("gate_up_bias", "down_bias")]

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(logits)
        ids, order = experts.flatten().sort(stable=True)
        sizes = torch.zeros(cell.E, dtype=torch.int32, device=x.device)
        sizes = sizes.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        metadata = make_metadata(sizes, ids.numel())
        z = matmul(x[order // cell.K], up, biases[0], a_ragged_metadata=metadata)
        out = matmul(activated(z, cell), down, biases[1], a_ragged_metadata=metadata)
        out = out * scores.flatten()[order, None].to(x.dtype)
        return torch.empty_like(out).index_copy(0, order, out).view(cell.T, cell.K, cell.D).sum(1)

    return forward


def _sonicmoe(cell: GpuCell, weights: Weights) -> Forward:
    module = _required("sonicmoe", "pip install git+https://github.com/Dao-AILab/sonic-moe")
    if not cell.gated or cell.activation not in SONIC_ACTIVATIONS or cell.E % 8 or cell.dtype == torch.float32:
        raise UnavailableError("takes SwiGLU and GeGLU in half precision only, E in multiples of 8")
    _needs_gpu(weights)
    up, down = (w if cell.transposed else w.transpose(1, 2) for w in (weights["gate_up_proj"], weights["down_proj"]))
    activation = getattr(module.enums.ActivationType, SONIC_ACTIVATIONS[cell.activation])
    token = torch.arange(cell.T, dtype=torch.int32, device=up.device).repeat_interleave(cell.K)
    general = import_module("sonicmoe.functional").moe_general_routing_inputs
    route = torch_router(cell, weights)

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(logits)
        y: Tensor = general(
            x,
            scores.flatten().to(x.dtype),
            token,
            experts.flatten().to(torch.int32),
            up.permute(2, 1, 0),
            weights.get("gate_up_bias"),
            down.permute(2, 1, 0),
            weights.get("down_bias"),
            E=cell.E,
            stream_id=None,
            activation_type=activation,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=cell.layout == "gate_up",
        )[0]
        return y

    return forward


LIBRARIES: tuple[GpuPeer, ...] = (
    GpuPeer("Liger-Kernel", _liger, NO_GRAPH),
    GpuPeer("ScatterMoE", _scattermoe, NO_GRAPH),
    GpuPeer("triton_kernels", _triton_kernels, ("forward", "decode")),
    GpuPeer("SonicMoE", _sonicmoe),
)


def line_up(cell: GpuCell) -> list[GpuPeer]:
    """Everyone who computes the cell's operator in its mode, ours first."""
    peers = TORCH_LINE_UP[cell.operator] + (LIBRARIES if cell.operator == "experts" else ())
    return [peer for peer in peers if cell.mode in peer.modes]


def parameters(cell: GpuCell, weights: Weights) -> Weights:
    """The weights as parameters over the same memory, which all peers share."""
    return {name: nn.Parameter(weight, requires_grad=cell.has_gradients) for name, weight in weights.items()}
