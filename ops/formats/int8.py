"""Weights of 8 bits with one scale for every output: ``W = scale * values``."""

from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.cpu.native import new_on
from fusedonemoe.ops.formats.format import Format, Part, Shape, Tensors
from fusedonemoe.ops.formats.quantized_weight import PARTS, QuantizedWeight
from fusedonemoe.ops.operands import Reader, check_dim


class Int8(Format):
    """Values int8 ``[E, O, I]``, scales float32 ``[E, O]``, no zero points."""

    name = "int8"
    parts: tuple[Part, ...] = PARTS

    def shape(self, tensors: Tensors) -> Shape | None:
        """Return ``(E, O, I)``, the shape of int8 values."""
        return tensors[0].shape if tensors[0].dtype == torch.int8 else None

    def read(self, reader: Reader, name: str, tensors: Tensors, shape: Shape, *, views: bool) -> Tensors:
        """Check dtypes, shapes and devices; the result has no zero points."""
        values, scale, _ = tensors
        check_dim(f"{name}_scale", scale, 2)
        values = reader.read(name, values, shape, (torch.int8,), views=views)
        return QuantizedWeight(values, reader.read(f"{name}_scale", scale, shape[:2], (torch.float32,)))

    def make(self, weight_EOI: Tensor, **options: Any) -> QuantizedWeight:
        """Round to the nearest of 255 values, the largest of each output being 127 or -127."""
        wide = weight_EOI.to(torch.float32)
        largest = wide.abs().amax(-1) if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])
        scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return QuantizedWeight((wide / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale)

    def empty(self, shape: Shape, device: torch.device, **options: Any) -> QuantizedWeight:
        """Return uninitialised values and scales."""
        return QuantizedWeight(new_on(device, shape, torch.int8), new_on(device, shape[:2], torch.float32))

    def widen(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Return ``scale * values``, computed in float32 or float64 and rounded once to ``dtype``."""
        values, scale, _ = tensors
        wide = torch.promote_types(dtype, torch.float32)
        return (values.to(wide) * scale.to(wide)[..., None]).to(dtype)


INT8 = Int8()
