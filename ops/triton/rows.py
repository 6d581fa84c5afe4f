"""Grouped projections of rows in expert order: ``out[i] = rows[i] @ weights[e] (+ narrow[i] @ factor[e]) (+ bias[e])``.

Both products are summed in one float32 accumulator and rounded once. A projection into the narrow space of an adapter,
``narrow[i] = rows[i] @ A[e]``, has no second product: its few columns are one block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.triton.launch import launch_blocks
from fusedonemoe.ops.triton.plan import RowPlan
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.ops.triton.tiles import multiply_rows, swizzled

# The fewest columns and the shortest sum that tl.dot takes. Ranks are about as small.
NARROW = 16
# Of a rank's columns; a larger one takes a loop.
MOST_AT_ONCE = 32


@triton.jit(do_not_specialize=["first_row"])
def rows_kernel(
    rows_ptr,  # [N, A], or [T, A] when gathered
    weights_ptr,  # [E, A, B]
    bias_ptr,  # [E, B]
    narrow_ptr,  # [N, R]
    factor_ptr,  # [E, R, B]
    out_ptr,  # [N, B]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    blocks_ptr,  # [num_blocks, 2]
    A,
    B,
    R,
    first_row,
    top_k,
    stride_we,
    stride_wa,
    stride_wb,
    stride_fe,
    stride_fr,
    stride_fb,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program: a block of rows of one expert by BLOCK_N columns of the output; of a LOW_RANK sum, rows from first_row on."""
    num_columns = tl.cdiv(B, BLOCK_N)
    block, column_block = swizzled(tl.program_id(0), tl.num_programs(0) // num_columns, num_columns, GROUP_M)
    expert = tl.load(blocks_ptr + 2 * block)
    if expert < 0:
        return
    first = tl.load(blocks_ptr + 2 * block + 1)
    end = tl.load(offsets_ptr + expert + 1)
    if LOW_RANK and first + BLOCK_M <= first_row:
        return

    # A row behind the end reads the last row instead: what it computes is not stored, and the loops need no mask.
    row = first + tl.arange(0, BLOCK_M)
    place = tl.minimum(row, end - 1)
    source = place
    if GATHER:
        source = tl.load(order_ptr + place) // top_k
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < B
    weights_ptr += expert.to(tl.int64) * stride_we
    acc = multiply_rows(
        rows_ptr, weights_ptr, source, column, in_columns, A, stride_wa, stride_wb, EVEN_K, EVEN_N, PRECISION, BLOCK_K
    )
    if LOW_RANK:
        # On top of the same accumulator: a second one would not fit the registers.
        factor_ptr += expert.to(tl.int64) * stride_fe
        depth = tl.arange(0, BLOCK_R)
        narrow_ptrs = narrow_ptr + place.to(tl.int64)[:, None] * R + depth[None, :]
        factor_ptrs = factor_ptr + depth.to(tl.int64)[:, None] * stride_fr + column.to(tl.int64)[None, :] * stride_fb
        if ONE_BLOCK:
            narrow = tl.load(narrow_ptrs, mask=depth[None, :] < R, other=0.0)
            factor = tl.load(factor_ptrs, mask=(depth[:, None] < R) & in_columns[None, :], other=0.0)
            acc = tl.dot(narrow, factor, acc, input_precision=PRECISION)
        else:
            for k in range(0, R, BLOCK_R):
                narrow = tl.load(narrow_ptrs, mask=depth[None, :] < R - k, other=0.0)
                factor = tl.load(factor_ptrs, mask=(depth[:, None] < R - k) & in_columns[None, :], other=0.0)
                acc = tl.dot(narrow, factor, acc, input_precision=PRECISION)
                narrow_ptrs += BLOCK_R
                factor_ptrs += BLOCK_R * stride_fr

    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert.to(tl.int64) * B + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * B + column[None, :]
    stored = row < end
    if LOW_RANK:
        stored = (row >= first_row) & stored
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=stored[:, None] & in_columns[None, :])


def grouped_rows(
    rows: Tensor,  # [N, A] in sorted order, or [T, A] with top_k: sorted row i then reads row order[i] // top_k
    weights_EAB: Tensor,  # any strides, in the dtype of rows
    plan: RowPlan,  # in blocks of tile.BLOCK_M
    tile: Tile,
    *,
    bias_EB: Tensor | None = None,  # added in float32
    low_rank: tuple[Tensor, Tensor] | None = None,  # narrow [N, R] in sorted order, and factor [E, R, B] of any strides
    top_k: int | None = None,
    first_row: int = 0,  # rows before it need not be written, and with low_rank are not
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``out[i] = rows[i] @ weights[e] (+ narrow[i] @ factor[e]) (+ bias[e])`` for the sorted rows ``i`` of expert ``e``.

    ``[N, B]``, accumulated in float32 and rounded once. Positions from ``offsets[E]`` on are not written.
    """
    rows = rows.contiguous()
    A, B = weights_EAB.shape[1:]
    narrow, factor, R, strides = None, None, 0, (0, 0, 0)
    if low_rank is not None:
        narrow, factor = low_rank[0].contiguous(), low_rank[1]
        R, strides = narrow.shape[1], factor.stride()
    BLOCK_R = min(max(triton.next_power_of_2(R), NARROW), MOST_AT_ONCE)
    out_NB = rows.new_empty(plan.order.shape[0], B, dtype=dtype)
    launch_blocks(
        rows_kernel,
        plan,
        tile,
        (rows, weights_EAB, None if bias_EB is None else bias_EB.contiguous(), narrow, factor, out_NB),
        A,
        B,
        (R, first_row, 1 if top_k is None else top_k, *weights_EAB.stride(), *strides),
        GATHER=top_k is not None,
        HAS_BIAS=bias_EB is not None,
        LOW_RANK=low_rank is not None,
        ONE_BLOCK=R <= BLOCK_R,
        BLOCK_R=BLOCK_R,
    )
    return out_NB
