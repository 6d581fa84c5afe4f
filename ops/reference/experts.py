"""Activations, the gated and the plain MLP, and the merged projection."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from fusedonemoe.ops.reference.arrays import FloatArray, float64, routed_rows, sigmoid

GATE_UP_LAYOUTS = ("gate_up", "up_gate", "interleaved")

_Function: TypeAlias = Callable[[FloatArray], FloatArray]
_erfc = np.vectorize(math.erfc, otypes=[np.float64])


@dataclass(frozen=True)
class MLPGradients:
    """Gradients of ``experts_mlp``, each of its argument's shape; a bias that was not given has None."""

    x: FloatArray
    weights: FloatArray
    up_proj: FloatArray
    down_proj: FloatArray
    up_bias: FloatArray | None
    down_bias: FloatArray | None


@dataclass(frozen=True)
class MergedGradients:
    """Gradients of ``experts_merged``, each of its argument's shape."""

    x: FloatArray
    weights: FloatArray
    proj: FloatArray


def _gelu_tanh_derivative(z: FloatArray) -> FloatArray:
    slope = 2.0 * math.sqrt(2.0 / math.pi)
    y = slope * (z + 0.044715 * z**3)
    return sigmoid(y) + z * sigmoid(y) * sigmoid(-y) * slope * (1.0 + 3 * 0.044715 * z**2)


# The functions, each with its derivative. Phi(z) = erfc(-z / sqrt 2) / 2; (1 + erf) would cancel for negative z.
_FUNCTIONS: dict[str, tuple[_Function, _Function]] = {
    "silu": (lambda z: z * sigmoid(z), lambda z: sigmoid(z) + z * sigmoid(z) * sigmoid(-z)),
    "gelu": (
        lambda z: z * 0.5 * _erfc(-z / math.sqrt(2.0)),
        lambda z: 0.5 * _erfc(-z / math.sqrt(2.0)) + z * np.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi),
    ),
    # (1 + tanh(y)) / 2 = sigmoid(2 y)
    "gelu_tanh": (lambda z: z * sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)), _gelu_tanh_derivative),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "relu2": (lambda z: np.maximum(z, 0.0) ** 2, lambda z: 2.0 * np.maximum(z, 0.0)),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "identity": (np.copy, np.ones_like),
}
ACTIVATIONS = tuple(_FUNCTIONS)
GATED_ACTIVATIONS = (*ACTIVATIONS, "swiglu_oai")


def _function(name: str) -> tuple[_Function, _Function]:
    if name not in _FUNCTIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {name!r}")
    return _FUNCTIONS[name]


def activate(name: str, gate: ArrayLike, up: ArrayLike | None = None, *, alpha: float = 1.702, limit: float = 7.0) -> FloatArray:
    """Apply an activation to arrays of any shape: ``act(gate)`` alone, ``act(gate) * up`` when up is given.

    "swiglu_oai" (GPT-OSS) is gated only: with ``g = min(gate, limit)`` and ``u = clamp(up, -limit, limit)`` it is
    ``(u + 1) * g * sigmoid(alpha * g)``.
    """
    g = float64(gate)
    if name == "swiglu_oai":
        if up is None:
            raise ValueError("swiglu_oai needs up: it has no plain form")
        g = np.minimum(g, limit)
        u = np.clip(float64(up), -limit, limit)
        return (u + 1.0) * g * sigmoid(alpha * g)
    h = _function(name)[0](g)
    return h if up is None else h * float64(up)


