"""Experts that are MLPs, over sorted rows: forward and hand-written backward, for every format of weights and for adapters.

``z = x Wup_e + s1 (x A1_e) B1_e + bup_e``, ``y_t = sum_j w_tj (act(z) Wdown_e + s2 (act(z) A2_e) B2_e + bdown_e)``. No expert's
delta is ever formed. Weights that are not floats are widened whole: any device can do that, and any compiler can look through it.

Shape suffixes as in :mod:`.grouped`, with O and I for the outputs and inputs of a projection, and R for the rank of an adapter.
"""

from functools import cached_property

import torch
from torch import Tensor

from fusedonemoe.ops import grouped
from fusedonemoe.ops.activation import activate, activate_backward
from fusedonemoe.ops.cuda import ALIGNMENT_BYTES
from fusedonemoe.ops.formats import TRANSPOSED
from fusedonemoe.ops.grouped import (
    Rows,
    bias_of_row,
    column_sums,
    dots,
    first_rows,
    in_backward,
    of_choices,
    sorted_rows,
    sum_over_choices,
)
from fusedonemoe.ops.plan import make_plan
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.records import Adapter, ExpertsCall, ExpertsForm, ExpertsGradients, ExpertsNeeds, Projection, SavedRows


def _aligned(adapter: Adapter) -> Adapter:
    """Pad the rank with zeros to rows of whole 16 bytes, which torch's CUDA grouped GEMM wants."""
    rank, multiple = adapter.A.shape[1], ALIGNMENT_BYTES // adapter.A.element_size()
    missing = -rank % multiple
    if missing == 0 or not adapter.A.is_cuda:
        return adapter
    pad = torch.nn.functional.pad
    return Adapter(pad(adapter.A, (0, 0, 0, missing)), pad(adapter.B, (0, missing)), adapter.scale)


class _Products:
    """The grouped products of sorted rows with one projection, in either direction."""

    def __init__(self, projection: Projection, offsets: Tensor, dtype: torch.dtype) -> None:
        self.projection, self.offsets, self.dtype = projection, offsets, dtype
        self.adapter = None if projection.adapter is None else _aligned(projection.adapter)

    @cached_property
    def weights_EOI(self) -> Tensor:
        """The weights of all experts: the device alone knows which have tokens. Floats keep their dtype, others get the rows'."""
        return self.projection.format.widen(self.projection.tensors, self.dtype)

    def forward(self, rows_NI: Tensor, rows: Rows, first: int | None = None) -> Tensor:
        """Return ``rows W_e^T + s (rows A_e^T) B_e^T + bias_e``, ``[N, O]``; only the sorted rows from ``first`` on, if given."""
        offsets = self.offsets if first is None else (self.offsets - first).clamp(min=0)
        out_NO = grouped.grouped_mm(rows_NI, self.weights_EOI.transpose(1, 2), offsets)
        if self.adapter is not None:
            out_NO += grouped.grouped_mm(self.narrow(rows_NI, offsets), self.adapter.B.transpose(1, 2), offsets)
        if self.projection.bias is not None:
            out_NO += bias_of_row(self.projection.bias, rows, first)
        return out_NO

    def backward(self, gradient_NO: Tensor, narrow_NR: Tensor | None) -> Tensor:
        """Return ``gradient W_e + narrow A_e``, ``[N, I]``."""
        out_NI = grouped.grouped_mm(gradient_NO, self.weights_EOI, self.offsets)
        if self.adapter is not None and narrow_NR is not None:
            out_NI += grouped.grouped_mm(narrow_NR, self.adapter.A, self.offsets)
        return out_NI

    def narrow(self, rows_NI: Tensor, offsets: Tensor) -> Tensor:
        """Return ``s rows A_e^T``, ``[N, R]``."""
        assert self.adapter is not None
        return grouped.grouped_mm(rows_NI, self.adapter.A.transpose(1, 2), offsets) * self.adapter.scale

    def narrow_back(self, gradient_NO: Tensor) -> Tensor | None:
        """Return ``s gradient B_e``, ``[N, R]``; None without an adapter."""
        if self.adapter is None:
            return None
        return grouped.grouped_mm(gradient_NO, self.adapter.B, self.offsets) * self.adapter.scale

    def weights_gradient(self, gradient_NO: Tensor, rows_NI: Tensor, *, laid_out: bool) -> Tensor:
        """Return ``sum gradient^T rows``; ``laid_out`` like the weights, into which autograd would copy it."""
        if laid_out and self.projection.format is TRANSPOSED:
            return grouped.grouped_outer(rows_NI, gradient_NO, self.offsets).transpose(1, 2)
        return grouped.grouped_outer(gradient_NO, rows_NI, self.offsets)

    def factor_gradient(self, left: Tensor, right: Tensor, rank_dim: int) -> Tensor:
        """Return ``sum left^T right`` without padded columns: A's gradient ``[E, R, I]``, or B's ``[E, O, R]``."""
        assert self.projection.adapter is not None
        gradient, rank = grouped.grouped_outer(left, right, self.offsets), self.projection.adapter.A.shape[1]
        return gradient if gradient.shape[rank_dim] == rank else gradient.narrow(rank_dim, 0, rank).contiguous()


