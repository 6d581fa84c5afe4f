"""Other libraries' kernels for GPUs, where they are installed: Liger-Kernel, ScatterMoE, triton_kernels and SonicMoE.

None of them is a dependency. Each gets routing in torch, as models write it, and the weights in the layout of its users; copies
of weights are made once, outside the timing.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.bench.peers import (
    NO_GRAPH,
    PEERS,
    Forward,
    Peer,
    UnavailableError,
    Weights,
    activated,
    columns_last,
    interpreted,
    route,
)
from fusedonemoe.bench.workloads import MODES, Cell

# Packages whose versions are in a result file, with torch and transformers.
PACKAGES = ("triton", "liger-kernel", "scattermoe", "triton-kernels", "sonic-moe")
LIGER = "liger_kernel.ops.fused_moe"
SONIC_ACTIVATIONS = {"silu": "SWIGLU", "gelu": "GEGLU"}


def _required(module: str, install: str) -> Any:
    """Import a module of an optional package."""
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


def _liger(cell: Cell, weights: Weights) -> Forward:
    module = _required(LIGER, "pip install liger-kernel")
    if not cell.is_plain:
        raise UnavailableError("takes SwiGLU without biases only, gate rows first")
    _needs_gpu(weights)
    apply: Callable[..., Tensor] = module.LigerFusedMoEFunction.apply

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(cell, logits)
        return apply(x, weights["gate_up_proj"], weights["down_proj"], experts.to(torch.int32), scores)

    return forward


def _scattermoe(cell: Cell, weights: Weights) -> Forward:
    module = _required("scattermoe.parallel_experts", "pip install git+https://github.com/shawntan/scattermoe")
    _needs_gpu(weights)
    up, down = columns_last(cell, weights)

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(cell, logits)
        plan = module.flatten_sort_count(experts, num_experts=cell.E)
        z = module.parallel_linear(x, up, cell.K, *plan, expert_biases=weights.get("gate_up_bias"), grouped_out=True)
        y: Tensor = module.parallel_linear(
            activated(z, cell), down, 1, *plan, expert_biases=weights.get("down_bias"), gates=scores.to(x.dtype), grouped_in=True
        )
        return y

    return forward


def _triton_kernels(cell: Cell, weights: Weights) -> Forward:
    install = "pip install 'git+https://github.com/triton-lang/triton#subdirectory=python/triton_kernels'"
    matmul = _required("triton_kernels.matmul", install).matmul
    make_metadata = import_module("triton_kernels.tensor").make_ragged_tensor_metadata
    _needs_gpu(weights)
    up, down = columns_last(cell, weights)
    # Its kernels want the weights' rows contiguous in the other direction, and biases in float32.
    up, down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (up, down))
    biases = [b.float() if (b := weights.get(name)) is not None else None for name in ("gate_up_bias", "down_bias")]

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(cell, logits)
        ids, order = experts.flatten().sort(stable=True)
        sizes = torch.zeros(cell.E, dtype=torch.int32, device=x.device)
        sizes = sizes.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        metadata = make_metadata(sizes, ids.numel())
        z = matmul(x[order // cell.K], up, biases[0], a_ragged_metadata=metadata)
        out = matmul(activated(z, cell), down, biases[1], a_ragged_metadata=metadata)
        out = out * scores.flatten()[order, None].to(x.dtype)
        return torch.empty_like(out).index_copy(0, order, out).view(cell.T, cell.K, cell.D).sum(1)

    return forward


def _sonicmoe(cell: Cell, weights: Weights) -> Forward:
    module = _required("sonicmoe", "pip install git+https://github.com/Dao-AILab/sonic-moe")
    if not cell.gated or cell.activation not in SONIC_ACTIVATIONS or cell.E % 8 or cell.dtype == torch.float32:
        raise UnavailableError("takes SwiGLU and GeGLU in half precision only, E in multiples of 8")
    _needs_gpu(weights)
    up, down = (w if cell.transposed else w.transpose(1, 2) for w in (weights["gate_up_proj"], weights["down_proj"]))
    activation = getattr(module.enums.ActivationType, SONIC_ACTIVATIONS[cell.activation])
    token = torch.arange(cell.T, dtype=torch.int32, device=up.device).repeat_interleave(cell.K)
    general = import_module("sonicmoe.functional").moe_general_routing_inputs

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        scores, experts = route(cell, logits)
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


LIBRARIES: tuple[Peer, ...] = (
    Peer("Liger-Kernel", _liger, NO_GRAPH),
    Peer("ScatterMoE", _scattermoe, NO_GRAPH),
    Peer("triton_kernels", _triton_kernels, ("forward", "decode")),
    Peer("SonicMoE", _sonicmoe, MODES),
)


def line_up(cell: Cell) -> list[Peer]:
    """Return all peers that compute the cell's operator in its mode, ours first."""
    peers = PEERS[cell.operator] + (LIBRARIES if cell.operator == "experts" else ())
    return [peer for peer in peers if cell.mode in peer.modes]