def activate_backward(
    name: str, da: ArrayLike, gate: ArrayLike, up: ArrayLike | None = None, *, alpha: float = 1.702, limit: float = 7.0
) -> tuple[FloatArray, FloatArray | None]:
    """Gradients dgate and dup (or None) of ``sum(da * activate(...))``; a clamp passes them up to its boundary, inclusive."""
    da, g = float64(da), float64(gate)
    if name == "swiglu_oai":
        if up is None:
            raise ValueError("swiglu_oai needs up: it has no plain form")
        u = float64(up)
        clamped_g, clamped_u = np.minimum(g, limit), np.clip(u, -limit, limit)
        sig = sigmoid(alpha * clamped_g)
        dg = da * (clamped_u + 1.0) * (sig + clamped_g * alpha * sig * sigmoid(-alpha * clamped_g))
        du = da * clamped_g * sig
        return np.where(g <= limit, dg, 0.0), np.where(np.abs(u) <= limit, du, 0.0)
    act, derivative = _function(name)
    if up is None:
        return da * derivative(g), None
    return da * derivative(g) * float64(up), da * act(g)


def split_gate_up(z: FloatArray, layout: str) -> tuple[FloatArray, FloatArray]:
    """Views (gate, up) of the last axis ``[..., 2F]`` in one of ``GATE_UP_LAYOUTS``."""
    half = z.shape[-1] // 2
    match layout:
        case "gate_up":
            return z[..., :half], z[..., half:]
        case "up_gate":
            return z[..., half:], z[..., :half]
        case "interleaved":
            return z[..., 0::2], z[..., 1::2]
    raise ValueError(f"gate_up_layout must be one of {GATE_UP_LAYOUTS}, got {layout!r}")


