"""Product keys on the GPU: two halves of logits to weights and expert ids, and the exact backward, one launch each.

The formulas are :mod:`fusedonemoe.ops.product_keys`'s, in float32. A program holds both halves of BLOCK_T tokens. It finds the
best R = min(K, G) keys of each half, adds up the candidates, and selects among them in K rounds by one integer that has the order
of the real sums: the float sum in its upper half, the rounding error of the addition in its lower half.

The backward adds up, for every key, the picked pairs it is in, by comparing: no atomics, always in the order of the picks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.triton import DTYPES
from fusedonemoe.ops.triton.launch import launch
from fusedonemoe.ops.triton.routing import FAR, LOWEST, MAX_ROUNDS, best_ids, in_order, tokens_and_warps, tokens_grid

MAX_KEYS = 4096  # of a half; both are held in registers
MAX_CANDIDATES = 1024  # every round of the selection passes over all of them; K = 128 has 645

LOWEST_PAIR = tl.constexpr(-(2**63))  # of a candidate that may no longer be picked
BIAS = tl.constexpr(2**31)


@triton.jit
def at_ranks(keys, ranks, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """``keys[t, ranks[0, c]]``. In one dimension: Triton 3.7 fails to lay out a gather from rows of several warps."""
    at = ranks + tl.arange(0, BLOCK_T)[:, None] * BLOCK_R
    gathered = tl.gather(tl.reshape(keys, [BLOCK_T * BLOCK_R]), tl.reshape(at, [BLOCK_T * BLOCK_C]), 0)
    return tl.reshape(gathered, [BLOCK_T, BLOCK_C])


@triton.jit
def sum_of_powers(logits, peak):
    """``sum(exp(l - peak))`` of each row."""
    return tl.sum(tl.exp(logits - peak[:, None]), axis=1)


@triton.jit
def _route_kernel(
    logits_ptr,  # [T, 2, G]
    weights_ptr,  # [T, K]
    experts_ptr,  # [T, K]
    T,
    stride_lt,
    stride_lh,
    stride_lg,
    G: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SORT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = row < T
    row = row.to(tl.int64)
    key = tl.arange(0, BLOCK_G)[None, :]
    is_key = key < G
    is_logit = is_row[:, None] & is_key
    a_ptr = logits_ptr + row[:, None] * stride_lt
    b_ptr = a_ptr + stride_lh
    a = tl.load(a_ptr + key.to(tl.int64) * stride_lg, is_logit, other=float("-inf")).to(tl.float32)
    b = tl.load(b_ptr + key.to(tl.int64) * stride_lg, is_logit, other=float("-inf")).to(tl.float32)
    a_keys = best_ids(tl.where(is_key, in_order(a), LOWEST), key, R, BLOCK_T, BLOCK_R, SORT)
    b_keys = best_ids(tl.where(is_key, in_order(b), LOWEST), key, R, BLOCK_T, BLOCK_R, SORT)

    # Candidates in the order of their first rank; rank r has so many that (r + 1) (s + 1) <= K.
    candidate = tl.arange(0, BLOCK_C)[None, :]
    first = tl.zeros([1, BLOCK_C], tl.int32)
    begin = tl.zeros([1, BLOCK_C], tl.int32)
    end = 0
    for rank in range(R):
        end += tl.minimum(K // (rank + 1), G)
        first = tl.where(candidate >= end, rank + 1, first)
        begin = tl.where(candidate >= end, end, begin)
    is_candidate = candidate < C
    i = at_ranks(a_keys, tl.where(is_candidate, first, 0), BLOCK_T, BLOCK_R, BLOCK_C)
    j = at_ranks(b_keys, tl.where(is_candidate, candidate - begin, 0), BLOCK_T, BLOCK_R, BLOCK_C)
    expert = i * G + j

    # Halves, so that no sum overflows. Their products are exact, so that contracting them into the additions changes nothing.
    is_sum = is_row[:, None] & is_candidate
    x = 0.5 * tl.load(a_ptr + i.to(tl.int64) * stride_lg, is_sum, other=0.0).to(tl.float32)
    y = 0.5 * tl.load(b_ptr + j.to(tl.int64) * stride_lg, is_sum, other=0.0).to(tl.float32)
    total = x + y
    from_y = total - x
    error = (x - (total - from_y)) + (y - from_y)
    error = tl.where(tl.abs(total) == float("inf"), tl.maximum(x, y), error)
    order = (in_order(total).to(tl.int64) << 32) + (in_order(error).to(tl.int64) + BIAS)
    order = tl.where(is_candidate, order, LOWEST_PAIR)

    slot = tl.arange(0, BLOCK_K)[None, :]
    experts = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for k in range(K):
        is_best = order == tl.max(order, axis=1)[:, None]
        winner = tl.min(tl.where(is_best, expert, FAR), axis=1)[:, None]
        experts = tl.where(slot == k, winner, experts)
        order = tl.where(is_best & (expert == winner), LOWEST_PAIR, order)

    i = experts // G
    j = experts - i * G
    is_stored = is_row[:, None] & (slot < K)
    picked_a = tl.load(a_ptr + i.to(tl.int64) * stride_lg, is_stored, other=float("-inf")).to(tl.float32)
    picked_b = tl.load(b_ptr + j.to(tl.int64) * stride_lg, is_stored, other=float("-inf")).to(tl.float32)
    peak_a, peak_b = tl.max(a, axis=1), tl.max(b, axis=1)
    weights = tl.exp((picked_a - peak_a[:, None]) + (picked_b - peak_b[:, None]))
    if NORMALIZE:
        whole = tl.sum(tl.where(slot < K, weights, 0.0), axis=1)
    else:
        whole = sum_of_powers(a, peak_a) * sum_of_powers(b, peak_b)
    at = row[:, None] * K + slot
    tl.store(weights_ptr + at, weights / whole[:, None], is_stored)
    tl.store(experts_ptr + at, experts.to(tl.int64), is_stored)


@triton.jit
def picked_pair(row_ptr, expert, is_row, peak_a, peak_b, stride_lh, stride_lg, G: tl.constexpr):
    """Both keys of a pair, and ``exp(a - peak_a + b - peak_b)``."""
    i = expert // G
    j = expert - i * G
    a = tl.load(row_ptr + i * stride_lg, is_row, other=0.0).to(tl.float32)
    b = tl.load(row_ptr + stride_lh + j * stride_lg, is_row, other=0.0).to(tl.float32)
    return i, j, tl.exp((a - peak_a) + (b - peak_b))


@triton.jit
def _route_backward_kernel(
    dweights_ptr,  # [T, K]
    logits_ptr,  # [T, 2, G]
    experts_ptr,  # [T, K]
    dlogits_ptr,  # [T, 2, G]
    T,
    stride_dt,
    stride_dk,
    stride_lt,
    stride_lh,
    stride_lg,
    G: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = row < T
    row = row.to(tl.int64)
    key = tl.arange(0, BLOCK_G)[None, :]
    is_logit = is_row[:, None] & (key < G)
    row_ptr = logits_ptr + row * stride_lt
    a_ptr = row_ptr[:, None] + key.to(tl.int64) * stride_lg
    a = tl.load(a_ptr, is_logit, other=float("-inf")).to(tl.float32)
    b = tl.load(a_ptr + stride_lh, is_logit, other=float("-inf")).to(tl.float32)
    peak_a, peak_b = tl.max(a, axis=1), tl.max(b, axis=1)
    experts_ptr += row * K
    dweights_ptr += row * stride_dt

    whole_a, whole_b = sum_of_powers(a, peak_a), sum_of_powers(b, peak_b)
    whole = whole_a * whole_b
    mean = tl.zeros([BLOCK_T], tl.float32)
    if NORMALIZE:
        whole = tl.zeros([BLOCK_T], tl.float32)
        for k in range(K):
            expert = tl.load(experts_ptr + k, is_row, other=0)
            _, _, power = picked_pair(row_ptr, expert, is_row, peak_a, peak_b, stride_lh, stride_lg, G)
            whole += power
            mean += power * tl.load(dweights_ptr + k * stride_dk, is_row, other=0.0).to(tl.float32)
        mean = mean / whole

    da = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    db = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for k in range(K):
        expert = tl.load(experts_ptr + k, is_row, other=0)
        i, j, power = picked_pair(row_ptr, expert, is_row, peak_a, peak_b, stride_lh, stride_lg, G)
        dscore = power / whole * (tl.load(dweights_ptr + k * stride_dk, is_row, other=0.0).to(tl.float32) - mean)
        da += tl.where(key == i[:, None], dscore[:, None], 0.0)
        db += tl.where(key == j[:, None], dscore[:, None], 0.0)
        total += dscore
    if not NORMALIZE:
        da -= tl.exp(a - peak_a[:, None]) * (total / whole_a)[:, None]
        db -= tl.exp(b - peak_b[:, None]) * (total / whole_b)[:, None]
    da_ptr = dlogits_ptr + row[:, None] * (2 * G) + key
    tl.store(da_ptr, da.to(dlogits_ptr.dtype.element_ty), is_logit)
    tl.store(da_ptr + G, db.to(dlogits_ptr.dtype.element_ty), is_logit)


def count_candidates(top_k: int, num_keys: int) -> int:
    """Count the pairs of ranks, each below ``num_keys``, that have ``(r + 1) (s + 1) <= top_k``."""
    return sum(min(top_k // (rank + 1), num_keys) for rank in range(min(top_k, num_keys)))


def refusal(dtype: torch.dtype, num_keys: int, top_k: int | None = None) -> str | None:
    """Return why these kernels cannot route such logits, or None; without ``top_k``, why not the backward."""
    if dtype not in DTYPES:
        return f"the product-key kernels take float32, bfloat16 and float16 logits, got {dtype}"
    if num_keys > MAX_KEYS:
        return f"the product-key kernels take at most {MAX_KEYS} keys, got {num_keys}"
    if top_k is not None and count_candidates(top_k, num_keys) > MAX_CANDIDATES:
        return f"the product-key kernel takes at most {MAX_CANDIDATES} candidates, top_k={top_k} of {num_keys} keys has more"
    return None


def route_product_key(logits_T2G: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.product_keys.route_product_key`, for what :func:`refusal` does not name."""
    T, _, G = logits_T2G.shape
    R = min(top_k, G)
    C = count_candidates(top_k, G)
    BLOCK_G = triton.next_power_of_2(G)
    BLOCK_C = triton.next_power_of_2(C)
    BLOCK_T, num_warps = tokens_and_warps(max(2 * BLOCK_G, BLOCK_C))
    weights_TK = logits_T2G.new_empty((T, top_k), dtype=torch.float32)
    experts_TK = logits_T2G.new_empty((T, top_k), dtype=torch.int64)
    launch(
        _route_kernel,
        tokens_grid(T, BLOCK_T),
        (logits_T2G, weights_TK, experts_TK),
        (T, *logits_T2G.stride()),
        G=G,
        K=top_k,
        R=R,
        C=C,
        SORT=R > MAX_ROUNDS,
        NORMALIZE=norm_topk_prob,
        BLOCK_T=BLOCK_T,
        BLOCK_G=BLOCK_G,
        BLOCK_R=triton.next_power_of_2(R),
        BLOCK_C=BLOCK_C,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=num_warps,
    )
    return weights_TK, experts_TK


def route_product_key_backward(dweights_TK: Tensor, logits_T2G: Tensor, experts_TK: Tensor, norm_topk_prob: bool) -> Tensor:
    """Run :func:`fusedonemoe.ops.product_keys.route_product_key_backward`; the result is contiguous."""
    T, _, G = logits_T2G.shape
    BLOCK_G = triton.next_power_of_2(G)
    BLOCK_T, num_warps = tokens_and_warps(2 * BLOCK_G)
    dlogits_T2G = logits_T2G.new_empty((T, 2, G))
    launch(
        _route_backward_kernel,
        tokens_grid(T, BLOCK_T),
        (dweights_TK, logits_T2G, experts_TK.contiguous(), dlogits_T2G),
        (T, *dweights_TK.stride(), *logits_T2G.stride()),
        G=G,
        K=experts_TK.shape[1],
        NORMALIZE=norm_topk_prob,
        BLOCK_T=BLOCK_T,
        BLOCK_G=BLOCK_G,
        num_warps=num_warps,
    )
    return dlogits_T2G
