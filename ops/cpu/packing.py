"""Expert weights as panels, the order in which the CPU kernels read them: a permutation of the weights, in their own dtype.

A weight ``[E, O, I]`` becomes ``[E, panels, units, columns, elements]``. A unit is what one multiply-add takes along ``I``:
one element, or two where the machine has a dot product of pairs. A panel has ``columns`` rows of the weight side by side; in
the panels of a gated up-projection the first half of the columns are gate rows, and the second half the up rows that belong to
them. What the sizes do not fill is zero, and is never read. Panels are the weights themselves: a write into them, element by
element, is a write into the weights.

Suffixes of tensor names: T tokens, D hidden size, E experts, K experts per token, O rows of a weight, I their length.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import build, native
from fusedonemoe.ops.records import PLAIN, Activation

PANEL_DIMS = 5


class Projection(NamedTuple):
    """The home form of packed weights.

    Attributes:
        rows: ``O``.
        width: ``I``.
        layout: order of gate and up rows, or ``plain``.
    """

    rows: int
    width: int
    layout: str

    @property
    def columns(self) -> int:
        """Columns that the panels together have: pairs of gate and up rows count once."""
        return self.rows if self.layout == PLAIN else self.rows // 2


@cache
def _sizes_of(dtype: torch.dtype) -> tuple[int, int]:
    return build.load().fusedonemoe_panel_columns(), native._kernel("elements_per_unit", dtype)()


def panel_sizes(dtype: torch.dtype) -> tuple[int, int]:
    """Columns of a panel and elements of a unit, on this machine."""
    return _sizes_of(dtype)


panel_sizes.__dict__["_dynamo_marked_constant"] = True  # see native.refusal


def panel_shape(E: int, home: Projection, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """The shape of the panels of a weight."""
    columns, elements = panel_sizes(dtype)
    width = columns if home.layout == PLAIN else columns // 2
    return E, -(-home.columns // width), -(-home.width // elements), columns, elements


def check_panels(name: str, panels: Tensor, home: Projection) -> None:
    """The tensor has the form that this machine's kernels have for such a weight."""
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


def _move(weight_EOI: Tensor, panels: Tensor, home: Projection, *, back: bool) -> None:
    E, rows, width = weight_EOI.shape
    first, second, step, gated = native.gate_up_rows(Activation("identity", home.layout, 0.0, 0.0), home.columns)
    sizes = (E, home.columns, rows, width, first, second, step, gated, int(back), native.threads(E, rows, width))
    addresses = native.addresses(weight_EOI, panels)
    if not all(addresses) and panels.numel():
        raise RuntimeError("weights can be packed and unpacked in memory alone, and under this mode a tensor has none")
    native.call("pack", weight_EOI.dtype, (*addresses, *sizes))


def pack(weight_EOI: Tensor, layout: str, out: Tensor | None = None) -> Tensor:
    """The panels of a contiguous weight on CPU, of a dtype that the kernels have; written into ``out`` where given."""
    E, rows, width = weight_EOI.shape
    home = Projection(rows, width, layout)
    panels = native.new(panel_shape(E, home, weight_EOI.dtype), weight_EOI.dtype) if out is None else out
    _move(weight_EOI, panels, home, back=False)
    return panels


def unpack(panels: Tensor, rows: int, width: int, layout: str) -> Tensor:
    """The weight ``[E, O, I]`` that the panels hold, to the bit."""
    home = Projection(rows, width, layout)
    check_panels("panels", panels, home)
    weight_EOI = torch.empty(panels.shape[0], rows, width, dtype=panels.dtype, device="cpu")
    _move(weight_EOI, panels, home, back=True)
    return weight_EOI


def experts_mlp_packed(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    packed_up: Tensor,
    packed_down: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    intermediate_size: int,
    *act: Any,
) -> Tensor:
    """The first output of :func:`fusedonemoe.ops.cpu.native.experts_mlp`, from the panels of both weights."""
    activation, D, F, E, N = Activation(*act), x_TD.shape[1], intermediate_size, packed_up.shape[0], experts_TK.numel()
    G = F if activation.layout == PLAIN else 2 * F
    for name, panels, home in (
        ("packed_up", packed_up, Projection(G, D, activation.layout)),
        ("packed_down", packed_down, Projection(D, F, PLAIN)),
    ):
        if panels.dtype != x_TD.dtype:
            raise TypeError(f"{name} must have the dtype of x ({x_TD.dtype}), got {panels.dtype}")
        check_panels(name, panels, home)
    if packed_down.shape[0] != E:
        raise ValueError(f"packed_down must have as many experts as packed_up ({E}), got {packed_down.shape[0]}")
    y_TD = native.new(x_TD.shape, x_TD.dtype)
    if not N:
        return y_TD
    x_TD, ids, weights_TK = x_TD.contiguous(), native.as_ids(experts_TK), native.as_float_weights(weights_TK)
    up_bias_EG, down_bias_ED = native.as_bias(up_bias_EG), native.as_bias(down_bias_ED)
    order_and_offsets = torch.empty(N + E + 1, dtype=torch.int32, device="cpu")
    order = order_and_offsets.data_ptr()
    native.call(
        "mlp_forward",
        x_TD.dtype,
        (
            *native.addresses(x_TD, packed_up, None, None, packed_down, None, None, up_bias_EG, down_bias_ED),
            *native.addresses(ids, weights_TK, y_TD, None),
            *(order, order + 4 * N, 0, 0, native.threads(N, G, D)),
            *native.mlp_sizes(experts_TK, (E, G, D), F, activation, "panels"),
        ),
        (activation.alpha, activation.limit),
    )
    return y_TD
