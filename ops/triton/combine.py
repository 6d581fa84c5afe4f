"""From the rows of every choice to one row per token: ``out[t] = sum_j w_tj rows[position[t * K + j]]``, in the order of ``j``.

The row and the weight of a choice whose id lies outside ``[0, E)`` are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.triton.launch import launch
from fusedonemoe.ops.triton.plan import RowPlan


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    rows_ptr,  # [N, B]
    weights_ptr,  # [T, K]
    position_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    out_ptr,  # [T, B]
    T,
    B,
    E,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: BLOCK_T tokens by BLOCK_B columns."""
    num_columns = tl.cdiv(B, BLOCK_B)
    token = tl.program_id(0) // num_columns * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) % num_columns * BLOCK_B + tl.arange(0, BLOCK_B)
    in_tokens = token < T
    in_columns = column < B
    num_rows = tl.load(offsets_ptr + E)
    choice = token.to(tl.int64) * K
    acc = tl.zeros((BLOCK_T, BLOCK_B), tl.float32)
    for j in tl.range(0, K, loop_unroll_factor=UNROLL):
        position = tl.load(position_ptr + choice + j, mask=in_tokens, other=num_rows)
        routed = position < num_rows
        row_ptrs = rows_ptr + position.to(tl.int64)[:, None] * B + column[None, :]
        rows = tl.load(row_ptrs, mask=routed[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            rows *= tl.load(weights_ptr + choice + j, mask=routed, other=0.0).to(tl.float32)[:, None]
        acc += rows
    out_ptrs = out_ptr + token.to(tl.int64)[:, None] * B + column[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_tokens[:, None] & in_columns[None, :])


def combine(rows_NB: Tensor, weights_TK: Tensor | None, plan: RowPlan, dtype: torch.dtype, *, top_k: int | None = None) -> Tensor:
    """``out[t] = sum_j (w_tj) rows[position[t * K + j]]``, ``[T, B]``, summed in float32 in the order of ``j``, rounded once.

    Without weights, of any floating dtype, it is a plain sum of ``top_k`` rows.
    """
    N, B = rows_NB.shape
    if weights_TK is not None:
        top_k, weights_TK = weights_TK.shape[1], weights_TK.contiguous()
    assert top_k is not None
    T = N // top_k
    out_TB = rows_NB.new_empty(T, B, dtype=dtype)
    BLOCK_B = min(triton.next_power_of_2(B), 1024)
    BLOCK_T = 1024 // BLOCK_B
    launch(
        combine_kernel,
        (triton.cdiv(T, BLOCK_T) * triton.cdiv(B, BLOCK_B),),
        (rows_NB, weights_TK, plan.position, plan.offsets, out_TB),
        (T, B, plan.offsets.shape[0] - 1),
        K=top_k,
        WEIGHTED=weights_TK is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_B=BLOCK_B,
        UNROLL=top_k if top_k <= 16 else 8,
        num_warps=4,
        num_stages=1,
    )
    return out_TB
