"""The oracle of single-neuron experts and value memory: naive NumPy float64 loops, as in :mod:`fusedonemoe.ops.reference`.

Nothing here shares code with an operator. Expert ids outside ``[0, E)`` contribute zero and receive zero gradients.

Shape legend: T tokens, D hidden size, E experts, K experts per token.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity")


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


def _sigmoid(s: float) -> float:
    return 1 / (1 + math.exp(-s)) if s >= 0 else math.exp(s) / (1 + math.exp(s))


def activation_and_slope(s: float, name: str) -> tuple[float, float]:
    """``act(s)`` and ``act'(s)``.

    Args:
        s: one number.
        name: one of :data:`ACTIVATIONS`.
    """
    if name == "silu":
        p = _sigmoid(s)
        return s * p, p + s * p * (1 - p)
    if name == "gelu":
        phi = math.erfc(-s / math.sqrt(2)) / 2
        return s * phi, phi + s * math.exp(-s * s / 2) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        root = math.sqrt(2 / math.pi)
        t = math.tanh(root * (s + 0.044715 * s**3))
        return s * (1 + t) / 2, (1 + t) / 2 + s * (1 - t * t) / 2 * root * (1 + 3 * 0.044715 * s * s)
    if name == "relu":
        return max(s, 0.0), float(s > 0)
    if name == "relu2":
        return max(s, 0.0) ** 2, 2 * max(s, 0.0)
    if name == "sigmoid":
        p = _sigmoid(s)
        return p, p * (1 - p)
    assert name == "identity", name
    return s, 1.0


def _float64(array: ArrayLike) -> FloatArray:
    return np.asarray(array, dtype=np.float64)


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
        activation: one of :data:`ACTIVATIONS`.
    """
    x_TD, weights_TK, down_ED, up_ED = map(_float64, (x, weights, down_table, up_table))
    experts_TK = np.asarray(experts, dtype=np.int64)
    y_TD = np.zeros_like(x_TD)
    for t, j in np.ndindex(*experts_TK.shape):
        e = experts_TK[t, j]
        if 0 <= e < len(up_ED):
            y_TD[t] += activation_and_slope(float(x_TD[t] @ down_ED[e]), activation)[0] * weights_TK[t, j] * up_ED[e]
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
    dy_TD, x_TD, weights_TK, down_ED, up_ED = map(_float64, (dy, x, weights, down_table, up_table))
    experts_TK = np.asarray(experts, dtype=np.int64)
    dx_TD, dweights_TK, ddown_ED, dup_ED = (np.zeros_like(array) for array in (x_TD, weights_TK, down_ED, up_ED))
    for t, j in np.ndindex(*experts_TK.shape):
        e, w = experts_TK[t, j], weights_TK[t, j]
        if not 0 <= e < len(up_ED):
            continue
        value, slope = activation_and_slope(float(x_TD[t] @ down_ED[e]), activation)
        q = dy_TD[t] @ up_ED[e]
        dweights_TK[t, j] = q * value
        dx_TD[t] += q * w * slope * down_ED[e]
        ddown_ED[e] += q * w * slope * x_TD[t]
        dup_ED[e] += w * value * dy_TD[t]
    return NeuronGradients(x=dx_TD, weights=dweights_TK, down_table=ddown_ED, up_table=dup_ED)


def experts_values(experts: ArrayLike, weights: ArrayLike, table: ArrayLike) -> FloatArray:
    """``y_t = sum_j w_tj v_e``. ``[T, D]``.

    Args:
        experts: ids, ``[T, K]``.
        weights: ``[T, K]``.
        table: ``[E, D]``.
    """
    weights_TK, table_ED = _float64(weights), _float64(table)
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
    dy_TD, weights_TK, table_ED = map(_float64, (dy, weights, table))
    experts_TK = np.asarray(experts, dtype=np.int64)
    dweights_TK, dtable_ED = np.zeros_like(weights_TK), np.zeros_like(table_ED)
    for t, j in np.ndindex(*experts_TK.shape):
        e = experts_TK[t, j]
        if 0 <= e < len(table_ED):
            dweights_TK[t, j] = dy_TD[t] @ table_ED[e]
            dtable_ED[e] += weights_TK[t, j] * dy_TD[t]
    return ValueGradients(weights=dweights_TK, table=dtable_ED)
