"""The gradient of a table ``[E, D]`` whose rows are experts: ``out_e = sum over the pairs (t, j) of e of c_tj rows_t``.

The pairs are sorted by expert (a stable sort), each expert walks its own in that order, and every row of the table is written
once. A *hot* expert, one with more than SEGMENT pairs, is cut where multiples of SEGMENT fall among the sorted positions:

    sorted positions   0 ......... S ......... 2S ......... 3S
    experts            aa bbbbbbbbb|bbbbbbbbbbb|bbb c dddddd|ddddddd e      b and d are hot

At most two hot experts share a window of S positions, as each holds its first or its last: the slots are ``2 * window`` for the
expert at its start and ``2 * window + 1`` for another at its end. A second pass adds up their float32 sums in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops import plan as torch_plan
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.launch import launch
from fusedonemoe.ops.triton.plan import MAX_EXPERTS, make_plan

WARP = 32
VECTORS = 8  # of 16 bytes, that a thread loads at once
# Segments enough for every multiprocessor, and few enough for their float32 rows to stay small beside the table.
SHORTEST_SEGMENT, SEGMENTS = 64, 2048


def vectors_at_once(length: int) -> int:
    """Vectors that a thread loads at once; fewer of rows that begin anywhere, each element of which has an address of its own."""
    return VECTORS // 2 if length % 16 else VECTORS


def segment_length(pairs: int) -> int:
    """The power of two that cuts ``pairs`` into about SEGMENTS segments."""
    return max(SHORTEST_SEGMENT, triton.next_power_of_2(triton.cdiv(pairs, SEGMENTS)))


def rows_plan(experts_TK: Tensor, num_experts: int) -> torch_plan.Plan:
    """The stable order of the pairs by expert; the blocks that a row kernel wants besides are not made for many experts."""
    if num_experts > MAX_EXPERTS:
        return torch_plan.make_plan(experts_TK, num_experts)
    plan = make_plan(experts_TK, num_experts, SHORTEST_SEGMENT)
    return torch_plan.Plan(plan.order, plan.offsets)


@triton.jit
def sum_of_pairs(
    rows_ptr,  # [T, D]
    factors_ptr,  # [T, K]
    order_ptr,  # [N]
    begin,  # [ABREAST * LISTS]
    end,  # [ABREAST * LISTS]
    column,  # [BLOCK_D]
    D,
    K: tl.constexpr,
    EVEN_D: tl.constexpr,
    LISTS: tl.constexpr,
    ABREAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """LISTS sums, each over its own sorted positions, ABREAST at a time. Lane ``i`` of begin and end is of list ``i % LISTS``."""
    lane = tl.arange(0, ABREAST * LISTS) // LISTS
    acc = tl.zeros((LISTS, BLOCK_D), tl.float32)
    for first in range(0, tl.max(end - begin, 0), ABREAST):
        position = begin + first + lane
        here = position < end
        pair = tl.load(order_ptr + position, mask=here, other=0)
        loaded = here[:, None] if EVEN_D else here[:, None] & (column < D)[None, :]
        rows = tl.load(rows_ptr + (pair // K).to(tl.int64)[:, None] * D + column[None, :], mask=loaded, other=0.0)
        factor = tl.load(factors_ptr + pair, mask=here, other=0.0).to(tl.float32)
        acc += tl.sum(tl.reshape(rows.to(tl.float32) * factor[:, None], (ABREAST, LISTS, BLOCK_D)), 0)
    return acc


@triton.jit
def experts_kernel(
    rows_ptr,  # [T, D]
    factors_ptr,  # [T, K]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    out_ptr,  # [E, D]
    E,
    D,
    K: tl.constexpr,
    EVEN_D: tl.constexpr,
    SEGMENT: tl.constexpr,
    LISTS: tl.constexpr,
    ABREAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of LISTS experts that are not hot."""
    first = tl.program_id(0) * LISTS
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    of_lane = first + tl.arange(0, ABREAST * LISTS) % LISTS
    begin = tl.load(offsets_ptr + of_lane, mask=of_lane < E, other=0)
    end = tl.load(offsets_ptr + of_lane + 1, mask=of_lane < E, other=0)
    end = tl.where(end - begin > SEGMENT, begin, end)
    acc = sum_of_pairs(rows_ptr, factors_ptr, order_ptr, begin, end, column, D, K, EVEN_D, LISTS, ABREAST, BLOCK_D)
    expert = first + tl.arange(0, LISTS)
    pairs = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=0) - tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    stored = ((expert < E) & (pairs <= SEGMENT))[:, None] & (column < D)[None, :]
    tl.store(out_ptr + expert.to(tl.int64)[:, None] * D + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def segments_kernel(
    rows_ptr,  # [T, D]
    experts_ptr,  # [T, K]
    factors_ptr,  # [T, K]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    partial_ptr,  # [2 * windows, D]
    E,
    D,
    K: tl.constexpr,
    EVEN_D: tl.constexpr,
    SEGMENT: tl.constexpr,
    LISTS: tl.constexpr,
    ABREAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of the sum of one slot, if it is a hot expert's; LISTS parts of it side by side."""
    slot = tl.program_id(0)
    window = slot // 2 * SEGMENT
    probe = window + slot % 2 * (SEGMENT - 1)
    if probe >= tl.load(offsets_ptr + E):
        return
    expert = tl.load(experts_ptr + tl.load(order_ptr + probe)).to(tl.int64)
    expert_begin = tl.load(offsets_ptr + expert)
    expert_end = tl.load(offsets_ptr + expert + 1)
    if (expert_end - expert_begin <= SEGMENT) | ((slot % 2 == 1) & (expert_begin <= window)):
        return
    begin = tl.maximum(expert_begin, window)
    end = tl.minimum(expert_end, window + SEGMENT)
    part = tl.cdiv(end - begin, LISTS)
    part_begin = begin + tl.arange(0, ABREAST * LISTS) % LISTS * part
    part_end = tl.minimum(part_begin + part, end)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = sum_of_pairs(rows_ptr, factors_ptr, order_ptr, part_begin, part_end, column, D, K, EVEN_D, LISTS, ABREAST, BLOCK_D)
    tl.store(partial_ptr + slot.to(tl.int64) * D + column, tl.sum(acc, 0), mask=column < D)


@triton.jit
def add_segments_kernel(
    experts_ptr,  # [T, K]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    partial_ptr,  # [2 * windows, D]
    out_ptr,  # [E, D]
    E,
    D,
    SEGMENT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of the hot expert that begins in a window, if one does; it then holds the window's last position."""
    window = tl.program_id(0)
    last = window * SEGMENT + SEGMENT - 1
    if last >= tl.load(offsets_ptr + E):
        return
    expert = tl.load(experts_ptr + tl.load(order_ptr + last)).to(tl.int64)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    if (end - begin <= SEGMENT) | (begin < window * SEGMENT):
        return
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for first in range(window, tl.cdiv(end, SEGMENT), BLOCK_S):
        of_row = first + tl.arange(0, BLOCK_S)
        slot = 2 * of_row + (begin > of_row * SEGMENT).to(tl.int32)
        loaded = (of_row * SEGMENT < end)[:, None] & (column < D)[None, :]
        acc += tl.load(partial_ptr + slot.to(tl.int64)[:, None] * D + column[None, :], mask=loaded, other=0.0)
    tl.store(out_ptr + expert * D + column, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=column < D)


def table_gradient(
    rows_TD: Tensor, experts_TK: Tensor, factors_TK: Tensor, plan: torch_plan.Plan, dtype: torch.dtype, num_experts: int
) -> Tensor:
    """``out_e = sum_tj c_tj rows_t`` over the pairs whose id is ``e``, ``[E, D]``, in float32 and a fixed order, rounded once.

    Rows and factors are contiguous. ``num_experts``, of the whole table, decides the order of sums: some experts' rows have the
    bits of all. Hot experts' segments take ``2 (N / SEGMENT + 1)`` rows of float32.
    """
    D, K = rows_TD.shape[1], experts_TK.shape[1]
    E, N = plan.offsets.shape[0] - 1, plan.order.shape[0]
    pairs = rules.hint(N)
    segment = segment_length(pairs)
    out_ED = torch.empty((E, D), dtype=dtype, device=rows_TD.device)
    if isinstance(E, int) and E == 0:
        return out_ED

    vector = 16 // rows_TD.element_size()
    BLOCK_D = min(WARP * vector, max(triton.next_power_of_2(D), 16))
    narrow = WARP * vector // BLOCK_D  # rows that a warp reads in one vector of each thread
    # Where most experts have a pair or two, several share a program, or launching programs would take the longest.
    lists = 1 if pairs >= 8 * num_experts else 2 if pairs >= 2 * num_experts else 4
    column_blocks = triton.cdiv(D, BLOCK_D)
    cut = {"SEGMENT": segment, "BLOCK_D": BLOCK_D, "num_stages": 1}
    sizes = {"K": K, "EVEN_D": D % BLOCK_D == 0}
    launch(
        experts_kernel,
        (triton.cdiv(E, lists * narrow), column_blocks),
        (rows_TD, factors_TK, plan.order, plan.offsets, out_ED),
        (E, D),
        LISTS=lists * narrow,
        ABREAST=vectors_at_once(D) // lists,
        num_warps=1,
        **sizes,
        **cut,
    )
    if isinstance(N, int) and segment >= N:
        return out_ED  # no expert can be hot; of a symbolic N nobody may ask

    windows = N // segment + 1
    # Flat, as torch asks of a matrix whether it has one row, which would guard on a symbolic number of windows.
    partial = torch.empty(2 * windows * D, dtype=torch.float32, device=rows_TD.device)
    launch(
        segments_kernel,
        (2 * windows, column_blocks),
        (rows_TD, experts_TK, factors_TK, plan.order, plan.offsets, partial),
        (E, D),
        LISTS=4 * narrow,
        ABREAST=vectors_at_once(D),
        num_warps=4,
        **sizes,
        **cut,
    )
    hot = (experts_TK, plan.order, plan.offsets, partial, out_ED)
    launch(add_segments_kernel, (windows, column_blocks), hot, (E, D), BLOCK_S=4 * narrow, num_warps=4, **cut)
    return out_ED
