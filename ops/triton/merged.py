"""The merged up-projection: ``h_t = sum_j w_tj (x_t W_e)``, ``e = experts_tj``, forward and backward.

With ``q = dh W_e^T``: ``dw = <q, x>``, ``dx_t = sum_j w_tj q``, ``dW_e = sum (w x)^T dh``.
"""

from torch import Tensor

from fusedonemoe.ops.grouped import MergedNeeds
from fusedonemoe.ops.operands import check_dim, reader_of
from fusedonemoe.ops.plan import Plan
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.outer import grouped_outer
from fusedonemoe.ops.triton.plan import from_saved, make_plan
from fusedonemoe.ops.triton.rows import grouped_rows
from fusedonemoe.ops.triton.sums import routing_gradient


def _tiles(experts_TK: Tensor, proj_EDF: Tensor) -> rules.Tiles:
    """The tiles of the layer; all its products of rows have one BLOCK_M."""
    T, K = experts_TK.shape
    return rules.tiles_of(proj_EDF, rules.hint(T) * K, proj_EDF.shape, gated=False)


def experts_merged(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, proj_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``h_t = sum_j w_tj (x_t W_e)`` with the plan's ``order`` and ``offsets``, for tensors of any strides.

    The row of each choice is rounded to the dtype of x before the sum, but not to float16.
    """
    tiles = _tiles(experts_TK, proj_EDF)
    plan = make_plan(experts_TK, proj_EDF.shape[0], tiles.down.BLOCK_M)
    rows_NF = grouped_rows(x_TD, proj_EDF, plan, tiles.down, top_k=experts_TK.shape[1], dtype=row_dtype(x_TD.dtype))
    return combine(rows_NF, weights_TK, plan, x_TD.dtype), plan.order, plan.offsets


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
    """Gradients of :func:`experts_merged` with respect to x, weights and proj, contiguous; of size zero where not wanted."""
    reader = reader_of(x_TD)
    check_dim("proj", proj_EDF, 3)
    (T, D), (E, _, F) = x_TD.shape, proj_EDF.shape
    experts_TK, weights_TK = reader.routing(experts_TK, weights_TK, T)
    proj_EDF = reader.read("proj", proj_EDF, (E, D, F), views=True)
    x_TD, dh_TF = reader.read("x", x_TD, (T, D)), reader.read("dh", dh_TF, (T, F))
    order, offsets = reader.plan(order, offsets, experts_TK, E)
    K = experts_TK.shape[1]
    tiles = _tiles(experts_TK, proj_EDF)
    dx, dweights, dproj = (x_TD.new_empty(0) for _ in range(3))
    if needs.proj:
        dproj = grouped_outer(x_TD, dh_TF, Plan(order, offsets), tiles.dup, gather_left=K, gather_right=K, weights_TK=weights_TK)
    if needs.x or needs.weights:
        plan = from_saved(order, offsets, tiles.dx.BLOCK_M)
        q_ND = grouped_rows(dh_TF, proj_EDF.transpose(1, 2), plan, tiles.dx, top_k=K, dtype=row_dtype(x_TD.dtype))
        if needs.weights:
            dweights = routing_gradient(x_TD, experts_TK, plan, weights_TK.dtype, sorted_ND=q_ND)
        if needs.x:
            dx = combine(q_ND, weights_TK, plan, x_TD.dtype)
    return dx, dweights, dproj
