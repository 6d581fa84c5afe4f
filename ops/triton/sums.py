"""The backward's plain sums: column sums per expert, which are the bias gradients, and the routing gradient. No atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.triton.launch import launch
from fusedonemoe.ops.triton.plan import RowPlan


@triton.jit
def column_sums_kernel(
    rows_ptr,  # [N, B], or [T, B] where gathered
    weights_ptr,  # [T * K]
    out_ptr,  # [E, B]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    B,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of one expert; its rows in BLOCK_K partial sums that are added at the end."""
    num_columns = tl.cdiv(B, BLOCK_N)
    expert = tl.program_id(0) // num_columns
    column = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < B
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)

    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        in_rows = row < end
        source = tl.load(order_ptr + row, mask=in_rows, other=0) if TOP_K else row
        memory_row = source // TOP_K if TOP_K else source
        row_ptrs = rows_ptr + memory_row.to(tl.int64)[:, None] * B + column[None, :]
        rows = tl.load(row_ptrs, mask=in_rows[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
        if TOP_K:
            rows *= tl.load(weights_ptr + source, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        acc += rows
    tl.store(out_ptr + expert.to(tl.int64) * B + column, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=in_columns)


def column_sums(rows: Tensor, plan: RowPlan, *, weights_TK: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``out[e] = sum_i (w_i) rows[i]`` over the sorted rows of each expert, ``[E, B]``, in float32 and a fixed order.

    ``rows`` are sorted, ``[N, B]``, or with ``weights_TK`` one per token, ``[T, B]``; all are contiguous.
    """
    E, B = plan.offsets.shape[0] - 1, rows.shape[1]
    out_EB = torch.empty((E, B), dtype=dtype or rows.dtype, device=rows.device)
    BLOCK_N = min(64, triton.next_power_of_2(B))
    launch(
        column_sums_kernel,
        (E * triton.cdiv(B, BLOCK_N),),
        (rows, weights_TK, out_EB, plan.order, plan.offsets),
        (B,),
        TOP_K=0 if weights_TK is None else weights_TK.shape[1],
        BLOCK_N=BLOCK_N,
        BLOCK_K=64,
        num_warps=4,
        num_stages=3,
    )
    return out_EB


@triton.jit(do_not_specialize=["N"])
def routing_gradient_kernel(
    tokens_ptr,  # [T, D]
    rows_ptr,  # [E, D], or [N, D] when sorted
    partial_ptr,  # [N, C]
    position_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    experts_ptr,  # [T, K]
    out_ptr,  # [T, K]
    N,
    C,
    D,
    E,
    TOP_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M flattened rows ``t * K + j``; 0 for a row without an expert, whose sorted row was never written."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < N
    num_routed = tl.load(offsets_ptr + E)
    position = tl.load(position_ptr + row, mask=in_rows, other=num_routed)
    routed = position < num_routed

    total = tl.zeros((BLOCK_M,), tl.float32)
    if PARTIAL:
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first in range(0, C, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            partial_ptrs = partial_ptr + position.to(tl.int64)[:, None] * C + column[None, :]
            acc += tl.load(partial_ptrs, mask=routed[:, None] & (column < C)[None, :], other=0.0)
        total = tl.sum(acc, axis=1)
    if ROWS != "none":
        if ROWS == "sorted":
            other_row = position.to(tl.int64)
        else:
            other_row = tl.load(experts_ptr + row, mask=routed, other=0).to(tl.int64)
        token = (row // TOP_K).to(tl.int64)
        products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            loaded = routed[:, None] & (d < D)[None, :]
            values = tl.load(tokens_ptr + token[:, None] * D + d[None, :], mask=loaded, other=0.0).to(tl.float32)
            products += values * tl.load(rows_ptr + other_row[:, None] * D + d[None, :], mask=loaded, other=0.0).to(tl.float32)
        total += tl.sum(products, axis=1)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=in_rows)


def routing_gradient(
    tokens_TD: Tensor,
    experts_TK: Tensor,
    plan: RowPlan,
    dtype: torch.dtype,
    *,
    partial_NC: Tensor | None = None,
    bias_ED: Tensor | None = None,
    sorted_ND: Tensor | None = None,
) -> Tensor:
    """``dw_tj = sum_c partial[position, c] + <token_t, bias_e>``, or ``<token_t, sorted[position]>``, ``[T, K]``.

    It is 0 for an id outside ``[0, E)``. All are contiguous; ``partial`` is float32 and sorted, like ``sorted [N, D]``.
    """
    dweights_TK = torch.empty(experts_TK.shape, dtype=dtype, device=tokens_TD.device)
    N, D, C = plan.order.shape[0], tokens_TD.shape[1], 1 if partial_NC is None else partial_NC.shape[1]
    rows = bias_ED if sorted_ND is None else sorted_ND
    BLOCK_M, BLOCK_D, num_stages = (32, 128, 2) if sorted_ND is None else (8, min(256, triton.next_power_of_2(D)), 1)
    launch(
        routing_gradient_kernel,
        (triton.cdiv(N, BLOCK_M),),
        (tokens_TD, rows, partial_NC, plan.position, plan.offsets, experts_TK, dweights_TK),
        (N, C, D, plan.offsets.shape[0] - 1),
        TOP_K=experts_TK.shape[1],
        PARTIAL=partial_NC is not None,
        ROWS="sorted" if sorted_ND is not None else "none" if bias_ED is None else "expert",
        BLOCK_M=BLOCK_M,
        BLOCK_C=min(16, triton.next_power_of_2(C)),
        BLOCK_D=BLOCK_D,
        num_warps=4,
        num_stages=num_stages,
    )
    return dweights_TK
