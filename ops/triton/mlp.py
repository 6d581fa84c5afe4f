"""Experts that are MLPs as Triton kernels: the launches, their order, and which of them a frozen weight saves.

The formulas are those of ``ops/mlp.py``. Experts of plain floats have the activation and its derivative inside the kernels of the
products. Other formats and adapters have products of their own, and between them the activation is plain tensor arithmetic.
"""

from collections.abc import Callable
from typing import Any

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
from fusedonemoe.ops.triton.outer import grouped_outer
from fusedonemoe.ops.triton.plan import RowPlan, from_saved, make_plan
from fusedonemoe.ops.triton.quantized_rows import quantized_rows
from fusedonemoe.ops.triton.rows import NARROW, grouped_rows
from fusedonemoe.ops.triton.sums import column_sums, routing_gradient
from fusedonemoe.ops.triton.up import up_projection


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

    def narrow(self, rows: Tensor, *, back: bool = False, top_k: int | None = None) -> Tensor | None:
        """Return ``s rows A_e^T``, or ``s rows B_e`` back from outputs to inputs, ``[N, R]``; None without an adapter."""
        if self.adapter is None:
            return None
        tile = self.tile._replace(BLOCK_N=NARROW, num_warps=2, num_stages=3)  # few warps for so few columns
        factor_EBR = self.adapter.B if back else self.adapter.A.transpose(1, 2)
        return grouped_rows(rows, factor_EBR, self.plan, tile, top_k=top_k) * self.adapter.scale

    def multiply(self, rows: Tensor, narrow_NR: Tensor | None, *, back: bool = False, **options: Any) -> Tensor:
        """Return ``rows W_e^T + narrow B_e^T + bias_e``, or ``rows W_e + narrow A_e`` back.

        ``narrow`` is what :meth:`narrow` returns of these rows; the options are those of :func:`grouped_rows`.
        """
        projection, plan, tile, low_rank = self.projection, self.plan, self.tile, None
        if self.adapter is not None:
            assert narrow_NR is not None
            low_rank = (narrow_NR, self.adapter.A if back else self.adapter.B.transpose(1, 2))
        if projection.format in FLOATS:
            weights_EAB = projection.floats if back else projection.floats.transpose(1, 2)
            bias_EB = None if back else projection.bias
            return grouped_rows(rows, weights_EAB, plan, tile, bias_EB=bias_EB, low_rank=low_rank, **options)
        out_NB = quantized_rows(rows, projection, plan, tile, back=back, **options)
        if low_rank is not None:
            out_NB += grouped_rows(*low_rank, plan, tile, dtype=options.get("dtype"))
        return out_NB


def _tiles_of(call: ExpertsCall) -> rules.Tiles:
    """Return the tiles of the layer; those of all products of rows have one BLOCK_M."""
    form = call.form
    return rules.tiles_of(call.x, call.experts.numel(), form.down.shape, gated=form.act.layout != PLAIN)


def experts_mlp(call: ExpertsCall, save_percent: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``ops.mlp.experts_mlp`` for bfloat16, float16 and float32; rows of z whose ids are out of range are not written."""
    x_TD, experts_TK, weights_TK, form = call
    (up, down, act), (N, K) = form, (experts_TK.numel(), experts_TK.shape[1])
    tiles = _tiles_of(call)
    plan = make_plan(experts_TK, up.shape[0], tiles.down.BLOCK_M)
    x_TD = x_TD.contiguous()
    if _is_fused(form):
        z = x_TD.new_empty(saved_rows(N, save_percent), up.shape[1])
        h_NF = x_TD.new_empty(N, down.shape[2])
        up_projection(x_TD, up.floats, up.bias, plan, K, act, tiles.up, z, h_NF)
    else:
        ups = _Products(up, plan, tiles.down)
        z_NG = ups.multiply(x_TD, ups.narrow(x_TD, top_k=K), top_k=K)
        h_NF = activate(z_NG, act, reuse=True)
        z = first_rows(z_NG, save_percent)
        del z_NG
    downs = _Products(down, plan, tiles.down)
    y_ND = downs.multiply(h_NF, downs.narrow(h_NF), dtype=row_dtype(x_TD.dtype))
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
    v_NR = downs.narrow(dy_TD, back=True, top_k=top_k) if needs.dz or needs.weights or needs.down_A else None
    if needs.down_A:
        ddown_A = outer(weighted(v_NR), h_NF)
    if needs.dz or needs.weights:
        dh_NF = downs.multiply(dy_TD, v_NR, back=True, top_k=top_k, dtype=dtype)
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
    """Gradients of the layer, as ``ops.mlp.experts_mlp_backward`` defines them; nothing is launched for one not wanted."""
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

    x_narrow = ups.narrow(x_TD, top_k=K) if save_percent < 100 or needs.up_B else None
    if save_percent < 100:
        kept = z.shape[0]
        if fused:
            z_NG = z.new_empty(order.shape[0], form.up.shape[1])
            up_projection(x_TD, form.up.floats, form.up.bias, plan, K, form.act, tiles.up, z_NG, first_row=kept)
        else:
            z_NG = ups.multiply(x_TD, x_narrow, top_k=K, first_row=kept)
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
        sums = {"partial_NC": partial_NC, "bias_ED": bias_ED}
        dweights = routing_gradient(dy_TD, experts_TK.contiguous(), plan, weights_TK.dtype, **sums)
    if needs.up:
        dup = grouped_outer(dz_NG, x_TD, plan, tiles.dup, gather_right=K)
    if needs.up_bias:
        assert form.up.bias is not None
        dup_bias = column_sums(dz_NG, plan, dtype=form.up.bias.dtype)
    if needs.up_B:
        dup_B = outer(x_narrow, dz_NG).transpose(1, 2).contiguous()
    if needs.x or needs.up_A:
        g_NR = ups.narrow(dz_NG, back=True)
    if needs.up_A:
        dup_A = outer(g_NR, x_TD, K)
    if needs.x:
        dx_ND = ups.multiply(dz_NG, g_NR, back=True, dtype=dtype)
        del dz_NG
        dx = combine(dx_ND, None, plan, x_TD.dtype, top_k=K)
    return ExpertsGradients(dx, dweights, dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B)
