"""A grouped projection with a low-rank one beside it: ``out[i] = rows[i] @ weights[e] + narrow[i] @ factor[e] (+ bias[e])``.

Both sums stand in one float32 accumulator and are rounded once. Into the narrow space, ``narrow[i] = rows[i] @ A[e]``, leads a
plain grouped projection: its few columns are one block.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from fusedonemoe.ops.triton.plan import RowPlan
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.ops.triton.tiles import dot_precision, multiply_rows, swizzled

# The fewest columns and the shortest sum that tl.dot takes. Ranks are about as small.
NARROW = 16
# Of a rank's columns; a larger one takes a loop.
MOST_AT_ONCE = 32


@triton.jit(do_not_specialize=["first_row"])
def low_rank_rows_kernel(
    rows_ptr,  # [N, A], or [T, A] when gathered
    weights_ptr,  # [E, A, B]
    narrow_ptr,  # [N, R]
    factor_ptr,  # [E, R, B]
    bias_ptr,  # [E, B]
    out_ptr,  # [N, B]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    blocks_ptr,  # [num_blocks, 2]
    first_row,
    top_k,
    A,
    B,
    R,
    stride_we,
    stride_wa,
    stride_wb,
    stride_fe,
    stride_fr,
    stride_fb,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_A: tl.constexpr,
    EVEN_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program: a block of rows of one expert by BLOCK_N columns of the output, from first_row on."""
    num_columns = tl.cdiv(B, BLOCK_N)
    block, column_block = swizzled(tl.program_id(0), tl.num_programs(0) // num_columns, num_columns, GROUP_M)
    expert = tl.load(blocks_ptr + 2 * block)
    if expert < 0:
        return
    first = tl.load(blocks_ptr + 2 * block + 1)
    end = tl.load(offsets_ptr + expert + 1)
    if first + BLOCK_M <= first_row:
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
    factor_ptr += expert.to(tl.int64) * stride_fe
    acc = multiply_rows(
        rows_ptr, weights_ptr, source, column, in_columns, A, stride_wa, stride_wb, EVEN_A, EVEN_B, PRECISION, BLOCK_K
    )
    # On top of the same accumulator: a second one would not fit the registers.
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
    stored = (row >= first_row) & (row < end)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=stored[:, None] & in_columns[None, :])


def narrow_tile(tile: Tile) -> Tile:
    """The tile of a grouped projection into the narrow space: as many rows, and few warps for so few columns."""
    return tile._replace(BLOCK_N=NARROW, num_warps=2, num_stages=3)


def low_rank_rows(
    rows: Tensor,
    weights_EAB: Tensor,
    narrow_NR: Tensor,
    factor_ERB: Tensor,
    plan: RowPlan,
    tile: Tile,
    out_NB: Tensor,
    *,
    first_row: int = 0,
    bias_EB: Tensor | None = None,
    top_k: int | None = None,
) -> None:
    """Fills ``out[i] = rows[i] @ weights[e] + narrow[i] @ factor[e] (+ bias[e])`` for the sorted rows ``i >= first_row``.

    Args:
        rows: ``[N, A]`` in sorted order, or ``[T, A]`` with ``top_k``: sorted row ``i`` then reads row ``order[i] // top_k``.
        weights_EAB: a view with any strides, in the dtype of ``rows``.
        narrow_NR: in sorted order, in the dtype of ``rows``.
        factor_ERB: a view with any strides, in the dtype of ``rows``.
        plan: the schedule of rows, in blocks of ``tile.BLOCK_M``.
        tile: how the wide product is cut.
        out_NB: contiguous. Positions from ``offsets[E]`` on are not written.
        first_row: rows before it are not written.
        bias_EB: added in float32.
        top_k: choices per token, where the rows are gathered.
    """
    rows, narrow_NR = rows.contiguous(), narrow_NR.contiguous()
    (_, A, B), R = weights_EAB.shape, narrow_NR.shape[1]
    BLOCK_R = min(max(triton.next_power_of_2(R), NARROW), MOST_AT_ONCE)
    grid = (plan.blocks.shape[0] * triton.cdiv(B, tile.BLOCK_N),)
    wrap_triton(low_rank_rows_kernel)[grid](
        rows,
        weights_EAB,
        narrow_NR,
        factor_ERB,
        out_NB if bias_EB is None else bias_EB.contiguous(),
        out_NB,
        plan.order,
        plan.offsets,
        plan.blocks,
        first_row,
        1 if top_k is None else top_k,
        A,
        B,
        R,
        weights_EAB.stride(0),
        weights_EAB.stride(1),
        weights_EAB.stride(2),
        factor_ERB.stride(0),
        factor_ERB.stride(1),
        factor_ERB.stride(2),
        GATHER=top_k is not None,
        HAS_BIAS=bias_EB is not None,
        EVEN_A=A % tile.BLOCK_K == 0,
        EVEN_B=B % tile.BLOCK_N == 0,
        PRECISION=dot_precision(rows.dtype),
        BLOCK_R=BLOCK_R,
        ONE_BLOCK=R <= BLOCK_R,
        **tile._asdict(),
    )
