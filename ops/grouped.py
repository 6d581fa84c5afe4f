"""The sorted formulation: rows in expert order, one grouped GEMM per projection. K/E of dense's arithmetic.

Forward and hand-written backward of both expert layers, as static-shape tensor code around :func:`grouped_mm` and
:func:`grouped_outer`. ``N = T * K`` rows; row suffix ``N`` means sorted (plan) order. Rows whose id lies outside
``[0, E)`` stand at the end; the grouped products write zeros there, so they add nothing anywhere.

Of float16, everything between x and y is float32 but the saved ``z``: see :func:`fusedonemoe.ops.precision.row_dtype`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops.activation import activate, activate_backward
from fusedonemoe.ops.plan import in_range, make_plan
from fusedonemoe.ops.precision import row_dtype, sum_dtype
from fusedonemoe.ops.records import Activation


def grouped_mm(rows_NA: Tensor, weights_EAB: Tensor, offsets: Tensor) -> Tensor:
    """``out[i] = rows[i] @ weights[e]`` for the sorted rows ``i`` of expert ``e``; zeros past ``offsets[E]``. ``[N, B]``."""
    return torch.ops.fusedonemoe.grouped_mm(rows_NA, weights_EAB, offsets)


def grouped_outer(left_NA: Tensor, right_NB: Tensor, offsets: Tensor) -> Tensor:
    """``out[e] = sum_i left[i]^T right[i]`` over the sorted rows of expert ``e``; zeros for an empty one. ``[E, A, B]``."""
    return torch.ops.fusedonemoe.grouped_outer(left_NA, right_NB, offsets)


def _outer_laid_out_like(weights_EAB: Tensor, left_NA: Tensor, right_NB: Tensor, offsets: Tensor) -> Tensor:
    """:func:`grouped_outer`, in the dtype and the layout of the weights, into which autograd would copy their gradient."""
    if weights_EAB.stride(1) < weights_EAB.stride(2):
        return grouped_outer(right_NB, left_NA, offsets).to(weights_EAB.dtype).transpose(1, 2)
    return grouped_outer(left_NA, right_NB, offsets).to(weights_EAB.dtype)


class Rows(NamedTuple):
    """What every operator needs to know of its sorted rows.

    Attributes:
        token: ``[N]`` the token of each row.
        position: ``[N]`` where each flattened row ``t * K + j`` stands in sorted order.
        weights_TK: routing weights with those of out-of-range ids at 0 (an arbitrary value may stand there).
        weight: ``[N, 1]`` the routing weight of each row.
    """

    token: Tensor
    position: Tensor
    weights_TK: Tensor
    weight: Tensor


def in_backward(gradient: Tensor, *routing: Tensor) -> tuple[Tensor, ...]:
    """``routing``, as values that are known only when ``gradient`` is.

    torch.compile sees forward and backward as one graph, and cuts it where it likes. To it the backward's gathered rows of x
    and its pre-activations are values that the forward has already, so it would keep those: K copies of x, and all of z
    whatever ``save_percent`` says. Behind this they are the backward's own, and what is kept is what the operator keeps.
    """
    known = gradient.any()
    return tuple(torch.where(known, tensor, tensor) for tensor in routing)


def sorted_rows(
    experts_TK: Tensor, weights_TK: Tensor, order: Tensor, num_experts: int, gradient: Tensor | None = None
) -> tuple[Rows, Tensor, Tensor]:
    """The rows, with ``experts_TK`` and ``order`` as a backward pass of this ``gradient`` has to use them."""
    positions = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    if gradient is not None:
        order, experts_TK, weights_TK, positions = in_backward(gradient, order, experts_TK, weights_TK, positions)
    weights_TK = torch.where(in_range(experts_TK, num_experts), weights_TK, 0)
    weight = weights_TK.reshape(-1).index_select(0, order)
    position = torch.empty_like(order).scatter(0, order.to(torch.int64), positions)
    return Rows(order // experts_TK.shape[1], position, weights_TK, weight[:, None]), experts_TK, order


def bias_of_row(bias_EB: Tensor, experts_TK: Tensor, order: Tensor) -> Tensor:
    """``[N, B]`` the bias of each sorted row; zeros where the id is out of range, as any expert's bias may be NaN."""
    ids = experts_TK.reshape(-1).to(torch.int64).index_select(0, order)
    rows_NB = bias_EB.index_select(0, ids.clamp(0, bias_EB.shape[0] - 1).to(torch.int32))
    return torch.where(in_range(ids, bias_EB.shape[0])[:, None], rows_NB, 0)


