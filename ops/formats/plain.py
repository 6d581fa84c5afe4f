"""Float weights ``[E, O, I]``, by the order of the strides: plain, the inputs of an output side by side, or transposed."""

from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.formats.format import Format, Part, Shape, Tensors
from fusedonemoe.ops.operands import Reader


class Plain(Format):
    """One tensor in the dtype of x. The operators read both formats by their strides, so the two are of one kind."""

    name = "plain"
    parts: tuple[Part, ...] = (Part("{}_proj", casts=True, has_gradient=True),)

    def shape(self, tensors: Tensors) -> Shape | None:
        """Return ``(E, O, I)`` if the inputs of an output are nearer to each other than the outputs of an input."""
        _, between_outputs, between_inputs = tensors[0].stride()
        return tensors[0].shape if between_inputs <= between_outputs else None

    def kind(self, tensors: Tensors) -> tuple[str | int, ...]:
        """Return one kind for all strides."""
        return (PLAIN.name,)

    def read(self, reader: Reader, name: str, tensors: Tensors, shape: Shape, *, views: bool) -> Tensors:
        """Check dtype, shape and device."""
        return (reader.read(f"{name}_proj", tensors[0], shape, views=views),)

    def make(self, weight_EOI: Tensor, **options: Any) -> Tensors:
        """Return the weights, contiguous."""
        return (weight_EOI.contiguous(),)

    def widen(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Return the weights themselves: products widen the experts that they read."""
        weight_EOI: Tensor = tensors[0]
        return weight_EOI


class Transposed(Plain):
    """A view ``[E, O, I]`` of a tensor ``[E, I, O]``."""

    name = "transposed"

    def shape(self, tensors: Tensors) -> Shape | None:
        """Return ``(E, O, I)`` if the outputs of an input are nearer to each other than the inputs of an output."""
        _, between_outputs, between_inputs = tensors[0].stride()
        return tensors[0].shape if between_outputs < between_inputs else None

    def make(self, weight_EOI: Tensor, **options: Any) -> Tensors:
        """Return a view of a tensor ``[E, I, O]``."""
        return (weight_EOI.transpose(1, 2).contiguous().transpose(1, 2),)


PLAIN = Plain()
TRANSPOSED = Transposed()
