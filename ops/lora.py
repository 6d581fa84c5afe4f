"""Experts with low-rank adapters, factored: the grouped and the dense formulation. No expert's delta is ever formed.

``z = x Wup_e + s1 (x A1_e) B1_e``, ``y = act(z) Wdown_e + s2 (act(z) A2_e) B2_e``: beside each base product run two grouped
products of width ``r``, which on both sides of the base product's rows cost ``r/D + r/G`` of it. Shape suffixes as in
:mod:`.grouped`, with ``R`` for a rank. An adapter that is absent has rank 0, and costs nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops.activation import activate, activate_backward
from fusedonemoe.ops.cuda import ALIGNMENT_BYTES
from fusedonemoe.ops.dense import by_expert, sum_of_experts, tokens_of_experts
from fusedonemoe.ops.grouped import (
    bias_of_row,
    column_sums,
    dots,
    first_rows,
    grouped_mm,
    grouped_outer,
    of_choices,
    sorted_rows,
    sum_over_choices,
)
from fusedonemoe.ops.plan import make_plan
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.records import Activation


class Adapter(NamedTuple):
    """The factors of one projection's adapter: ``delta_e = scale * B_e A_e``.

    Attributes:
        A: ``[E, R, in]``.
        B: ``[E, out, R]``.
        scale: what the product is multiplied with.
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def is_absent(self) -> bool:
        """Whether there is none: rank 0."""
        return self.A.shape[1] == 0

    def narrow(self, rows_NA: Tensor, offsets: Tensor) -> Tensor:
        """``s rows A_e^T`` ``[N, R]``: into the adapter."""
        return grouped_mm(rows_NA, self.A.transpose(1, 2), offsets) * self.scale

    def narrow_back(self, gradients_NB: Tensor, offsets: Tensor) -> Tensor:
        """``s gradients B_e`` ``[N, R]``: back into the adapter."""
        return grouped_mm(gradients_NB, self.B, offsets) * self.scale

    def dense(self, rows_ETA: Tensor, routed_ET1: Tensor) -> Tensor:
        """``s (rows A_e^T) B_e^T`` ``[E, T, B]``: all the way through the adapter, for the rows that were routed."""
        A, B = self.A.to(rows_ETA.dtype), self.B.to(rows_ETA.dtype)
        narrow_ETR = torch.where(routed_ET1, torch.matmul(rows_ETA, A.transpose(1, 2)) * self.scale, 0)
        return torch.matmul(narrow_ETR, B.transpose(1, 2))


def _aligned(adapter: Adapter) -> Adapter:
    """With ranks that torch's CUDA grouped GEMM takes: rows of whole 16 bytes. The added columns are zeros, and add zeros."""
    rank, multiple = adapter.A.shape[1], ALIGNMENT_BYTES // adapter.A.element_size()
    missing = -rank % multiple
    if missing == 0 or not adapter.A.is_cuda:
        return adapter
    pad = torch.nn.functional.pad
    return Adapter(pad(adapter.A, (0, 0, 0, missing)), pad(adapter.B, (0, missing)), adapter.scale)


def _trimmed(gradient: Tensor, dim: int, rank: int) -> Tensor:
    """Without the columns that :func:`_aligned` added."""
    return gradient if gradient.shape[dim] == rank else gradient.narrow(dim, 0, rank).contiguous()


