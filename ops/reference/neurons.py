"""Single-neuron experts and value memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fusedonemoe.ops.reference.arrays import FloatArray, float64, routed_rows
from fusedonemoe.ops.reference.experts import activate, activate_backward


@dataclass(frozen=True)
class NeuronGradients:
    """Gradients of ``experts_neurons``, each of its argument's shape."""

    x: FloatArray
    weights: FloatArray
    down_table: FloatArray
    up_table: FloatArray


@dataclass(frozen=True)
class ValueGradients:
    """Gradients of ``experts_values``, each of its argument's shape."""

    weights: FloatArray
    table: FloatArray


def experts_neurons(
    x: ArrayLike, experts: ArrayLike, weights: ArrayLike, down_table: ArrayLike, up_table: ArrayLike, *, activation: str = "silu"
) -> FloatArray:
    """``y_t = sum_j act(<x_t, d_e>) w_tj u_e``, ``[T, D]``, of tables ``[E, D]``."""
    x_TD, weights_TK, down_ED, up_ED = map(float64, (x, weights, down_table, up_table))
    y_TD = np.zeros_like(x_TD)
    for t, j, e in routed_rows(experts, len(up_ED)):
        y_TD[t] += activate(activation, x_TD[t] @ down_ED[e]) * weights_TK[t, j] * up_ED[e]
    return y_TD


def experts_neurons_backward(
    dy: ArrayLike,
    x: ArrayLike,
    experts: ArrayLike,
    weights: ArrayLike,
    down_table: ArrayLike,
    up_table: ArrayLike,
    *,
    activation: str = "silu",
) -> NeuronGradients:
    """Gradients of ``sum(dy * experts_neurons(...))``, of ``dy`` ``[T, D]`` and the arguments there."""
    dy_TD, x_TD, weights_TK, down_ED, up_ED = map(float64, (dy, x, weights, down_table, up_table))
    dx_TD, dweights_TK, ddown_ED, dup_ED = map(np.zeros_like, (x_TD, weights_TK, down_ED, up_ED))
    for t, j, e in routed_rows(experts, len(up_ED)):
        w, s, q = weights_TK[t, j], x_TD[t] @ down_ED[e], dy_TD[t] @ up_ED[e]
        h = activate(activation, s)
        ds, _ = activate_backward(activation, q * w, s)
        dweights_TK[t, j] = q * h
        dx_TD[t] += ds * down_ED[e]
        ddown_ED[e] += ds * x_TD[t]
        dup_ED[e] += w * h * dy_TD[t]
    return NeuronGradients(x=dx_TD, weights=dweights_TK, down_table=ddown_ED, up_table=dup_ED)


def experts_values(experts: ArrayLike, weights: ArrayLike, table: ArrayLike) -> FloatArray:
    """``y_t = sum_j w_tj v_e``, ``[T, D]``, of a table ``[E, D]``."""
    weights_TK, table_ED = float64(weights), float64(table)
    y_TD = np.zeros((len(weights_TK), table_ED.shape[1]))
    for t, j, e in routed_rows(experts, len(table_ED)):
        y_TD[t] += weights_TK[t, j] * table_ED[e]
    return y_TD


def experts_values_backward(dy: ArrayLike, experts: ArrayLike, weights: ArrayLike, table: ArrayLike) -> ValueGradients:
    """Gradients of ``sum(dy * experts_values(...))``, of ``dy`` ``[T, D]`` and the arguments there."""
    dy_TD, weights_TK, table_ED = map(float64, (dy, weights, table))
    dweights_TK, dtable_ED = np.zeros_like(weights_TK), np.zeros_like(table_ED)
    for t, j, e in routed_rows(experts, len(table_ED)):
        dweights_TK[t, j] = dy_TD[t] @ table_ED[e]
        dtable_ED[e] += weights_TK[t, j] * dy_TD[t]
    return ValueGradients(weights=dweights_TK, table=dtable_ED)
