"""The static-graph formulation: masked batched matmul. No Python loop, no branch on data, any device, any derivative.

Every expert sees every token, and a mask keeps what was routed: E/K times the arithmetic of a sorted formulation, in
exchange for three plain tensor contractions that autograd, ``torch.func``, ``torch.export`` and every backend understand.
"""

import torch
from torch import Tensor

from fusedonemoe.ops.activation import Activation, activate


def routing_masks(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Spread a routing over all experts.

    Returns:
        ``weights_TE``, the summed weight of each expert for each token (0 where unrouted; at least float32), and
        ``routed_TE``, the mask.
        An id outside ``[0, E)`` equals no expert and so drops out, whatever its weight.
    """
    weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    hit_TKE = experts_TK.to(torch.int64)[:, :, None] == torch.arange(num_experts, device=experts_TK.device)
    return torch.where(hit_TKE, weights_TK[:, :, None], 0).sum(1), hit_TKE.any(1)


def experts_mlp_dense(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
) -> Tensor:
    """``y_t = sum_e w_te (act(x_t Wup_e + bup_e) Wdown_e + bdown_e)`` over all experts at once.

    Pre-activations of unrouted pairs are set to 0 before the activation: an expert that overflows on a token that was
    never sent to it must not turn ``0 * inf`` into NaN, in the output or in a gradient. (An expert whose weights are
    themselves infinite or NaN does poison the sum; masking those would copy every weight on every call.)
    """
    weights_TE, routed_TE = routing_masks(experts_TK, weights_TK, up_EGD.shape[0])
    z_ETG = torch.matmul(x_TD, up_EGD.transpose(1, 2))
    if up_bias_EG is not None:
        z_ETG = z_ETG + up_bias_EG[:, None, :]
    z_ETG = torch.where(routed_TE.t()[:, :, None], z_ETG, 0)
    h_ETF = (activate(z_ETG, act) * weights_TE.t()[:, :, None]).to(x_TD.dtype)
    y_TD = torch.einsum("etf,edf->td", h_ETF, down_EDF)
    if down_bias_ED is not None:
        y_TD = (y_TD + weights_TE @ down_bias_ED.to(weights_TE.dtype)).to(x_TD.dtype)
    return y_TD


def experts_merged_dense(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, proj_EDF: Tensor) -> Tensor:
    """``h_t = sum_e (w_te x_t) W_e``: one matmul of the weighted copies of each token with all experts stacked."""
    E, D, F = proj_EDF.shape
    weights_TE, routed_TE = routing_masks(experts_TK, weights_TK, E)
    scaled_TED = torch.where(routed_TE[:, :, None], weights_TE[:, :, None] * x_TD[:, None, :], 0).to(x_TD.dtype)
    return scaled_TED.reshape(-1, E * D) @ proj_EDF.reshape(E * D, F)
