"""Plain weights: one float tensor ``[E, O, I]``, the inputs of an output side by side."""

from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.formats.format import Format, Part, Shape, Tensors
from fusedonemoe.ops.operands import Reader


class Plain(Format):
    """Rows of inputs, in the dtype of x."""

    name = "plain"
    parts: tuple[Part, ...] = (Part("{}_proj", casts=True, has_gradient=True),)

    def shape(self, tensors: Tensors) -> Shape | None:
        """Return ``(E, O, I)`` if the inputs of an output are nearer to each other than the outputs of an input."""
        (weight_EOI,) = tensors
        assert weight_EOI is not None
        _, between_outputs, between_inputs = weight_EOI.stride()
        return weight_EOI.shape if between_inputs <= between_outputs else None  # type: ignore[return-value]

    def kind(self, tensors: Tensors) -> tuple[str | int, ...]:
        """Return one kind for all strides."""
        return (PLAIN.name,)

    def read(self, reader: Reader, name: str, tensors: Tensors, shape: Shape, *, views: bool) -> Tensors:
        """Check dtype, shape and device."""
        (weight_EOI,) = tensors
        assert weight_EOI is not None
        read = reader.check if views else reader.read
        return (read(f"{name}_proj", weight_EOI, shape),)

    def make(self, weight_EOI: Tensor, **options: Any) -> Tensors:
        """Return the weights, contiguous."""
        return (weight_EOI.contiguous(),)

    def widen(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Return the weights themselves: products widen the experts that they read."""
        (weight_EOI,) = tensors
        assert weight_EOI is not None
        return weight_EOI


PLAIN = Plain()
