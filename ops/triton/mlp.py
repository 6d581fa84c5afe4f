"""Experts that are MLPs as Triton kernels: the launches, their order, and which of them a frozen weight saves.

The formulas are those of ``ops/mlp.py``. No step looks at the routing on the host, and gathered rows of x and dy are never
written to memory. Experts of plain floats have an activation and its derivative inside the kernels of the products. Other
formats and adapters have products of their own, and between them the activation is plain tensor arithmetic, of which
torch.compile makes one kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fusedonemoe.ops.activation import activate, activate_backward
from fusedonemoe.ops.formats import FLOATS
from fusedonemoe.ops.grouped import first_rows, saved_rows
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.records import (
    PLAIN,
    Activation,
    Adapter,
    ExpertsCall,
    ExpertsForm,
    ExpertsGradients,
    ExpertsNeeds,
    Projection,
    SavedRows,
)
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.dh import HiddenGradient, hidden_gradient
from fusedonemoe.ops.triton.low_rank import NARROW, low_rank_rows, narrow_tile
from fusedonemoe.ops.triton.outer import grouped_outer
from fusedonemoe.ops.triton.plan import RowPlan, from_saved, make_plan
from fusedonemoe.ops.triton.quantized_rows import quantized_rows
from fusedonemoe.ops.triton.rows import grouped_rows
from fusedonemoe.ops.triton.sums import column_sums, routing_gradient
from fusedonemoe.ops.triton.up import pre_activation, up_projection


def _is_fused(form: ExpertsForm) -> bool:
    """Return whether the kernels that compute the activation too can read the experts: floats without adapters."""
    return all(side.format in FLOATS and side.adapter is None for side in (form.up, form.down))


class _Products:
    """The products of sorted rows with one projection, in either direction."""

    def __init__(self, projection: Projection, plan: RowPlan, tile: rules.Tile) -> None:
        self.projection, self.plan, self.tile = projection, plan, tile
        # In PEFT's matrices an expert's B has no two values side by side, and the kernels read whole rows. The copy is made here
        # and not in front of the operator, which would keep it for the backward.
        adapter = projection.adapter
        self.adapter = None if adapter is None else Adapter(adapter.A.contiguous(), adapter.B.contiguous(), adapter.scale)

    def narrow(self, rows: Tensor, top_k: int | None = None) -> Tensor | None:
        """Return ``s rows A_e^T``, ``[N, R]``; None without an adapter."""
        return None if self.adapter is None else self._narrow(rows, self.adapter.A.transpose(1, 2), self.adapter.scale, top_k)

    def narrow_back(self, gradient: Tensor, top_k: int | None = None) -> Tensor | None:
        """Return ``s gradient B_e``, ``[N, R]``; None without an adapter."""
        return None if self.adapter is None else self._narrow(gradient, self.adapter.B, self.adapter.scale, top_k)

    def _narrow(self, rows: Tensor, factor_EBR: Tensor, scale: float, top_k: int | None) -> Tensor:
        return grouped_rows(rows, factor_EBR, self.plan, narrow_tile(self.tile), top_k=top_k) * scale

    def forward(
        self,
        rows: Tensor,
        narrow_NR: Tensor | None,
        *,
        top_k: int | None = None,
        first_row: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return ``rows W_e^T + narrow B_e^T + bias_e``, ``[N, O]``; rows before ``first_row`` need not be written."""
        factor = None if self.adapter is None else self.adapter.B.transpose(1, 2)
        return self._through(rows, narrow_NR, factor, self.projection.bias, top_k, first_row, dtype, back=False)

    def backward(
        self, gradient: Tensor, narrow_NR: Tensor | None, *, top_k: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return ``gradient W_e + narrow A_e``, ``[N, I]``."""
        factor = None if self.adapter is None else self.adapter.A
        return self._through(gradient, narrow_NR, factor, None, top_k, 0, dtype, back=True)

    def _through(
        self,
        rows: Tensor,
        narrow_NR: Tensor | None,
        factor_ERB: Tensor | None,
        bias_EB: Tensor | None,
        top_k: int | None,
        first_row: int,
        dtype: torch.dtype | None,
        *,
        back: bool,
    ) -> Tensor:
        projection, plan, tile = self.projection, self.plan, self.tile
        if projection.format not in FLOATS:
            out_NB = quantized_rows(rows, projection, plan, tile, back=back, top_k=top_k, first_row=first_row, dtype=dtype)
            if narrow_NR is not None and factor_ERB is not None:
                out_NB += grouped_rows(narrow_NR, factor_ERB, plan, tile, dtype=dtype)
            return out_NB
        weights_EAB = projection.floats if back else projection.floats.transpose(1, 2)
        if narrow_NR is None or factor_ERB is None:
            return grouped_rows(rows, weights_EAB, plan, tile, bias_EB=bias_EB, top_k=top_k, dtype=dtype)
        out_NB = rows.new_empty(plan.order.shape[0], weights_EAB.shape[2], dtype=dtype)
        low_rank_rows(
            *(rows, weights_EAB, narrow_NR, factor_ERB, plan, tile, out_NB), bias_EB=bias_EB, top_k=top_k, first_row=first_row
        )
        return out_NB


def _tiles_of(call: ExpertsCall) -> rules.Tiles:
    """Return the tiles of the layer; those of all products of rows have one BLOCK_M."""
    form = call.form
    return rules.tiles_of(call.x, call.experts.numel(), form.down.shape, gated=form.act.layout != PLAIN)


def experts_mlp(call: ExpertsCall, save_percent: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``ops.mlp.experts_mlp`` for bfloat16, float16 and float32.

    Returns:
        ``y_TD``; ``z``, the first ``floor(N * save_percent / 100)`` rows of the sorted pre-activations, those of ids outside
        ``[0, E)`` not written; and the plan's ``order`` and ``offsets``.
    """
    x_TD, experts_TK, weights_TK, form = call
    (up, down, act), (N, K) = form, (experts_TK.numel(), experts_TK.shape[1])
    tiles = _tiles_of(call)
    plan = make_plan(experts_TK, up.shape[0], tiles.down.BLOCK_M)
    x_TD = x_TD.contiguous()
    if _is_fused(form):
        z = x_TD.new_empty(saved_rows(N, save_percent), up.shape[1])
        h_NF = up_projection(x_TD, up.floats, up.bias, plan, K, act, tiles.up, z)
    else:
        ups = _Products(up, plan, tiles.down)
        z_NG = ups.forward(x_TD, ups.narrow(x_TD, K), top_k=K)
        h_NF = activate(z_NG, act, reuse=True)
        z = first_rows(z_NG, save_percent)
        del z_NG
    downs = _Products(down, plan, tiles.down)
    y_ND = downs.forward(h_NF, downs.narrow(h_NF), dtype=row_dtype(x_TD.dtype))
    del h_NF
    return combine(y_ND, weights_TK, plan, x_TD.dtype), z, plan.order, plan.offsets


def _hidden_gradient_by_steps(
    dy_TD: Tensor,
    z_NG: Tensor,
    weight_N1: Tensor,
    top_k: int,
    act: Activation,
    downs: _Products,
    outer: Callable[..., Tensor],
    needs: ExpertsNeeds,
) -> tuple[HiddenGradient, Tensor | None, Tensor | None]:
    """Return what :func:`hidden_gradient` stores, where it is wanted, and the gradients of the down adapter's factors."""
    dtype, empty = row_dtype(dy_TD.dtype), dy_TD.new_empty
    dz_NG, weighted_NF, partial_N1, ddown_A, ddown_B = empty(0), empty(0), empty(0), None, None

    def weighted(rows_NB: Tensor | None) -> Tensor:
        assert rows_NB is not None
        return (rows_NB * weight_N1).to(rows_NB.dtype)

    if needs.weights or needs.down or needs.down_A or needs.down_B:
        h_NF = activate(z_NG, act, reuse=True)
    if needs.down:
        weighted_NF = weighted(h_NF)
    if needs.down_B:
        ddown_B = outer(weighted(downs.narrow(h_NF)), dy_TD, top_k).transpose(1, 2).contiguous()
    v_NR = downs.narrow_back(dy_TD, top_k) if needs.dz or needs.weights or needs.down_A else None
    if needs.down_A:
        ddown_A = outer(weighted(v_NR), h_NF)
    if needs.dz or needs.weights:
        dh_NF = downs.backward(dy_TD, v_NR, top_k=top_k, dtype=dtype)
    if needs.weights:
        partial_N1 = (dh_NF.to(torch.float32) * h_NF).sum(1, keepdim=True)
        del h_NF
    if needs.dz:
        scaled_NF = weighted(dh_NF)
        del dh_NF
        dz_NG = activate_backward(scaled_NF, z_NG.to(dtype), act).to(dy_TD.dtype)
    return HiddenGradient(dz_NG, weighted_NF, partial_N1), ddown_A, ddown_B


def experts_mlp_backward(
    dy_TD: Tensor, saved: SavedRows, call: ExpertsCall, save_percent: int, needs: ExpertsNeeds
) -> ExpertsGradients:
    """Gradients of the layer, as ``ops.mlp.experts_mlp_backward`` defines them, contiguous.

    Nothing is launched or allocated for a gradient that is not wanted.
    """
    x_TD, experts_TK, weights_TK, form = call
    z, order, offsets = saved
    K, dtype, fused = experts_TK.shape[1], row_dtype(x_TD.dtype), _is_fused(form)
    tiles = _tiles_of(call)
    plan = from_saved(order, offsets, tiles.dx.BLOCK_M)
    dy_TD, x_TD, weights_TK = dy_TD.contiguous(), x_TD.contiguous(), weights_TK.contiguous()
    ups, downs = _Products(form.up, plan, tiles.dx), _Products(form.down, plan, tiles.dx)
    dx = dweights = dup = ddown = dup_bias = ddown_bias = dup_A = dup_B = ddown_A = ddown_B = None
    # The narrow side of an adapter's gradient is one block; of the other there are many, for few warps each.
    tile = tiles.ddown._replace(BLOCK_M=NARROW, BLOCK_N=64, num_warps=2, num_stages=3)

    def outer(narrow_NR: Tensor | None, wide: Tensor, gather: int | None = None) -> Tensor:
        assert narrow_NR is not None
        return grouped_outer(narrow_NR, wide, plan, tile, gather_right=gather)

    if needs.down_bias:
        assert form.down.bias is not None
        ddown_bias = column_sums(dy_TD, plan, weights_TK=weights_TK, dtype=form.down.bias.dtype)
    if not (needs.dz or needs.weights or needs.down or needs.down_A or needs.down_B):
        return ExpertsGradients(down_bias=ddown_bias)

    x_narrow = ups.narrow(x_TD, K) if save_percent < 100 or needs.up_B else None
    if save_percent < 100:
        kept = z.shape[0]
        if fused:
            z_NG = z.new_empty(order.shape[0], form.up.shape[1])
            pre_activation(x_TD, form.up.floats, form.up.bias, plan, K, form.act, tiles.up, z_NG, kept)
        else:
            z_NG = ups.forward(x_TD, x_narrow, top_k=K, first_row=kept)
        if save_percent > 0:
            z_NG[:kept].copy_(z)
        z = z_NG
        del z_NG
    if fused:
        wanted = {"dz": needs.dz, "weighted": needs.down, "partial": needs.weights}
        hidden = hidden_gradient(dy_TD, z, weights_TK, form.down.floats, plan, form.act, tiles.dh, **wanted)
    else:
        weight_N1 = weights_TK.reshape(-1).index_select(0, order)[:, None]
        hidden, ddown_A, ddown_B = _hidden_gradient_by_steps(dy_TD, z, weight_N1, K, form.act, downs, outer, needs)
    # Each large tensor is let go as soon as its last reader is launched.
    del z
    dz_NG, weighted_NF, partial_NC = hidden
    del hidden
    if needs.down:
        ddown = grouped_outer(dy_TD, weighted_NF, plan, tiles.ddown, gather_left=K)
    del weighted_NF
    if needs.weights:
        bias_ED = None if form.down.bias is None else form.down.bias.contiguous()
        dweights = routing_gradient(partial_NC, dy_TD, experts_TK.contiguous(), bias_ED, plan, weights_TK.dtype)
    if needs.up:
        dup = grouped_outer(dz_NG, x_TD, plan, tiles.dup, gather_right=K)
    if needs.up_bias:
        assert form.up.bias is not None
        dup_bias = column_sums(dz_NG, plan, dtype=form.up.bias.dtype)
    if needs.up_B:
        dup_B = outer(x_narrow, dz_NG).transpose(1, 2).contiguous()
    if needs.x or needs.up_A:
        g_NR = ups.narrow_back(dz_NG)
    if needs.up_A:
        dup_A = outer(g_NR, x_TD, K)
    if needs.x:
        dx_ND = ups.backward(dz_NG, g_NR, dtype=dtype)
        del dz_NG
        dx = combine(dx_ND, None, plan, x_TD.dtype, top_k=K)
    return ExpertsGradients(dx, dweights, dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B)
