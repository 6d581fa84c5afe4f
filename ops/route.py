"""Routing: logits to weights and expert ids, forward and the exact backward, as plain tensor arithmetic.

Arithmetic is float32 for every logits dtype but float64, which stays float64. Selection is by a total order (score, then
the lower id), so equal scores always give the same experts.
"""

import torch
from torch import Tensor

from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.rules import RouteRule


def routing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that routing computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _score(logits: Tensor, scoring: str) -> Tensor:
    return logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()


def select(keys: Tensor, k: int) -> Tensor:
    """Ids of the ``k`` largest keys of each row, descending, ties to the lower id. ``[T, k]`` int64."""
    if keys.dtype == torch.float64:
        return torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    # torch.topk leaves the order of equal keys open. An integer that carries the key's order in its upper half and the
    # reversed id in its lower half has no equals. Flipping the magnitude bits of negative floats makes the integer order
    # of the bits the order of the numbers; both zeros get the bits of +0.
    bits = torch.where(keys == 0, 0.0, keys).view(torch.int32)
    packed = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    del bits
    last = keys.shape[-1] - 1
    packed.bitwise_left_shift_(32).bitwise_or_(torch.arange(last, -1, -1, device=keys.device))
    return last - (torch.topk(packed, k, dim=-1).values & 0xFFFFFFFF)


def select_for_export(keys: Tensor, k: int) -> Tensor:
    """:func:`select` of float32 keys for formats that cannot look at a number's bits, such as ONNX.

    In float64 each key moves down by its id's share of less than a quarter of the distance to the next float32, so none are
    equal. Zeros have no such distance and get one; infinities become numbers.
    """
    last = keys.shape[-1] - 1
    share = torch.arange(last + 1, device=keys.device).to(torch.float64) * 2.0 ** -(26 + last.bit_length())
    # Built from factors that a float32 can hold: ONNX's exporter makes float32 of numbers on their way.
    one = torch.ones(1, dtype=torch.float64, device=keys.device)
    beyond, least = one * 2.0**100 * 2.0**100, one * 2.0**-100 * 2.0**-100 * 2.0**-100
    wide = torch.maximum(torch.minimum(keys.to(torch.float64), beyond), -beyond)
    return torch.topk(wide - (wide.abs() + least) * share, k, dim=-1).indices


def select_largest(keys: Tensor, k: int, opaque: bool = False) -> Tensor:
    """:func:`select`, or the operator that has a kernel for it; an exported graph keeps to torch's own operators."""
    if keys.dtype == torch.float32 and is_exporting():
        return select_for_export(keys, k)
    if opaque and keys.dtype == torch.float32 and keys.device.type == "cpu":
        return torch.ops.fusedonemoe.select_experts.default(keys, k)
    return select(keys, k)


def _close_groups(keys: Tensor, rule: RouteRule) -> Tensor:
    """Keys with everything outside the best ``topk_group`` groups at minus infinity."""
    grouped = keys.unflatten(-1, (rule.n_group, -1))
    best = min(2 if rule.group_score == "top2_sum" else 1, grouped.shape[-1])
    value = grouped.topk(best, dim=-1).values
    # Two halves are added: the sum of two large keys could be infinite, and then no group would be better than another.
    value = value[..., 0] if best == 1 else (0.5 * value).sum(-1)
    kept = select_largest(value, rule.topk_group)
    is_open = (kept[:, :, None] == torch.arange(rule.n_group, device=keys.device)).any(1)
    # An open group's own minus infinity must still beat a closed group.
    open_keys = grouped.clamp(min=torch.finfo(grouped.dtype).min)
    return open_keys.masked_fill_(~is_open[:, :, None], float("-inf")).flatten(-2)


def select_experts(logits: Tensor, selection_bias: Tensor | None, rule: RouteRule) -> Tensor:
    """Ids ``[T, K]`` int64 of the experts of every token, best first; all experts in id order when ``rule.top_k`` is 0.

    Without a bias and without groups the logits are the keys: the scores are monotone in them.
    """
    E = logits.shape[-1]
    if rule.top_k == 0:
        return torch.arange(E, device=logits.device).expand(logits.shape[0], E).contiguous()
    keys = logits.detach()
    if rule.score_first and (selection_bias is not None or rule.n_group > 1):
        # torch's sigmoid of equal numbers may differ in the last bit: its vectors and the rest of a row are two codes.
        wide = keys.double() if rule.scoring == "sigmoid" else keys
        keys = _score(wide, rule.scoring).to(keys.dtype)
    if selection_bias is not None:
        keys = keys + selection_bias.detach().to(keys.dtype)
    if rule.n_group > 1:
        keys = _close_groups(keys, rule)
    return select_largest(keys, rule.top_k)


def softmax_over_all(rule: RouteRule) -> bool:
    """Return whether unpicked logits take part: in a softmax over all experts that no normalisation cancels."""
    return rule.scoring == "softmax" and rule.score_first and not rule.norm_topk_prob


def route(logits: Tensor, selection_bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """Weights ``[T, K]``, float32 or float64 as the logits, and int64 ids of the selected experts.

    The unnormalised softmax subtracts the maximum of all logits; a logsumexp of large logits would be too inexact.
    """
    if logits.dtype != (dtype := routing_dtype(logits.dtype)):  # a conversion to the same costs a microsecond
        logits = logits.to(dtype)
    experts = select_experts(logits, selection_bias, rule)
    if softmax_over_all(rule):
        weights = logits.softmax(-1).gather(-1, experts)
    else:
        weights = _score(logits.gather(-1, experts), rule.scoring)
        if rule.scoring == "sigmoid" and rule.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + rule.norm_eps)
    return weights * rule.scale if rule.scale != 1.0 else weights, experts


def route_backward(dweights: Tensor, logits: Tensor, experts: Tensor, rule: RouteRule) -> Tensor:
    """Exact gradient ``[T, E]`` of :func:`route` in the dtype of the logits; the selection is a constant."""
    dtype = routing_dtype(logits.dtype)
    wide = logits.to(dtype)
    dscore = dweights.to(dtype) * rule.scale
    if softmax_over_all(rule):
        shares = wide.softmax(-1)
        dshare = dscore * shares.gather(-1, experts)
        return (shares * -dshare.sum(-1, keepdim=True)).scatter_add(-1, experts, dshare).to(logits.dtype)
    score = _score(wide.gather(-1, experts), rule.scoring)
    if rule.scoring == "softmax":
        dpicked = score * (dscore - (dscore * score).sum(-1, keepdim=True))
    else:
        if rule.norm_topk_prob:
            total = score.sum(-1, keepdim=True) + rule.norm_eps
            dscore = (dscore - (dscore * score).sum(-1, keepdim=True) / total) / total
        dpicked = dscore * score * (1 - score)
    return torch.zeros_like(wide).scatter(-1, experts, dpicked).to(logits.dtype)
