"""Weights of 4 bits in groups of inputs with a scale each: ``W = scale * (values - zero_point)``."""

from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.cpu.native import new_on
from fusedonemoe.ops.formats.format import Format, Part, Shape, Tensors
from fusedonemoe.ops.formats.quantized_weight import PARTS, QuantizedWeight
from fusedonemoe.ops.operands import Reader, check_dim

GROUP_SIZES = (32, 64, 128)
MIDDLE = 8  # of the 16 values of four bits: the zero point where none is stored


class Int4(Format):
    """Two values in each uint8 of ``[E, O, I / 2]``, scales float32 and zero points uint8 ``[E, O, I / group_size]``."""

    name = "int4"
    parts: tuple[Part, ...] = PARTS

    def shape(self, tensors: Tensors) -> Shape | None:
        """Return ``(E, O, I)`` of uint8 values: each has those of two inputs."""
        values = tensors[0]
        E, O, half = values.shape  # noqa: E741
        return (E, O, 2 * half) if values.dtype == torch.uint8 else None

    def kind(self, tensors: Tensors) -> tuple[str | int, ...]:
        """Return the name and the size of the groups."""
        values, scale, _ = tensors
        check_dim("scale", scale, 3)
        return self.name, QuantizedWeight(values, scale).group_size

    def read(self, reader: Reader, name: str, tensors: Tensors, shape: Shape, *, views: bool) -> Tensors:
        """Check dtypes, shapes, devices and the size of the groups."""
        values, scale, zero = tensors
        check_dim(f"{name}_scale", scale, 3)
        E, O, I = shape  # noqa: E741
        group = QuantizedWeight(values, scale).group_size
        if group not in GROUP_SIZES or I % group:
            raise ValueError(f"{name}_scale must have a scale for {GROUP_SIZES} inputs, got shape {tuple(scale.shape)}")
        groups = (E, O, I // group)
        return QuantizedWeight(
            reader.read(name, values, (E, O, I // 2), (torch.uint8,), views=views),
            reader.read(f"{name}_scale", scale, groups, (torch.float32,)),
            reader.read_optional(f"{name}_zero", zero, groups, (torch.uint8,)),
        )

    def make(self, weight_EOI: Tensor, **options: Any) -> QuantizedWeight:
        """Round to the nearest of 16 values a group of ``group_size`` inputs.

        ``symmetric``: the largest of a group becomes -8, and the scale takes its sign. Otherwise the values reach to both ends.
        """
        groups = weight_EOI.to(torch.float32).unflatten(-1, (-1, options["group_size"]))
        tiny, zero = torch.finfo(torch.float32).tiny, None
        if options["symmetric"]:
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

    def empty(self, shape: Shape, device: torch.device, **options: Any) -> QuantizedWeight:
        """Return uninitialised values and scales, and zero points where the weights are not ``symmetric``."""
        E, O, I = shape  # noqa: E741
        groups = (E, O, I // options["group_size"])
        zero_point = None if options["symmetric"] else new_on(device, groups, torch.uint8)
        return QuantizedWeight(new_on(device, (E, O, I // 2), torch.uint8), new_on(device, groups, torch.float32), zero_point)

    def widen(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Return the weights, computed in float32 or float64 and rounded once to ``dtype``."""
        values, scale, zero_point = tensors
        wide = torch.promote_types(dtype, torch.float32)
        nibbles = torch.stack((values & 15, values >> 4), -1).flatten(-2)
        groups = nibbles.to(wide).unflatten(-1, (scale.shape[-1], -1))
        zero = MIDDLE if zero_point is None else zero_point.to(wide)[..., None]
        return ((groups - zero) * scale.to(wide)[..., None]).flatten(-2).to(dtype)


INT4 = Int4()
