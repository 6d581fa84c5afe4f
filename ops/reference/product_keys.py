"""Product keys: a full sort of all G * G pairs by their sums in exact rational arithmetic."""

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fusedonemoe.ops.reference.arrays import FloatArray, IntArray, float64


def _key(*terms: float) -> tuple[int, Fraction]:
    """Sorts sums in descending order: minus infinity stands for one number below all others."""
    finite = [Fraction(float(term)) for term in terms if term != -np.inf]
    return len(terms) - len(finite), -sum(finite, Fraction(0))


def _log_softmax(logits: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):  # -max - max is minus infinity, as good as any number whose exp is 0
        shifted = logits - logits.max()
    result: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return result


def route_product_key(logits: ArrayLike, top_k: int, *, norm_topk_prob: bool = False) -> tuple[FloatArray, IntArray]:
    """Choose the best pairs of every token and their weights, of logits ``[T, 2, G]``.

    ``la, lb = log_softmax(a), log_softmax(b)``; expert ``i * G + j`` scores ``la_i + lb_j``, which is ``a_i + b_j`` but for a
    constant of the token; ``w = exp(score)``, divided by their sum with ``norm_topk_prob``. Best first, ties to the lower id.
    """
    logits_T2G = float64(logits)
    T, _, G = logits_T2G.shape
    weights_TK = np.zeros((T, top_k))
    experts_TK = np.zeros((T, top_k), dtype=np.int64)
    for t, (a, b) in enumerate(logits_T2G):
        keys: list[Any] = [(_key(a[i], b[j]), i * G + j) for i in range(G) for j in range(G)]
        picked = np.array([expert for _, expert in sorted(keys)[:top_k]], dtype=np.int64)
        with np.errstate(over="ignore"):
            w_K = np.exp(_log_softmax(a)[picked // G] + _log_softmax(b)[picked % G])
        weights_TK[t] = w_K / w_K.sum() if norm_topk_prob else w_K
        experts_TK[t] = picked
    return weights_TK, experts_TK


def route_product_key_backward(
    dweights: ArrayLike, logits: ArrayLike, experts: IntArray, *, norm_topk_prob: bool = False
) -> FloatArray:
    """Gradient of ``sum(dweights * weights)`` with respect to the logits, of the ``experts`` that ``route_product_key`` picked.

    ``dscore_k = w_k (dw_k - [normalised] sum_i dw_i w_i)``; each picked pair gives it to its two logits, and takes ``softmax``
    times it from every logit of the two halves.
    """
    dweights_TK, logits_T2G = float64(dweights), float64(logits)
    G = logits_T2G.shape[-1]
    dlogits_T2G = np.zeros_like(logits_T2G)
    for t, (a, b) in enumerate(logits_T2G):
        la, lb = _log_softmax(a), _log_softmax(b)
        i_K, j_K = experts[t] // G, experts[t] % G
        w_K = np.exp(la[i_K] + lb[j_K])
        if norm_topk_prob:
            w_K = w_K / w_K.sum()
        mean = (dweights_TK[t] * w_K).sum() if norm_topk_prob else 0.0
        for i, j, w, dw in zip(i_K, j_K, w_K, dweights_TK[t], strict=True):
            dscore = w * (dw - mean)
            dlogits_T2G[t, 0, i] += dscore
            dlogits_T2G[t, 1, j] += dscore
            dlogits_T2G[t, 0] -= np.exp(la) * dscore
            dlogits_T2G[t, 1] -= np.exp(lb) * dscore
    return dlogits_T2G
