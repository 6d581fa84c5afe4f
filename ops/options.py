"""The public arguments that describe an activation: a checked record made from them, and the arguments of a record."""

from dataclasses import dataclass, fields
from typing import Any

from fusedonemoe.ops.records import ACTIVATIONS, GATE_UP_LAYOUTS, PLAIN, Activation
from fusedonemoe.ops.values import check_flag, check_one_of

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


@dataclass(frozen=True, kw_only=True)
class ActivationFields:
    """The public arguments that describe an activation; see :func:`fusedonemoe.functional.experts_mlp`."""

    activation: str = "silu"
    gated: bool = True
    gate_up_layout: str = "gate_up"
    swiglu_alpha: float = SWIGLU_ALPHA
    swiglu_limit: float = SWIGLU_LIMIT


ACTIVATION_OPTIONS = tuple(field.name for field in fields(ActivationFields))


def make_activation(
    activation: str,
    gated: bool,
    gate_up_layout: str = "gate_up",
    swiglu_alpha: float = SWIGLU_ALPHA,
    swiglu_limit: float = SWIGLU_LIMIT,
) -> Activation:
    """Make the checked record of an activation from the public arguments."""
    check_one_of("activation", activation, ACTIVATIONS)
    check_one_of("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
    check_flag("gated", gated)
    if activation == "swiglu_oai" and not gated:
        raise ValueError("activation 'swiglu_oai' is gated by definition, got gated=False")
    return Activation(activation, row_layout(gated, gate_up_layout), float(swiglu_alpha), float(swiglu_limit))


def row_layout(gated: bool, gate_up_layout: str) -> str:
    """Return the order of the up-projection's rows: the layout of gate and up, or ``plain`` without a gate."""
    return gate_up_layout if gated else PLAIN


def activation_options(act: Activation) -> dict[str, Any]:
    """Return the public arguments that :func:`make_activation` makes this record from."""
    gated = act.layout != PLAIN
    layout = act.layout if gated else "gate_up"
    constants = {"swiglu_alpha": act.alpha, "swiglu_limit": act.limit}
    return {"activation": act.name, "gated": gated, "gate_up_layout": layout, **constants}


def options_of(holder: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the attributes of these names as keyword arguments."""
    return {name: getattr(holder, name) for name in names}
