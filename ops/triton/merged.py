"""The merged up-projection: ``h_t = sum_j w_tj (x_t W_e)``, ``e = experts_tj``, forward and backward.

With ``q = dh W_e^T``: ``dw = <q, x>``, ``dx_t = sum_j w_tj q``, ``dW_e = sum (w x)^T dh``. Rows of x and of dh stay per token in
memory and are read through ``order // K``; the routing weight is multiplied in where a row of x has been read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from fusedonemoe.ops.grouped import MergedNeeds
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.plan import RowPlan, from_saved, make_plan
from fusedonemoe.ops.triton.rows import grouped_rows
from fusedonemoe.ops.triton.tiles import dot_precision, swizzled


def _tiles(experts_TK: Tensor, proj_EDF: Tensor) -> rules.Tiles:
    """The tiles of the layer; all its products of rows have one BLOCK_M."""
    E, D, F = proj_EDF.shape
    rows_per_expert = rules.hint(experts_TK.shape[0]) * experts_TK.shape[1] / E
    return rules.tiles_for(rules.architecture(proj_EDF.device), proj_EDF.dtype, rows_per_expert, D, F, False)


def experts_merged(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, proj_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``h_t = sum_j w_tj (x_t W_e)``, with the plan's ``order`` and ``offsets``.

    Args:
        x_TD: of any strides, bfloat16, float16 or float32.
        experts_TK: any integer dtype; a choice whose id lies outside ``[0, E)`` adds nothing.
        weights_TK: floating.
        proj_EDF: a view with any strides, in the dtype of x.

    Returns:
        ``h [T, F]`` in the dtype of x, the row of each choice rounded to it before the sum; ``order``; ``offsets``.
    """
    tiles = _tiles(experts_TK, proj_EDF)
    plan = make_plan(experts_TK, proj_EDF.shape[0], tiles.down.BLOCK_M)
    rows_NF = grouped_rows(x_TD, proj_EDF, plan, tiles.down, top_k=experts_TK.shape[1])
    return combine(rows_NF, weights_TK, plan, x_TD.dtype), plan.order, plan.offsets


