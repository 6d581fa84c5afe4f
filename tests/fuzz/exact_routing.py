"""Routing in float64 with its error bounds, forward and backward, one token after the other where a choice is made.

Each softmax subtracts the maximum. Ids are checked rather than computed where the keys have a rounding error: of two
experts whose keys are closer than it, either may be picked.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tests.fuzz.bounds import Array, Bounded


class Rule(NamedTuple):
    """The options of :func:`fusedonemoe.functional.route`; ``top_k`` None keeps every expert."""

    top_k: int | None
    scoring: str = "softmax"
    score_first: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    norm_eps: float = 1e-20


def differences(logits: Bounded) -> tuple[Bounded, Array]:
    """``l - max(l)`` of each row, and the rows in which there is no finite maximum. Minus infinity stays what it is."""
    value = logits.value
    lost: Array = ~(np.isfinite(value) | np.isneginf(value)).all(-1) | ~np.isfinite(value).any(-1)
    top = np.where(lost, 0.0, value.max(-1))[:, None]
    difference = np.where(lost[:, None], 0.0, value - top)
    masked = np.isneginf(difference)
    at = np.where(lost, 0, value.argmax(-1))
    top_error = np.where(np.isfinite(logits.error), logits.error, 0)[np.arange(len(value)), at][:, None]
    error = logits.work.unit * np.abs(difference) + np.where(np.isfinite(value), logits.error, 0) + top_error
    error = np.where(masked, 0.0, np.where(np.isfinite(error), error, np.inf))
    out = Bounded(np.where(masked, -1e6, difference), error, logits.work)  # exp of either is 0
    return out, lost


def exponentials(difference: Bounded) -> Bounded:
    """``exp`` of numbers that are not positive, with the relative error that those of the differences make."""
    value = np.exp(difference.value)
    with np.errstate(over="ignore", invalid="ignore"):
        relative = np.expm1(np.minimum(difference.error, 700.0)) + 6 * difference.work.unit
    error = np.where(value < difference.work.least, difference.work.least, value * relative + difference.work.least)
    return Bounded(value, np.minimum(error, 1.0), difference.work)


def softmax(logits: Bounded) -> Bounded:
    """``exp(l - max) / sum exp(l - max)`` along the last axis of ``[T, E]``."""
    difference, lost = differences(logits)
    e = exponentials(difference)
    return (e / e.sum(1, keepdims=True)).forget(lost[:, None])


def sigmoid(logits: Bounded) -> Bounded:
    """``1 / (1 + exp(-l))``; infinities are its limits."""
    value = np.clip(logits.value, -1e6, 1e6)
    small = np.exp(-np.abs(value))
    s = np.where(value >= 0, 1, small) / (1 + small)
    moved = np.where(np.isinf(logits.value), 0.0, s * np.minimum(np.expm1(np.minimum(logits.error, 700.0)), 1e30))
    error = np.where(s < logits.work.least, logits.work.least, np.minimum(moved, 1) + 6 * logits.work.unit * s)
    return Bounded(s, np.where(np.isnan(logits.value), np.inf, error + logits.work.least), logits.work)


def logsumexp(logits: Bounded) -> Bounded:
    """The value of each row ``[T]``."""
    difference, lost = differences(logits)
    total = exponentials(difference).sum(1)
    top = np.where(lost, 0.0, np.max(np.where(lost[:, None], 0.0, logits.value), 1))
    log = total.apply(np.log, lambda v: np.abs(np.log(v)) + 1)
    return (log + Bounded(top, None, logits.work)).forget(lost)


def _group_values(keys: Array, rule: Rule, best: int) -> Array:
    grouped = keys.reshape(rule.n_group, -1)
    return -np.sort(-grouped, axis=1)[:, :best].sum(1)


def _wrong_choice(logits: Array, keys: Bounded, bias: Array | None, ids: list[int], rule: Rule) -> str | None:
    """A reason why these ids are no best choice by the keys of one token, or None.

    Two experts with the same logit and the same bias are equal exactly, so the lower id comes first.
    """
    E, value, error = len(logits), keys.value, keys.error
    if sorted(set(ids)) != sorted(ids) or not all(0 <= e < E for e in ids):
        return f"ids {ids} are not distinct and in range"
    if not np.isfinite(value).all() or not np.isfinite(error).all():
        return None
    is_open = np.ones(E, dtype=bool)
    if rule.n_group > 1:
        size = E // rule.n_group
        best = min(2 if rule.group_score == "top2_sum" else 1, size)
        groups, slack = _group_values(value, rule, best), best * 2 * error.max() + 4 * keys.work.unit * np.abs(value).max()
        order = np.sort(-groups)
        last_open = -order[rule.topk_group - 1]
        certain, possible = groups > last_open + 2 * slack, groups >= last_open - 2 * slack
        of_ids = {e // size for e in ids}
        if not all(possible[g] for g in of_ids) or len(of_ids) > rule.topk_group:
            return f"ids {ids} are of groups {sorted(of_ids)}, whose values are {groups.tolist()}"
        is_open = np.repeat(certain, size)  # of which it is known that they were open
        is_open[[e for g in of_ids for e in range(g * size, (g + 1) * size)]] = True
    left = {e for e in range(E) if is_open[e]}
    for e in ids:
        left.discard(e)
        for other in left:
            same = logits[other] == logits[e] and (bias is None or bias[other] == bias[e])
            same = same and (rule.n_group == 1 or other // (E // rule.n_group) == e // (E // rule.n_group))
            gap = value[other] - value[e]
            if gap > error[other] + error[e] or (other < e and (same or (gap == 0 and not error[other] and not error[e]))):
                return f"id {e} (key {value[e]!r}) comes before {other} (key {value[other]!r}) in {ids}"
    return None


def wrong_choices(logits: Bounded, bias: Bounded | None, ids: Array, rule: Rule) -> list[str]:
    """What is wrong with the ids ``[T, K]`` picked by these logits ``[T, E]``."""
    if rule.top_k is None:
        return [] if (ids == np.arange(logits.value.shape[1])).all() else ["top_k=None gave other ids than all in order"]
    keys = logits
    if rule.score_first and (bias is not None or rule.n_group > 1):
        keys = softmax(logits) if rule.scoring == "softmax" else sigmoid(logits)
    if bias is not None:
        keys = keys + bias
    # A minus infinity among plain logits is below all numbers.
    value = np.where(np.isneginf(keys.value), -np.finfo(np.float64).max, keys.value)
    keys = Bounded(value, np.where(np.isneginf(logits.value) & (keys is logits), 0, keys.error), keys.work)
    wrong = []
    for t, chosen in enumerate(ids.tolist()):
        bias_row = None if bias is None else bias.value
        if reason := _wrong_choice(logits.value[t], keys[t], bias_row, chosen, rule):
            wrong.append(f"token {t}: {reason}")
    return wrong


def route(logits: Bounded, ids: Array, rule: Rule, dweights: Bounded | None) -> tuple[Bounded, Bounded | None]:
    """The weights of the picked experts, and the gradient of the logits for that of the weights."""
    rows = np.arange(len(ids))[:, None]
    scale = rule.routed_scaling_factor
    over_all = rule.scoring == "softmax" and rule.score_first and not rule.norm_topk_prob
    if over_all:
        p = softmax(logits)
        score = p[rows, ids]
    else:
        picked = logits[rows, ids]
        score = softmax(picked) if rule.scoring == "softmax" else sigmoid(picked)
    total = (score.sum(1, keepdims=True) + rule.norm_eps) if rule.scoring == "sigmoid" and rule.norm_topk_prob else None
    weights = (score if total is None else score / total) * scale
    if dweights is None:
        return weights, None
    dscore = dweights * scale
    out = Bounded(np.zeros_like(logits.value), None, logits.work)
    if over_all:
        weighted = dscore * score
        out = -(p * weighted.sum(1, keepdims=True))
        added = out[rows, ids] + weighted
    elif rule.scoring == "softmax":
        added = score * (dscore - (dscore * score).sum(1, keepdims=True))
    else:
        if total is not None:
            dscore = (dscore - (dscore * score).sum(1, keepdims=True) / total) / total
        added = dscore * score * (1 - score)
    out.value[rows, ids], out.error[rows, ids] = added.value, added.error
    # A row without a maximum promises nothing, an expert that has no part in the weights included.
    lost = np.isinf(weights.error).all(1)
    return weights, out.forget(lost[:, None])


def best_pairs(pair: Array, top_k: int) -> list[int] | None:
    """Ids ``i * G + j`` of the greatest ``a_i + b_j`` in real arithmetic, ties to the lower id; None where there is a NaN.

    Of sums with the same number of terms at minus infinity the other terms decide.
    """
    if np.isnan(pair).any() or np.isposinf(pair).any():
        return None
    a, b = pair
    G = len(a)

    def key(e: int) -> tuple[int, Fraction, int]:
        terms = (float(a[e // G]), float(b[e % G]))
        finite = [Fraction(term) for term in terms if term != -np.inf]
        return 2 - len(finite), -sum(finite, Fraction(0)), e

    return sorted(range(G * G), key=key)[:top_k]


def _log_softmax(half: Bounded) -> tuple[Bounded, Array]:
    difference, lost = differences(half)
    total = exponentials(difference).sum(1, keepdims=True)
    return difference - total.apply(np.log, lambda v: np.abs(np.log(v)) + 1), lost


def route_product_key(
    pairs: Bounded, ids: Array, norm_topk_prob: bool, dweights: Bounded | None
) -> tuple[Bounded, Bounded | None]:
    """The weights of the picked pairs of ``[T, 2, G]`` logits, and the logits' gradient."""
    T, _, G = pairs.value.shape
    rows = np.arange(T)[:, None]
    i, j = ids // G, ids % G
    (la, lost_a), (lb, lost_b) = _log_softmax(pairs[:, 0]), _log_softmax(pairs[:, 1])
    lost = (lost_a | lost_b)[:, None]
    score = la[rows, i] + lb[rows, j]
    weights = softmax(score) if norm_topk_prob else exponentials(score)
    if norm_topk_prob:  # the two logarithms cancel, so their errors do
        a, _ = differences(pairs[:, 0])
        b, _ = differences(pairs[:, 1])
        weights = softmax(a[rows, i] + b[rows, j])
    weights = weights.forget(np.broadcast_to(lost, weights.value.shape))
    if dweights is None:
        return weights, None
    dscore = dweights * weights
    total = dscore.sum(1, keepdims=True)
    if norm_topk_prob:
        dscore = dscore - weights * total
    halves = []
    for half, index in ((pairs[:, 0], i), (pairs[:, 1], j)):
        out = np.zeros((3, T, G))
        for t in range(T):
            for k, g in enumerate(index[t]):
                out[:, t, g] += dscore.value[t, k], dscore.error[t, k], abs(dscore.value[t, k]) * ids.shape[1] * pairs.work.unit
        gradient = Bounded(out[0], out[1] + out[2], pairs.work)
        if not norm_topk_prob:
            gradient = gradient - softmax(half) * total
        halves.append(gradient.forget(np.broadcast_to(lost, (T, G))))
    value, error = (np.stack([getattr(half, name) for half in halves], 1) for name in ("value", "error"))
    return weights, Bounded(value, error, pairs.work)
