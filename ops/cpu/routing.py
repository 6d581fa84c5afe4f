"""The router as a function of tensors: compiled kernels that go over each row of logits once, forward and backward."""

from functools import lru_cache

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.cpu.selection import KEYS_PER_ROW, KEYS_PER_THREAD, threads_for
from fusedonemoe.ops.operands import FLOATS, INTEGERS, check_dim, reader_of
from fusedonemoe.ops.rules import NAMES, RouteRule


@lru_cache
def _numbers(rule: RouteRule) -> tuple[list[int], list[float]]:
    """The fields behind ``top_k`` as the kernels read them: integers, where a name is its place among the names, and floats."""
    values = rule._asdict() | {name: names.index(getattr(rule, name)) for name, names in NAMES.items()}
    floats = {name: values.pop(name) for name, kind in RouteRule.__annotations__.items() if kind is float}
    return [*values.values()][1:], [*floats.values()]


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
    threads = 1 if T * (E + KEYS_PER_ROW) < 2 * KEYS_PER_THREAD else threads_for(T, E)  # for few tokens a call costs much
    integers, floats = _numbers(rule)
    native.call("route", logits_TE.dtype, (*addresses, T, E, K, rule.top_k > 0, *integers, threads), floats)
    return weights_TK, experts_TK


def route_backward(dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, rule: RouteRule) -> Tensor:
    """Run :func:`fusedonemoe.ops.route.route_backward` in one kernel; ids outside ``[0, E)`` are skipped."""
    if logits_TE.dim() != 2:
        check_dim("logits", logits_TE, 2)
    dtype, shape = logits_TE.dtype, logits_TE.shape
    choices = (shape[0], rule.top_k or shape[-1])
    operands = (
        (logits_TE, dtype, shape),
        (experts_TK, torch.int64, choices),
        (dweights_TK, torch.float32, choices),
    )
    _check_rule(rule, shape[-1])
    if not native.as_saved(dtype, operands):
        reader = reader_of(logits_TE, "logits")
        check_dim("experts", experts_TK, 2)
        if choices[1] != experts_TK.shape[1]:
            raise ValueError(f"experts must have shape {choices}, got {tuple(experts_TK.shape)}")
        logits_TE = reader.read("logits", logits_TE, shape)
        experts_TK = native.read_as(reader.read("experts", experts_TK, choices, INTEGERS), torch.int64)
        dweights_TK = native.read_as(reader.read("dweights", dweights_TK, choices, FLOATS), torch.float32)
    (T, E), K = shape, choices[1]
    dlogits_TE = torch.empty_like(logits_TE)
    addresses = native.addresses(dweights_TK, logits_TE, experts_TK, dlogits_TE)
    threads = 1 if T * (E + KEYS_PER_ROW) < 2 * KEYS_PER_THREAD else threads_for(T, E)
    integers, floats = _numbers(rule)
    native.call("route_backward", logits_TE.dtype, (*addresses, T, E, K, *integers, threads), floats)
    return dlogits_TE
