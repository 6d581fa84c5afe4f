"""The other routing rules, capacity, the balance losses and the usage report.

Shape legend: T tokens, E experts, K experts per token, S shared experts among the E.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fusedonemoe.ops.reference.arrays import FloatArray, IntArray, float64, sigmoid, softmax
from fusedonemoe.ops.reference.routing import route


class UsageNumbers(NamedTuple):
    """The numbers of a usage report."""

    share: list[float]
    entropy: float
    max_over_mean: float
    dead: int


def route_top_p(
    logits: ArrayLike, top_p: float, *, temperature: float = 1.0, noise: ArrayLike | None = None
) -> tuple[FloatArray, IntArray]:
    """Every expert with ``softmax(l / temperature) + noise > top_p``, at weight ``sigmoid(l)``; others at 0 with id -1.

    ``noise`` ``[T, E]`` is what is added, drawn and scaled by the caller.
    """
    rows = float64(logits)
    added = np.zeros_like(rows) if noise is None else float64(noise)
    weights, experts = np.zeros_like(rows), np.full(rows.shape, -1, dtype=np.int64)
    for t, row in enumerate(rows):
        probabilities, scores = softmax(row / temperature), sigmoid(row)
        for e in range(len(row)):
            if probabilities[e] + added[t, e] > top_p:
                weights[t, e], experts[t, e] = scores[e], e
    return weights, experts


def route_top_p_backward(dweights: ArrayLike, logits: ArrayLike, experts: ArrayLike) -> FloatArray:
    """Gradient of the logits: that of the sigmoid where an expert was kept."""
    grad, rows, ids = (float64(a) for a in (dweights, logits, experts))
    score = sigmoid(rows)
    return np.where(ids >= 0, grad * score * (1 - score), 0.0)


def route_with_shared(
    logits: ArrayLike,
    top_k: int,
    num_shared_experts: int,
    *,
    selection_bias: ArrayLike | None = None,
    norm_topk_prob: bool = True,
) -> tuple[FloatArray, IntArray]:
    """The ``K - S`` best of the first ``E - S`` experts by a softmax of their own, then the last ``S`` by theirs."""
    rows = float64(logits)
    (T, E), S = rows.shape, num_shared_experts
    bias = np.zeros(E) if selection_bias is None else float64(selection_bias)
    weights, experts = np.zeros((T, top_k)), np.zeros((T, top_k), dtype=np.int64)
    for t, row in enumerate(rows):
        picked: list[int] = []
        if top_k > S:
            routed = softmax(row[: E - S])
            keys = row if selection_bias is None else routed + bias[: E - S]
            picked = sorted(range(E - S), key=lambda e: (-keys[e], e))[: top_k - S]
            total = sum(routed[e] for e in picked) if norm_topk_prob else 1.0
            weights[t, : top_k - S] = [routed[e] / total for e in picked]
        if S:
            weights[t, top_k - S :] = softmax(row[E - S :])
        experts[t] = [*picked, *range(E - S, E)]
    return weights, experts


def route_with_shared_backward(
    dweights: ArrayLike, logits: ArrayLike, experts: ArrayLike, num_shared_experts: int, *, norm_topk_prob: bool = True
) -> FloatArray:
    """Gradient of the logits, through one Jacobian for the routed experts and one for the shared."""
    grad, rows = float64(dweights), float64(logits)
    ids, S = np.asarray(experts), num_shared_experts
    (T, E), R = rows.shape, ids.shape[1] - S
    dlogits = np.zeros_like(rows)
    for t in range(T):
        picked = ids[t, :R]
        if R:
            # A softmax over all, divided by the sum of the picked, is the softmax over the picked.
            over = picked if norm_topk_prob else np.arange(E - S)
            score, upstream = softmax(rows[t, over]), np.zeros(len(over))
            for j, e in enumerate(picked):
                upstream[list(over).index(e)] = grad[t, j]
            dlogits[t, over] = score * (upstream - upstream @ score)
        if S:
            score = softmax(rows[t, E - S :])
            dlogits[t, E - S :] = score * (grad[t, R:] - grad[t, R:] @ score)
    return dlogits


def topk_softmax(logits: ArrayLike, top_k: int) -> tuple[FloatArray, IntArray, IntArray]:
    """Softmax, the best K, and ``j * T + t``."""
    weights, experts = route(logits, top_k, norm_topk_prob=False)
    T = len(weights)
    rows = [[j * T + t for j in range(top_k)] for t in range(T)]
    return weights, experts, np.array(rows, dtype=np.int64).reshape(T, top_k)


def apply_capacity(experts: ArrayLike, weights: ArrayLike, num_experts: int, capacity: int) -> tuple[IntArray, FloatArray, int]:
    """The first ``capacity`` rows of each expert stay, in token order; the others get weight 0 and id -1."""
    ids, kept_weights = np.asarray(experts, dtype=np.int64).copy(), float64(weights).copy()
    taken, dropped = [0] * num_experts, 0
    for t, j in np.ndindex(ids.shape):
        e = ids[t, j]
        if not 0 <= e < num_experts:
            continue
        taken[e] += 1
        if taken[e] > capacity:
            ids[t, j], kept_weights[t, j] = -1, 0.0
            dropped += 1
    return ids, kept_weights, dropped


def _probabilities(row: FloatArray, scoring: str) -> tuple[FloatArray, Callable[[FloatArray], FloatArray]]:
    """The probabilities of a token, and the map from their gradient to that of its logits."""
    if scoring == "given":
        return row, lambda dp: dp
    if scoring == "softmax":
        p = softmax(row)
        return p, lambda dp: p * (dp - dp @ p)
    s = sigmoid(row)
    p = s / s.sum()
    return p, lambda dp: (dp - dp @ p) / s.sum() * s * (1 - s)


def _tokens(T: int, attention_mask: ArrayLike | None) -> list[int]:
    return list(range(T)) if attention_mask is None else [t for t, counts in enumerate(np.asarray(attention_mask)) if counts]


def load_balancing_loss(
    logits: ArrayLike, experts: ArrayLike, *, scoring: str = "softmax", attention_mask: ArrayLike | None = None
) -> tuple[float, FloatArray]:
    """``E * sum_i f_i P_i`` over the tokens that count, and its gradient in the logits."""
    rows, ids = float64(logits), np.asarray(experts)
    (T, E), K = rows.shape, ids.shape[1]
    tokens = _tokens(T, attention_mask)
    if not tokens:
        return 0.0, np.zeros_like(rows)
    share = np.array([sum(int(i == e) for t in tokens for i in ids[t]) for e in range(E)]) / (len(tokens) * K)
    loss, dlogits = 0.0, np.zeros_like(rows)
    for t in tokens:
        p, backward = _probabilities(rows[t], scoring)
        dp = E * share / len(tokens)
        loss += float(dp @ p)
        dlogits[t] = backward(dp)
    return loss, dlogits


def router_z_loss(logits: ArrayLike, *, attention_mask: ArrayLike | None = None) -> tuple[float, FloatArray]:
    """``mean_t logsumexp(l_t)^2`` over the tokens that count, and its gradient."""
    rows = float64(logits)
    loss, dlogits = 0.0, np.zeros_like(rows)
    tokens = _tokens(len(rows), attention_mask)
    for t in tokens:
        lse = rows[t].max() + math.log(np.exp(rows[t] - rows[t].max()).sum())
        loss += lse**2 / len(tokens)
        dlogits[t] = 2 * lse * softmax(rows[t]) / len(tokens)
    return loss, dlogits


def update_selection_bias(bias: ArrayLike, counts: ArrayLike, rate: float, *, num_shared_experts: int = 0) -> FloatArray:
    """``b_i + rate * sign(mean(c) - c_i)`` for the routed experts."""
    moved, rows = float64(bias).copy(), [int(c) for c in np.asarray(counts)]
    routed = len(rows) - num_shared_experts
    mean = sum(rows[:routed]) / routed
    for e in range(routed):
        moved[e] += rate * (int(rows[e] < mean) - int(rows[e] > mean))
    return moved


def usage(counts: ArrayLike) -> UsageNumbers:
    """The numbers of a report on at least one row and two experts."""
    rows = [int(c) for c in np.asarray(counts)]
    share = [row / sum(rows) for row in rows]
    entropy = -sum(p * math.log(p, len(rows)) for p in share if p)
    return UsageNumbers(share, entropy, max(rows) / (sum(rows) / len(rows)), sum(row == 0 for row in rows))