def experts_mlp(call: ExpertsCall, save_percent: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y_t = sum_j w_tj down_e(act(up_e(x_t)))``.

    Returns y, the first ``floor(N * save_percent / 100)`` sorted rows of z, and the plan's ``order`` and ``offsets``.
    """
    x_TD, experts_TK, weights_TK, (up, down, act) = call
    plan, dtype = make_plan(experts_TK, up.shape[0]), row_dtype(x_TD.dtype)
    rows = sorted_rows(experts_TK, weights_TK, plan.order, up.shape[0])
    x_ND = x_TD.index_select(0, rows.token).to(dtype)
    z_NG = _Products(up, plan.offsets, dtype).forward(x_ND, rows).to(x_TD.dtype)
    del x_ND
    h_NF = activate(z_NG.to(dtype), act, reuse=True)
    saved = first_rows(z_NG, save_percent)
    del z_NG
    y_ND = _Products(down, plan.offsets, dtype).forward(h_NF, rows)
    del h_NF
    return sum_over_choices(y_ND, rows, weighted=True, dtype=x_TD.dtype), saved, plan.order, plan.offsets


def _widened_again(form: ExpertsForm, gradient: Tensor) -> ExpertsForm:
    """The experts, whose weights are widened a second time: to keep them would cost what a narrow format saves.

    Scales that depend on the gradient hide from torch.compile that it has widened them already.
    """
    scales = [i for i, part in enumerate(form.up.format.parts) if part.is_scale]
    if not scales:
        return form
    hidden = iter(in_backward(gradient, *(side.tensors[i] for side in (form.up, form.down) for i in scales)))

    def behind(side: Projection) -> Projection:
        return side._replace(tensors=tuple(next(hidden) if i in scales else tensor for i, tensor in enumerate(side.tensors)))

    return form._replace(up=behind(form.up), down=behind(form.down))


def experts_mlp_backward(
    dy_TD: Tensor, saved: SavedRows, call: ExpertsCall, save_percent: int, needs: ExpertsNeeds
) -> ExpertsGradients:
    """Gradients of :func:`experts_mlp` (SonicMoE's algebra, arXiv 2512.14080: each expert's y is never needed).

    With ``v = s2 dy B2_e``, ``dA' = dy Wdown_e^T + v A2_e`` and ``A = act(z)``: ``dw = <dA', A> + <dy, bdown_e>``,
    ``dz = act'(z) (w dA')``, ``dWdown_e = sum dy^T (w A)``, ``dWup_e = sum dz^T x``, ``dx_t = sum_j dz Wup_e + g A1_e`` with
    ``g = s1 dz B1_e``; ``dA2_e = sum (w v)^T A``, ``dB2_e = sum dy^T (w s2 A A2_e^T)``, ``dA1_e = sum g^T x``,
    ``dB1_e = sum dz^T (s1 x A1_e^T)``; bias gradients are column sums. What is not wanted costs nothing.
    """
    x_TD, experts_TK, weights_TK, form = call
    form = _widened_again(form, dy_TD)
    z, order, offsets = saved
    E, dtype = form.up.shape[0], row_dtype(x_TD.dtype)
    rows = sorted_rows(experts_TK, weights_TK, order, E, dy_TD)
    up, down = _Products(form.up, offsets, dtype), _Products(form.down, offsets, dtype)
    of_up = needs.up or needs.up_A or needs.up_B
    # The gradients of an adapted layer have the same bits in every layout of its weights.
    laid_out = form.up.adapter is None and form.down.adapter is None
    dx = dweights = dup = ddown = dup_bias = ddown_bias = dup_A = dup_B = ddown_A = ddown_B = None

    if save_percent < 100 or of_up:
        x_ND = x_TD.index_select(0, rows.token).to(dtype)
    if save_percent < 100:
        kept = z.shape[0]
        z = torch.cat((z, up.forward(x_ND[kept:], rows, kept).to(x_TD.dtype)))
        if not of_up:
            del x_ND
    z, dy_ND = z.to(dtype), dy_TD.index_select(0, rows.token).to(dtype)
    h_NF = activate(z, form.act, reuse=True)

    if needs.down:
        ddown = down.weights_gradient(dy_ND, (h_NF * rows.weight).to(dtype), laid_out=laid_out)
    if needs.down_B:
        ddown_B = down.factor_gradient(dy_ND, (down.narrow(h_NF, offsets) * rows.weight).to(dtype), 2)
    if needs.down_bias:
        ddown_bias = column_sums((dy_ND * rows.weight).to(dtype), offsets)
    if needs.dz or needs.weights or needs.down_A:
        v_NR = down.narrow_back(dy_ND)
    if needs.down_A:
        assert v_NR is not None
        ddown_A = down.factor_gradient((v_NR * rows.weight).to(dtype), h_NF, 1)
    if needs.dz or needs.weights:
        dh_NF = down.backward(dy_ND, v_NR)
    if needs.weights:
        dweight = dots(dh_NF, h_NF, weights_TK.dtype)
        if form.down.bias is not None:
            dweight = dweight + dots(dy_ND, bias_of_row(form.down.bias, rows), weights_TK.dtype)
        dweights = of_choices(dweight, rows, E).to(weights_TK.dtype)
    del h_NF, dy_ND
    if needs.dz:
        dz_NG = activate_backward((dh_NF * rows.weight).to(dtype), z, form.act)
        del dh_NF
    if needs.up:
        dup = up.weights_gradient(dz_NG, x_ND, laid_out=laid_out)
    if needs.up_B:
        dup_B = up.factor_gradient(dz_NG, up.narrow(x_ND, offsets), 2)
    if needs.up_bias:
        dup_bias = column_sums(dz_NG, offsets)
    if needs.x or needs.up_A:
        g_NR = up.narrow_back(dz_NG)
    if needs.up_A:
        assert g_NR is not None
        dup_A = up.factor_gradient(g_NR, x_ND, 1)
    if of_up:
        del x_ND
    if needs.x:
        dx = sum_over_choices(up.backward(dz_NG, g_NR), rows, weighted=False, dtype=x_TD.dtype)
    of_parameters = (dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B)
    return ExpertsGradients(dx, dweights, *(None if each is None else each.to(x_TD.dtype) for each in of_parameters))
