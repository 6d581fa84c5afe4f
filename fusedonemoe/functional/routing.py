"""Routing: from logits to weights and ids, and from ids to the order, the counts and the capacity of the rows."""

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedonemoe import checks
from fusedonemoe.functional.calls import choose_routing, with_leading
from fusedonemoe.ops import library
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.operands import MOST_ROWS, check_choices_of, check_rows
from fusedonemoe.ops.plan import Plan, in_range, inverse_order, make_plan
from fusedonemoe.ops.plan import tokens_per_expert as count_tokens
from fusedonemoe.ops.product_keys import route_product_key as portable_product_key
from fusedonemoe.ops.route import route as portable_route
from fusedonemoe.ops.rules import RouteOptions, RouteRule, lists_options, make_rule

# 1.1 * 110 is 121 and a bit in floating point: a part as small as this of the whole is rounding, and makes no further row.
_ROUNDING = 1e-9


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
        TypeError, ValueError: an argument that does not fit, which the message names, or 2**31 choices or more.

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
    checks.check_logits(logits)
    rule = make_rule(logits.shape[-1], top_k, selection_bias=selection_bias is not None, **options)
    return route_by(rule, logits, selection_bias, impl)


def route_by(rule: RouteRule, logits: Tensor, selection_bias: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """Run :func:`route` of floating-point logits ``[..., E]`` by a rule that was made for ``E`` experts."""
    if impl != "auto" or is_exporting():
        impl = choose_routing(impl)
    if selection_bias is not None:
        checks.check_selection_bias(selection_bias, logits)
    rows_TE = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    T, E = rows_TE.shape
    if not torch.compiler.is_dynamo_compiling() and isinstance(T, int) and T * (rule.top_k or E) > MOST_ROWS:
        check_choices_of(logits, rule.top_k or E)
    if impl == "portable":
        weights, experts = portable_route(rows_TE, selection_bias, rule)
    elif impl == "dense":
        weights, experts = torch.ops.fusedonemoe.route_dense(rows_TE, selection_bias, *rule, library.BUILD)
    else:
        if forward_ad._current_level >= 0:
            refuse_transforms()
        weights, experts = library.route(rows_TE, selection_bias, *rule, library.BUILD)
    if logits.dim() == 2:
        return weights, experts
    return with_leading(weights, logits), with_leading(experts, logits)


def route_product_key(logits: Tensor, top_k: int, *, norm_topk_prob: bool = False, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Turn two halves of router logits into the weights and ids of the best pairs.

    ``la, lb = log_softmax(a), log_softmax(b)``; expert ``(i, j) = i * G + j`` scores ``la_i + lb_j``; the ``K`` best of all
    ``G * G`` are picked, ``w = exp(score)``, then ``w / sum(w)`` if ``norm_topk_prob``. The selection is that of a full sort by
    ``a_i + b_j`` in real arithmetic (up to the last bit of subnormal logits), equal sums by the lower id, though only about
    ``K ln K`` pairs are looked at. The gradient is exact, the selection being a constant.

    Args:
        logits: ``[..., 2, G]`` float64, float32, bfloat16 or float16: ``a`` and ``b``. Any ``G``. Minus infinity masks a key.
        top_k: ``K``, from 1 to ``G * G``; experts per token, best first.
        norm_topk_prob: whether a token's weights sum to 1.
        impl: as for :func:`route`.

    Returns:
        ``weights`` ``[..., K]`` float32 (float64 for float64 logits) and ``experts`` ``[..., K]`` int64.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Source:
        Lample et al. 2019 (arXiv 1907.05242) section 3.2; He 2024, PEER (arXiv 2407.04153) section 2.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 2.5]])
        >>> weights, experts = F.route_product_key(logits, top_k=3, norm_topk_prob=True)
        >>> experts
        tensor([3, 5, 6])
        >>> weights
        tensor([0.5065, 0.3072, 0.1863])
    """
    checks.check_float("logits", logits)
    if logits.dim() < 2 or logits.shape[-2] != 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., 2, G] with G >= 1, got {tuple(logits.shape)}")
    impl = choose_routing(impl)
    checks.check_integer("top_k", top_k)
    G = int(logits.shape[-1])  # the candidates are listed in Python: the number of keys is no symbol of a compiled graph
    if not 1 <= top_k <= G * G:
        raise ValueError(f"top_k must be from 1 to {G * G}, the pairs of {G} keys, got {top_k}")
    check_choices_of(logits, top_k, dims=2)
    pairs = logits.reshape(-1, 2, G)
    if impl == "portable":
        weights, experts = portable_product_key(pairs, top_k, norm_topk_prob)
    else:
        if impl == "auto":
            refuse_transforms()
        op = torch.ops.fusedonemoe.route_product_key_dense if impl == "dense" else library.route_product_key
        weights, experts = op(pairs, top_k, norm_topk_prob, library.BUILD)
    leading = logits.shape[:-2]
    return weights.reshape(*leading, top_k), experts.reshape(*leading, top_k)


def plan(experts: Tensor, num_experts: int) -> Plan:
    """Sort the rows of a routing ``[..., K]`` by expert, without a host synchronisation; ids outside ``[0, E)`` come last.

    Returns:
        :class:`Plan` ``(order, offsets)``: ``order`` ``[N]`` int32 lists the flattened rows ``t * K + j`` by expert, in
        token order inside an expert; expert ``e`` owns ``order[offsets[e]:offsets[e + 1]]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names, or 2**31 rows or more.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.plan(torch.tensor([[1, 0], [1, 7]]), num_experts=2)
        Plan(order=tensor([1, 0, 2, 3], dtype=torch.int32), offsets=tensor([0, 1, 3], dtype=torch.int32))
    """
    checks.check_ids(experts)
    check_rows(experts)
    checks.check_count("num_experts", num_experts)
    return make_plan(experts, num_experts)


def tokens_per_expert(experts: Tensor, num_experts: int) -> Tensor:
    """Count the routed rows of every expert: ``c_e = #{(t, j): experts_tj = e}``, without a host synchronisation.

    Args:
        experts: ids of any shape and integer dtype; ids outside ``[0, num_experts)`` are not counted.
        num_experts: ``E``, the length of the result, int64.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.tokens_per_expert(torch.tensor([[1, 0], [1, 7]]), num_experts=3)
        tensor([1, 2, 0])
    """
    checks.check_ids(experts)
    checks.check_count("num_experts", num_experts)
    return count_tokens(experts, num_experts)


def apply_capacity(experts: Tensor, weights: Tensor, num_experts: int, capacity_factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the routed rows that exceed an expert's capacity.

    ``C = ceil(capacity_factor * T * K / E)``; of the rows of an expert, in the order of the tokens and of the choices within
    a token, those from the ``C``-th on get weight 0 and id -1. The gradient of a dropped weight is 0.

    Args:
        experts: ``[..., K]`` ids of any integer dtype; those outside ``[0, num_experts)`` are left as they are.
        weights: ``[..., K]``, floating.
        num_experts: ``E``.
        capacity_factor: above 0; 1 is enough at perfect balance. 1.1 and 2 / 3 mean just that, not their binary neighbours.

    Returns:
        ``experts`` in their dtype (int64 for an unsigned one, which has no -1), ``weights`` in theirs, and ``dropped``, how
        many rows that were, a 0-dimensional int64 tensor. Nothing waits for it.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Source:
        GShard (arXiv 2006.16668) section 2.2; Switch Transformers (arXiv 2101.03961) section 2.2.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> experts, weights = torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1)
        >>> experts, weights, dropped = F.apply_capacity(experts, weights, num_experts=2, capacity_factor=1.0)
        >>> experts.flatten(), weights.flatten(), dropped
        (tensor([ 0,  0, -1,  1]), tensor([1., 1., 0., 1.]), tensor(1))
    """
    checks.check_choices(experts)
    checks.check_float("weights", weights)
    checks.check_count("num_experts", num_experts)
    checks.check_shape("weights", weights, tuple(experts.shape))
    checks.check_same_device("weights", weights, "experts", experts.device)
    checks.check_number("capacity_factor", capacity_factor)
    if not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor must be above 0 and finite, got {capacity_factor}")
    capacity = math.ceil(capacity_factor * experts.numel() / num_experts * (1 - _ROUNDING))

    order, offsets = make_plan(experts, num_experts)
    routed = in_range(experts, num_experts)
    ids = torch.where(routed, experts.to(torch.int64), 0)
    place = inverse_order(order).reshape(experts.shape) - offsets[ids]
    beyond = routed & (place >= capacity)
    signed = experts if experts.dtype.is_signed else experts.to(torch.int64)
    return torch.where(beyond, -1, signed), torch.where(beyond, 0.0, weights), beyond.sum()
