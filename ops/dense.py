"""The static-graph formulation: masked batched matmul. No Python loop, no branch on data, any device, any derivative.

Every expert computes a row for every token: E/K times the arithmetic of a sorted formulation. Tokens that were not routed to an
expert, and its rows for them, are zeros, so NaN and infinity reach nothing that was not routed.
"""

import torch
from torch import Tensor

from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.precision import row_dtype, sum_dtype
from fusedonemoe.ops.records import ExpertsCall, Projection


def routing_masks(
    experts_TK: Tensor, weights_TK: Tensor, num_experts: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return ``weights_TE``, the summed weight of each expert for each token, and ``routed_TE``, the mask.

    A weight is 0 where unrouted, at least float32, and at least ``dtype``. An id outside ``[0, E)`` drops out.
    """
    weights_TK = weights_TK.to(sum_dtype(weights_TK.dtype, dtype))
    hit_TKE = experts_TK.to(torch.int64)[:, :, None] == torch.arange(num_experts, device=experts_TK.device)
    return torch.where(hit_TKE, weights_TK[:, :, None], 0).sum(1), hit_TKE.any(1)


def _by_expert(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x_ETD`` with zeros for tokens that were not routed to an expert, ``weights_ET1`` and ``routed_ET1``."""
    weights_TE, routed_TE = routing_masks(experts_TK, weights_TK, num_experts, x_TD.dtype)
    routed_ET1 = routed_TE.t()[:, :, None]
    return torch.where(routed_ET1, x_TD.to(row_dtype(x_TD.dtype)), 0), weights_TE.t()[:, :, None], routed_ET1


def _sum_of_experts(rows_ETB: Tensor, routed_ET1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of a token's rows, of the experts that it was routed to, ``[T, B]``; rounded once."""
    return torch.where(routed_ET1, rows_ETB, 0).sum(0, dtype=sum_dtype(rows_ETB.dtype)).to(dtype)


def _project(rows_ETI: Tensor, projection: Projection, routed_ET1: Tensor, bias_weights_ET1: Tensor | None = None) -> Tensor:
    """``rows W_e^T + s (rows A_e^T) B_e^T (+ bias_e)``, ``[E, T, O]``; the bias times ``bias_weights``, where given."""
    dtype = rows_ETI.dtype
    weights_EOI = projection.format.widen(projection.tensors, dtype).to(dtype)
    out_ETO = torch.matmul(rows_ETI, weights_EOI.transpose(1, 2))
    if projection.adapter is not None:
        A, B, scale = projection.adapter
        narrow_ETR = torch.where(routed_ET1, torch.matmul(rows_ETI, A.to(dtype).transpose(1, 2)) * scale, 0)
        out_ETO = out_ETO + torch.matmul(narrow_ETR, B.to(dtype).transpose(1, 2))
    if projection.bias is not None:
        bias_E1O = projection.bias[:, None, :]
        out_ETO = out_ETO + (bias_E1O if bias_weights_ET1 is None else bias_weights_ET1 * bias_E1O)
    return out_ETO


def experts_mlp_dense(call: ExpertsCall) -> Tensor:
    """``y_t = sum_e down_e(w_te act(up_e(x_t)))`` over all experts at once, the down bias times ``w_te`` as well.

    Pre-activations of unrouted pairs are 0: a bias that overflows in the activation must not make a gradient ``0 * inf``.
    """
    x_TD, experts_TK, weights_TK, (up, down, act) = call
    x_ETD, weights_ET1, routed_ET1 = _by_expert(x_TD, experts_TK, weights_TK, up.shape[0])
    z_ETG = torch.where(routed_ET1, _project(x_ETD, up, routed_ET1), 0)
    h_ETF = (activate(z_ETG, act) * weights_ET1).to(x_ETD.dtype)
    y_ETD = _project(h_ETF, down, routed_ET1, weights_ET1)
    return _sum_of_experts(y_ETD, routed_ET1, x_TD.dtype)


def experts_merged_dense(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, proj_EDF: Tensor) -> Tensor:
    """``h_t = sum_e (w_te x_t) W_e``: a batched matmul of the weighted tokens of each expert with its weights."""
    x_ETD, weights_ET1, routed_ET1 = _by_expert(x_TD, experts_TK, weights_TK, proj_EDF.shape[0])
    proj_EDF = proj_EDF.to(x_ETD.dtype)
    x_ETD = (weights_ET1 * x_ETD).to(x_ETD.dtype)
    T = x_TD.shape[0]
    if isinstance(T, torch.SymInt) and not T.node.has_hint():  # of a graph that is traced with an unbacked number of tokens
        # Inductor's lowering of bmm asks whether the number of tokens is 1. It does not of baddbmm, which reads no first operand
        # with beta=0. Other calls take bmm: torch crashes in a compiled baddbmm whose first operand has no tangent.
        h_ETF = torch.baddbmm(proj_EDF[:, :1].detach(), x_ETD, proj_EDF, beta=0)
    else:
        h_ETF = torch.bmm(x_ETD, proj_EDF)
    return _sum_of_experts(h_ETF, routed_ET1, x_TD.dtype)
