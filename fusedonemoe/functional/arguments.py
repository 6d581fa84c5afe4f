"""The arguments that the expert layers have in common: their checks, and the form in which the operators take them."""

from torch import Tensor

from fusedonemoe.checks import (
    check_dim,
    check_fits,
    check_gate,
    check_like_x,
    check_one_of,
    check_routing,
    check_save_percent,
    check_shape,
)
from fusedonemoe.ops.records import ACTIVATIONS, GATE_UP_LAYOUTS, PLAIN


def check_call(
    x: Tensor, experts: Tensor, weights: Tensor, activation: str, gated: bool, gate_up_layout: str, save_percent: int
) -> None:
    """All that a layer is called with beside its parameters."""
    check_routing(x, experts, weights)
    check_one_of("activation", activation, ACTIVATIONS)
    check_one_of("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
    check_save_percent(save_percent)
    check_gate(activation, gated)


def intermediate_size(E: int, G: int, gated: bool) -> int:
    """``F`` of an up-projection ``[E, G, D]``: of at least one expert, with as many gate rows as up rows."""
    if E < 1:
        raise ValueError("gate_up_proj must hold at least one expert, got E = 0")
    if gated and G % 2:
        raise ValueError(f"gate_up_proj must have as many gate rows as up rows, got {G} in all")
    return G // 2 if gated else G


def projections(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *, gated: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    """The checked weights as ``[E, G, D]`` and ``[E, D, F]``: views where they come ``transposed``."""
    check_like_x("gate_up_proj", gate_up_proj, x)
    check_like_x("down_proj", down_proj, x)
    check_dim("gate_up_proj", gate_up_proj, "E, D, G" if transposed else "E, G, D")
    up_EGD = gate_up_proj.transpose(1, 2) if transposed else gate_up_proj
    E, G, D = up_EGD.shape
    F = intermediate_size(E, G, gated)
    check_fits(x, D, "gate_up_proj")
    check_shape("down_proj", down_proj, (E, F, D) if transposed else (E, D, F))
    return up_EGD, down_proj.transpose(1, 2) if transposed else down_proj


def check_biases(x: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Biases, where there are some, of an up-projection of this shape ``[E, G, D]``."""
    E, G, D = shape
    for name, bias, width in (("gate_up_bias", gate_up_bias, G), ("down_bias", down_bias, D)):
        if bias is not None:
            check_like_x(name, bias, x)
            check_shape(name, bias, (E, width))


def activation_arguments(
    activation: str, gated: bool, gate_up_layout: str, swiglu_alpha: float, swiglu_limit: float
) -> tuple[str, str, float, float]:
    """The fields of :class:`~fusedonemoe.ops.records.Activation`."""
    return activation, gate_up_layout if gated else PLAIN, float(swiglu_alpha), float(swiglu_limit)
