"""The tensors of weights of 8 or 4 bits with scales."""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops.formats.format import Part

PARTS = (Part("{}"), Part("{}_scale", is_scale=True), Part("{}_zero", is_optional=True))


class QuantizedWeight(NamedTuple):
    """A stacked weight ``[E, O, I]`` in 8 or 4 bits, as plain tensors: ``W = scale * (values - zero_point)``.

    Attributes:
        values: int8 ``[E, O, I]``, or two 4-bit values 0 .. 15 in each uint8 of ``[E, O, I / 2]``, the even input's in the
            lower half.
        scale: float32 ``[E, O]`` with int8, ``[E, O, I / group_size]`` with int4.
        zero_point: uint8 ``[E, O, I / group_size]`` with int4, the value that means 0; None for the middle, 8.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return ``(E, O, I)`` of the weight."""
        E, O, I = self.values.shape  # noqa: E741
        return E, O, I if self.values.dtype == torch.int8 else 2 * I

    @property
    def bits(self) -> int:
        """Return 8 or 4."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def group_size(self) -> int:
        """Return how many inputs share a scale, which is all I of them for int8."""
        width = self.shape[2]
        return width if self.bits == 8 else width // max(self.scale.shape[2], 1)

    @property
    def nbytes(self) -> int:
        """Return the bytes of values, scales and zero points."""
        return sum(t.nbytes for t in self if t is not None)
