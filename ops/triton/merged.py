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
from fusedonemoe.ops.operands import read_merged
from fusedonemoe.ops.plan import Plan
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.outer import grouped_outer
from fusedonemoe.ops.triton.plan import RowPlan, from_saved, make_plan
from fusedonemoe.ops.triton.rows import grouped_rows


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
        ``h [T, F]`` in the dtype of x, the row of each choice rounded to it before the sum (not to float16); ``order``;
        ``offsets``.
    """
    tiles = _tiles(experts_TK, proj_EDF)
    plan = make_plan(experts_TK, proj_EDF.shape[0], tiles.down.BLOCK_M)
    rows_NF = grouped_rows(x_TD, proj_EDF, plan, tiles.down, top_k=experts_TK.shape[1], dtype=row_dtype(x_TD.dtype))
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
    reader, (x_TD, experts_TK, weights_TK, proj_EDF) = read_merged(x_TD, experts_TK, weights_TK, proj_EDF, views=True)
    dh_TF = reader.read("dh", dh_TF, (x_TD.shape[0], proj_EDF.shape[2]))
    order, offsets = reader.plan(order, offsets, experts_TK, proj_EDF.shape[0])
    K = experts_TK.shape[1]
    tiles = _tiles(experts_TK, proj_EDF)
    dx, dweights, dproj = (x_TD.new_empty(0) for _ in range(3))
    if needs.proj:
        dproj = grouped_outer(x_TD, dh_TF, Plan(order, offsets), tiles.dup, gather_left=K, gather_right=K, weights_TK=weights_TK)
    if needs.x or needs.weights:
        plan = from_saved(order, offsets, tiles.dx.BLOCK_M)
        q_ND = grouped_rows(dh_TF, proj_EDF.transpose(1, 2), plan, tiles.dx, top_k=K, dtype=row_dtype(x_TD.dtype))
        if needs.weights:
            dweights = routing_gradient(q_ND, x_TD, plan, K, weights_TK.dtype)
        if needs.x:
            dx = combine(q_ND, weights_TK, plan, x_TD.dtype)
    return dx, dweights, dproj
