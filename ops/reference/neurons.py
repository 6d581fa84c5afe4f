"""Single-neuron experts and value memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fusedonemoe.ops.reference.arrays import FloatArray, float64
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
    """``y_t = sum_j act(<x_t, d_e>) w_tj u_e``. ``[T, D]``.

    Args:
        x: ``[T, D]``.
        experts: ids, ``[T, K]``.
        weights: ``[T, K]``.
        down_table: ``[E, D]``.
        up_table: ``[E, D]``.
        activation: one of ``ACTIVATIONS``.
    """
    x_TD, weights_TK, down_ED, up_ED = map(float64, (x, weights, down_table, up_table))
    experts_TK = np.asarray(experts, dtype=np.int64)
    y_TD = np.zeros_like(x_TD)
    for t, j in np.ndindex(*experts_TK.shape):
        e = experts_TK[t, j]
        if 0 <= e < len(up_ED):
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
    """Gradients of ``sum(dy * experts_neurons(...))``.

    Args:
        dy: ``[T, D]``; the other arguments are those of ``experts_neurons``.
    """
    dy_TD, x_TD, weights_TK, down_ED, up_ED = map(float64, (dy, x, weights, down_table, up_table))
    experts_TK = np.asarray(experts, dtype=np.int64)
    dx_TD, dweights_TK, ddown_ED, dup_ED = (np.zeros_like(array) for array in (x_TD, weights_TK, down_ED, up_ED))
    for t, j in np.ndindex(*experts_TK.shape):
        e, w = experts_TK[t, j], weights_TK[t, j]
        if not 0 <= e < len(up_ED):
            continue
        s, q = x_TD[t] @ down_ED[e], dy_TD[t] @ up_ED[e]
        h = activate(activation, s)
        ds, _ = activate_backward(activation, q * w, s)
        dweights_TK[t, j] = q * h
        dx_TD[t] += ds * down_ED[e]
        ddown_ED[e] += ds * x_TD[t]
        dup_ED[e] += w * h * dy_TD[t]
    return NeuronGradients(x=dx_TD, weights=dweights_TK, down_table=ddown_ED, up_table=dup_ED)


def experts_values(experts: ArrayLike, weights: ArrayLike, table: ArrayLike) -> FloatArray:
    """``y_t = sum_j w_tj v_e``. ``[T, D]``.

    Args:
        experts: ids, ``[T, K]``.
        weights: ``[T, K]``.
        table: ``[E, D]``.
    """
    weights_TK, table_ED = float64(weights), float64(table)
    experts_TK = np.asarray(experts, dtype=np.int64)
    y_TD = np.zeros((len(experts_TK), table_ED.shape[1]))
    for t, j in np.ndindex(*experts_TK.shape):
        if 0 <= experts_TK[t, j] < len(table_ED):
            y_TD[t] += weights_TK[t, j] * table_ED[experts_TK[t, j]]
    return y_TD


def experts_values_backward(dy: ArrayLike, experts: ArrayLike, weights: ArrayLike, table: ArrayLike) -> ValueGradients:
    """Gradients of ``sum(dy * experts_values(...))``.

    Args:
        dy: ``[T, D]``; the other arguments are those of ``experts_values``.
    """
    dy_TD, weights_TK, table_ED = map(float64, (dy, weights, table))
    experts_TK = np.asarray(experts, dtype=np.int64)
    dweights_TK, dtable_ED = np.zeros_like(weights_TK), np.zeros_like(table_ED)
    for t, j in np.ndindex(*experts_TK.shape):
        e = experts_TK[t, j]
        if 0 <= e < len(table_ED):
            dweights_TK[t, j] = dy_TD[t] @ table_ED[e]
            dtable_ED[e] += weights_TK[t, j] * dy_TD[t]
    return ValueGradients(weights=dweights_TK, table=dtable_ED)
