"""The routing rule: its fields in each form that a caller gives them in, and the checks. A new field is written here alone."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack

from fusedonemoe.ops.values import check_count, check_flag, check_integer, check_one_of, check_positive

SCORINGS = ("softmax", "sigmoid")
GROUP_SCORES = ("top2_sum", "max")
NORM_EPS = 1e-20

_Function = TypeVar("_Function", bound=Callable[..., Any])


class RouteRule(NamedTuple):
    """The rule as operators and kernels take it, with 0 as the ``top_k`` that keeps every expert; see :class:`RouteOptions`."""

    top_k: int
    scoring: str
    score_first: bool
    norm_topk_prob: bool
    scale: float  # routed_scaling_factor
    n_group: int
    topk_group: int
    group_score: str
    norm_eps: float = NORM_EPS


class RouteOptions(TypedDict, total=False):
    """The fields of a routing rule, as keywords of functions and modules.

    Attributes:
        scoring: ``"softmax"`` or ``"sigmoid"``.
        score_first: score all logits and select among the scores (Qwen3, Mixtral, DeepSeek-V3), or select among the logits and
            score the picked ones only (GPT-OSS).
        norm_topk_prob: divide a token's weights by their sum before scaling.
        routed_scaling_factor: factor on the weights.
        n_group: the number of contiguous groups, of equal size, that experts are divided into.
        topk_group: only experts of the best ``topk_group`` groups can be picked.
        group_score: a group's value: ``"top2_sum"`` of its keys (DeepSeek-V3) or ``"max"`` (DeepSeek-V2).
        norm_eps: added to the sum of sigmoids that divides them (LFM2 has 1e-6); only for ``scoring="sigmoid"``.
    """

    scoring: str
    score_first: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    group_score: str
    norm_eps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouteFields:
    """The fields of a routing rule in a configuration, with their defaults; see :class:`RouteOptions`."""

    scoring: str = "softmax"
    score_first: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    norm_eps: float = NORM_EPS


class RouteAttributes:
    """The fields of a routing rule in a module, plain attributes; see :class:`RouteOptions`."""

    top_k: int | None
    scoring: str
    score_first: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    group_score: str
    norm_eps: float


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(RouteFields)}
ROUTE_OPTIONS = tuple(_DEFAULTS)


def lists_options(function: _Function) -> _Function:
    """Show each field of a rule, in place of the last parameter ``**options``, to ``inspect.signature``."""
    signature, kind = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
    *own, _ = signature.parameters.values()
    for field in dataclasses.fields(RouteFields):
        own.append(inspect.Parameter(field.name, kind, default=field.default, annotation=field.type))
    function.__dict__["__signature__"] = signature.replace(parameters=own)
    return function


def with_defaults(options: RouteOptions) -> dict[str, Any]:
    """Return every field under its public name, in the order of :class:`RouteRule`; raise for a keyword that is no field."""
    values = {**_DEFAULTS, **options}
    if len(values) > len(_DEFAULTS):
        raise TypeError(f"got an unexpected keyword argument {list(values)[-1]!r}")
    return values


def make_rule(num_experts: int, top_k: int | None, *, selection_bias: bool = False, **options: Unpack[RouteOptions]) -> RouteRule:
    """Make the checked record of a rule for so many experts, ``top_k`` of them a token or, if None, all of them."""
    values = with_defaults(options)
    scoring, norm_eps = values["scoring"], values["norm_eps"]
    check_one_of("scoring", scoring, SCORINGS)
    check_one_of("group_score", values["group_score"], GROUP_SCORES)
    check_flag("score_first", values["score_first"])
    check_flag("norm_topk_prob", values["norm_topk_prob"])
    check_positive("norm_eps", norm_eps)
    if scoring == "softmax" and norm_eps != NORM_EPS:
        raise ValueError(f"norm_eps applies only to scoring='sigmoid', got {norm_eps} with scoring='softmax'")
    _check_counts(num_experts, top_k, values["n_group"], values["topk_group"], selection_bias)
    values["routed_scaling_factor"], values["norm_eps"] = float(values["routed_scaling_factor"]), float(norm_eps)
    return RouteRule(top_k or 0, *values.values())


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
