"""Product keys: the best pairs of two short lists of logits, forward and the exact backward, as plain tensor arithmetic.

Expert ``(i, j) = i * G + j`` scores ``log_softmax(a)_i + log_softmax(b)_j``. Subtracting the two logsumexps moves no pair past
another, so pairs are chosen by ``a_i + b_j``, in the order of the real numbers, equal sums by the lower id.

*Which pairs can win.* Ranks order each half by descending logit, equal logits by the lower index. All other pairs of ranks ``r'
<= r``, ``s' <= s`` beat the pair ``(r, s)``. So only pairs with ``(r + 1) (s + 1) <= K`` can win: about ``K ln K`` of ``G * G``.

*Why the order is exact.* The float sum ``s = fl(a + b)`` is monotone in the real sum ``s + e``, so comparing ``s`` first and the
rounding error ``e``, which Knuth's TwoSum gives exactly, second compares the real sums.
"""

import torch
from torch import Tensor

from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.route import routing_dtype, select_largest

SCATTERS = ("cpu",)  # devices that add up a scatter in a fixed order; others do it with atomics
EXACT_INTEGERS = 1 << 24  # up to here a float32 holds every integer


def candidates(top_k: int, num_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks ``(r, s)`` with ``(r + 1) (s + 1) <= top_k``, both below ``num_keys``; each ``[C]`` int64.

    Computed on the device: a CUDA graph cannot hold a list copied from the host. An exported graph holds the lists.
    """
    ranks = min(top_k, num_keys)
    if is_exporting():
        pairs = [(r, s) for r in range(ranks) for s in range(min(top_k // (r + 1), num_keys))]
        first, second = torch.tensor(pairs, device=device).unbind(1)
        return first, second
    C = sum(min(top_k // (r + 1), num_keys) for r in range(ranks))
    partners = torch.div(top_k, torch.arange(1, ranks + 1, device=device), rounding_mode="floor").clamp(max=num_keys)
    ends = partners.cumsum(0)
    candidate = torch.arange(C, device=device)
    first = torch.searchsorted(ends, candidate, right=True)
    return first, candidate - (ends - partners)[first]


def exact_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two keys per sum, the greater one first: they order ``a + b`` as real numbers.

    Halves are added, so that no sum overflows. Of two sums with one minus infinity each, the other terms decide.
    """
    a, b = 0.5 * a, 0.5 * b
    total = a + b
    from_b = total - a
    error = (a - (total - from_b)) + (b - from_b)
    return total, torch.where(total.isinf(), torch.maximum(a, b), error)


def _best_keys(logits: Tensor, top_k: int, opaque: bool) -> tuple[Tensor, Tensor]:
    """Indices and values of the best ``min(top_k, G)`` logits of each half, best first; ``[T, 2, R]``."""
    T, _, G = logits.shape
    ranks = min(top_k, G)
    keys = select_largest(logits.reshape(2 * T, G), ranks, opaque).reshape(T, 2, ranks)
    return keys, logits.gather(-1, keys)


def _select_exactly(keys: Tensor, values: Tensor, top_k: int, num_keys: int, opaque: bool) -> Tensor:
    """The ids of the best pairs, from :func:`_best_keys`."""
    first, second = candidates(top_k, num_keys, keys.device)
    ids = keys[:, 0].index_select(1, first) * num_keys + keys[:, 1].index_select(1, second)
    total, error = exact_sum(values[:, 0].index_select(1, first), values[:, 1].index_select(1, second))
    # Every selection keeps the order of equal keys, so the last one, by the sums, breaks ties by what came before it: the
    # rounding errors, then the ids.
    C = ids.shape[1]
    by_id = ids.to(torch.float32 if num_keys * num_keys <= EXACT_INTEGERS else torch.float64).neg()
    order = select_largest(by_id, C, opaque)
    order = order.gather(1, select_largest(error.gather(1, order), C, opaque))
    order = order.gather(1, select_largest(total.gather(1, order), top_k, opaque))
    return ids.gather(1, order)


def select_pairs_on_cpu(logits: Tensor, top_k: int) -> Tensor:
    """Select pairs of float32 on CPU, looking at the data: a row whose ``top_k + 1`` greatest sums differ needs one selection."""
    G = logits.shape[-1]
    keys, values = _best_keys(logits, top_k, True)
    first, second = candidates(top_k, G, logits.device)
    halved = 0.5 * values
    total = halved[:, 0].index_select(1, first) + halved[:, 1].index_select(1, second)
    chosen = select_largest(total, min(top_k + 1, total.shape[1]), True)
    best = total.gather(1, chosen)
    chosen = chosen[:, :top_k]
    ids = keys[:, 0].gather(1, first[chosen]) * G + keys[:, 1].gather(1, second[chosen])
    tied = (best[:, 1:] == best[:, :-1]).any(1).nonzero()[:, 0]
    if tied.numel():
        ids[tied] = _select_exactly(keys[tied], values[tied], top_k, G, True)
    return ids


def select_pairs(logits: Tensor, top_k: int, opaque: bool) -> Tensor:
    """Ids ``i * G + j`` of the ``top_k`` pairs of greatest sum, best first, equal sums by the lower id. ``[T, K]`` int64.

    ``opaque``: the selection may be an operator, which no transform looks into.
    """
    logits = logits.detach()
    if opaque and logits.dtype == torch.float32 and logits.device.type == "cpu" and not is_exporting():
        return torch.ops.fusedonemoe.select_product_keys.default(logits, top_k)
    return _select_exactly(*_best_keys(logits, top_k, False), top_k, logits.shape[-1], False)


def _picked(half: Tensor, index: Tensor) -> Tensor:
    """``half[t, index[t, k]]``, whose derivative is a scatter."""
    if half.device.type in SCATTERS:
        return half.gather(1, index)
    is_key = index[:, :, None] == torch.arange(half.shape[1], device=half.device)
    return torch.where(is_key, half[:, None, :], 0.0).sum(-1)


def _summed(values: Tensor, index: Tensor, num_keys: int) -> Tensor:
    """``[T, G]``: the sum of ``values[t, k]`` over the k whose ``index[t, k]`` is g, in a fixed order."""
    if values.device.type in SCATTERS:
        return values.new_zeros(values.shape[0], num_keys).scatter_add(1, index, values)
    is_key = index[:, :, None] == torch.arange(num_keys, device=values.device)
    return torch.where(is_key, values[:, :, None], 0.0).sum(1)


def _weigh(logits: Tensor, experts: Tensor, norm_topk_prob: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the picked pairs, best first, and their indices i and j, each ``[T, K]``."""
    G = logits.shape[-1]
    i = torch.div(experts, G, rounding_mode="floor")
    j = experts - i * G
    if norm_topk_prob:  # cancels the two logsumexps; the first pair is the best
        a, b = _picked(logits[:, 0], i), _picked(logits[:, 1], j)
        return ((a - a[:, :1]) + (b - b[:, :1])).softmax(-1), i, j
    # The differences to the two maxima are exact enough for logits of any size; the two sums are from 1 to G.
    below = logits - logits.detach().amax(-1, keepdim=True)
    total_T2 = below.exp().sum(-1)
    a, b = below.unbind(1)
    return torch.exp(_picked(a, i) + _picked(b, j)) / (total_T2[:, :1] * total_T2[:, 1:]), i, j


def route_product_key(logits: Tensor, top_k: int, norm_topk_prob: bool, opaque: bool = False) -> tuple[Tensor, Tensor]:
    """Weights ``[T, K]``, float32 or float64 as the logits, and int64 ids of the best pairs."""
    logits = logits.to(routing_dtype(logits.dtype))
    experts = select_pairs(logits, top_k, opaque)
    return _weigh(logits, experts, norm_topk_prob)[0], experts


def route_product_key_backward(dweights: Tensor, logits: Tensor, experts: Tensor, norm_topk_prob: bool) -> Tensor:
    """Exact gradient ``[T, 2, G]`` of :func:`route_product_key` in the dtype of the logits; the selection is a constant.

    With ``dscore = dw * w`` (normalised: ``w * (dw - <dw, w>)``, which sums to 0),
    ``da_g = sum of dscore over the picked pairs (g, .) - softmax(a)_g * sum of dscore``, and the same for b.
    """
    # In one order of memory, whatever a saved-tensor hook returned: sums over other strides may round in another order.
    logits, experts = logits.contiguous(), experts.contiguous()
    wide = logits.to(routing_dtype(logits.dtype))
    G = wide.shape[-1]
    weights, i, j = _weigh(wide, experts, norm_topk_prob)
    dscore = dweights.to(wide.dtype) * weights
    total = dscore.sum(-1, keepdim=True)
    if norm_topk_prob:
        dscore = dscore - weights * total
    dlogits = torch.stack((_summed(dscore, i, G), _summed(dscore, j, G)), 1)
    if not norm_topk_prob:
        dlogits = dlogits - wide.softmax(-1) * total[:, :, None]
    return dlogits.to(logits.dtype)
