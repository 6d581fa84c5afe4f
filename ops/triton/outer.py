"""Weight gradients: ``out[e] = sum_i (w_i left[i])^T right[i]`` over the sorted rows ``i`` of expert ``e``, weighted or not.

Each program owns one tile of one expert's gradient, in a fixed order of summation. Gathered operands are read through ``order //
K``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.plan import Plan
from fusedonemoe.ops.triton.launch import dot_precision, launch
from fusedonemoe.ops.triton.plan import RowPlan
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.ops.triton.tiles import swizzled


@triton.jit
def _source(rows, in_rows, order_ptr, TOP_K: tl.constexpr):
    """Row of the operand in memory: the token of a sorted row, or the row itself (``TOP_K`` 0)."""
    if TOP_K == 0:
        source = rows
    else:
        source = tl.load(order_ptr + rows, mask=in_rows, other=0) // TOP_K
    return source.to(tl.int64)


@triton.jit
def outer_kernel(
    left_ptr,  # [N, A], or [T, A] where gathered
    right_ptr,  # [N, B], or [T, B] where gathered
    weights_ptr,  # [T * K]
    out_ptr,  # [E, A, B]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    A,
    B,
    TOP_K_LEFT: tl.constexpr,
    TOP_K_RIGHT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN_A: tl.constexpr,
    EVEN_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of ``out[e]``; the programs of one expert are neighbours, so its rows are read from L2."""
    blocks_a = tl.cdiv(A, BLOCK_M)
    blocks_b = tl.cdiv(B, BLOCK_N)
    pid = tl.program_id(0)
    expert = pid // (blocks_a * blocks_b)
    block_a, block_b = swizzled(pid % (blocks_a * blocks_b), blocks_a, blocks_b, GROUP_M)
    a = block_a * BLOCK_M + tl.arange(0, BLOCK_M)
    b = block_b * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        in_rows = rows < end
        left_rows = _source(rows, in_rows, order_ptr, TOP_K_LEFT)
        right_rows = _source(rows, in_rows, order_ptr, TOP_K_RIGHT)
        # Both operands are zero behind the expert's last row: what stands there may be NaN, which times zero is NaN.
        in_left = in_rows[:, None] if EVEN_A else in_rows[:, None] & (a < A)[None, :]
        in_right = in_rows[:, None] if EVEN_B else in_rows[:, None] & (b < B)[None, :]
        left = tl.load(left_ptr + left_rows[:, None] * A + a[None, :], mask=in_left, other=0.0)
        right = tl.load(right_ptr + right_rows[:, None] * B + b[None, :], mask=in_right, other=0.0)
        left = tl.trans(left)
        if WEIGHTED:
            row = tl.load(order_ptr + rows, mask=in_rows, other=0)
            weight = tl.load(weights_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * weight[None, :]).to(right.dtype)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    out_ptrs = out_ptr + (expert.to(tl.int64) * A + a[:, None]) * B + b[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(a < A)[:, None] & (b < B)[None, :])


def grouped_outer(
    left: Tensor,
    right: Tensor,
    plan: Plan | RowPlan,
    tile: Tile,
    *,
    gather_left: int | None = None,
    gather_right: int | None = None,
    weights_TK: Tensor | None = None,
) -> Tensor:
    """``out[e] = sum_i (w_i left[i])^T right[i]`` over the sorted rows of each expert, ``[E, A, B]``, summed in float32.

    Left and right are contiguous, sorted, or per token with ``gather_left`` and ``gather_right``, which are K. Weighted rows are
    rounded to the dtype of right before the product.
    """
    A, B, E = left.shape[1], right.shape[1], plan.offsets.shape[0] - 1
    if weights_TK is not None:
        # The rows are weighted in registers, which leaves none for a wider tile.
        tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, 128), num_stages=min(tile.num_stages, 3))
    out_EAB = torch.empty((E, A, B), dtype=left.dtype, device=left.device)
    launch(
        outer_kernel,
        (E * triton.cdiv(A, tile.BLOCK_M) * triton.cdiv(B, tile.BLOCK_N),),
        (left, right, weights_TK, out_EAB, plan.order, plan.offsets),
        (A, B),
        TOP_K_LEFT=gather_left or 0,
        TOP_K_RIGHT=gather_right or 0,
        WEIGHTED=weights_TK is not None,
        EVEN_A=A % tile.BLOCK_M == 0,
        EVEN_B=B % tile.BLOCK_N == 0,
        PRECISION=dot_precision(left.dtype),
        **tile._asdict(),
    )
    return out_EAB
