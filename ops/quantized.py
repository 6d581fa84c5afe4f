"""Weights of 8 or 4 bits: how they are stored, made and read, and the expert layer over them by plain tensor arithmetic.

``W = scale * (values - zero_point)``. Of ``[E, O, I]``, O outputs of I inputs, ``int8`` keeps one scale per output and
``int4`` one for every ``group_size`` inputs. What stands here widens whole weights on the way into the formulation of plain
ones, which any device can run and any compiler can look through; the compiled kernels widen them in registers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops import dense, grouped
from fusedonemoe.ops.grouped import MLPNeeds
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.records import Activation

GROUP_SIZES = (32, 64, 128)
MIDDLE = 8  # of the 16 values of four bits: the zero point where none is stored


class QuantizedWeight(NamedTuple):
    """A stacked weight ``[E, O, I]`` in 8 or 4 bits, as plain tensors.

    Attributes:
        values: int8 ``[E, O, I]``, or two 4-bit values 0 .. 15 in each uint8 of ``[E, O, I / 2]``, the even input's in the
            lower half.
        scale: float32 ``[E, O]`` beside int8, ``[E, O, I / group_size]`` beside int4.
        zero_point: uint8 ``[E, O, I / group_size]`` beside int4, the value that means 0; None for the middle, 8.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(E, O, I)`` of the weight it stands for."""
        E, O, I = self.values.shape  # noqa: E741
        return E, O, I if self.values.dtype == torch.int8 else 2 * I

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def group_size(self) -> int:
        """How many inputs share a scale, which is all I of them for int8."""
        width = self.shape[2]
        return width if self.bits == 8 else width // max(self.scale.shape[2], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zero points."""
        return sum(t.nbytes for t in self if t is not None)


def quantize_int8(weight_EOI: Tensor) -> QuantizedWeight:
    """Round to the nearest of 255 values, the largest of each output being 127 or -127."""
    wide = weight_EOI.to(torch.float32)
    largest = wide.abs().amax(-1) if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return QuantizedWeight((wide / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale)


def quantize_int4(weight_EOI: Tensor, group_size: int, symmetric: bool) -> QuantizedWeight:
    """Round to the nearest of 16 values a group.

    Symmetric: the largest of a group becomes the value of largest size, which is -8, and the scale takes its sign. Otherwise
    the values reach from the smallest to the largest, zero included.
    """
    groups = weight_EOI.to(torch.float32).unflatten(-1, (-1, group_size))
    tiny, zero = torch.finfo(torch.float32).tiny, None
    if symmetric:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scale = largest / -MIDDLE
        scale = torch.where(scale.abs() < tiny, tiny, scale)
        values = (groups / scale).round() + MIDDLE
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=tiny)
        middle = (-low / scale).round().clamp(0, 15)
        values = (groups / scale).round() + middle
        zero = middle.squeeze(-1).to(torch.uint8)
    nibbles = values.clamp(0, 15).to(torch.uint8).flatten(-2)
    return QuantizedWeight(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scale.squeeze(-1), zero)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """``scale * (values - zero_point)``, computed in float32 or float64 and rounded once to ``dtype``. ``[E, O, I]``."""
    wide = torch.promote_types(dtype, torch.float32)
    if weight.bits == 8:
        return (weight.values.to(wide) * weight.scale.to(wide)[..., None]).to(dtype)
    nibbles = torch.stack((weight.values & 15, weight.values >> 4), -1).flatten(-2)
    groups = nibbles.to(wide).unflatten(-1, (weight.scale.shape[-1], -1))
    zero = MIDDLE if weight.zero_point is None else weight.zero_point.to(wide)[..., None]
    return ((groups - zero) * weight.scale.to(wide)[..., None]).flatten(-2).to(dtype)


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
