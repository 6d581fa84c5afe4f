"""Weights of 8 or 4 bits: how they are stored, made and read, and the expert layer over them by plain tensor arithmetic.

``W = scale * (values - zero_point)``. Of ``[E, O, I]``, O outputs of I inputs, ``int8`` keeps one scale per output and
``int4`` one for every ``group_size`` inputs. What stands here widens whole weights on the way into the formulation of plain
ones, which any device can run and any compiler can look through; the compiled kernels widen them in registers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops import dense, grouped
from fusedonemoe.ops.formats import QuantizedWeight
from fusedonemoe.ops.grouped import MLPNeeds
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.records import QUANTIZED_ARGUMENTS, Activation


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return ``scale * (values - zero_point)``, rounded once to ``dtype``. ``[E, O, I]``."""
    return QUANTIZED_ARGUMENTS.format_of("weight", weight).widen(weight, dtype)


def experts_mlp_dense(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
) -> Tensor:
    """:func:`fusedonemoe.ops.dense.experts_mlp_dense` of the widened weights."""
    dtype = row_dtype(x_TD.dtype)
    wide = (dequantize(up, dtype), dequantize(down, dtype))
    return dense.experts_mlp_dense(x_TD, experts_TK, weights_TK, *wide, up_bias_EG, down_bias_ED, act)


def experts_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    save_percent: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`fusedonemoe.ops.grouped.experts_mlp` of the widened weights.

    All experts are widened: which of them have tokens is known on the device alone, and a loop over those that have would
    ask it.
    """
    dtype = row_dtype(x_TD.dtype)
    wide = (dequantize(up, dtype), dequantize(down, dtype))
    return grouped.experts_mlp(x_TD, experts_TK, weights_TK, *wide, up_bias_EG, down_bias_ED, act, save_percent)


class QuantizedNeeds(NamedTuple):
    """Which gradients of the layer are wanted; its weights have none."""

    x: bool
    weights: bool
    up_bias: bool
    down_bias: bool


def experts_mlp_backward(
    dy_TD: Tensor,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    save_percent: int,
    needs: QuantizedNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up bias and down bias; a zero-size tensor where not needed."""
    # The weights are widened a second time, not kept from the forward: that would cost what quantising saved. Values that
    # depend on the gradient keep torch.compile from seeing that it has them already.
    scales = grouped.in_backward(dy_TD, up.scale, down.scale)
    dtype = row_dtype(x_TD.dtype)
    up_EGD, down_EDF = (dequantize(w._replace(scale=s), dtype) for w, s in zip((up, down), scales, strict=True))
    wants = MLPNeeds(needs.x, needs.weights, False, False, needs.up_bias, needs.down_bias)
    routing = (experts_TK, weights_TK)
    dx, dweights, _, _, dup_bias, ddown_bias = grouped.experts_mlp_backward(
        dy_TD, z, order, offsets, x_TD, *routing, up_EGD, down_EDF, up_bias_EG, down_bias_ED, act, save_percent, wants
    )
    return dx, dweights, dup_bias, ddown_bias
