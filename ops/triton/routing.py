"""Routing on the GPU: logits to weights and expert ids, and the exact backward, one launch each.

A program holds the logits of BLOCK_T tokens whole. The formulas are :mod:`fusedonemoe.ops.route`'s, in float32. Keys are compared
as integers of the same order; K rounds, each removing its winner, the least id of equals, are an exact selection.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.route import softmax_over_all
from fusedonemoe.ops.rules import RouteRule
from fusedonemoe.ops.triton import DTYPES, INTERPRETED
from fusedonemoe.ops.triton.launch import launch
from fusedonemoe.ops.triton.tiles import sigmoid

MAX_EXPERTS = 16384  # a row is held in registers; twice as many spill
# Beyond so many rounds a bitonic sort takes fewer instructions, as far as it can be unrolled in reasonable time.
MAX_ROUNDS = 32
MAX_SORTED = 2048

LOWEST = tl.constexpr(-(2**31))  # of a lane that may no longer be picked
MINUS_INFINITY = tl.constexpr(-0x7F800001)  # what in_order makes of it
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def in_order(key):
    """The int32 with the order of a float32: the bits, their magnitude flipped when negative. Both zeros are one."""
    bits = tl.where(key == 0.0, 0.0, key).to(tl.int32, bitcast=True)
    # The one NaN that would be LOWEST moves up.
    return tl.maximum(tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST + 1)


@triton.jit
def from_order(order):
    """The float32 that :func:`in_order` was given."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def best_of(order, expert):
    """The id of the greatest ``order`` of each row, the least of equals."""
    best = tl.max(order, axis=1)
    return tl.min(tl.where(order == best[:, None], expert, FAR), axis=1)


@triton.jit
def best_ids(order, ids, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, SORT: tl.constexpr):
    """The ids of the greatest K of each row, descending, equal ones by ascending id."""
    if SORT:
        packed = (order.to(tl.int64) << 32) | (ids ^ FAR).to(tl.int64)
        best = (tl.topk(packed, BLOCK_K) & FAR).to(tl.int32) ^ FAR
    else:
        slot = tl.arange(0, BLOCK_K)[None, :]
        best = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
        for j in range(K):
            winner = best_of(order, ids)[:, None]
            best = tl.where(slot == j, winner, best)
            order = tl.where(ids == winner, LOWEST, order)
    return best


@triton.jit
def soft_max(logits):
    """Softmax of each row; lanes that hold minus infinity get 0."""
    powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit
