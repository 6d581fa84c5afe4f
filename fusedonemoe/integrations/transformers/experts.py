"""The experts function that transformers calls: its contract outside, :func:`fusedonemoe.functional.experts_mlp` inside."""

from typing import Any

import torch
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.integrations.transformers.gates import activation_of
from fusedonemoe.ops import library
from fusedonemoe.ops.options import activation_options


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run an experts module of transformers: ``y_t = sum_k w_tk expert_{e_tk}(x_t)``.

    The module's attributes have the defaults of the first version of transformers' contract, because each later version has
    added some. The number of experts is that of the weights: under expert parallelism a module has fewer than its
    configuration says. Any id outside it is skipped, be it ``E``, which is transformers' word for "not here", or -1.
    transformers passes the arguments by position: ``[T, D]``, ``[T, K]`` ids, ``[T, K]`` weights of any float dtype; the result
    is ``[T, D]`` in the dtype of ``hidden_states``.
    """
    has_gate = getattr(experts, "has_gate", True)
    up = experts.gate_up_proj if has_gate else experts.up_proj
    transposed = getattr(experts, "is_transposed", False)
    up_bias = down_bias = None
    if getattr(experts, "has_bias", False):
        up_bias, down_bias = experts.gate_up_proj_bias if has_gate else experts.up_proj_bias, experts.down_proj_bias
    x = hidden_states
    if x.dtype != up.dtype and library.autocast_dtype(x.device.type) is None:
        x = x.to(up.dtype)
    act = None if getattr(experts, "has_post_expert_norm", False) else activation_of(experts)
    if act is None:
        y = _unfused(experts, x, top_k_index, top_k_weights, (up, up_bias), (experts.down_proj, down_bias), transposed)
    else:
        y = F.experts_mlp(
            x,
            top_k_index,
            top_k_weights,
            up,
            experts.down_proj,
            gate_up_bias=up_bias,
            down_bias=down_bias,
            transposed=transposed,
            **activation_options(act),
        )
    return y if y.dtype == hidden_states.dtype else y.to(hidden_states.dtype)


def _unfused(
    experts: Any,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    transposed: bool,
) -> Tensor:
    """Two grouped products with the module's own code between and behind them; a row for every token and choice."""
    (T, K), D, E = experts_TK.shape, x_TD.shape[-1], up[0].shape[0]
    ids_N1 = experts_TK.reshape(-1, 1)
    inside_N1 = (ids_N1 >= 0) & (ids_N1 < E)
    x_ND = x_TD[:, None].expand(T, K, D).reshape(T * K, D)
    z_NG = _grouped(x_ND, ids_N1, *up, transposed)
    h_NF = experts._apply_gate(z_NG) if getattr(experts, "has_gate", True) else experts.act_fn(z_NG)
    y_ND = _grouped(h_NF, ids_N1, *down, transposed)
    if getattr(experts, "has_post_expert_norm", False):
        # A row of zeros, which a skipped id has, is what a norm has no gradient at.
        y_ND = experts.post_expert_norm(torch.where(inside_N1, y_ND, 1))
    # Not times a weight of zero: what the module made of a skipped row need not be finite.
    y_TKD = torch.where(inside_N1, y_ND, 0).view(T, K, D)
    wide = torch.promote_types(torch.promote_types(y_TKD.dtype, weights_TK.dtype), torch.float32)
    weights_TK = torch.where(inside_N1.view(T, K), weights_TK, 0)
    return (y_TKD.to(wide) * weights_TK.to(wide)[..., None]).sum(1).to(y_ND.dtype)


def _grouped(rows_NA: Tensor, ids_N1: Tensor, weight: Tensor, bias_EB: Tensor | None, transposed: bool) -> Tensor:
    """``rows[n] @ weight[id_n] + bias[id_n]``, zeros for an id of no expert: both are sums over one choice of weight 1."""
    ones_N1 = torch.ones(ids_N1.shape, dtype=torch.float32, device=rows_NA.device)
    y_NB = F.experts_merged(rows_NA, ids_N1, ones_N1, weight if transposed else weight.transpose(1, 2))
    if bias_EB is None:
        return y_NB
    return y_NB + F.experts_values(ids_N1, ones_N1, bias_EB).to(y_NB.dtype)