def sum_over_choices(rows_NB: Tensor, rows: Rows, *, weighted: bool, dtype: torch.dtype) -> Tensor:
    """Per token, the (weighted) sum of its K rows in the order of its choices: no atomics. ``[T, B]``.

    A half-precision sum runs in float32 and rounds once. One choice after the other, because [T, K, B] in float32 would be
    the largest tensor of the whole block.
    """
    position_TK = rows.position.view(rows.weights_TK.shape)
    wide = sum_dtype(dtype)
    sum_TB = None
    for position, weight in zip(position_TK.unbind(1), rows.weights_TK.to(wide).split(1, dim=1), strict=True):
        choice_TB = rows_NB.index_select(0, position).to(wide)
        if sum_TB is None:
            sum_TB = choice_TB * weight if weighted else choice_TB
        elif weighted:
            sum_TB.addcmul_(choice_TB, weight)
        else:
            sum_TB += choice_TB
    assert sum_TB is not None
    return sum_TB.to(dtype)


def of_choices(dweight_N: Tensor, rows: Rows, experts_TK: Tensor, num_experts: int) -> Tensor:
    """``[T, K]`` gradients of routing weights, of those of sorted rows; 0 where the id is out of range."""
    dweights_TK = dweight_N.index_select(0, rows.position).view(experts_TK.shape)
    return torch.where(in_range(experts_TK, num_experts), dweights_TK, 0)


def dots(left_NB: Tensor, right_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N]`` ``<left[i], right[i]>``, summed in the wider of ``dtype`` and that of the rows."""
    return (left_NB * right_NB).sum(1, dtype=torch.promote_types(dtype, left_NB.dtype))


def column_sums(rows_NB: Tensor, offsets: Tensor) -> Tensor:
    """``[E, B]`` sum of each expert's rows, as a grouped product with ones: one fixed order of summation."""
    # Several columns of ones, not one: torch's CUDA grouped GEMM wants rows of whole 16 bytes.
    ones = rows_NB.new_ones(rows_NB.shape[0], 8)
    return grouped_outer(ones, rows_NB, offsets)[:, 0].contiguous()


def _pre_activation(
    x_ND: Tensor, up_EGD: Tensor, up_bias_EG: Tensor | None, experts_TK: Tensor, order: Tensor, offsets: Tensor
) -> Tensor:
    """``z = x Wup_e (+ bup_e)`` for sorted rows, in the dtype of x."""
    z_NG = grouped_mm(x_ND.to(row_dtype(x_ND.dtype)), up_EGD.transpose(1, 2), offsets)
    if up_bias_EG is not None:
        z_NG += bias_of_row(up_bias_EG, experts_TK, order)
    return z_NG.to(x_ND.dtype)


def saved_rows(num_rows: int, save_percent: int) -> int:
    """How many sorted rows of ``z`` the forward keeps for the backward: ``floor(N * p / 100)``."""
    # No rows is known for every T, and must not become a symbolic size.
    return num_rows * save_percent // 100 if save_percent else 0


def first_rows(z_NG: Tensor, save_percent: int) -> Tensor:
    """The rows of ``z`` that the forward keeps: all of them, or a copy of the first."""
    if save_percent == 100:
        return z_NG
    # Inductor takes a clone of a slice for the slice itself, which holds all of z. A selection of rows it copies.
    return z_NG.index_select(0, torch.arange(saved_rows(z_NG.shape[0], save_percent), device=z_NG.device))