@triton.jit(do_not_specialize=["N"])
def routing_gradient_kernel(
    q_ptr,  # [N, D]
    x_ptr,  # [T, D]
    position_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    out_ptr,  # [T, K]
    N,
    D,
    E,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``<q, x_t>`` of BLOCK_M flattened rows ``t * K + j``; 0 for a row without an expert, whose q was never written."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < N
    num_routed = tl.load(offsets_ptr + E)
    position = tl.load(position_ptr + row, mask=in_rows, other=num_routed)
    routed = position < num_routed
    q_rows_ptr = q_ptr + position.to(tl.int64) * D
    x_rows_ptr = x_ptr + (row // TOP_K).to(tl.int64) * D
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = routed[:, None] & (d < D)[None, :]
        q = tl.load(q_rows_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += q * tl.load(x_rows_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=in_rows)


def routing_gradient(q_ND: Tensor, x_TD: Tensor, plan: RowPlan, top_k: int, dtype: torch.dtype) -> Tensor:
    """``dw_tj = <q[position], x_t>`` summed in float32, ``[T, K]``; 0 for an id outside ``[0, E)``."""
    N, D = q_ND.shape
    dweights_TK = torch.empty((x_TD.shape[0], top_k), dtype=dtype, device=x_TD.device)
    BLOCK_M = 8
    wrap_triton(routing_gradient_kernel)[(triton.cdiv(N, BLOCK_M),)](
        q_ND,
        x_TD,
        plan.position,
        plan.offsets,
        dweights_TK,
        N,
        D,
        plan.offsets.shape[0] - 1,
        TOP_K=top_k,
        BLOCK_M=BLOCK_M,
        BLOCK_D=min(256, triton.next_power_of_2(D)),
        num_warps=4,
        num_stages=1,
    )
    return dweights_TK


@triton.jit
def weighted_outer_kernel(
    left_ptr,  # [T, A]
    right_ptr,  # [T, B]
    weights_ptr,  # [T, K]
    out_ptr,  # [E, A, B]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    A,
    B,
    TOP_K: tl.constexpr,
    EVEN_A: tl.constexpr,
    EVEN_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of ``out[e] = sum_i (w_i left[token_i])^T right[token_i]`` over the sorted rows of an expert."""
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
        position = first + tl.arange(0, BLOCK_K)
        in_rows = position < end
        row = tl.load(order_ptr + position, mask=in_rows, other=0)
        weight = tl.load(weights_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
        token = (row // TOP_K).to(tl.int64)
        # Both operands are zero behind the expert's last row: what stands there may be NaN, which times zero is NaN.
        in_left = in_rows[:, None] if EVEN_A else in_rows[:, None] & (a < A)[None, :]
        in_right = in_rows[:, None] if EVEN_B else in_rows[:, None] & (b < B)[None, :]
        left = tl.load(left_ptr + token[:, None] * A + a[None, :], mask=in_left, other=0.0)
        right = tl.load(right_ptr + token[:, None] * B + b[None, :], mask=in_right, other=0.0)
        weighted = (tl.trans(left).to(tl.float32) * weight[None, :]).to(right.dtype)
        acc = tl.dot(weighted, right, acc, input_precision=PRECISION)

    out_ptrs = out_ptr + (expert.to(tl.int64) * A + a[:, None]) * B + b[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(a < A)[:, None] & (b < B)[None, :])


def weighted_outer(
    left_TA: Tensor, right_TB: Tensor, weights_TK: Tensor, order: Tensor, offsets: Tensor, tile: rules.Tile
) -> Tensor:
    """``out[e] = sum (w_tj left_t)^T right_t`` over the pairs of expert ``e``, in their sorted order.

    Args:
        left_TA: contiguous; its weighted rows are rounded to its dtype before the product.
        right_TB: contiguous, of the same dtype.
        weights_TK: contiguous, floating.
        order: of the plan.
        offsets: of the plan.
        tile: BLOCK_M columns of left by BLOCK_N columns of right, BLOCK_K rows at a time.

    Returns:
        ``[E, A, B]`` in the dtype of left, summed in float32; zeros for an expert without rows.
    """
    A, B, E = left_TA.shape[1], right_TB.shape[1], offsets.shape[0] - 1
    out_EAB = left_TA.new_empty((E, A, B))
    grid = (E * triton.cdiv(A, tile.BLOCK_M) * triton.cdiv(B, tile.BLOCK_N),)
    wrap_triton(weighted_outer_kernel)[grid](
        left_TA,
        right_TB,
        weights_TK,
        out_EAB,
        order,
        offsets,
        A,
        B,
        TOP_K=weights_TK.shape[1],
        EVEN_A=A % tile.BLOCK_M == 0,
        EVEN_B=B % tile.BLOCK_N == 0,
        PRECISION=dot_precision(left_TA.dtype),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        GROUP_M=tile.GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_EAB


def experts_merged_backward(
    dh_TF: Tensor,
    order: Tensor,
    offsets: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    proj_EDF: Tensor,
    needs: MergedNeeds,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`experts_merged`.

    Args:
        dh_TF: of any strides.
        order: of the forward's plan.
        offsets: of the forward's plan.
        needs: which gradients are wanted; what only the others need is neither launched nor allocated.

    Returns:
        Gradients of x, weights and proj, contiguous; a zero-size tensor where not needed.
    """
    K = experts_TK.shape[1]
    tiles = _tiles(experts_TK, proj_EDF)
    dh_TF, x_TD, weights_TK = dh_TF.contiguous(), x_TD.contiguous(), weights_TK.contiguous()
    dx, dweights, dproj = (x_TD.new_empty(0) for _ in range(3))
    if needs.proj:
        # The rows are weighted in registers, which leaves none for a wider tile.
        tile = tiles.dup._replace(BLOCK_N=min(tiles.dup.BLOCK_N, 128), num_stages=min(tiles.dup.num_stages, 3))
        dproj = weighted_outer(x_TD, dh_TF, weights_TK, order, offsets, tile)
    if needs.x or needs.weights:
        plan = from_saved(order, offsets, tiles.dx.BLOCK_M)
        q_ND = grouped_rows(dh_TF, proj_EDF.transpose(1, 2), plan, tiles.dx, top_k=K)
        if needs.weights:
            dweights = routing_gradient(q_ND, x_TD, plan, K, weights_TK.dtype)
        if needs.x:
            dx = combine(q_ND, weights_TK, plan, x_TD.dtype)
    return dx, dweights, dproj
