"""Experts of 8 or 4 bits as Triton kernels: the formulas of ``ops/grouped.py`` around products that read the stored weights.

The activations and their derivatives are plain tensor arithmetic, as in ``lora.py``: torch.compile makes one kernel of each.
"""

import torch
from torch import Tensor

from fusedonemoe.ops.activation import activate, activate_backward
from fusedonemoe.ops.formats import QuantizedWeight
from fusedonemoe.ops.grouped import first_rows
from fusedonemoe.ops.precision import row_dtype
from fusedonemoe.ops.quantized import QuantizedNeeds
from fusedonemoe.ops.records import PLAIN, Activation
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.plan import from_saved, make_plan
from fusedonemoe.ops.triton.quantized_rows import quantized_rows
from fusedonemoe.ops.triton.sums import column_sums, routing_gradient


def experts_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    save_percent: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``ops.quantized.experts_mlp``; rows of z of ids outside ``[0, E)`` are not written.

    Returns:
        ``y_TD``; ``z``, the first ``floor(N * save_percent / 100)`` rows of the sorted pre-activations; and the plan's
        ``order`` and ``offsets``.
    """
    K, N = experts_TK.shape[1], experts_TK.numel()
    tile = rules.tiles_of(x_TD, N, down.shape, gated=act.layout != PLAIN).down
    plan = make_plan(experts_TK, up.shape[0], tile.BLOCK_M)
    z_NG = quantized_rows(x_TD, up, plan, tile, bias_EB=up_bias_EG, top_k=K)
    h_NF = activate(z_NG, act, reuse=True)
    saved = first_rows(z_NG, save_percent)
    del z_NG
    y_ND = quantized_rows(h_NF, down, plan, tile, bias_EB=down_bias_ED, dtype=row_dtype(x_TD.dtype))
    del h_NF
    return combine(y_ND, weights_TK, plan, x_TD.dtype), saved, plan.order, plan.offsets


def experts_mlp_backward(
    dy_TD: Tensor,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    save_percent: int,
    needs: QuantizedNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up bias and down bias; a zero-size tensor where not needed, and nothing launched for it."""
    N, K, dtype = order.shape[0], experts_TK.shape[1], row_dtype(x_TD.dtype)
    tile = rules.tiles_of(x_TD, N, down.shape, gated=act.layout != PLAIN).dx
    plan = from_saved(order, offsets, tile.BLOCK_M)
    dy_TD, weights_TK = dy_TD.contiguous(), weights_TK.contiguous()
    dx, dweights, dup_bias, ddown_bias = (x_TD.new_empty(0) for _ in range(4))
    if needs.down_bias:
        assert down_bias_ED is not None
        ddown_bias = column_sums(dy_TD, plan, weights_TK=weights_TK, dtype=down_bias_ED.dtype)
    needs_dz = needs.x or needs.up_bias
    if not (needs_dz or needs.weights):
        return dx, dweights, dup_bias, ddown_bias

    if save_percent < 100:
        z_NG, kept = z.new_empty(N, up.shape[1]), z.shape[0]
        if save_percent > 0:
            z_NG[:kept].copy_(z)
        z = quantized_rows(x_TD, up, plan, tile, bias_EB=up_bias_EG, top_k=K, out_NB=z_NG, first_row=kept)
    dh_NF = quantized_rows(dy_TD, down, plan, tile, back=True, top_k=K, dtype=dtype)
    if needs.weights:
        partial_N1 = (dh_NF.to(torch.float32) * activate(z, act, reuse=True)).sum(1, keepdim=True)
        bias_ED = None if down_bias_ED is None else down_bias_ED.contiguous()
        dweights = routing_gradient(partial_N1, dy_TD, experts_TK.contiguous(), bias_ED, plan, weights_TK.dtype)
    if needs_dz:
        scaled_NF = (dh_NF * weights_TK.reshape(-1).index_select(0, order)[:, None]).to(dh_NF.dtype)
        del dh_NF
        dz_NG = activate_backward(scaled_NF, z.to(dtype), act).to(x_TD.dtype)
        del scaled_NF
        if needs.up_bias:
            assert up_bias_EG is not None
            dup_bias = column_sums(dz_NG, plan, dtype=up_bias_EG.dtype)
        if needs.x:
            dx_ND = quantized_rows(dz_NG, up, plan, tile, back=True, dtype=dtype)
            dx = combine(dx_ND, None, plan, x_TD.dtype, top_k=K)
    return dx, dweights, dup_bias, ddown_bias