def experts_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    save_percent: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y_t = sum_j w_tj (act(x_t Wup_e + bup_e) Wdown_e + bdown_e)``.

    Returns:
        ``y_TD``; ``z``, the first ``floor(N * save_percent / 100)`` rows of the sorted pre-activations; and the plan's
        ``order`` and ``offsets``.
    """
    E = up_EGD.shape[0]
    plan = make_plan(experts_TK, E)
    rows, *_ = sorted_rows(experts_TK, weights_TK, plan.order, E)
    x_ND = x_TD.index_select(0, rows.token)
    z_NG = _pre_activation(x_ND, up_EGD, up_bias_EG, experts_TK, plan.order, plan.offsets)
    del x_ND
    h_NF = activate(z_NG.to(row_dtype(z_NG.dtype)), act, reuse=True)
    saved = first_rows(z_NG, save_percent)
    del z_NG
    y_ND = grouped_mm(h_NF, down_EDF.transpose(1, 2), plan.offsets)
    del h_NF
    if down_bias_ED is not None:
        y_ND += bias_of_row(down_bias_ED, experts_TK, plan.order)
    return sum_over_choices(y_ND, rows, weighted=True, dtype=x_TD.dtype), saved, plan.order, plan.offsets


class MLPNeeds(NamedTuple):
    """Which gradients of :func:`experts_mlp` are wanted; what is not wanted costs nothing."""

    x: bool
    weights: bool
    up: bool
    down: bool
    up_bias: bool
    down_bias: bool


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
    """Gradients of :func:`experts_mlp` (SonicMoE's algebra, arXiv 2512.14080: each expert's y is never needed).

    With ``dA' = dy Wdown_e^T`` and ``A = act(z)``: ``dw = <dA', A> + <dy, bdown_e>``, ``dz = act'(z) (w dA')``,
    ``dWdown_e = sum dy^T (w A)``, ``dWup_e = sum dz^T x``, ``dx_t = sum_j dz Wup_e``; bias gradients are column sums.

    Returns:
        Gradients of x, weights, up, down, up bias and down bias; a zero-size tensor where not needed.
    """
    E, dtype = up_EGD.shape[0], row_dtype(x_TD.dtype)
    rows, experts_TK, order = sorted_rows(experts_TK, weights_TK, order, E, dy_TD)
    x_ND = x_TD.index_select(0, rows.token)
    if save_percent < 100:
        kept = z.shape[0]
        rest_offsets = (offsets - kept).clamp(min=0)
        rest = _pre_activation(x_ND[kept:], up_EGD, up_bias_EG, experts_TK, order[kept:], rest_offsets)
        z = torch.cat((z, rest))
    x_ND, z, dy_ND = x_ND.to(dtype), z.to(dtype), dy_TD.index_select(0, rows.token).to(dtype)
    h_NF = activate(z, act, reuse=True)

    # Operators may not return one tensor twice, so each unneeded gradient is an empty tensor of its own.
    dx, dweights, dup, ddown, dup_bias, ddown_bias = (x_TD.new_empty(0) for _ in range(6))
    if needs.down:
        ddown = _outer_laid_out_like(down_EDF, dy_ND, (h_NF * rows.weight).to(dtype), offsets)
    if needs.down_bias:
        ddown_bias = column_sums((dy_ND * rows.weight).to(dtype), offsets).to(x_TD.dtype)
    if needs.x or needs.weights or needs.up or needs.up_bias:
        dh_NF = grouped_mm(dy_ND, down_EDF, offsets)
    if needs.weights:
        dweight = dots(dh_NF, h_NF, weights_TK.dtype)
        if down_bias_ED is not None:
            dweight = dweight + dots(dy_ND, bias_of_row(down_bias_ED, experts_TK, order), weights_TK.dtype)
        dweights = of_choices(dweight, rows, experts_TK, E).to(weights_TK.dtype)
    del h_NF, dy_ND
    if needs.x or needs.up or needs.up_bias:
        dz_NG = activate_backward((dh_NF * rows.weight).to(dtype), z, act)
    if needs.up:
        dup = _outer_laid_out_like(up_EGD, dz_NG, x_ND, offsets)
    if needs.up_bias:
        dup_bias = column_sums(dz_NG, offsets).to(x_TD.dtype)
    del x_ND
    if needs.x:
        dx = sum_over_choices(grouped_mm(dz_NG, up_EGD, offsets), rows, weighted=False, dtype=x_TD.dtype)
    return dx, dweights, dup, ddown, dup_bias, ddown_bias


def experts_merged(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, proj_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``h_t = sum_j w_tj (x_t W_e)``, with the plan's ``order`` and ``offsets``."""
    plan = make_plan(experts_TK, proj_EDF.shape[0])
    rows, *_ = sorted_rows(experts_TK, weights_TK, plan.order, proj_EDF.shape[0])
    h_NF = grouped_mm(x_TD.index_select(0, rows.token).to(row_dtype(x_TD.dtype)), proj_EDF, plan.offsets)
    return sum_over_choices(h_NF, rows, weighted=True, dtype=x_TD.dtype), plan.order, plan.offsets


class MergedNeeds(NamedTuple):
    """Which gradients of :func:`experts_merged` are wanted."""

    x: bool
    weights: bool
    proj: bool


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
    """Gradients of :func:`experts_merged`: with ``q = dh W_e^T``, ``dw = <q, x>``, ``dx = sum_j w q``, ``dW_e = sum (w x)^T dh``.

    Returns:
        Gradients of x, weights and proj; a zero-size tensor where not needed.
    """
    E, dtype = proj_EDF.shape[0], row_dtype(x_TD.dtype)
    rows, experts_TK, order = sorted_rows(experts_TK, weights_TK, order, E, dh_TF)
    dh_NF = dh_TF.index_select(0, rows.token).to(dtype)
    dx, dweights, dproj = (x_TD.new_empty(0) for _ in range(3))
    if needs.weights or needs.proj:
        x_ND = x_TD.index_select(0, rows.token).to(dtype)
    if needs.proj:
        dproj = grouped_outer((x_ND * rows.weight).to(dtype), dh_NF, offsets).to(proj_EDF.dtype)
    if needs.x or needs.weights:
        q_ND = grouped_mm(dh_NF, proj_EDF.transpose(1, 2), offsets)
    if needs.weights:
        dweight = dots(q_ND, x_ND, weights_TK.dtype)
        dweights = of_choices(dweight, rows, experts_TK, E).to(weights_TK.dtype)
    if needs.x:
        dx = sum_over_choices(q_ND, rows, weighted=True, dtype=x_TD.dtype)
    return dx, dweights, dproj
