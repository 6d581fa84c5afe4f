"""The sorted formulation: rows in expert order, one grouped GEMM per projection. K/E of dense's arithmetic.

The steps of :mod:`.mlp` and the merged projection as static-shape tensor code. ``N = T * K`` rows; row suffix ``N`` means sorted
(plan) order. Rows of ids outside ``[0, E)`` come last; the grouped products write zeros there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops.plan import in_range, make_plan
from fusedonemoe.ops.precision import row_dtype, sum_dtype


def grouped_mm(rows_NA: Tensor, weights_EAB: Tensor, offsets: Tensor) -> Tensor:
    """``out[i] = rows[i] @ weights[e]`` for the sorted rows ``i`` of expert ``e``; zeros past ``offsets[E]``. ``[N, B]``."""
    return torch.ops.fusedonemoe.grouped_mm(rows_NA, weights_EAB, offsets)


def grouped_outer(left_NA: Tensor, right_NB: Tensor, offsets: Tensor) -> Tensor:
    """``out[e] = sum_i left[i]^T right[i]`` over the sorted rows of expert ``e``; zeros for an empty one. ``[E, A, B]``."""
    return torch.ops.fusedonemoe.grouped_outer(left_NA, right_NB, offsets)


class Rows(NamedTuple):
    """The sorted rows of a call."""

    experts_TK: Tensor  # ids
    order: Tensor  # [N] the flattened row t * K + j of each row
    token: Tensor  # [N] the token of each row
    position: Tensor  # [N] the place of each flattened row in sorted order
    weights_TK: Tensor  # routing weights, 0 where an id is out of range
    weight: Tensor  # [N, 1] the routing weight of each row


def in_backward(gradient: Tensor, *routing: Tensor) -> tuple[Tensor, ...]:
    """Return ``routing`` as values that are known only when ``gradient`` is.

    torch.compile cuts forward and backward out of one graph. Without this it would keep the gathered rows of x and all of z from
    the forward, whatever ``save_percent`` says.
    """
    known = gradient.any()
    return tuple(torch.where(known, tensor, tensor) for tensor in routing)


def sorted_rows(experts_TK: Tensor, weights_TK: Tensor, order: Tensor, num_experts: int, gradient: Tensor | None = None) -> Rows:
    """Return the rows; in a backward pass, as values that depend on its ``gradient``."""
    positions = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    if gradient is not None:
        order, experts_TK, weights_TK, positions = in_backward(gradient, order, experts_TK, weights_TK, positions)
    weights_TK = torch.where(in_range(experts_TK, num_experts), weights_TK, 0)
    weight = weights_TK.reshape(-1).index_select(0, order)
    position = torch.empty_like(order).scatter(0, order.to(torch.int64), positions)
    return Rows(experts_TK, order, order // experts_TK.shape[1], position, weights_TK, weight[:, None])


def bias_of_row(bias_EB: Tensor, rows: Rows, first: int | None = None) -> Tensor:
    """Return the bias of each sorted row, or of those from ``first`` on, ``[N, B]``; zeros where the id is out of range."""
    order = rows.order if first is None else rows.order[first:]
    ids = rows.experts_TK.reshape(-1).to(torch.int64).index_select(0, order)
    rows_NB = bias_EB.index_select(0, ids.clamp(0, bias_EB.shape[0] - 1).to(torch.int32))
    return torch.where(in_range(ids, bias_EB.shape[0])[:, None], rows_NB, 0)


def sum_over_choices(rows_NB: Tensor, rows: Rows, *, weighted: bool, dtype: torch.dtype) -> Tensor:
    """Per token, the (weighted) sum of its K rows in the order of its choices: no atomics. ``[T, B]``.

    A half-precision sum runs in float32 and rounds once. One choice at a time: ``[T, K, B]`` would be the block's largest tensor.
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


def of_choices(dweight_N: Tensor, rows: Rows, num_experts: int) -> Tensor:
    """Return gradients of routing weights ``[T, K]``, of those of sorted rows; 0 where the id is out of range."""
    dweights_TK = dweight_N.index_select(0, rows.position).view(rows.experts_TK.shape)
    return torch.where(in_range(rows.experts_TK, num_experts), dweights_TK, 0)


def dots(left_NB: Tensor, right_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N]`` ``<left[i], right[i]>``, summed in the wider of ``dtype`` and that of the rows."""
    return (left_NB * right_NB).sum(1, dtype=torch.promote_types(dtype, left_NB.dtype))


def column_sums(rows_NB: Tensor, offsets: Tensor) -> Tensor:
    """``[E, B]`` sum of each expert's rows, as a grouped product with ones: one fixed order of summation."""
    # Several columns of ones, not one: torch's CUDA grouped GEMM wants rows of whole 16 bytes.
    ones = rows_NB.new_ones(rows_NB.shape[0], 8)
    return grouped_outer(ones, rows_NB, offsets)[:, 0].contiguous()


def saved_rows(num_rows: int, save_percent: int) -> int:
    """Return the number of sorted rows of ``z`` that the forward keeps for the backward: ``floor(N * p / 100)``."""
    # No rows is known for every T, and must not become a symbolic size.
    return num_rows * save_percent // 100 if save_percent else 0


def first_rows(z_NG: Tensor, save_percent: int) -> Tensor:
    """The rows of ``z`` that the forward keeps: all of them, or a copy of the first."""
    if save_percent == 100:
        return z_NG
    # Inductor takes a clone of a slice for the slice itself, which holds all of z. A selection of rows it copies.
    return z_NG.index_select(0, torch.arange(saved_rows(z_NG.shape[0], save_percent), device=z_NG.device))


def experts_merged(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, proj_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``h_t = sum_j w_tj (x_t W_e)``, with the plan's ``order`` and ``offsets``."""
    plan = make_plan(experts_TK, proj_EDF.shape[0])
    rows = sorted_rows(experts_TK, weights_TK, plan.order, proj_EDF.shape[0])
    h_NF = grouped_mm(x_TD.index_select(0, rows.token).to(row_dtype(x_TD.dtype)), proj_EDF, plan.offsets)
    return sum_over_choices(h_NF, rows, weighted=True, dtype=x_TD.dtype), plan.order, plan.offsets


class MergedNeeds(NamedTuple):
    """The gradients of :func:`experts_merged` that are wanted."""

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
    """Gradients of :func:`experts_merged` with respect to x, weights and proj, of size zero where not wanted.

    With ``q = dh W_e^T``: ``dw = <q, x>``, ``dx = sum_j w q``, ``dW_e = sum (w x)^T dh``.
    """
    E, dtype = proj_EDF.shape[0], row_dtype(x_TD.dtype)
    rows = sorted_rows(experts_TK, weights_TK, order, E, dh_TF)
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
        dweights = of_choices(dweight, rows, E).to(weights_TK.dtype)
    if needs.x:
        dx = sum_over_choices(q_ND, rows, weighted=True, dtype=x_TD.dtype)
    return dx, dweights, dproj
