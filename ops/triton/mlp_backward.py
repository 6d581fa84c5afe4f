"""Backward of the expert layer as Triton kernels: the launches, their order, and which of them a frozen weight saves.

SonicMoE's algebra (arXiv 2512.14080), as in ``ops/grouped.py``: with ``dA' = dy Wdown_e`` and ``A = act(z)``,
``dw = <dA', A> + <dy, bdown_e>``, ``dz = act'(z) (w dA')``, ``dWdown_e = sum dy^T (w A)``, ``dWup_e = sum dz^T x``,
``dx_t = sum_j dz Wup_e``; bias gradients are column sums. Gathered rows of x and dy are never written to memory.
"""

from torch import Tensor

from fusedonemoe.ops.grouped import MLPNeeds
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.records import PLAIN, Activation
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.dh import hidden_gradient
from fusedonemoe.ops.triton.outer import grouped_outer
from fusedonemoe.ops.triton.plan import RowPlan, from_saved
from fusedonemoe.ops.triton.rows import grouped_rows
from fusedonemoe.ops.triton.sums import column_sums, routing_gradient
from fusedonemoe.ops.triton.up import pre_activation


def _all_rows(
    z: Tensor,
    x_TD: Tensor,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    plan: RowPlan,
    top_k: int,
    act: Activation,
    save_percent: int,
    tile: rules.Tile,
) -> Tensor:
    """``[N, G]`` pre-activations: the saved rows copied, the rest computed again."""
    z_NG = z.new_empty(plan.order.shape[0], up_EGD.shape[1])
    kept = z.shape[0]
    if save_percent > 0:
        z_NG[:kept].copy_(z)
    pre_activation(x_TD, up_EGD, up_bias_EG, plan, top_k, act, tile, z_NG, kept)
    return z_NG


def experts_mlp_backward(
    dy_TD: Tensor,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    save_percent: int,
    needs: MLPNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the expert layer, as ``ops.grouped.experts_mlp_backward`` defines them.

    Args:
        dy_TD: of any strides.
        z: the first ``floor(N * save_percent / 100)`` sorted pre-activations.
        order: of the forward's plan.
        offsets: of the forward's plan.
        needs: which gradients are wanted; what only the others need is neither launched nor allocated.

    Returns:
        Gradients of x, weights, up, down, up bias and down bias, contiguous; a zero-size tensor where not needed.
    """
    N, K = order.shape[0], experts_TK.shape[1]
    tiles = rules.tiles_of(x_TD, N, down_EDF.shape, gated=act.layout != PLAIN)
    plan = from_saved(order, offsets, tiles.dh.BLOCK_M)
    dy_TD, x_TD, weights_TK = dy_TD.contiguous(), x_TD.contiguous(), weights_TK.contiguous()
    dx, dweights, dup, ddown, dup_bias, ddown_bias = (x_TD.new_empty(0) for _ in range(6))

    if needs.down_bias:
        assert down_bias_ED is not None
        ddown_bias = column_sums(dy_TD, plan, weights_TK=weights_TK, dtype=down_bias_ED.dtype)
    needs_dz = needs.x or needs.up or needs.up_bias
    if not (needs_dz or needs.weights or needs.down):
        return dx, dweights, dup, ddown, dup_bias, ddown_bias

    if save_percent < 100:
        z = _all_rows(z, x_TD, up_EGD, up_bias_EG, plan, K, act, save_percent, tiles.up)
    dz_NG, weighted_NF, partial_NC = hidden_gradient(
        dy_TD, z, weights_TK, down_EDF, plan, act, tiles.dh, dz=needs_dz, weighted=needs.down, partial=needs.weights
    )
    # Each large tensor is let go as soon as its last reader is launched.
    del z
    if needs.down:
        ddown = grouped_outer(dy_TD, weighted_NF, plan, tiles.ddown, gather_left=K)
    del weighted_NF
    if needs.weights:
        bias_ED = None if down_bias_ED is None else down_bias_ED.contiguous()
        dweights = routing_gradient(partial_NC, dy_TD, experts_TK.contiguous(), bias_ED, plan, weights_TK.dtype)
    if needs.up:
        dup = grouped_outer(dz_NG, x_TD, plan, tiles.dup, gather_right=K)
    if needs.up_bias:
        assert up_bias_EG is not None
        dup_bias = column_sums(dz_NG, plan, dtype=up_bias_EG.dtype)
    if needs.x:
        dx_ND = grouped_rows(dz_NG, up_EGD, plan, tiles.dx, dtype=row_dtype(x_TD.dtype))
        del dz_NG
        dx = combine(dx_ND, None, plan, x_TD.dtype, top_k=K)
    return dx, dweights, dup, ddown, dup_bias, ddown_bias
