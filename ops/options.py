"""The public arguments that describe a record: checked records made from them, and the arguments of a record."""

from typing import Any

from fusedonemoe.ops.records import (
    ACTIVATIONS,
    GATE_UP_LAYOUTS,
    GROUP_SCORES,
    NORM_EPS,
    PLAIN,
    SCORINGS,
    Activation,
    RouteRule,
)
from fusedonemoe.ops.values import check_count, check_flag, check_integer, check_one_of, check_positive

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
# The public arguments that describe an activation.
ACTIVATION_OPTIONS = ("activation", "gated", "gate_up_layout", "swiglu_alpha", "swiglu_limit")


def make_activation(
    activation: str,
    gated: bool,
    gate_up_layout: str = "gate_up",
    swiglu_alpha: float = SWIGLU_ALPHA,
    swiglu_limit: float = SWIGLU_LIMIT,
) -> Activation:
    """Make the checked record of an activation from the public arguments.

    Raises:
        TypeError: ``gated`` is not a bool.
        ValueError: an unknown name, or ``swiglu_oai`` without a gate.
    """
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


# The fields of a rule under their public names; top_k, which has no default, is not among them.
ROUTE_OPTIONS = (
    *("scoring", "score_first", "norm_topk_prob", "routed_scaling_factor"),
    *("n_group", "topk_group", "group_score", "norm_eps"),
)


def make_rule(
    num_experts: int,
    top_k: int | None,
    *,
    scoring: str = "softmax",
    score_first: bool = True,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    norm_eps: float = NORM_EPS,
    selection_bias: bool = False,
) -> RouteRule:
    """Make the checked record of a routing rule for ``num_experts`` experts from the public arguments.

    ``top_k`` is None for all experts; with ``selection_bias`` there is a bias, which needs a selection. See :class:`RouteRule`
    for the others.

    Raises:
        TypeError: a count that is no integer, or a flag that is no bool.
        ValueError: an unknown name, or a number that these experts do not allow.
    """
    check_one_of("scoring", scoring, SCORINGS)
    check_one_of("group_score", group_score, GROUP_SCORES)
    check_flag("score_first", score_first)
    check_flag("norm_topk_prob", norm_topk_prob)
    check_positive("norm_eps", norm_eps)
    if scoring == "softmax" and norm_eps != NORM_EPS:
        raise ValueError(f"norm_eps applies only to scoring='sigmoid', got {norm_eps} with scoring='softmax'")
    _check_counts(num_experts, top_k, n_group, topk_group, selection_bias)
    factor, eps = float(routed_scaling_factor), float(norm_eps)
    return RouteRule(top_k or 0, scoring, score_first, norm_topk_prob, factor, n_group, topk_group, group_score, eps)


def check_rule(rule: RouteRule, num_experts: int, selection_bias: bool) -> None:
    """Check that a rule, which was made for others, is one for this number of experts."""
    _check_counts(num_experts, rule.top_k or None, rule.n_group, rule.topk_group, selection_bias)


def _check_counts(num_experts: int, top_k: int | None, n_group: int, topk_group: int, selection_bias: bool) -> None:
    check_integer("n_group", n_group)
    if n_group < 1 or num_experts % n_group:
        raise ValueError(f"n_group must divide the number of experts ({num_experts}), got {n_group}")
    check_count("topk_group", topk_group, 1, n_group, "n_group")
    if top_k is None:
        if n_group > 1 or selection_bias:
            raise ValueError("top_k=None selects every expert: n_group must be 1, and there can be no selection bias")
    else:
        check_integer("top_k", top_k)
        most = num_experts // n_group * topk_group
        if not 1 <= top_k <= most:
            raise ValueError(f"top_k must be from 1 to {most}, the experts that can be picked, or None, got {top_k}")
