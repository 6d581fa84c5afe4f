"""The parts of a weight format that operators, records and kernels ask for."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops.operands import Reader

Shape = tuple[int, int, int]
Tensors = tuple[Any, ...]  # the tensors of a weight, with None for an optional one that is absent


class Part(NamedTuple):
    """One of the tensors that hold a weight, as an argument of the operators."""

    name: str  # of the argument, with {} in place of up or down
    is_optional: bool = False  # None may come in its place
    casts: bool = False  # autocast casts it
    has_gradient: bool = False  # the backward returns a gradient of it
    is_scale: bool = False  # it scales another part, and is small next to it


class Format:
    """A way to store stacked weights ``[E, O, I]``: E experts, O outputs, I inputs."""

    name: str  # the word that kernels dispatch on
    parts: tuple[Part, ...]  # the tensors of the weights. Formats with the same parts share an operator; shape() tells them apart
    has_sizes: bool = True  # whether the tensors tell O and I; if not, the operator takes the intermediate size

    def shape(self, tensors: Tensors) -> Shape | None:
        """Return ``(E, O, I)`` of the weights that the tensors hold; None if they are in another format."""
        raise NotImplementedError

    def kind(self, tensors: Tensors) -> tuple[str | int, ...]:
        """Return the facts in which both projections of an expert must agree."""
        return (self.name,)

    def read(self, reader: Reader, name: str, tensors: Tensors, shape: Shape, *, views: bool) -> Tensors:
        """Check tensors of an operator that was called by its name; return them contiguous, or with ``views`` in any strides."""
        raise NotImplementedError

    def make(self, weight_EOI: Tensor, **options: Any) -> Tensors:
        """Return the tensors of floating-point weights."""
        raise NotImplementedError(f"no weights are made in the format {self.name}")

    def empty(self, shape: Shape, device: torch.device, **options: Any) -> Tensors:
        """Return the tensors of weights of this shape, uninitialised; the options are those of :meth:`make`."""
        raise NotImplementedError(f"no weights are made in the format {self.name}")

    def widen(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Return the weights ``[E, O, I]``; in ``dtype``, unless the format stores floats, which keep theirs."""
        raise NotImplementedError
