"""Experts with low-rank adapters as Triton kernels: the formulas of ``ops/lora.py``, around the grouped products of this package.

The activations and their derivatives are plain tensor arithmetic: torch.compile makes one kernel of each.
"""

import torch
from torch import Tensor

from fusedonemoe.ops.activation import activate, activate_backward
from fusedonemoe.ops.grouped import first_rows
from fusedonemoe.ops.lora import Adapter, Gradients, LoRANeeds
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.records import PLAIN, Activation
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.low_rank import NARROW, low_rank_rows, narrow_tile
from fusedonemoe.ops.triton.outer import grouped_outer
from fusedonemoe.ops.triton.plan import RowPlan, from_saved, make_plan
from fusedonemoe.ops.triton.rows import grouped_rows
from fusedonemoe.ops.triton.sums import column_sums, routing_gradient


class _Products:
    """The products of one layer's rows with an adapted projection, in either direction."""

    def __init__(self, plan: RowPlan, tile: rules.Tile, adapter: Adapter) -> None:
        self.plan, self.tile, self.adapter = plan, tile, adapter

    def into(self, rows: Tensor, top_k: int | None = None) -> Tensor | None:
        """``s rows A_e^T``, ``[N, R]``; None without an adapter."""
        return self._narrow(rows, self.adapter.A.transpose(1, 2), top_k)

    def back_into(self, rows: Tensor, top_k: int | None = None) -> Tensor | None:
        """``s rows B_e``, ``[N, R]``; None without an adapter."""
        return self._narrow(rows, self.adapter.B, top_k)

    def _narrow(self, rows: Tensor, factor: Tensor, top_k: int | None) -> Tensor | None:
        if self.adapter.is_absent:
            return None
        return grouped_rows(rows, factor, self.plan, narrow_tile(self.tile), top_k=top_k) * self.adapter.scale

    def through(
        self,
        rows: Tensor,
        weights_EAB: Tensor,
        narrow_NR: Tensor | None,
        factor_ERB: Tensor,
        *,
        bias_EB: Tensor | None = None,
        top_k: int | None = None,
        first_row: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``rows weights_e + narrow factor_e (+ bias_e)``, ``[N, B]``; rows before ``first_row`` need not be written."""
        if narrow_NR is None:
            return grouped_rows(rows, weights_EAB, self.plan, self.tile, bias_EB=bias_EB, top_k=top_k, dtype=dtype)
        out_NB = rows.new_empty(self.plan.order.shape[0], weights_EAB.shape[2], dtype=dtype)
        low_rank_rows(
            *(rows, weights_EAB, narrow_NR, factor_ERB, self.plan, self.tile, out_NB),
            bias_EB=bias_EB,
            top_k=top_k,
            first_row=first_row,
        )
        return out_NB


def experts_mlp_lora(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    up: Adapter,
    down: Adapter,
    act: Activation,
    save_percent: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``ops.lora.experts_mlp_lora``; rows of z of ids outside ``[0, E)`` are not written.

    Returns:
        ``y_TD``; ``z``, the first ``floor(N * save_percent / 100)`` rows of the sorted pre-activations; and the plan's
        ``order`` and ``offsets``.
    """
    K, N = experts_TK.shape[1], experts_TK.numel()
    tiles = rules.tiles_of(x_TD, N, down_EDF.shape, gated=act.layout != PLAIN)
    plan = make_plan(experts_TK, up_EGD.shape[0], tiles.down.BLOCK_M)
    x_TD = x_TD.contiguous()
    ups, downs = _Products(plan, tiles.down, up), _Products(plan, tiles.down, down)
    z_NG = ups.through(x_TD, up_EGD.transpose(1, 2), ups.into(x_TD, K), up.B.transpose(1, 2), bias_EB=up_bias_EG, top_k=K)
    h_NF = activate(z_NG, act, reuse=True)
    saved = first_rows(z_NG, save_percent)
    del z_NG
    y_ND = downs.through(
        *(h_NF, down_EDF.transpose(1, 2), downs.into(h_NF), down.B.transpose(1, 2)),
        bias_EB=down_bias_ED,
        dtype=row_dtype(x_TD.dtype),
    )
    del h_NF
    return combine(y_ND, weights_TK, plan, x_TD.dtype), saved, plan.order, plan.offsets


def experts_mlp_lora_backward(
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
    up: Adapter,
    down: Adapter,
    act: Activation,
    save_percent: int,
    needs: LoRANeeds,
) -> Gradients:
    """Gradients of the adapted layer, as ``ops.lora.experts_mlp_lora_backward`` defines them.

    Returns:
        Gradients of x, weights, up, down, up bias, down bias, up's A and B, down's A and B; a zero-size tensor where not
        needed, and then neither launched nor allocated.
    """
    N, K, dtype = order.shape[0], experts_TK.shape[1], row_dtype(x_TD.dtype)
    tiles = rules.tiles_of(x_TD, N, down_EDF.shape, gated=act.layout != PLAIN)
    plan = from_saved(order, offsets, tiles.dx.BLOCK_M)
    dy_TD, x_TD, weights_TK = dy_TD.contiguous(), x_TD.contiguous(), weights_TK.contiguous()
    ups, downs = _Products(plan, tiles.dx, up), _Products(plan, tiles.dx, down)
    dx, dweights, dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B = (x_TD.new_empty(0) for _ in range(10))
    # The narrow side of an adapter's gradient is one block; of the other there are many, for few warps each.
    tile = tiles.ddown._replace(BLOCK_M=NARROW, BLOCK_N=64, num_warps=2, num_stages=3)

    def outer(narrow_NR: Tensor | None, wide: Tensor, gather: int | None = None) -> Tensor:
        assert narrow_NR is not None
        return grouped_outer(narrow_NR, wide, plan, tile, gather_right=gather)

    def weighted(rows_NB: Tensor) -> Tensor:
        return (rows_NB * weights_TK.reshape(-1).index_select(0, order)[:, None]).to(rows_NB.dtype)

    x_narrow = ups.into(x_TD, K) if save_percent < 100 or needs.up_B else None
    if save_percent < 100:
        kept = z.shape[0]
        z_NG = ups.through(
            *(x_TD, up_EGD.transpose(1, 2), x_narrow, up.B.transpose(1, 2)),
            bias_EB=up_bias_EG,
            top_k=K,
            first_row=kept,
        )
        if save_percent > 0:
            z_NG[:kept].copy_(z)
        z = z_NG
        del z_NG
    h_NF = activate(z, act, reuse=True)
    if needs.down:
        ddown = grouped_outer(dy_TD, weighted(h_NF), plan, tiles.ddown, gather_left=K)
    if needs.down_bias:
        assert down_bias_ED is not None
        ddown_bias = column_sums(dy_TD, plan, weights_TK=weights_TK, dtype=down_bias_ED.dtype)
    if needs.down_B:
        narrow_NR = downs.into(h_NF)
        assert narrow_NR is not None
        ddown_B = outer(weighted(narrow_NR), dy_TD, K).transpose(1, 2).contiguous()
    if needs.dz or needs.weights or needs.down_A:
        v_NR = downs.back_into(dy_TD, K)
    if needs.down_A:
        assert v_NR is not None
        ddown_A = outer(weighted(v_NR), h_NF)
    if needs.dz or needs.weights:
        dh_NF = downs.through(dy_TD, down_EDF, v_NR, down.A, top_k=K, dtype=dtype)
    if needs.weights:
        partial_N1 = (dh_NF.to(torch.float32) * h_NF).sum(1, keepdim=True)
        bias_ED = None if down_bias_ED is None else down_bias_ED.contiguous()
        dweights = routing_gradient(partial_N1, dy_TD, experts_TK.contiguous(), bias_ED, plan, weights_TK.dtype)
    del h_NF
    if needs.dz:
        dz_NG = activate_backward(weighted(dh_NF), z.to(dtype), act).to(x_TD.dtype)
        del dh_NF
    if needs.up:
        dup = grouped_outer(dz_NG, x_TD, plan, tiles.dup, gather_right=K)
    if needs.up_bias:
        assert up_bias_EG is not None
        dup_bias = column_sums(dz_NG, plan, dtype=up_bias_EG.dtype)
    if needs.up_B:
        dup_B = outer(x_narrow, dz_NG).transpose(1, 2).contiguous()
    if needs.x or needs.up_A:
        g_NR = ups.back_into(dz_NG)
    if needs.up_A:
        dup_A = outer(g_NR, x_TD, K)
    if needs.x:
        dx_ND = ups.through(dz_NG, up_EGD, g_NR, up.A, dtype=dtype)
        dx = combine(dx_ND, None, plan, x_TD.dtype, top_k=K)
    return dx, dweights, dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B