def close_groups(
    order,  # [BLOCK_T, BLOCK_G * BLOCK_S]
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """``order`` with everything outside the best TOPK_GROUP groups at LOWEST."""
    order = tl.reshape(order, [BLOCK_T, BLOCK_G, BLOCK_S])
    best = tl.max(order, axis=2)
    value = from_order(best)
    if SUM_OF_TWO:
        lane = tl.arange(0, BLOCK_S)[None, None, :]
        owner = tl.min(tl.where(order == best[:, :, None], lane, BLOCK_S), axis=2)
        second = from_order(tl.max(tl.where(lane == owner[:, :, None], LOWEST, order), axis=2))
        value = 0.5 * value + 0.5 * second  # the sum of two large keys could be infinite
    group = tl.arange(0, BLOCK_G)[None, :]
    rank = tl.where(group < NUM_GROUPS, in_order(value), LOWEST)
    is_open = tl.zeros([BLOCK_T, BLOCK_G], tl.int32)
    for _ in range(TOPK_GROUP):
        is_winner = group == best_of(rank, group)[:, None]
        is_open = tl.where(is_winner, 1, is_open)
        rank = tl.where(is_winner, LOWEST, rank)
    # Minus infinity counts as the least finite number here, as in the formulation in tensor arithmetic.
    order = tl.where(order == MINUS_INFINITY, MINUS_INFINITY + 1, order)
    order = tl.where(is_open[:, :, None] == 1, order, LOWEST)
    return tl.reshape(order, [BLOCK_T, BLOCK_G * BLOCK_S])


@triton.jit
def _route_kernel(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E], unread without HAS_BIAS
    weights_ptr,  # [T, K]
    experts_ptr,  # [T, K]
    T,
    stride_lt,
    stride_le,
    stride_b,
    E: tl.constexpr,
    K: tl.constexpr,
    SELECT: tl.constexpr,
    SORT: tl.constexpr,
    SIGMOID: tl.constexpr,
    SCORE_KEYS: tl.constexpr,
    OVER_ALL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = row < T
    row = row.to(tl.int64)
    lane = tl.arange(0, BLOCK_G * BLOCK_S)
    group_size: tl.constexpr = E // NUM_GROUPS
    if group_size == BLOCK_S:
        expert, is_expert = lane, lane < E
    else:
        expert = lane // BLOCK_S * group_size + lane % BLOCK_S
        is_expert = (lane % BLOCK_S < group_size) & (expert < E)
    expert, is_expert = expert[None, :], is_expert[None, :]
    row_ptr = logits_ptr + row[:, None] * stride_lt
    logits = tl.load(row_ptr + expert.to(tl.int64) * stride_le, is_row[:, None] & is_expert, other=float("-inf")).to(tl.float32)

    if OVER_ALL:
        peak = tl.max(logits, axis=1)
        total = tl.sum(tl.exp(logits - peak[:, None]), axis=1)

    slot = tl.arange(0, BLOCK_K)[None, :]
    is_stored = is_row[:, None] & (slot < K)
    if SELECT:
        key = logits
        if SCORE_KEYS:
            if SIGMOID:
                key = sigmoid(logits)
            else:
                key = soft_max(logits)
        if HAS_BIAS:
            key += tl.load(bias_ptr + expert * stride_b, is_expert, other=0.0).to(tl.float32)
        order = tl.where(is_expert, in_order(key), LOWEST)
        if NUM_GROUPS > 1:
            order = close_groups(order, NUM_GROUPS, TOPK_GROUP, SUM_OF_TWO, BLOCK_T, BLOCK_G, BLOCK_S)
        experts = best_ids(order, expert, K, BLOCK_T, BLOCK_K, SORT)
        picked = tl.load(row_ptr + experts.to(tl.int64) * stride_le, is_stored, other=float("-inf")).to(tl.float32)
    else:
        experts = slot + tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
        picked = logits

    if OVER_ALL:
        weights = tl.exp(picked - peak[:, None]) / total[:, None]
    elif SIGMOID:
        weights = sigmoid(picked)
        if NORMALIZE:
            weights = weights / (tl.sum(weights, axis=1)[:, None] + EPS)
    else:
        weights = soft_max(picked)
    at = row[:, None] * K + slot
    tl.store(weights_ptr + at, weights * SCALE, is_stored)
    tl.store(experts_ptr + at, experts.to(tl.int64), is_stored)


@triton.jit
def _route_backward_kernel(
    dweights_ptr,  # [T, K]
    logits_ptr,  # [T, E]
    experts_ptr,  # [T, K]
    dlogits_ptr,  # [T, E]
    T,
    stride_dt,
    stride_dk,
    stride_lt,
    stride_le,
    E: tl.constexpr,
    K: tl.constexpr,
    SELECT: tl.constexpr,
    SIGMOID: tl.constexpr,
    OVER_ALL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = row < T
    row = row.to(tl.int64)
    expert = tl.arange(0, BLOCK_E)[None, :]
    is_logit = is_row[:, None] & (expert < E)
    logits_ptr += row[:, None] * stride_lt + expert.to(tl.int64) * stride_le
    logits = tl.load(logits_ptr, is_logit, other=float("-inf")).to(tl.float32)

    # Everything stands in the order of the ids: the gradient of each expert's weight, 0 where it was not picked.
    if SELECT:
        is_picked = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
        dscore = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for j in range(K):
            chosen = tl.load(experts_ptr + row * K + j, is_row, other=-1).to(tl.int32)
            dweight = tl.load(dweights_ptr + row * stride_dt + j * stride_dk, is_row, other=0.0).to(tl.float32)
            is_choice = expert == chosen[:, None]
            is_picked |= is_choice
            dscore = tl.where(is_choice, dweight[:, None], dscore)
    else:
        is_picked = is_logit
        dweights_ptr += row[:, None] * stride_dt + expert.to(tl.int64) * stride_dk
        dscore = tl.load(dweights_ptr, is_logit, other=0.0).to(tl.float32)
    dscore *= SCALE

    if not OVER_ALL:
        logits = tl.where(is_picked, logits, float("-inf"))
    if SIGMOID:
        score = sigmoid(logits)
        if NORMALIZE:
            total = tl.sum(score, axis=1)[:, None] + EPS
            dscore = (dscore - tl.sum(dscore * score, axis=1)[:, None] / total) / total
        dlogits = dscore * score * (1.0 - score)
    else:
        score = soft_max(logits)
        dlogits = score * (dscore - tl.sum(dscore * score, axis=1)[:, None])
    if not OVER_ALL:
        dlogits = tl.where(is_picked, dlogits, 0.0)
    tl.store(dlogits_ptr + row[:, None] * E + expert, dlogits.to(dlogits_ptr.dtype.element_ty), is_logit)


def refusal(dtype: torch.dtype, num_experts: int, n_group: int = 1) -> str | None:
    """Return why these kernels cannot route such logits, or None."""
    if dtype not in DTYPES:
        return f"the routing kernels take float32, bfloat16 and float16 logits, got {dtype}"
    # Both the groups and their sizes are rounded up to powers of two.
    if triton.next_power_of_2(n_group) * triton.next_power_of_2(num_experts // n_group) > MAX_EXPERTS:
        return f"the routing kernels take at most {MAX_EXPERTS} experts, got {num_experts} in {n_group} groups"
    return None


def tokens_and_warps(lanes: int) -> tuple[int, int]:
    """BLOCK_T and num_warps for rows of so many lanes: tiles of about 1024 lanes, 8 in a thread, until one row is more."""
    if INTERPRETED:
        return min(max(512 // lanes, 1), 16), 4
    BLOCK_T = min(max(1024 // lanes, 1), 64)
    return BLOCK_T, min(max(BLOCK_T * lanes // 256, 4), 16)


def tokens_grid(T: int, BLOCK_T: int) -> tuple[int]:
    """Programs of BLOCK_T tokens each, one at least."""
    return (torch.sym_max(triton.cdiv(T, BLOCK_T), 1),)


def route(logits_TE: Tensor, selection_bias_E: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.route.route`, for what :func:`refusal` does not name: weights in float32 and int64 ids."""
    T, E = logits_TE.shape
    K = rule.top_k or E
    BLOCK_G = triton.next_power_of_2(rule.n_group)
    BLOCK_S = triton.next_power_of_2(E // rule.n_group)
    BLOCK_T, num_warps = tokens_and_warps(BLOCK_G * BLOCK_S)
    weights_TK = logits_TE.new_empty((T, K), dtype=torch.float32)
    experts_TK = logits_TE.new_empty((T, K), dtype=torch.int64)
    has_bias = selection_bias_E is not None
    launch(
        _route_kernel,
        tokens_grid(T, BLOCK_T),
        (logits_TE, selection_bias_E, weights_TK, experts_TK),
        (T, *logits_TE.stride(), selection_bias_E.stride(0) if has_bias else 1),
        SORT=K > MAX_ROUNDS and BLOCK_G * BLOCK_S <= MAX_SORTED,
        SCORE_KEYS=rule.score_first and (has_bias or rule.n_group > 1),
        HAS_BIAS=has_bias,
        NUM_GROUPS=rule.n_group,
        TOPK_GROUP=rule.topk_group,
        SUM_OF_TWO=rule.group_score == "top2_sum" and rule.n_group < E,
        BLOCK_T=BLOCK_T,
        BLOCK_G=BLOCK_G,
        BLOCK_S=BLOCK_S,
        BLOCK_K=triton.next_power_of_2(K),
        num_warps=num_warps,
        **_weighting(rule, E),
    )
    return weights_TK, experts_TK


def _weighting(rule: RouteRule, num_experts: int) -> dict[str, Any]:
    """The constants that forward and backward share."""
    return {
        "E": num_experts,
        "K": rule.top_k or num_experts,
        "SELECT": rule.top_k > 0,
        "SIGMOID": rule.scoring == "sigmoid",
        "OVER_ALL": softmax_over_all(rule),
        "NORMALIZE": rule.norm_topk_prob,
        "EPS": rule.norm_eps,
        "SCALE": rule.scale,
    }


def route_backward(dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, rule: RouteRule) -> Tensor:
    """Run :func:`fusedonemoe.ops.route.route_backward`, contiguous, for ids of :func:`route`: no expert twice for a token."""
    T, E = logits_TE.shape
    BLOCK_E = triton.next_power_of_2(E)
    BLOCK_T, num_warps = tokens_and_warps(BLOCK_E)
    dlogits_TE = logits_TE.new_empty((T, E))
    launch(
        _route_backward_kernel,
        tokens_grid(T, BLOCK_T),
        (dweights_TK, logits_TE, experts_TK.contiguous(), dlogits_TE),
        (T, *dweights_TK.stride(), *logits_TE.stride()),
        BLOCK_T=BLOCK_T,
        BLOCK_E=BLOCK_E,
        num_warps=num_warps,
        **_weighting(rule, E),
    )
    return dlogits_TE
