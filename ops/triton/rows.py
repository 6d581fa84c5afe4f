"""One grouped projection of rows in expert order: ``out[i] = rows[i] @ weights[e] (+ bias[e])``, rows gathered or not.

It is the down projection, the gradient of the gathered rows of x, and the merged projection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from fusedonemoe.ops.triton.plan import RowPlan
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.ops.triton.tiles import dot_precision, multiply_rows, swizzled


@triton.jit
def rows_kernel(
    rows_ptr,  # [N, A], or [T, A] when gathered
    weights_ptr,  # [E, A, B]
    bias_ptr,  # [E, B]
    out_ptr,  # [N, B]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    blocks_ptr,  # [num_blocks, 2]
    top_k,
    A,
    B,
    stride_we,
    stride_wa,
    stride_wb,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_A: tl.constexpr,
    EVEN_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program: a block of rows of one expert by BLOCK_N columns of the output."""
    num_columns = tl.cdiv(B, BLOCK_N)
    block, column_block = swizzled(tl.program_id(0), tl.num_programs(0) // num_columns, num_columns, GROUP_M)
    expert = tl.load(blocks_ptr + 2 * block)
    if expert < 0:
        return
    first = tl.load(blocks_ptr + 2 * block + 1)
    end = tl.load(offsets_ptr + expert + 1)

    # A row behind the end reads the last row instead: what it computes is not stored, and the loop needs no mask.
    row = first + tl.arange(0, BLOCK_M)
    source = tl.minimum(row, end - 1)
    if GATHER:
        source = tl.load(order_ptr + source) // top_k
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < B
    weights_ptr += expert.to(tl.int64) * stride_we
    acc = multiply_rows(
        rows_ptr, weights_ptr, source, column, in_columns, A, stride_wa, stride_wb, EVEN_A, EVEN_B, PRECISION, BLOCK_K
    )

    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert.to(tl.int64) * B + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * B + column[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(row < end)[:, None] & in_columns[None, :])


def grouped_rows(
    rows: Tensor,
    weights_EAB: Tensor,
    plan: RowPlan,
    tile: Tile,
    *,
    bias_EB: Tensor | None = None,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``out[i] = rows[i] @ weights[e] (+ bias[e])`` for the sorted rows ``i`` of expert ``e``.

    Args:
        rows: ``[N, A]`` in sorted order, or ``[T, A]`` with ``top_k``: sorted row ``i`` then reads row ``order[i] // top_k``.
        weights_EAB: a view with any strides, in the dtype of ``rows``.
        plan: the schedule of rows, in blocks of ``tile.BLOCK_M``.
        tile: how the product is cut.
        bias_EB: added in float32.
        top_k: choices per token, where the rows are gathered.
        dtype: of the result; that of ``rows`` if None.

    Returns:
        ``[N, B]``, accumulated in float32 and rounded once. Positions from ``offsets[E]`` on are not
        written.
    """
    rows = rows.contiguous()
    A, B = weights_EAB.shape[1:]
    out_NB = rows.new_empty(plan.order.shape[0], B, dtype=dtype)
    grid = (plan.blocks.shape[0] * triton.cdiv(B, tile.BLOCK_N),)
    wrap_triton(rows_kernel)[grid](
        rows,
        weights_EAB,
        out_NB if bias_EB is None else bias_EB.contiguous(),
        out_NB,
        plan.order,
        plan.offsets,
        plan.blocks,
        1 if top_k is None else top_k,
        A,
        B,
        weights_EAB.stride(0),
        weights_EAB.stride(1),
        weights_EAB.stride(2),
        GATHER=top_k is not None,
        HAS_BIAS=bias_EB is not None,
        EVEN_A=A % tile.BLOCK_K == 0,
        EVEN_B=B % tile.BLOCK_N == 0,
        PRECISION=dot_precision(rows.dtype),
        **tile._asdict(),
    )
    return out_NB
