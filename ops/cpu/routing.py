"""The router as a function of tensors: compiled kernels that go over each row of logits once, forward and backward."""

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.cpu.selection import threads_for
from fusedonemoe.ops.operands import FLOATS, INTEGERS, check_dim, reader_of
from fusedonemoe.ops.records import RouteRule


def _flags(rule: RouteRule) -> tuple[int, ...]:
    grouping = (rule.n_group, rule.topk_group, rule.group_score == "max")
    return rule.scoring == "sigmoid", rule.score_first, rule.norm_topk_prob, *grouping


def _check_rule(rule: RouteRule, E: int) -> None:
    """Groups and a number of choices that ``E`` experts have."""
    if rule.n_group < 1 or E % rule.n_group or not 1 <= rule.topk_group <= rule.n_group:
        raise ValueError(f"n_group must divide {E} experts and be at least topk_group, got {rule.n_group}, {rule.topk_group}")
    selectable = E // rule.n_group * rule.topk_group
    if not 0 <= rule.top_k <= selectable:
        raise ValueError(f"top_k must be from 0 to {selectable}, got {rule.top_k}")


def route_checked(logits_TE: Tensor, selection_bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """:func:`route` of operands that nobody has looked at."""
    reader = reader_of(logits_TE, "logits")
    E = logits_TE.shape[1]
    _check_rule(rule, E)
    if selection_bias is not None:
        selection_bias = reader.read("selection_bias", selection_bias, (E,), FLOATS)
    return route(reader.read("logits", logits_TE, logits_TE.shape), selection_bias, rule)


def route(logits_TE: Tensor, selection_bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.route.route` in one kernel."""
    logits_TE = logits_TE.contiguous()
    if selection_bias is not None:
        selection_bias = native.read_as(selection_bias.detach(), torch.float32)
    T, E = logits_TE.shape
    K = rule.top_k or E
    weights_TK = torch.empty(T, K, dtype=torch.float32, device="cpu")
    experts_TK = torch.empty(T, K, dtype=torch.int64, device="cpu")
    addresses = native.addresses(logits_TE, selection_bias, weights_TK, experts_TK)
    words = (*addresses, T, E, K, rule.top_k > 0, *_flags(rule), threads_for(T, E))
    native.call("route", logits_TE.dtype, words, (rule.scale, rule.norm_eps))
    return weights_TK, experts_TK


def route_backward(dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, rule: RouteRule) -> Tensor:
    """Run :func:`fusedonemoe.ops.route.route_backward` in one kernel; ids outside ``[0, E)`` are skipped."""
    reader = reader_of(logits_TE, "logits")
    check_dim("experts", experts_TK, 2)
    (T, E), K = logits_TE.shape, experts_TK.shape[1]
    _check_rule(rule, E)
    if (rule.top_k or E) != K:
        raise ValueError(f"experts must have shape {(T, rule.top_k or E)}, got {tuple(experts_TK.shape)}")
    logits_TE = reader.read("logits", logits_TE, (T, E))
    experts_TK = native.as_ids(reader.read("experts", experts_TK, (T, K), INTEGERS))
    dweights_TK = native.as_float_weights(reader.read("dweights", dweights_TK, (T, K), FLOATS))
    dlogits_TE = torch.empty_like(logits_TE)
    addresses = native.addresses(dweights_TK, logits_TE, experts_TK, dlogits_TE)
    words = (*addresses, T, E, experts_TK.shape[1], *_flags(rule), threads_for(T, E))
    native.call("route_backward", logits_TE.dtype, words, (rule.scale, rule.norm_eps))
    return dlogits_TE
