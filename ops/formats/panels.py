"""Panels: float weights in the order in which the CPU kernels read them, a permutation of the weights in their own dtype.

A weight ``[E, O, I]`` becomes ``[E, panels, units, columns, elements]``. A unit is what one multiply-add takes along ``I``: one
element, or two. A panel has ``columns`` rows of the weight side by side; of a gated up-projection the first half are gate rows,
the second half their up rows. Zeros fill what the sizes leave. A write into panels is a write into the weights.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.formats.format import Format, Part, Shape, Tensors

PANEL_DIMS = 5
WITHOUT_GATE = "plain"


class PanelHome(NamedTuple):
    """The weight that panels hold: ``O`` rows of width ``I``, and the order of gate and up rows, or ``plain``."""

    rows: int
    width: int
    layout: str

    @property
    def columns(self) -> int:
        """Return how many columns the panels have together: pairs of gate and up rows count once."""
        return self.rows if self.layout == WITHOUT_GATE else self.rows // 2


def panel_shape(E: int, home: PanelHome, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Return the shape of the panels of a weight."""
    columns, elements = native.panel_sizes(dtype)
    width = columns if home.layout == WITHOUT_GATE else columns // 2
    return E, -(-home.columns // width), -(-home.width // elements), columns, elements


def check_panels(name: str, panels: Tensor, home: PanelHome) -> None:
    """Check that the tensor has the form that this machine's kernels have for such a weight."""
    if panels.dim() != PANEL_DIMS:
        raise ValueError(f"{name} must be panels, with {PANEL_DIMS} dimensions, got shape {tuple(panels.shape)}")
    expected = panel_shape(panels.shape[0], home, panels.dtype)
    if tuple(panels.shape) != expected:
        raise ValueError(
            f"{name} must be panels of shape {expected} for a weight of {home.rows} rows of {home.width} on this machine, "
            f"got {tuple(panels.shape)}"
        )
    if not panels.is_contiguous():
        raise ValueError(f"{name} must be contiguous panels, got strides {panels.stride()}")


def pack(weight_EOI: Tensor, layout: str, out: Tensor | None = None) -> Tensor:
    """Return the panels of a contiguous weight on CPU, of a dtype that the kernels have; written into ``out`` where given."""
    E, rows, width = weight_EOI.shape
    dtype = weight_EOI.dtype
    panels = native.new(panel_shape(E, PanelHome(rows, width, layout), dtype), dtype) if out is None else out
    torch.ops.fusedonemoe.pack_weights_.default(panels, weight_EOI, layout)
    return panels


class Panels(Format):
    """One tensor, which does not tell O and I; the operator ``unpack_weights``, which is told them, reads the weights back."""

    name = "panels"
    parts: tuple[Part, ...] = (Part("packed_{}"),)
    has_sizes = False

    def make(self, weight_EOI: Tensor, **options: Any) -> Tensors:
        """Return the panels; ``layout`` among the options is the order of gate and up rows, or ``plain``."""
        return (pack(weight_EOI, options["layout"]),)

    def shape(self, tensors: Tensors) -> Shape | None:
        """Return None: the tensor does not tell."""
        return None


PANELS = Panels()