@dataclass(frozen=True)
class _MLP:
    """The experts of ``experts_mlp``, by the names of its arguments."""

    up_EHD: FloatArray  # H is 2F when gated, F when plain
    down_EDF: FloatArray
    _: KW_ONLY
    up_bias: ArrayLike | None = None  # [E, H]
    down_bias: ArrayLike | None = None  # [E, D], multiplied by the routing weight
    activation: str = "silu"  # one of ACTIVATIONS, or swiglu_oai when gated
    gated: bool = True
    gate_up_layout: str = "gate_up"
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    @property
    def constants(self) -> dict[str, float]:
        return {"alpha": self.swiglu_alpha, "limit": self.swiglu_limit}

    def halves(self, z_H: FloatArray) -> tuple[FloatArray, FloatArray | None]:
        """Gate and up of pre-activations; those of a plain expert and None."""
        return split_gate_up(z_H, self.gate_up_layout) if self.gated else (z_H, None)

    def run(self, x_D: FloatArray, e: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The pre-activations, the activations and the output of one row in its expert."""
        z_H = self.up_EHD[e] @ x_D
        if self.up_bias is not None:
            z_H = z_H + float64(self.up_bias)[e]
        a_F = activate(self.activation, *self.halves(z_H), **self.constants)
        out_D = self.down_EDF[e] @ a_F
        if self.down_bias is not None:
            out_D = out_D + float64(self.down_bias)[e]
        return z_H, a_F, out_D


def experts_mlp(
    x: ArrayLike, experts: ArrayLike, weights: ArrayLike, up_proj: ArrayLike, down_proj: ArrayLike, **options: Any
) -> FloatArray:
    """Run every token through its experts and sum with the routing weights, ``[T, D]``; options as in :class:`_MLP`.

    ``y_t = sum_j w_tj * (a_tj @ Wd_e^T + bd_e)``, ``z = x_t @ Wu_e^T + bu_e``, ``a = act(gate) * up``, or ``act(z)`` when plain.
    """
    mlp, x_TD, weights_TK = _MLP(float64(up_proj), float64(down_proj), **options), float64(x), float64(weights)
    y_TD = np.zeros_like(x_TD)
    for t, j, e in routed_rows(experts, len(mlp.up_EHD)):
        y_TD[t] += weights_TK[t, j] * mlp.run(x_TD[t], e)[2]
    return y_TD


def experts_mlp_backward(
    dy: ArrayLike, x: ArrayLike, experts: ArrayLike, weights: ArrayLike, up_proj: ArrayLike, down_proj: ArrayLike, **options: Any
) -> MLPGradients:
    """Gradients of ``sum(dy * experts_mlp(...))``, of ``dy`` ``[T, D]`` and the arguments there.

    ``dw = <dy, a @ Wd^T + bd>``, ``da = w * (dy @ Wd)``, ``dz = act'(z) da``, ``dx = dz @ Wu``,
    ``dWu = dz^T x``, ``dWd = w * dy^T a``, ``dbu = dz``, ``dbd = w * dy``, each summed over its routed rows.
    """
    dy_TD, x_TD, weights_TK, up_EHD, down_EDF = map(float64, (dy, x, weights, up_proj, down_proj))
    mlp = _MLP(up_EHD, down_EDF, **options)
    dx_TD, dweights_TK, dup_EHD, ddown_EDF = map(np.zeros_like, (x_TD, weights_TK, up_EHD, down_EDF))
    dup_bias_EH, ddown_bias_ED = np.zeros(up_EHD.shape[:2]), np.zeros(down_EDF.shape[:2])
    for t, j, e in routed_rows(experts, len(up_EHD)):
        z_H, a_F, out_D = mlp.run(x_TD[t], e)
        dweights_TK[t, j] = dy_TD[t] @ out_D
        dout_D = weights_TK[t, j] * dy_TD[t]
        ddown_bias_ED[e] += dout_D
        ddown_EDF[e] += np.outer(dout_D, a_F)
        dhalves = activate_backward(mlp.activation, dout_D @ down_EDF[e], *mlp.halves(z_H), **mlp.constants)
        dz_H = np.zeros_like(z_H)
        for half_F, dhalf_F in zip(mlp.halves(dz_H), dhalves, strict=True):
            if half_F is not None and dhalf_F is not None:
                half_F[:] = dhalf_F
        dup_bias_EH[e] += dz_H
        dup_EHD[e] += np.outer(dz_H, x_TD[t])
        dx_TD[t] += dz_H @ up_EHD[e]
    return MLPGradients(
        x=dx_TD,
        weights=dweights_TK,
        up_proj=dup_EHD,
        down_proj=ddown_EDF,
        up_bias=None if mlp.up_bias is None else dup_bias_EH,
        down_bias=None if mlp.down_bias is None else ddown_bias_ED,
    )


def experts_merged(x: ArrayLike, experts: ArrayLike, weights: ArrayLike, proj: ArrayLike) -> FloatArray:
    """Mix the projections ``W`` ``[E, D, F]`` before any activation: ``h_t = sum_j w_tj * (x_t @ W_e)``, ``[T, F]``."""
    x_TD, weights_TK, proj_EDF = float64(x), float64(weights), float64(proj)
    h_TF = np.zeros((len(x_TD), proj_EDF.shape[2]))
    for t, j, e in routed_rows(experts, len(proj_EDF)):
        h_TF[t] += weights_TK[t, j] * (x_TD[t] @ proj_EDF[e])
    return h_TF


def experts_merged_backward(
    dh: ArrayLike, x: ArrayLike, experts: ArrayLike, weights: ArrayLike, proj: ArrayLike
) -> MergedGradients:
    """Gradients of ``sum(dh * experts_merged(...))``, of ``dh`` ``[T, F]`` and the arguments there.

    ``dw = <dh, x @ W>``, ``dx = w * (W @ dh)``, ``dW = w * x^T dh``, each summed over its routed rows.
    """
    dh_TF, x_TD, weights_TK, proj_EDF = map(float64, (dh, x, weights, proj))
    dx_TD, dweights_TK, dproj_EDF = map(np.zeros_like, (x_TD, weights_TK, proj_EDF))
    for t, j, e in routed_rows(experts, len(proj_EDF)):
        w = weights_TK[t, j]
        dweights_TK[t, j] = dh_TF[t] @ (x_TD[t] @ proj_EDF[e])
        dx_TD[t] += w * (proj_EDF[e] @ dh_TF[t])
        dproj_EDF[e] += w * np.outer(x_TD[t], dh_TF[t])
    return MergedGradients(x=dx_TD, weights=dweights_TK, proj=dproj_EDF)
