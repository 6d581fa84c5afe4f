"""The oracle: routing and expert layers as naive NumPy float64 loops, written to be read beside the formulas.

Nothing here shares code with an operator, so that agreement between the two is evidence. Speed is no concern.

Arrays go in (anything ``numpy.asarray`` takes), float64 and int64 arrays come out. Expert ids outside ``[0, E)``
mean "not on this rank": they contribute zero and receive zero gradients.

Shape legend: T tokens, D hidden size, F intermediate size, E experts, K experts per token, N = T * K routed rows.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity")
GATED_ACTIVATIONS = (*ACTIVATIONS, "swiglu_oai")
GATE_UP_LAYOUTS = ("gate_up", "up_gate", "interleaved")

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


def _float64(array: ArrayLike) -> FloatArray:
    return np.asarray(array, dtype=np.float64)


def _sigmoid(z: FloatArray) -> FloatArray:
    # 1 / (1 + exp(-z)) without overflow at either end.
    return np.exp(-np.logaddexp(0.0, -z))


def _score(logits: FloatArray, scoring: str) -> FloatArray:
    if scoring == "softmax":
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()
    if scoring == "sigmoid":
        return _sigmoid(logits)
    raise ValueError(f'scoring must be "softmax" or "sigmoid", got {scoring!r}')


def _score_backward(dscore: FloatArray, score: FloatArray, logits: FloatArray, scoring: str) -> FloatArray:
    if scoring == "softmax":
        return score * (dscore - (dscore * score).sum())
    return dscore * score * _sigmoid(-logits)


def _best(keys: list[tuple[float, int]], count: int) -> list[int]:
    """Ids of the ``count`` largest of (key, id) pairs, descending, ties to the lower id."""
    return [i for _, i in sorted(keys, key=lambda pair: (-pair[0], pair[1]))[:count]]


def _select(key_E: FloatArray, top_k: int, n_group: int, topk_group: int, group_score: str) -> list[int]:
    num_experts = len(key_E)
    if num_experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(f"no {topk_group} of {n_group} equal groups in {num_experts} experts")
    size = num_experts // n_group
    if not 1 <= top_k <= topk_group * size:
        raise ValueError(f"top_k must be in [1, {topk_group * size}], got {top_k}")
    if group_score not in ("top2_sum", "max"):
        raise ValueError(f'group_score must be "top2_sum" or "max", got {group_score!r}')

    group_values = []
    for group in range(n_group):
        best_first = sorted(key_E[group * size : (group + 1) * size], reverse=True)
        counted = best_first[:2] if group_score == "top2_sum" else best_first[:1]
        group_values.append((float(sum(counted)), group))
    kept_groups = _best(group_values, topk_group)

    eligible = [(float(key_E[e]), e) for e in range(num_experts) if e // size in kept_groups]
    return _best(eligible, top_k)


def route(
    logits: ArrayLike,
    top_k: int | None,
    *,
    scoring: str = "softmax",
    score_first: bool = True,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    selection_bias: ArrayLike | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    norm_eps: float = 1e-20,
) -> tuple[FloatArray, IntArray]:
    """Chooses the experts of every token and their weights.

    ``score_first``: ``s = score(l)``, ``picked = TopK(s + b)``, ``p = s[picked]``; otherwise
    ``picked = TopK(l + b)``, ``p = score(l[picked])``. Then ``w = factor * p / (sum(p) + norm_eps)``, the division
    only with ``norm_topk_prob``. The bias b decides who is picked and never enters a weight.

    Args:
        logits: ``[T, E]``.
        top_k: K, or None for every expert in id order without selection.
        scoring: "softmax" or "sigmoid".
        score_first: Score all E logits and then select, or select on logits and score the K picked ones.
        norm_topk_prob: Divide the picked scores by their sum.
        routed_scaling_factor: Multiplies every weight.
        selection_bias: b, ``[E]``.
        n_group: Contiguous groups of E / n_group experts each.
        topk_group: Groups that stay eligible.
        group_score: A group's value: "top2_sum", the sum of its best two keys (one when it has one), or "max".
        norm_eps: Added to the sum that divides.

    Returns:
        weights ``[T, K]`` and experts ``[T, K]``, in descending order of the key, ties to the lower id.
    """
    logits_TE = _float64(logits)
    T, E = logits_TE.shape
    bias_E = np.zeros(E) if selection_bias is None else _float64(selection_bias)
    K = E if top_k is None else top_k
    weights_TK = np.zeros((T, K))
    experts_TK = np.zeros((T, K), dtype=np.int64)
    for t in range(T):
        if top_k is None:
            picked = list(range(E))
        else:
            key_E = (_score(logits_TE[t], scoring) if score_first else logits_TE[t]) + bias_E
            picked = _select(key_E, top_k, n_group, topk_group, group_score)
        if score_first:
            weights_K = _score(logits_TE[t], scoring)[picked]
        else:
            weights_K = _score(logits_TE[t, picked], scoring)
        if norm_topk_prob:
            weights_K = weights_K / (weights_K.sum() + norm_eps)
        weights_TK[t] = weights_K * routed_scaling_factor
        experts_TK[t] = picked
    return weights_TK, experts_TK


def route_backward(
    dweights: ArrayLike,
    logits: ArrayLike,
    top_k: int | None,
    *,
    scoring: str = "softmax",
    score_first: bool = True,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    selection_bias: ArrayLike | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    norm_eps: float = 1e-20,
) -> FloatArray:
    """Gradient of ``sum(dweights * weights)`` with respect to the logits, the selection held constant.

    With ``S = sum(p) + norm_eps``: ``dp_j = (dw_j - sum_i dw_i p_i / S) / S`` when normalised. A softmax over all E
    gives every logit a gradient through its denominator; one over the picked logits gives the others none.

    Args:
        dweights: ``[T, K]``; the other arguments are those of ``route``.

    Returns:
        dlogits ``[T, E]``.
    """
    dweights_TK, logits_TE = _float64(dweights), _float64(logits)
    _, experts_TK = route(
        logits_TE,
        top_k,
        scoring=scoring,
        score_first=score_first,
        selection_bias=selection_bias,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
    )
    dlogits_TE = np.zeros_like(logits_TE)
    for t, picked in enumerate(experts_TK):
        score_E = _score(logits_TE[t], scoring)
        p_K = score_E[picked] if score_first else _score(logits_TE[t, picked], scoring)
        dp_K = dweights_TK[t] * routed_scaling_factor
        if norm_topk_prob:
            total = p_K.sum() + norm_eps
            dp_K = (dp_K - (dp_K * p_K).sum() / total) / total
        if score_first:
            dscore_E = np.zeros_like(score_E)
            dscore_E[picked] = dp_K
            dlogits_TE[t] = _score_backward(dscore_E, score_E, logits_TE[t], scoring)
        else:
            dlogits_TE[t, picked] = _score_backward(dp_K, p_K, logits_TE[t, picked], scoring)
    return dlogits_TE


def plan(experts: ArrayLike, num_experts: int) -> tuple[IntArray, IntArray]:
    """Sorts the N = T * K routed rows (row ``t * K + j``) by expert, stably, out-of-range ids last.

    Args:
        experts: Ids, ``[T, K]``.
        num_experts: E.

    Returns:
        order ``[N]`` and offsets ``[E + 1]``: expert e owns ``order[offsets[e]:offsets[e + 1]]``; ``offsets[E]``
        is the number of in-range rows.
    """
    flat_N = np.asarray(experts, dtype=np.int64).reshape(-1)
    order: list[int] = []
    offsets = [0]
    for e in range(num_experts):
        order += [n for n, expert in enumerate(flat_N) if expert == e]
        offsets.append(len(order))
    order += [n for n, expert in enumerate(flat_N) if not 0 <= expert < num_experts]
    return np.array(order, dtype=np.int64), np.array(offsets, dtype=np.int64)


def _act(name: str, z: FloatArray) -> FloatArray:
    match name:
        case "silu":
            return z * _sigmoid(z)
        case "gelu":
            # Phi(z) = erfc(-z / sqrt 2) / 2; (1 + erf) would cancel for negative z.
            return z * 0.5 * _erfc(-z / math.sqrt(2.0))
        case "gelu_tanh":
            # (1 + tanh(y)) / 2 = sigmoid(2 y)
            return z * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))
        case "relu":
            return np.maximum(z, 0.0)
        case "relu2":
            return np.maximum(z, 0.0) ** 2
        case "sigmoid":
            return _sigmoid(z)
        case "identity":
            return z.copy()
    raise ValueError(f"activation must be one of {ACTIVATIONS}, got {name!r}")


def _act_derivative(name: str, z: FloatArray) -> FloatArray:
    match name:
        case "silu":
            return _sigmoid(z) + z * _sigmoid(z) * _sigmoid(-z)
        case "gelu":
            return 0.5 * _erfc(-z / math.sqrt(2.0)) + z * np.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi)
        case "gelu_tanh":
            slope = 2.0 * math.sqrt(2.0 / math.pi)
            y = slope * (z + 0.044715 * z**3)
            return _sigmoid(y) + z * _sigmoid(y) * _sigmoid(-y) * slope * (1.0 + 3 * 0.044715 * z**2)
        case "relu":
            return np.where(z > 0, 1.0, 0.0)
        case "relu2":
            return 2.0 * np.maximum(z, 0.0)
        case "sigmoid":
            return _sigmoid(z) * _sigmoid(-z)
        case "identity":
            return np.ones_like(z)
    raise ValueError(f"activation must be one of {ACTIVATIONS}, got {name!r}")


def activate(name: str, gate: ArrayLike, up: ArrayLike | None = None, *, alpha: float = 1.702, limit: float = 7.0) -> FloatArray:
    """Applies an activation: ``act(gate)`` alone, ``act(gate) * up`` when up is given.

    "swiglu_oai" (GPT-OSS) is gated only: with ``g = min(gate, limit)`` and ``u = clamp(up, -limit, limit)`` it is
    ``(u + 1) * g * sigmoid(alpha * g)``.

    Args:
        name: One of ``ACTIVATIONS``, or "swiglu_oai".
        gate: Any shape.
        up: The shape of gate, or None.
        alpha: Slope inside the sigmoid of "swiglu_oai".
        limit: Clamp of "swiglu_oai".

    Returns:
        The shape of gate.
    """
    g = _float64(gate)
    if name == "swiglu_oai":
        if up is None:
            raise ValueError("swiglu_oai needs up: it has no plain form")
        g = np.minimum(g, limit)
        u = np.clip(_float64(up), -limit, limit)
        return (u + 1.0) * g * _sigmoid(alpha * g)
    return _act(name, g) if up is None else _act(name, g) * _float64(up)


def activate_backward(
    name: str,
    da: ArrayLike,
    gate: ArrayLike,
    up: ArrayLike | None = None,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tuple[FloatArray, FloatArray | None]:
    """Gradient of ``sum(da * activate(...))``; a clamp passes gradients up to its boundary, inclusive.

    Args:
        da: The shape of gate; the other arguments are those of ``activate``.

    Returns:
        dgate and dup, dup None when up is None.
    """
    da, g = _float64(da), _float64(gate)
    if name == "swiglu_oai":
        if up is None:
            raise ValueError("swiglu_oai needs up: it has no plain form")
        u = _float64(up)
        clamped_g, clamped_u = np.minimum(g, limit), np.clip(u, -limit, limit)
        sig = _sigmoid(alpha * clamped_g)
        dg = da * (clamped_u + 1.0) * (sig + clamped_g * alpha * sig * _sigmoid(-alpha * clamped_g))
        du = da * clamped_g * sig
        return np.where(g <= limit, dg, 0.0), np.where(np.abs(u) <= limit, du, 0.0)
    if up is None:
        return da * _act_derivative(name, g), None
    return da * _act_derivative(name, g) * _float64(up), da * _act(name, g)


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


def experts_mlp(
    x: ArrayLike,
    experts: ArrayLike,
    weights: ArrayLike,
    up_proj: ArrayLike,
    down_proj: ArrayLike,
    *,
    up_bias: ArrayLike | None = None,
    down_bias: ArrayLike | None = None,
    activation: str = "silu",
    gated: bool = True,
    gate_up_layout: str = "gate_up",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
) -> FloatArray:
    """Runs every token through its experts and sums with the routing weights.

    ``y_t = sum_j w_tj * (a_tj @ Wd_e^T + bd_e)``, ``e = experts_tj``, with ``a = act(gate) * up`` of
    ``z = x_t @ Wu_e^T + bu_e`` when gated and ``a = act(z)`` when plain.

    Args:
        x: ``[T, D]``.
        experts: Ids, ``[T, K]``.
        weights: ``[T, K]``.
        up_proj: ``[E, 2F, D]`` when gated, its rows in ``gate_up_layout``; ``[E, F, D]`` when plain.
        down_proj: ``[E, D, F]``.
        up_bias: ``[E, 2F]`` in the same layout, or ``[E, F]``.
        down_bias: ``[E, D]``, multiplied by the routing weight.
        activation: One of ``ACTIVATIONS``, or "swiglu_oai" when gated.
        gated: Whether up_proj holds gate and up.
        gate_up_layout: "gate_up", "up_gate" or "interleaved" (g0, u0, g1, u1, ...).
        swiglu_alpha: For "swiglu_oai".
        swiglu_limit: For "swiglu_oai".

    Returns:
        y ``[T, D]``.
    """
    x_TD, weights_TK = _float64(x), _float64(weights)
    up_EHD, down_EDF = _float64(up_proj), _float64(down_proj)  # H = 2F when gated, F when plain
    experts_TK = np.asarray(experts, dtype=np.int64)
    y_TD = np.zeros_like(x_TD)
    for t, j in np.ndindex(*experts_TK.shape):
        e = experts_TK[t, j]
        if not 0 <= e < len(up_EHD):
            continue
        z_H = up_EHD[e] @ x_TD[t]
        if up_bias is not None:
            z_H = z_H + _float64(up_bias)[e]
        gate_F, up_F = split_gate_up(z_H, gate_up_layout) if gated else (z_H, None)
        a_F = activate(activation, gate_F, up_F, alpha=swiglu_alpha, limit=swiglu_limit)
        out_D = down_EDF[e] @ a_F
        if down_bias is not None:
            out_D = out_D + _float64(down_bias)[e]
        y_TD[t] += weights_TK[t, j] * out_D
    return y_TD


def experts_mlp_backward(
    dy: ArrayLike,
    x: ArrayLike,
    experts: ArrayLike,
    weights: ArrayLike,
    up_proj: ArrayLike,
    down_proj: ArrayLike,
    *,
    up_bias: ArrayLike | None = None,
    down_bias: ArrayLike | None = None,
    activation: str = "silu",
    gated: bool = True,
    gate_up_layout: str = "gate_up",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
) -> MLPGradients:
    """Gradients of ``sum(dy * experts_mlp(...))``.

    ``dw = <dy, a @ Wd^T + bd>``, ``da = w * (dy @ Wd)``, ``dz = act'(z) da``, ``dx = dz @ Wu``,
    ``dWu = dz^T x``, ``dWd = w * dy^T a``, ``dbu = dz``, ``dbd = w * dy``, each summed over its routed rows.

    Args:
        dy: ``[T, D]``; the other arguments are those of ``experts_mlp``.

    Returns:
        The gradients, each of its argument's shape.
    """
    dy_TD, x_TD, weights_TK = _float64(dy), _float64(x), _float64(weights)
    up_EHD, down_EDF = _float64(up_proj), _float64(down_proj)
    experts_TK = np.asarray(experts, dtype=np.int64)
    dx_TD, dweights_TK = np.zeros_like(x_TD), np.zeros_like(weights_TK)
    dup_EHD, ddown_EDF = np.zeros_like(up_EHD), np.zeros_like(down_EDF)
    dup_bias_EH, ddown_bias_ED = np.zeros(up_EHD.shape[:2]), np.zeros(down_EDF.shape[:2])
    for t, j in np.ndindex(*experts_TK.shape):
        e, w = experts_TK[t, j], weights_TK[t, j]
        if not 0 <= e < len(up_EHD):
            continue
        z_H = up_EHD[e] @ x_TD[t]
        if up_bias is not None:
            z_H = z_H + _float64(up_bias)[e]
        gate_F, up_F = split_gate_up(z_H, gate_up_layout) if gated else (z_H, None)
        a_F = activate(activation, gate_F, up_F, alpha=swiglu_alpha, limit=swiglu_limit)
        out_D = down_EDF[e] @ a_F
        if down_bias is not None:
            out_D = out_D + _float64(down_bias)[e]

        dweights_TK[t, j] = dy_TD[t] @ out_D
        dout_D = w * dy_TD[t]
        ddown_bias_ED[e] += dout_D
        ddown_EDF[e] += np.outer(dout_D, a_F)
        dgate_F, dup_F = activate_backward(activation, dout_D @ down_EDF[e], gate_F, up_F, alpha=swiglu_alpha, limit=swiglu_limit)
        if dup_F is None:
            dz_H = dgate_F
        else:
            dz_H = np.zeros_like(z_H)
            for half_F, dhalf_F in zip(split_gate_up(dz_H, gate_up_layout), (dgate_F, dup_F), strict=True):
                half_F[:] = dhalf_F
        dup_bias_EH[e] += dz_H
        dup_EHD[e] += np.outer(dz_H, x_TD[t])
        dx_TD[t] += dz_H @ up_EHD[e]
    return MLPGradients(
        x=dx_TD,
        weights=dweights_TK,
        up_proj=dup_EHD,
        down_proj=ddown_EDF,
        up_bias=None if up_bias is None else dup_bias_EH,
        down_bias=None if down_bias is None else ddown_bias_ED,
    )


def experts_merged(x: ArrayLike, experts: ArrayLike, weights: ArrayLike, proj: ArrayLike) -> FloatArray:
    """Mixes the experts' projections before any activation: ``h_t = sum_j w_tj * (x_t @ W_e)``.

    Args:
        x: ``[T, D]``.
        experts: Ids, ``[T, K]``.
        weights: ``[T, K]``.
        proj: W, ``[E, D, F]``.

    Returns:
        h ``[T, F]``.
    """
    x_TD, weights_TK, proj_EDF = _float64(x), _float64(weights), _float64(proj)
    experts_TK = np.asarray(experts, dtype=np.int64)
    h_TF = np.zeros((len(x_TD), proj_EDF.shape[2]))
    for t, j in np.ndindex(*experts_TK.shape):
        e = experts_TK[t, j]
        if 0 <= e < len(proj_EDF):
            h_TF[t] += weights_TK[t, j] * (x_TD[t] @ proj_EDF[e])
    return h_TF


def experts_merged_backward(
    dh: ArrayLike, x: ArrayLike, experts: ArrayLike, weights: ArrayLike, proj: ArrayLike
) -> MergedGradients:
    """Gradients of ``sum(dh * experts_merged(...))``.

    ``dw = <dh, x @ W>``, ``dx = w * (W @ dh)``, ``dW = w * x^T dh``, each summed over its routed rows.

    Args:
        dh: ``[T, F]``; the other arguments are those of ``experts_merged``.

    Returns:
        The gradients, each of its argument's shape.
    """
    dh_TF, x_TD, weights_TK, proj_EDF = _float64(dh), _float64(x), _float64(weights), _float64(proj)
    experts_TK = np.asarray(experts, dtype=np.int64)
    dx_TD, dweights_TK, dproj_EDF = (np.zeros_like(array) for array in (x_TD, weights_TK, proj_EDF))
    for t, j in np.ndindex(*experts_TK.shape):
        e, w = experts_TK[t, j], weights_TK[t, j]
        if not 0 <= e < len(proj_EDF):
            continue
        dweights_TK[t, j] = dh_TF[t] @ (x_TD[t] @ proj_EDF[e])
        dx_TD[t] += w * (proj_EDF[e] @ dh_TF[t])
        dproj_EDF[e] += w * np.outer(x_TD[t], dh_TF[t])
    return MergedGradients(x=dx_TD, weights=dweights_TK, proj=dproj_EDF)