def _pre_activation(
    x_ND: Tensor,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    up: Adapter,
    experts_TK: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    """``z = x Wup_e + s (x A_e) B_e (+ bup_e)`` for sorted rows, in the dtype of x."""
    dtype, x_ND = x_ND.dtype, x_ND.to(row_dtype(x_ND.dtype))
    z_NG = grouped_mm(x_ND, up_EGD.transpose(1, 2), offsets)
    if not up.is_absent:
        z_NG += grouped_mm(up.narrow(x_ND, offsets), up.B.transpose(1, 2), offsets)
    if up_bias_EG is not None:
        z_NG += bias_of_row(up_bias_EG, experts_TK, order)
    return z_NG.to(dtype)


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
    """``y_t = sum_j w_tj (h Wdown_e + s2 (h A2_e) B2_e + bdown_e)``, ``h = act(x_t Wup_e + s1 (x_t A1_e) B1_e + bup_e)``.

    Returns:
        ``y_TD``; ``z``, the first ``floor(N * save_percent / 100)`` rows of the sorted pre-activations; and the plan's
        ``order`` and ``offsets``.
    """
    E = up_EGD.shape[0]
    up, down = _aligned(up), _aligned(down)
    plan = make_plan(experts_TK, E)
    rows, *_ = sorted_rows(experts_TK, weights_TK, plan.order, E)
    x_ND = x_TD.index_select(0, rows.token)
    z_NG = _pre_activation(x_ND, up_EGD, up_bias_EG, up, experts_TK, plan.order, plan.offsets)
    del x_ND
    h_NF = activate(z_NG.to(row_dtype(z_NG.dtype)), act, reuse=True)
    saved = first_rows(z_NG, save_percent)
    del z_NG
    y_ND = grouped_mm(h_NF, down_EDF.transpose(1, 2), plan.offsets)
    if not down.is_absent:
        y_ND += grouped_mm(down.narrow(h_NF, plan.offsets), down.B.transpose(1, 2), plan.offsets)
    del h_NF
    if down_bias_ED is not None:
        y_ND += bias_of_row(down_bias_ED, experts_TK, plan.order)
    return sum_over_choices(y_ND, rows, weighted=True, dtype=x_TD.dtype), saved, plan.order, plan.offsets


class LoRANeeds(NamedTuple):
    """Which gradients of :func:`experts_mlp_lora` are wanted; what is not wanted costs nothing."""

    x: bool
    weights: bool
    up: bool
    down: bool
    up_bias: bool
    down_bias: bool
    up_A: bool
    up_B: bool
    down_A: bool
    down_B: bool

    @property
    def dz(self) -> bool:
        """Whether any of them is made from the gradient of the pre-activations."""
        return self.x or self.up or self.up_bias or self.up_A or self.up_B


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
    """Gradients of :func:`experts_mlp_lora`.

    As in ``ops.grouped``, with ``v = s2 dy B2_e`` and ``g = s1 dz B1_e``, both ``[N, R]``: ``dA' = dy Wdown_e^T + v A2_e``,
    ``dA2_e = sum (w v)^T h``, ``dB2_e = sum dy^T (w s2 h A2_e^T)``; ``dx_t = sum_j dz Wup_e + g A1_e``,
    ``dA1_e = sum g^T x``, ``dB1_e = sum dz^T (s1 x A1_e^T)``.

    Returns:
        Gradients of x, weights, up, down, up bias, down bias, up's A and B, down's A and B; a zero-size tensor where not
        needed.
    """
    E, dtype = up_EGD.shape[0], row_dtype(x_TD.dtype)
    rank_up, rank_down = up.A.shape[1], down.A.shape[1]
    up, down = _aligned(up), _aligned(down)
    rows, experts_TK, order = sorted_rows(experts_TK, weights_TK, order, E, dy_TD)
    # Operators may not return one tensor twice, so each unneeded gradient is an empty tensor of its own.
    dx, dweights, dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B = (x_TD.new_empty(0) for _ in range(10))

    if save_percent < 100 or needs.up or needs.up_A or needs.up_B:
        x_ND = x_TD.index_select(0, rows.token)
    if save_percent < 100:
        kept = z.shape[0]
        rest_offsets = (offsets - kept).clamp(min=0)
        rest = _pre_activation(x_ND[kept:], up_EGD, up_bias_EG, up, experts_TK, order[kept:], rest_offsets)
        z = torch.cat((z, rest))
    if needs.up or needs.up_A or needs.up_B:
        x_ND = x_ND.to(dtype)
    z, dy_ND = z.to(dtype), dy_TD.index_select(0, rows.token).to(dtype)
    h_NF = activate(z, act, reuse=True)

    if needs.down:
        ddown = grouped_outer(dy_ND, (h_NF * rows.weight).to(dtype), offsets)
    if needs.down_B:
        narrow_NR = (down.narrow(h_NF, offsets) * rows.weight).to(dtype)
        ddown_B = _trimmed(grouped_outer(dy_ND, narrow_NR, offsets), 2, rank_down)
    if needs.down_bias:
        ddown_bias = column_sums((dy_ND * rows.weight).to(dtype), offsets)
    if needs.dz or needs.weights or needs.down_A:
        if not down.is_absent:
            v_NR = down.narrow_back(dy_ND, offsets)
        if needs.down_A:
            ddown_A = _trimmed(grouped_outer((v_NR * rows.weight).to(dtype), h_NF, offsets), 1, rank_down)
    if needs.dz or needs.weights:
        dh_NF = grouped_mm(dy_ND, down_EDF, offsets)
        if not down.is_absent:
            dh_NF += grouped_mm(v_NR, down.A, offsets)
    if needs.weights:
        dweight = dots(dh_NF, h_NF, weights_TK.dtype)
        if down_bias_ED is not None:
            dweight = dweight + dots(dy_ND, bias_of_row(down_bias_ED, experts_TK, order), weights_TK.dtype)
        dweights = of_choices(dweight, rows, experts_TK, E).to(weights_TK.dtype)
    del h_NF, dy_ND
    if needs.dz:
        dz_NG = activate_backward((dh_NF * rows.weight).to(dtype), z, act)
        del dh_NF
    if needs.up:
        dup = grouped_outer(dz_NG, x_ND, offsets)
    if needs.up_B:
        dup_B = _trimmed(grouped_outer(dz_NG, up.narrow(x_ND, offsets), offsets), 2, rank_up)
    if needs.up_bias:
        dup_bias = column_sums(dz_NG, offsets)
    if not up.is_absent and (needs.x or needs.up_A):
        g_NR = up.narrow_back(dz_NG, offsets)
        if needs.up_A:
            dup_A = _trimmed(grouped_outer(g_NR, x_ND, offsets), 1, rank_up)
    if needs.x:
        dx_ND = grouped_mm(dz_NG, up_EGD, offsets)
        if not up.is_absent:
            dx_ND += grouped_mm(g_NR, up.A, offsets)
        dx = sum_over_choices(dx_ND, rows, weighted=False, dtype=x_TD.dtype)
    dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B = (
        gradient.to(x_TD.dtype) for gradient in (dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B)
    )
    return dx, dweights, dup, ddown, dup_bias, ddown_bias, dup_A, dup_B, ddown_A, ddown_B


def experts_mlp_lora_dense(
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
) -> Tensor:
    """:func:`experts_mlp_lora` over all experts at once, as ``ops.dense.experts_mlp_dense`` is."""
    weights_ET1, routed_ET1 = by_expert(experts_TK, weights_TK, up_EGD.shape[0], x_TD.dtype)
    x_ETD = tokens_of_experts(x_TD, routed_ET1)
    dtype = x_ETD.dtype
    z_ETG = torch.matmul(x_ETD, up_EGD.to(dtype).transpose(1, 2))
    if not up.is_absent:
        z_ETG = z_ETG + up.dense(x_ETD, routed_ET1)
    if up_bias_EG is not None:
        z_ETG = z_ETG + up_bias_EG[:, None, :]
    z_ETG = torch.where(routed_ET1, z_ETG, 0)
    h_ETF = (activate(z_ETG, act) * weights_ET1).to(dtype)
    y_ETD = torch.matmul(h_ETF, down_EDF.to(dtype).transpose(1, 2))
    if not down.is_absent:
        y_ETD = y_ETD + down.dense(h_ETF, routed_ET1)
    if down_bias_ED is not None:
        y_ETD = y_ETD + weights_ET1 * down_bias_ED[:, None, :]
    return sum_of_experts(y_ETD, routed_ET1, x_TD.dtype)
