"""The backward's plain sums: column sums per expert, which are the bias gradients, and the routing gradient. No atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

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
    """``out[e] = sum_i (w_i) rows[i]`` over the sorted rows of each expert, in float32 and a fixed order.

    Args:
        rows: ``[N, B]`` in sorted order, or with ``weights_TK`` one row per token, ``[T, B]``; contiguous.
        plan: of the routing.
        weights_TK: ``[T, K]`` contiguous, the factor of each row.
        dtype: of the result, by default that of ``rows``.

    Returns:
        ``[E, B]``, zeros for an expert without rows.
    """
    E, B = plan.offsets.shape[0] - 1, rows.shape[1]
    out_EB = torch.empty((E, B), dtype=dtype or rows.dtype, device=rows.device)
    BLOCK_N = min(64, triton.next_power_of_2(B))
    wrap_triton(column_sums_kernel)[(E * triton.cdiv(B, BLOCK_N),)](
        rows,
        rows if weights_TK is None else weights_TK,
        out_EB,
        plan.order,
        plan.offsets,
        B,
        TOP_K=0 if weights_TK is None else weights_TK.shape[1],
        BLOCK_N=BLOCK_N,
        BLOCK_K=64,
        num_warps=4,
        num_stages=3,
    )
    return out_EB


@triton.jit(do_not_specialize=["N"])
def routing_gradient_kernel(
    partial_ptr,  # [N, C]
    position_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    experts_ptr,  # [T, K]
    dy_ptr,  # [T, D]
    bias_ptr,  # [E, D]
    out_ptr,  # [T, K]
    N,
    C,
    D,
    E,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M flattened rows ``t * K + j``."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < N
    num_routed = tl.load(offsets_ptr + E)
    position = tl.load(position_ptr + row, mask=in_rows, other=num_routed)
    routed = position < num_routed

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        partial_ptrs = partial_ptr + position.to(tl.int64)[:, None] * C + column[None, :]
        acc += tl.load(partial_ptrs, mask=routed[:, None] & (column < C)[None, :], other=0.0)
    total = tl.sum(acc, axis=1)
    if HAS_BIAS:
        expert = tl.load(experts_ptr + row, mask=routed, other=0).to(tl.int64)
        token = (row // TOP_K).to(tl.int64)
        products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            loaded = routed[:, None] & (d < D)[None, :]
            dy = tl.load(dy_ptr + token[:, None] * D + d[None, :], mask=loaded, other=0.0).to(tl.float32)
            products += dy * tl.load(bias_ptr + expert[:, None] * D + d[None, :], mask=loaded, other=0.0).to(tl.float32)
        total += tl.sum(products, axis=1)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=in_rows)


def routing_gradient(
    partial_NC: Tensor, dy_TD: Tensor, experts_TK: Tensor, down_bias_ED: Tensor | None, plan: RowPlan, dtype: torch.dtype
) -> Tensor:
    """``dw_tj = sum_c partial[position, c] + <dy_t, bdown_e>``, 0 for an id outside ``[0, E)``.

    Args:
        partial_NC: ``[N, C]`` float32, sorted rows.
        dy_TD: ``[T, D]`` contiguous.
        experts_TK: ids, contiguous.
        down_bias_ED: ``[E, D]`` contiguous, or None.
        plan: of the routing.
        dtype: of the result.

    Returns:
        ``[T, K]``.
    """
    dweights_TK = torch.empty(experts_TK.shape, dtype=dtype, device=dy_TD.device)
    N, C = partial_NC.shape
    BLOCK_M, BLOCK_C = 32, min(16, triton.next_power_of_2(C))
    wrap_triton(routing_gradient_kernel)[(triton.cdiv(N, BLOCK_M),)](
        partial_NC,
        plan.position,
        plan.offsets,
        experts_TK,
        dy_TD,
        dy_TD if down_bias_ED is None else down_bias_ED,
        dweights_TK,
        N,
        C,
        dy_TD.shape[1],
        plan.offsets.shape[0] - 1,
        TOP_K=experts_TK.shape[1],
        HAS_BIAS=down_bias_ED is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        BLOCK_D=128,
        num_warps=4,
        num_stages=2,
    )
    return dweights_TK
