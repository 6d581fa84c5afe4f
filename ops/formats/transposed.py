"""Transposed weights: a view ``[E, O, I]`` of a float tensor ``[E, I, O]``, the outputs of an input side by side."""

from typing import Any

from torch import Tensor

from fusedonemoe.ops.formats.format import Shape, Tensors
from fusedonemoe.ops.formats.plain import Plain


class Transposed(Plain):
    """Columns of outputs, in the dtype of x. The operators of plain weights read them by their strides."""

    name = "transposed"

    def shape(self, tensors: Tensors) -> Shape | None:
        """Return ``(E, O, I)`` if the outputs of an input are nearer to each other than the inputs of an output."""
        (weight_EOI,) = tensors
        assert weight_EOI is not None
        _, between_outputs, between_inputs = weight_EOI.stride()
        return weight_EOI.shape if between_outputs < between_inputs else None  # type: ignore[return-value]

    def make(self, weight_EOI: Tensor, **options: Any) -> Tensors:
        """Return a view of a tensor ``[E, I, O]``."""
        return (weight_EOI.transpose(1, 2).contiguous().transpose(1, 2),)


TRANSPOSED = Transposed()
