"""Experts from packed weights: the panels are the weights, so there is nothing that could differ from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedonemoe.checks import check_dim, check_fits, check_float, check_like_x, check_one_of, check_same_device, check_shape
from fusedonemoe.functional.calls import intermediate_size, records_gradients
from fusedonemoe.ops import library
from fusedonemoe.ops.choice import refusal
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.library import PanelHome
from fusedonemoe.ops.options import row_layout
from fusedonemoe.ops.records import GATE_UP_LAYOUTS, PLAIN


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Expert weights in the order in which the CPU kernels read them, for :func:`experts_mlp`.

    The panels are the weights: a write into ``up`` or ``down`` changes them, and :meth:`unpack` returns what was written.

    Attributes:
        up: panels of the up-projection, ``[E, panels, units, columns, elements]``, in the dtype of the weights.
        down: panels of the down-projection.
        layout: the ``gate_up_layout`` of the weights, or ``plain``.
        hidden_size: ``D``.
        intermediate_size: ``F``.
    """

    up: Tensor
    down: Tensor
    layout: str
    hidden_size: int
    intermediate_size: int

    @property
    def nbytes(self) -> int:
        """The bytes of both tensors of panels, the zeros that fill the last panel included."""
        return self.up.nbytes + self.down.nbytes

    @property
    def _homes(self) -> tuple[PanelHome, PanelHome]:
        rows = self.intermediate_size if self.layout == PLAIN else 2 * self.intermediate_size
        return PanelHome(rows, self.hidden_size, self.layout), PanelHome(self.hidden_size, self.intermediate_size, PLAIN)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Return ``gate_up_proj`` and ``down_proj`` as new tensors, with the bits that the panels hold, without autograd."""
        with torch.no_grad():
            return home_weights(self)


def home_weights(packed: PackedExperts) -> tuple[Tensor, Tensor]:
    """Both weights in home form."""
    up, down = packed._homes
    return library.unpack_weights(packed.up, *up), library.unpack_weights(packed.down, *down)


def pack_experts(
    gate_up_proj: Tensor, down_proj: Tensor, *, gated: bool = True, gate_up_layout: str = "gate_up"
) -> PackedExperts:
    """Copy expert weights into the order in which the CPU kernels read them, for inference.

    With few rows per expert the kernels are bound by reading the weights, and panels are read as one stream. Later changes of
    the arguments, which are those of :func:`experts_mlp`, do not reach the result. Nothing is recorded for a backward pass.

    Args:
        gate_up_proj: ``[E, 2F, D]``, or ``[E, F, D]`` when plain; float32, bfloat16 or float16, contiguous, on CPU.
        down_proj: ``[E, D, F]``, of the same dtype.
        gated: whether the first holds gate and up.
        gate_up_layout: order of its rows.

    Raises:
        TypeError, ValueError: an argument that does not fit, or no CPU kernels for such weights here; the message says why.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> gate_up_proj, down_proj = torch.randn(4, 64, 16), torch.randn(4, 16, 32)
        >>> packed = F.pack_experts(gate_up_proj, down_proj)
        >>> x, experts, weights = torch.randn(5, 16), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
        >>> y = F.experts_mlp(x, experts, weights, packed=packed)
        >>> torch.equal(y, F.experts_mlp(x, experts, weights, gate_up_proj, down_proj))
        True
        >>> torch.equal(packed.unpack()[0], gate_up_proj)
        True
    """
    check_float("gate_up_proj", gate_up_proj)
    check_one_of("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
    check_dim("gate_up_proj", gate_up_proj, "E, G, D")
    check_float("down_proj", down_proj)
    check_same_device("down_proj", down_proj, "gate_up_proj", gate_up_proj.device)
    if down_proj.dtype != gate_up_proj.dtype:
        raise TypeError(f"down_proj must have the dtype of gate_up_proj ({gate_up_proj.dtype}), got {down_proj.dtype}")
    E, G, D = gate_up_proj.shape
    F = intermediate_size(E, G, gated)
    check_shape("down_proj", down_proj, (E, D, F))
    check_can_pack({"gate_up_proj": gate_up_proj, "down_proj": down_proj})
    layout = row_layout(gated, gate_up_layout)
    with torch.inference_mode(False):  # else nothing could write into them later
        return PackedExperts(
            library.pack_weight(gate_up_proj.detach(), layout), library.pack_weight(down_proj.detach(), PLAIN), layout, D, F
        )


def check_can_pack(weights: dict[str, Tensor]) -> None:
    """There are CPU kernels for these weights, which are plain tensors in memory."""
    for name, weight in weights.items():
        if type(weight) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"{name} cannot be packed: it must be a plain tensor, got a {type(weight).__name__}")
        readable, widths = weight.is_contiguous() and not weight.is_neg(), tuple(weight.shape[1:])
        reason = refusal("cpu", device_type=weight.device.type, dtype=weight.dtype, widths=widths, contiguous=readable)
        if reason:
            raise ValueError(f"{name} cannot be packed: {reason}")


def refuse_packed_training(x: Tensor, weights: Tensor, *parameters: Tensor | None) -> None:
    """A call with packed weights records no gradients, and is not exported."""
    refuse_transforms()
    if records_gradients(x, weights, *parameters):
        raise RuntimeError(library.FOR_INFERENCE)
    if is_exporting():
        raise RuntimeError(
            "packed weights have the form of this machine, which an exported graph must not have: call unpack() before exporting"
        )


def check_packed(packed: PackedExperts, x: Tensor, layout: str, transposed: bool, impl: str) -> None:
    """Check that a call can read these panels. Operators check their sizes, each time: they are memory that kernels trust."""
    if not isinstance(packed, PackedExperts):
        raise TypeError(f"packed must be PackedExperts, as pack_experts makes them, got {type(packed).__name__}")
    if transposed:
        raise ValueError("packed weights have no transposed form: call with transposed=False")
    if impl not in ("auto", "cpu"):
        raise ValueError(f"packed weights are for impl='auto' or 'cpu', got impl={impl!r}: call unpack() for the others")
    if packed.layout != layout:
        raise ValueError(f"packed must have been packed with gate_up_layout {layout!r}, got {packed.layout!r}")
    check_fits(x, packed.hidden_size, "packed")
    check_like_x("packed.up", packed.up, x)
    check_like_x("packed.down", packed.down, x)
    if reason := refusal("cpu", device_type=x.device.type, dtype=packed.up.dtype, widths=()):
        raise ValueError(f"packed weights cannot be read here: {reason}")
    if packed.up.dim() != library.PANEL_DIMS or packed.down.dim() != library.PANEL_DIMS:
        shapes = tuple(packed.up.shape), tuple(packed.down.shape)
        raise ValueError(f"packed must hold panels, with {library.PANEL_DIMS} dimensions, got shapes {shapes[0]}, {shapes[1]}")
    # Their sizes are checked in the operators, each time: they are memory that kernels trust.
