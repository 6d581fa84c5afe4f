"""The router as a function of tensors: compiled kernels that go over each row of logits once, forward and backward."""

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.cpu.selection import threads_for
from fusedonemoe.ops.route import RouteRule


def _flags(rule: RouteRule) -> tuple[int, ...]:
    grouping = (rule.n_group, rule.topk_group, rule.group_score == "max")
    return rule.scoring == "sigmoid", rule.score_first, rule.norm_topk_prob, *grouping


def refusal(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot route logits of a dtype; None when they can."""
    return native.refusal(dtype, contiguous=True)


def route(logits_TE: Tensor, selection_bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """As :func:`fusedonemoe.ops.route.route`, in one kernel."""
    logits_TE = logits_TE.contiguous()
    if selection_bias is not None:
        selection_bias = native.read_as(selection_bias.detach(), torch.float32)
    T, E = logits_TE.shape
    K = rule.top_k or E
    weights_TK = torch.empty(T, K, dtype=torch.float32)
    experts_TK = torch.empty(T, K, dtype=torch.int64)
    addresses = native.addresses(logits_TE, selection_bias, weights_TK, experts_TK)
    words = (*addresses, T, E, K, rule.top_k > 0, *_flags(rule), threads_for(T, E))
    native.call("route", logits_TE.dtype, words, (rule.scale, rule.norm_eps))
    return weights_TK, experts_TK


def route_backward(dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, rule: RouteRule) -> Tensor:
    """As :func:`fusedonemoe.ops.route.route_backward`, in one kernel; ids outside ``[0, E)`` are skipped."""
    logits_TE, experts_TK = logits_TE.contiguous(), native.as_ids(experts_TK)
    dweights_TK = native.as_float_weights(dweights_TK)
    T, E = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE)
    addresses = native.addresses(dweights_TK, logits_TE, experts_TK, dlogits_TE)
    words = (*addresses, T, E, experts_TK.shape[1], *_flags(rule), threads_for(T, E))
    native.call("route_backward", logits_TE.dtype, words, (rule.scale, rule.norm_eps))
    return dlogits_TE
