"""Routing: from logits to weights and ids, and from ids to the order and the counts of the rows."""

from typing import Unpack

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedonemoe.checks import check_count, check_ids, check_logits, check_selection_bias
from fusedonemoe.functional.calls import choose_routing, with_leading
from fusedonemoe.ops import library
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.operands import MOST_ROWS, check_choices_of, check_rows
from fusedonemoe.ops.plan import Plan, make_plan
from fusedonemoe.ops.plan import tokens_per_expert as _count_tokens
from fusedonemoe.ops.route import route as _route_portably
from fusedonemoe.ops.rules import RouteOptions, RouteRule, lists_options, make_rule


@lists_options
def route(
    logits: Tensor,
    top_k: int | None,
    *,
    selection_bias: Tensor | None = None,
    impl: str = "auto",
    **options: Unpack[RouteOptions],
) -> tuple[Tensor, Tensor]:
    """Turn router logits into the weights and ids of each token's experts.

    ``score_first``: ``s = scoring(l)``, pick ``TopK(s + b)``, ``w = s[picked]``. Otherwise: pick ``TopK(l + b)``,
    ``w = scoring(l[picked])``. Then ``w / (sum(w) + norm_eps)`` if ``norm_topk_prob``, times ``routed_scaling_factor``. Equal
    keys go to the lower id. The gradient is exact, the selection being a constant.

    Args:
        logits: ``[..., E]`` float64, float32, bfloat16 or float16.
        top_k: ``K``, experts per token, best first; None keeps every expert, in id order, without selection.
        selection_bias: ``[E]``, added for the selection only (DeepSeek-V3's ``e_score_correction_bias``); no gradient.
        impl: ``"auto"``, ``"dense"`` for a composite with derivatives of every order, for ``torch.func``, or ``"portable"``
            for export, without an operator of this library.
        **options: the other fields of the rule, as :class:`RouteOptions` lists them.

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
    rule = make_rule(logits.shape[-1], top_k, selection_bias=selection_bias is not None, **options)
    return route_by(rule, logits, selection_bias, impl)


def route_by(rule: RouteRule, logits: Tensor, selection_bias: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """Run :func:`route` of floating-point logits ``[..., E]`` by a rule that was made for ``E`` experts."""
    if impl != "auto" or torch.compiler.is_exporting():
        impl = choose_routing(impl)
    if selection_bias is not None:
        check_selection_bias(selection_bias, logits)
    rows_TE = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    T, E = rows_TE.shape
    if not torch.compiler.is_dynamo_compiling() and isinstance(T, int) and T * (rule.top_k or E) > MOST_ROWS:
        check_choices_of(logits, rule.top_k or E)
    if impl == "portable":
        weights, experts = _route_portably(rows_TE, selection_bias, rule)
    elif impl == "dense":
        weights, experts = torch.ops.fusedonemoe.route_dense(rows_TE, selection_bias, *rule, library.BUILD)
    else:
        if forward_ad._current_level >= 0:
            refuse_transforms()
        weights, experts = library.route(rows_TE, selection_bias, *rule, library.BUILD)
    if logits.dim() == 2:
        return weights, experts
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
