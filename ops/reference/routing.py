"""Routing of logits and the plan of routed rows."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fusedonemoe.ops.reference.arrays import FloatArray, IntArray, float64, sigmoid, softmax


def _score(logits: FloatArray, scoring: str) -> FloatArray:
    if scoring == "softmax":
        return softmax(logits)
    if scoring == "sigmoid":
        return sigmoid(logits)
    raise ValueError(f'scoring must be "softmax" or "sigmoid", got {scoring!r}')


def _score_backward(dscore: FloatArray, score: FloatArray, logits: FloatArray, scoring: str) -> FloatArray:
    if scoring == "softmax":
        return score * (dscore - (dscore * score).sum())
    return dscore * score * sigmoid(-logits)


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
    """Choose the experts of every token and their weights, ``[T, K]``, in descending order of the key, ties to the lower id.

    ``score_first``: ``s = score(l)``, ``picked = TopK(s + b)``, ``p = s[picked]``; otherwise ``picked = TopK(l + b)`` and ``p``
    is the score of ``l[picked]``. Then ``w = factor * p / (sum(p) + norm_eps)``, the division only with ``norm_topk_prob``.

    The options are those of ``RouteOptions``; ``top_k`` None keeps every expert. A group of one has its key as the sum of its
    best two.
    """
    logits_TE = float64(logits)
    T, E = logits_TE.shape
    bias_E = np.zeros(E) if selection_bias is None else float64(selection_bias)
    K = E if top_k is None else top_k
    weights_TK = np.zeros((T, K))
    experts_TK = np.zeros((T, K), dtype=np.int64)
    for t in range(T):
        if top_k is None:
            picked = list(range(E))
        else:
            # Scores rise with the logits, and far apart logits have scores that a float64 cannot tell from 0.
            scored = score_first and (selection_bias is not None or n_group > 1)
            key_E = (_score(logits_TE[t], scoring) if scored else logits_TE[t]) + bias_E
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
    norm_eps: float = 1e-20,
    **selection: Any,
) -> FloatArray:
    """Gradient ``[T, E]`` of ``sum(dweights * weights)`` with respect to the logits, the selection held constant.

    With ``S = sum(p) + norm_eps``: ``dp_j = (dw_j - sum_i dw_i p_i / S) / S`` when normalised. A softmax over all E gives every
    logit a gradient through its denominator; one over the picked logits gives the others none.
    """
    dweights_TK, logits_TE = float64(dweights), float64(logits)
    _, experts_TK = route(logits_TE, top_k, scoring=scoring, score_first=score_first, **selection)
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
    """Sort the N = T * K routed rows (row ``t * K + j``) by expert, stably, out-of-range ids last.

    Expert e owns ``order[offsets[e]:offsets[e + 1]]``; ``offsets[E]`` is the number of in-range rows.
    """
    flat_N = np.asarray(experts, dtype=np.int64).reshape(-1)
    order: list[int] = []
    offsets = [0]
    for e in range(num_experts):
        order += [n for n, expert in enumerate(flat_N) if expert == e]
        offsets.append(len(order))
    order += [n for n, expert in enumerate(flat_N) if not 0 <= expert < num_experts]
    return np.array(order, dtype=np.int64), np.array(offsets, dtype=np.int64)
