"""The MLP with low-rank adapters: ``experts_mlp_lora``, its backward, the composite.

Adapters are plain tensors, ``A [E, r, in]`` and ``B [E, out, r]``; one that is absent has ``r = 0``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import lora
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.library.registration import (
    BUILD,
    composite,
    define_autocast,
    gpu_kernels,
    keeping,
    operator,
)
from fusedonemoe.ops.lora import Adapter, LoRANeeds
from fusedonemoe.ops.operands import check_rows, reader_of
from fusedonemoe.ops.records import Activation


def _adapter(A: Tensor, B: Tensor, scale: float) -> Adapter:
    """The factors as the products want them: in PEFT's matrices an expert's B has no two values side by side.

    Those of GPUs read whole rows; those of CPUs copy one expert's at a time. The copy is made here and not in front of the
    operator, which would keep it for the backward.
    """
    return Adapter(A.contiguous(), B.contiguous(), scale) if A.is_cuda else Adapter(A, B, scale)


def _experts_mlp_lora(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_A: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    up_scale: float,
    down_scale: float,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
    save_percent: int,
    build: int,
    impl: str = "grouped",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rows(experts)
    act = Activation(activation, layout, alpha, limit)
    up, down = _adapter(up_A, up_B, up_scale), _adapter(down_A, down_B, down_scale)
    kernels = gpu_kernels("lora") if impl == "triton" else lora
    return kernels.experts_mlp_lora(x, experts, weights, up_proj, down_proj, up_bias, down_bias, up, down, act, save_percent)


def _experts_mlp_lora_backward(
    dy: Tensor,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_A: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    up_scale: float,
    down_scale: float,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
    save_percent: int,
    needs: Sequence[bool],
    build: int,
    impl: str = "grouped",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows(experts)
    act = Activation(activation, layout, alpha, limit)
    up, down = _adapter(up_A, up_B, up_scale), _adapter(down_A, down_B, down_scale)
    kernels = gpu_kernels("lora") if impl == "triton" else lora
    parameters = (up_proj, down_proj, up_bias, down_bias, up, down)
    saved = (dy, *reader_of(x).rows(z, order, offsets, experts, up_proj), x, experts, weights)
    return kernels.experts_mlp_lora_backward(*saved, *parameters, act, save_percent, LoRANeeds(*needs))


def _experts_mlp_lora_dense(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_A: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    up_scale: float,
    down_scale: float,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
    build: int,
) -> Tensor:
    act = Activation(activation, layout, alpha, limit)
    up, down = Adapter(up_A, up_B, up_scale), Adapter(down_A, down_B, down_scale)
    return lora.experts_mlp_lora_dense(x, experts, weights, up_proj, down_proj, up_bias, down_bias, up, down, act)


_TENSORS = 11  # x, experts, weights, two projections, two biases, two factors of each adapter
_experts_mlp_lora_save = keeping(_TENSORS)


def _experts_mlp_lora_grad(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    if dy is None:
        return (None,) * count
    # A factor of rank 0 has a gradient without elements, which needs no computing.
    saved = ctx.saved_tensors  # once: checkpointing refuses to give them twice
    factors = (need and like.numel() > 0 for need, like in zip(ctx.needs_input_grad[7:11], saved[10:], strict=True))
    needs = LoRANeeds(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:7], *factors)
    grads = torch.ops.fusedonemoe.experts_mlp_lora_backward(dy, *saved, *ctx.constants, needs, BUILD, ctx.impl)
    dx, *rest = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *rest, *(None for _ in range(count - _TENSORS))


operator("experts_mlp_lora_backward", _experts_mlp_lora_backward).register_autograd(no_second_derivative)
operator("experts_mlp_lora", _experts_mlp_lora).register_autograd(_experts_mlp_lora_grad, setup_context=_experts_mlp_lora_save)
composite("experts_mlp_lora_dense", _experts_mlp_lora_dense)
define_autocast("experts_mlp_lora_backward", casts=())
for _name in ("experts_mlp_lora", "experts_mlp_lora_dense"):
    define_autocast(_name, casts=(0, 3, 4, 5, 6, 7, 8, 9, 10))
