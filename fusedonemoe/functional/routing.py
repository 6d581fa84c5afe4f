"""Routing: from logits to weights and ids, and from ids to the order and the counts of the rows."""

import torch
from torch import Tensor

from fusedonemoe.checks import (
    check_count,
    check_ids,
    check_integer,
    check_logits,
    check_norm_eps,
    check_one_of,
    check_selection_bias,
)
from fusedonemoe.functional.calls import as_rows, choose_routing, with_leading
from fusedonemoe.ops import library
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.operands import check_choices_of, check_rows
from fusedonemoe.ops.plan import Plan, make_plan
from fusedonemoe.ops.plan import tokens_per_expert as _count_tokens
from fusedonemoe.ops.records import GROUP_SCORES, NORM_EPS, SCORINGS, RouteRule
from fusedonemoe.ops.route import route as _route_portably


def route(
    logits: Tensor,
    top_k: int | None,
    *,
    scoring: str = "softmax",
    score_first: bool = True,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    selection_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    norm_eps: float = NORM_EPS,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn router logits into the weights and ids of each token's experts.

    ``score_first``: ``s = scoring(l)``, pick ``TopK(s + b)``, ``w = s[picked]``. Otherwise: pick ``TopK(l + b)``,
    ``w = scoring(l[picked])``. Then ``w / (sum(w) + norm_eps)`` if ``norm_topk_prob``, times ``routed_scaling_factor``. Equal
    keys go to the lower id. The gradient is exact, the selection being a constant.

    Args:
        logits: ``[..., E]`` float64, float32, bfloat16 or float16.
        top_k: ``K``, experts per token, best first; None keeps every expert, in id order, without selection.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        score_first: score before selecting (Qwen3, Mixtral, DeepSeek-V3) or after (GPT-OSS).
        norm_topk_prob: whether a token's weights sum to 1 before scaling.
        routed_scaling_factor: factor on the weights.
        selection_bias: ``[E]``, added for the selection only (DeepSeek-V3's ``e_score_correction_bias``); no gradient.
        n_group: experts stand in this many contiguous groups of equal size.
        topk_group: only experts of the best ``topk_group`` groups can be picked.
        group_score: a group's value: ``"top2_sum"`` of its keys (DeepSeek-V3) or ``"max"`` (DeepSeek-V2).
        norm_eps: keeps the division of sigmoids from zero (LFM2 has 1e-6); a softmax has a sum without it.
        impl: ``"auto"``, ``"dense"`` for a composite with derivatives of every order, for ``torch.func``, or ``"portable"``
            for export, without an operator of this library.

    Returns:
        ``weights`` ``[..., K]`` float32 (float64 for float64 logits) and ``experts`` ``[..., K]`` int64.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, name or count that does not fit, naming the argument, or 2**31 choices or more.

    Source:
        Shazeer et al. 2017 (arXiv 1701.06538) section 2.1; DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> weights, experts = F.route(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), top_k=2)
        >>> experts
        tensor([[1, 2]])
        >>> weights
        tensor([[0.5000, 0.5000]])
    """
    check_logits(logits)
    E = logits.shape[-1]
    check_one_of("scoring", scoring, SCORINGS)
    check_one_of("group_score", group_score, GROUP_SCORES)
    impl = choose_routing(impl)
    check_integer("n_group", n_group)
    check_integer("topk_group", topk_group)
    if top_k is not None:
        check_integer("top_k", top_k)
    if n_group < 1 or E % n_group:
        raise ValueError(f"n_group must divide the number of experts ({E}), got {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group must be from 1 to n_group ({n_group}), got {topk_group}")
    if top_k is None and (n_group > 1 or selection_bias is not None):
        raise ValueError("top_k=None selects every expert: n_group must be 1 and selection_bias None")
    check_norm_eps(norm_eps, scoring)
    selectable = E // n_group * topk_group
    if top_k is not None and not 1 <= top_k <= selectable:
        raise ValueError(f"top_k must be from 1 to {selectable}, the experts that can be picked, got {top_k}")
    if selection_bias is not None:
        check_selection_bias(selection_bias, logits)
    check_choices_of(logits, E if top_k is None else top_k)
    factor = float(routed_scaling_factor)
    rule = RouteRule(top_k or 0, scoring, score_first, norm_topk_prob, factor, n_group, topk_group, group_score, float(norm_eps))
    if impl == "portable":
        weights, experts = _route_portably(as_rows(logits), selection_bias, rule)
    else:
        if impl == "auto":
            refuse_transforms()
        op = torch.ops.fusedonemoe.route_dense if impl == "dense" else library.route
        weights, experts = op(as_rows(logits), selection_bias, *rule, library.BUILD)
    return with_leading(weights, logits), with_leading(experts, logits)


def plan(experts: Tensor, num_experts: int) -> Plan:
    """Sort the rows of a routing by expert, without a host synchronisation.

    Args:
        experts: ``[..., K]`` ids of any integer dtype; ids outside ``[0, num_experts)`` sort to the end.
        num_experts: ``E``.

    Returns:
        :class:`Plan` ``(order, offsets)``: ``order`` ``[N]`` int32 lists the flattened rows ``t * K + j`` by expert, in
        token order inside an expert; expert ``e`` owns ``order[offsets[e]:offsets[e + 1]]``.

    Raises:
        TypeError: ``experts`` has no integer dtype, or ``num_experts`` is no integer.
        ValueError: ``num_experts`` is below 1, or there are 2**31 rows or more.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.plan(torch.tensor([[1, 0], [1, 7]]), num_experts=2)
        Plan(order=tensor([1, 0, 2, 3], dtype=torch.int32), offsets=tensor([0, 1, 3], dtype=torch.int32))
    """
    check_ids(experts)
    check_rows(experts)
    check_count("num_experts", num_experts)
    return make_plan(experts, num_experts)


def tokens_per_expert(experts: Tensor, num_experts: int) -> Tensor:
    """Count the routed rows of every expert: ``c_e = #{(t, j): experts_tj = e}``, without a host synchronisation.

    Args:
        experts: ids of any shape and integer dtype; ids outside ``[0, num_experts)`` are not counted.
        num_experts: ``E``.

    Returns:
        ``[E]`` int64.

    Raises:
        TypeError: ``experts`` has no integer dtype, or ``num_experts`` is no integer.
        ValueError: ``num_experts`` is below 1.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.tokens_per_expert(torch.tensor([[1, 0], [1, 7]]), num_experts=3)
        tensor([1, 2, 0])
    """
    check_ids(experts)
    check_count("num_experts", num_experts)
    return _count_tokens(experts, num_experts)
