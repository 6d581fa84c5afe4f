"""Single-neuron experts and value memory: experts that are rows of tables ``[E, D]``, with E up to a million.

The formulas are those of ``ops/neurons.py``. All of it is made of the dot products of a token with its rows, the sum of a token's
rows (both in :mod:`.token_rows`) and the sum of a row's tokens (in :mod:`.segments`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedonemoe.ops.triton.segments import rows_plan, table_gradient
from fusedonemoe.ops.triton.token_rows import scores, scores_backward, sums


def experts_neurons(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """``y_t = sum_j act(s_tj) w_tj up[e]`` with ``s_tj = x_t . down[e]``; returns y, and s in float32 for the backward."""
    x_TD, experts_TK, weights_TK = x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous()
    s_TK, factors_TK = scores(x_TD, experts_TK, down_ED, torch.float32, weights_TK, activation)
    return sums(experts_TK, factors_TK, up_ED, x_TD.dtype), s_TK


def experts_neurons_backward(
    dy_TD: Tensor,
    s_TK: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    needs: Sequence[bool],
    slots_TK: Tensor | None = None,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients ``(dx, dweights, ddown, dup)`` of :func:`experts_neurons`, without elements where they are not wanted.

    With ``slots_TK``, contiguous, they are the rows of ``ddown`` and ``dup`` that belong to each id, ``num_slots`` in all.
    """
    need_x, need_weights, need_down, need_up = needs
    dy_TD, s_TK, x_TD, experts_TK, weights_TK = (t.contiguous() for t in (dy_TD, s_TK, x_TD, experts_TK, weights_TK))
    dx_TD, ddown_ED, dup_ED = (t.new_empty(0) for t in (x_TD, down_ED, up_ED))
    wanted = (need_weights, need_x or need_down, need_up)
    dweights_TK, ds_TK, factors_TK = scores_backward(dy_TD, s_TK, experts_TK, weights_TK, up_ED, activation, wanted)
    if need_x:
        dx_TD = sums(experts_TK, ds_TK, down_ED, x_TD.dtype)
    if need_down or need_up:
        E = down_ED.shape[0]
        owners_TK, owners = (experts_TK, E) if slots_TK is None else (slots_TK, num_slots)
        plan = rows_plan(owners_TK, owners)
        if need_down:
            ddown_ED = table_gradient(x_TD, owners_TK, ds_TK, plan, down_ED.dtype, E)
        if need_up:
            dup_ED = table_gradient(dy_TD, owners_TK, factors_TK, plan, up_ED.dtype, E)
    return dx_TD, dweights_TK, ddown_ED, dup_ED


def experts_values(experts_TK: Tensor, weights_TK: Tensor, table_ED: Tensor) -> Tensor:
    """``y_t = sum_j w_tj table[experts_tj]``, ``[T, D]`` in the dtype of the table; ids outside ``[0, E)`` add nothing."""
    return sums(experts_TK.contiguous(), weights_TK.contiguous(), table_ED, table_ED.dtype)


def experts_values_backward(
    dy_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    table_ED: Tensor,
    needs: Sequence[bool],
    slots_TK: Tensor | None = None,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor]:
    """``dw_tj = dy_t . table[e]`` and ``dtable_e = sum_tj w_tj dy_t``; needs and slots as in the other backward."""
    need_weights, need_table = needs
    dy_TD, experts_TK, weights_TK = dy_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous()
    dweights_TK, dtable_ED = weights_TK.new_empty(0), table_ED.new_empty(0)
    if need_weights:
        dweights_TK, _ = scores(dy_TD, experts_TK, table_ED, weights_TK.dtype)
    if need_table:
        E = table_ED.shape[0]
        owners_TK, owners = (experts_TK, E) if slots_TK is None else (slots_TK, num_slots)
        plan = rows_plan(owners_TK, owners)
        dtable_ED = table_gradient(dy_TD, owners_TK, weights_TK, plan, table_ED.dtype, E)
    return dweights_TK, dtable_ED
