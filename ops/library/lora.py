"""The MLP with low-rank adapters: ``experts_mlp_lora``, its backward, the composite.

Adapters are plain tensors, ``A [E, r, in]`` and ``B [E, out, r]``; one that is absent has ``r = 0``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import dense
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.library.mlp import gradients_of, kernels_of
from fusedonemoe.ops.library.registration import (
    BUILD,
    composite,
    define_autocast,
    keeping,
    operator,
)
from fusedonemoe.ops.operands import check_rows
from fusedonemoe.ops.records import LORA_ARGUMENTS, SavedRows


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
    arguments = (
        *(x, experts, weights, up_proj, down_proj, up_bias, down_bias, up_A, up_B, down_A, down_B, up_scale, down_scale),
        *(activation, layout, alpha, limit),
    )
    return kernels_of(impl).experts_mlp(LORA_ARGUMENTS.call(arguments), save_percent)


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
    arguments = (
        *(x, experts, weights, up_proj, down_proj, up_bias, down_bias, up_A, up_B, down_A, down_B, up_scale, down_scale),
        *(activation, layout, alpha, limit),
    )
    return gradients_of(LORA_ARGUMENTS, impl, dy, SavedRows(z, order, offsets), arguments, save_percent, needs)


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
    arguments = (
        *(x, experts, weights, up_proj, down_proj, up_bias, down_bias, up_A, up_B, down_A, down_B, up_scale, down_scale),
        *(activation, layout, alpha, limit),
    )
    return dense.experts_mlp_dense(LORA_ARGUMENTS.call(arguments))


_TENSORS = 11  # x, experts, weights, two projections, two biases, two factors of each adapter
_experts_mlp_lora_save = keeping(_TENSORS)


def _experts_mlp_lora_grad(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    if dy is None:
        return (None,) * count
    # A factor of rank 0 has a gradient without elements, which needs no computing.
    saved = ctx.saved_tensors  # once: checkpointing refuses to give them twice
    factors = (need and like.numel() > 0 for need, like in zip(ctx.needs_input_grad[7:11], saved[10:], strict=True))
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:7], *factors)
    grads = torch.ops.fusedonemoe.experts_mlp_lora_backward(dy, *saved, *ctx.constants, needs, BUILD, ctx.impl)
    dx, *rest = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *rest, *(None for _ in range(count - _TENSORS))


operator("experts_mlp_lora_backward", _experts_mlp_lora_backward).register_autograd(no_second_derivative)
operator("experts_mlp_lora", _experts_mlp_lora).register_autograd(_experts_mlp_lora_grad, setup_context=_experts_mlp_lora_save)
composite("experts_mlp_lora_dense", _experts_mlp_lora_dense)
define_autocast("experts_mlp_lora_backward", casts=())
for _name in ("experts_mlp_lora", "experts_mlp_lora_dense"):
    define_autocast(_name, casts=(0, 3, 4, 5, 6, 7, 8, 9, 10))
