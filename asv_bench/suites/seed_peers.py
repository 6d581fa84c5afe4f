"""The peers of the rows of the reference systems: ours, and the code that each system compared itself with.

The systems need a GPU or another language, or do not run; the code here is written from their formulas.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from asv_bench.suites.seed_cells import SeedCell
from asv_bench.suites.seed_inputs import ACTIVATIONS
from fusedonemoe import functional as F
from fusedonemoe.bench.peers import ALL_PAIRS, GATHER, OURS, UnavailableError, is_ours

Weights = dict[str, Tensor]
# From the tensors of a draw to the output; a router's to weights and ids.
Forward = Callable[..., Tensor | tuple[Tensor, Tensor]]
# Beyond these a formulation is no contender, and would hold up all others.
MOST_GATHERED_BYTES = 2e9
MOST_FLOPS = 2e11


@dataclass(frozen=True)
class SeedPeer:
    """One contender.

    Attributes:
        name: as printed.
        build: from a cell and its weights to the forward that is timed.
        modes: of the cells that it can run.
        metered: whether its memory is torch's or ours, so that its peak can be told.
        differs: what it computes otherwise, for one that is timed as it was published although it is another function; it
            has to agree with itself in float64, and is never the best peer.
    """

    name: str
    build: Callable[[SeedCell, Weights], Forward]
    modes: tuple[str, ...] = ("forward", "training")
    metered: bool = True
    differs: str = ""

    @property
    def is_ours(self) -> bool:
        """True for this library."""
        return is_ours(self.name)


def _fits(what: str, size: float) -> None:
    if size > MOST_GATHERED_BYTES:
        raise UnavailableError(f"{what} {size / 1e9:.0f} GB")


# The original: y = relu(sum_e w_e x W_e)^2 Wdown, w = sigmoid of the picked logits.


def _our_original(cell: SeedCell, weights: Weights) -> Forward:
    def forward(x: Tensor) -> Tensor:
        logits = nn.functional.linear(x, weights["router"])
        scores, experts = F.route(logits, cell.K, scoring="sigmoid", norm_topk_prob=False)
        return F.experts_merged(x, experts, scores, weights["proj"]).relu().square() @ weights["down"]

    return forward


def _picked(cell: SeedCell, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    picked, experts = nn.functional.linear(x, weights["router"]).topk(cell.K, dim=1)
    return picked.sigmoid(), experts


def _einsum_original(cell: SeedCell, weights: Weights) -> Forward:
    """Multiply a mask of weights, zero where an expert was not picked, and all experts in one product, as published."""

    def forward(x: Tensor) -> Tensor:
        scores, experts = _picked(cell, x, weights)
        scores_TE = x.new_zeros(cell.T, cell.E).scatter_(1, experts, scores)
        return torch.einsum("td,te,edf->tf", x, scores_TE, weights["proj"]).relu().square() @ weights["down"]

    return forward


def _loop_original(cell: SeedCell, weights: Weights) -> Forward:
    def forward(x: Tensor) -> Tensor:
        scores, experts = _picked(cell, x, weights)
        mixed = x.new_zeros(cell.T, cell.F)
        for e in range(cell.E):
            token, choice = torch.where(experts == e)
            if token.numel():
                mixed.index_add_(0, token, (x[token] @ weights["proj"][e]) * scores[token, choice, None])
        return mixed.relu().square() @ weights["down"]

    return forward


def _published_loop(cell: SeedCell, weights: Weights) -> Forward:
    """Weight every choice of a token by the largest of its logits: the loop that the original compares itself with."""

    def forward(x: Tensor) -> Tensor:
        picked, experts = nn.functional.linear(x, weights["router"]).topk(cell.K, dim=1)
        mixed = x.new_zeros(cell.T, cell.F)
        for e in range(cell.E):
            token, _ = torch.where(experts == e)
            if token.numel():
                mixed.index_add_(0, token, (x[token] @ weights["proj"][e]) * picked[token, :1])
        return mixed.relu().square() @ weights["down"]

    return forward


# Softmax and selection.


def _our_topk(cell: SeedCell, weights: Weights) -> Forward:
    return lambda logits: F.topk_softmax(logits, cell.K)[:2]


def _torch_topk(cell: SeedCell, weights: Weights) -> Forward:
    return lambda logits: tuple(logits.softmax(-1).topk(cell.K, dim=-1))


def _sorted_topk(cell: SeedCell, weights: Weights) -> Forward:
    """Sort all experts, keep the first and gather the weights, as candle's own operators do."""

    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(-1)
        experts = probabilities.argsort(-1, descending=True)[:, : cell.K].contiguous()
        return probabilities.gather(-1, experts), experts

    return forward


# Experts that are MLPs.


def _our_mlp(cell: SeedCell, weights: Weights) -> Forward:
    options = {"activation": cell.activation, "gated": cell.gated, "save_percent": cell.save_percent}
    return lambda x, experts, scores: F.experts_mlp(x, experts, scores, weights["up"], weights["down"], **options)  # type: ignore[arg-type]


def _hidden(cell: SeedCell, z: Tensor) -> Tensor:
    act = ACTIVATIONS[cell.activation]
    return act(z[:, : cell.F]) * z[:, cell.F :] if cell.gated else act(z)


def _loop_mlp(cell: SeedCell, weights: Weights) -> Forward:
    """One expert after the other, on the rows that picked it."""

    def forward(x: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        ups, downs = weights["up"].unbind(), weights["down"].unbind()
        for e in range(cell.E):
            token, choice = torch.where(experts == e)
            if token.numel():
                out = nn.functional.linear(_hidden(cell, nn.functional.linear(x[token], ups[e])), downs[e])
                y = y.index_add(0, token, out * scores[token, choice, None].to(x.dtype))
        return y

    return forward


def _dense_mlp(cell: SeedCell, weights: Weights) -> Forward:
    """Every expert on every token, and a mask."""
    flops = 2 * cell.T * cell.parameters * (3 if cell.mode == "training" else 1)
    if flops > MOST_FLOPS:
        raise UnavailableError(f"computes {cell.E / cell.K:.0f} times the work, {flops / 1e9:.0f} GFLOP")

    def forward(x: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        scores_TE = x.new_zeros(cell.T, cell.E).scatter(1, experts, scores.to(x.dtype))
        z = torch.matmul(x, weights["up"].transpose(1, 2)).flatten(0, 1)
        hidden = _hidden(cell, z).view(cell.E, cell.T, cell.F) * scores_TE.t()[:, :, None]
        return torch.matmul(hidden, weights["down"].transpose(1, 2)).sum(0)

    return forward


# MoeKernel: softmax, the best divided by their sum, relu(x W1) W2.


def _our_moekernel(cell: SeedCell, weights: Weights) -> Forward:
    experts = _our_mlp(cell, weights)

    def forward(x: Tensor) -> Tensor:
        scores, ids = F.route(nn.functional.linear(x, weights["router"]), cell.K)
        return experts(x, ids, scores)  # type: ignore[return-value]

    return forward


def _normalised(cell: SeedCell, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    scores, experts = nn.functional.linear(x, weights["router"]).softmax(1).topk(cell.K, dim=1)
    return scores / scores.sum(1, keepdim=True), experts


def _numpy_moekernel(cell: SeedCell, weights: Weights) -> Forward:
    """Its baseline in NumPy, one expert after the other."""
    router, up, down = (weights[name].numpy() for name in ("router", "up", "down"))

    def forward(x: Tensor) -> Tensor:
        rows = x.numpy()
        logits = rows @ router.T
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = shifted / shifted.sum(1, keepdims=True)
        ids = np.argpartition(probabilities, -cell.K, axis=1)[:, -cell.K :]
        scores = np.take_along_axis(probabilities, ids, 1)
        scores /= scores.sum(1, keepdims=True)
        y = np.zeros_like(rows)
        for e in range(cell.E):
            token, choice = np.nonzero(ids == e)
            if token.size:
                # A token names an expert once, so no row is added to twice.
                y[token] += np.maximum(rows[token] @ up[e].T, 0) @ down[e].T * scores[token, choice, None]
        return torch.from_numpy(y)

    return forward


def _per_token_moekernel(cell: SeedCell, weights: Weights) -> Forward:
    """Its first form in PyTorch: one token and one choice after the other."""

    def forward(x: Tensor) -> Tensor:
        scores, experts = _normalised(cell, x, weights)
        y = torch.zeros_like(x)
        for t in range(cell.T):
            for j in range(cell.K):
                e = int(experts[t, j])
                hidden = nn.functional.linear(x[t : t + 1], weights["up"][e]).relu()
                y[t] += nn.functional.linear(hidden, weights["down"][e])[0] * scores[t, j]
        return y

    return forward


def _per_expert_moekernel(cell: SeedCell, weights: Weights) -> Forward:
    """Its second form in PyTorch: one expert after the other."""
    experts = _loop_mlp(cell, weights)

    def forward(x: Tensor) -> Tensor:
        scores, ids = _normalised(cell, x, weights)
        return experts(x, ids, scores)  # type: ignore[return-value]

    return forward


# Product keys, and rows of tables as experts.


def _our_product_keys(cell: SeedCell, weights: Weights) -> Forward:
    return lambda logits: F.route_product_key(logits, cell.K)


def _all_pairs(cell: SeedCell, weights: Weights) -> Forward:
    """The selection over the scores of all pairs."""
    _fits("writes the scores of all pairs,", 4 * cell.T * cell.E)

    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        a, b = logits.log_softmax(-1).unbind(-2)
        scores, experts = (a[:, :, None] + b[:, None, :]).flatten(1).topk(cell.K, dim=1)
        return scores.exp(), experts

    return forward


def _best_of_each_half(cell: SeedCell, weights: Weights) -> Forward:
    """The selection over the pairs of the best K keys of each half, as product keys are usually written."""
    G = math.isqrt(cell.E)
    each = min(cell.K, G)

    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (i, j) = (t.unbind(-2) for t in logits.log_softmax(-1).topk(each, dim=-1))
        scores, best = (a[:, :, None] + b[:, None, :]).flatten(1).topk(cell.K, dim=1)
        return scores.exp(), (i[:, :, None] * G + j[:, None, :]).flatten(1).gather(1, best)

    return forward


def _our_neurons(cell: SeedCell, weights: Weights) -> Forward:
    down, up = weights["down"], weights["up"]
    return lambda x, ids, scores: F.experts_neurons(x, ids, scores, down, up, activation=cell.activation)


def _gathered_bytes(cell: SeedCell, tables: int) -> int:
    # With gradients, as many bytes again for those of the gathered rows.
    return cell.T * cell.K * cell.D * cell.dtype.itemsize * tables * (2 if cell.mode == "training" else 1)


def _gathered_neurons(cell: SeedCell, weights: Weights) -> Forward:
    _fits("gathers rows of", _gathered_bytes(cell, 2))

    def forward(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        z = (weights["down"][ids] @ x[:, :, None]).squeeze(2)
        mixed = ACTIVATIONS[cell.activation](z) * scores.to(x.dtype)
        return (mixed[:, None, :] @ weights["up"][ids]).squeeze(1)

    return forward


def _our_values(cell: SeedCell, weights: Weights) -> Forward:
    return lambda ids, scores: F.experts_values(ids, scores, weights["table"])


def _gathered_values(cell: SeedCell, weights: Weights) -> Forward:
    _fits("gathers rows of", _gathered_bytes(cell, 1))
    return lambda ids, scores: (scores.to(cell.dtype)[:, None, :] @ weights["table"][ids]).squeeze(1)


def _bag(cell: SeedCell, weights: Weights) -> Forward:
    """PyTorch's bag of embeddings, which gathers nothing."""
    table = weights["table"]
    return lambda ids, scores: nn.functional.embedding_bag(ids, table, per_sample_weights=scores.to(table.dtype), mode="sum")


_FORWARD = ("forward",)
# The second of each is the yardstick.
LINE_UP: dict[str, tuple[SeedPeer, ...]] = {
    "original": (
        SeedPeer(OURS, _our_original, _FORWARD),
        SeedPeer("original einsum", _einsum_original, _FORWARD),
        SeedPeer("per-expert loop", _loop_original, _FORWARD),
        SeedPeer(
            "loop as published",
            _published_loop,
            _FORWARD,
            differs="weights all experts of a token by the largest of its logits, which is another function",
        ),
    ),
    "topk": (
        SeedPeer(OURS, _our_topk, _FORWARD),
        SeedPeer("softmax, sort, gather", _sorted_topk, _FORWARD),
        SeedPeer("torch softmax, topk", _torch_topk, _FORWARD),
    ),
    "mlp": (SeedPeer(OURS, _our_mlp), SeedPeer("per-expert loop", _loop_mlp), SeedPeer("dense, masked", _dense_mlp)),
    "moekernel": (
        SeedPeer(OURS, _our_moekernel, _FORWARD),
        SeedPeer("NumPy, per expert", _numpy_moekernel, _FORWARD, metered=False),
        SeedPeer("torch, per token", _per_token_moekernel, _FORWARD),
        SeedPeer("torch, per expert", _per_expert_moekernel, _FORWARD),
    ),
    "product-keys": (
        SeedPeer(OURS, _our_product_keys),
        SeedPeer(ALL_PAIRS, _all_pairs),
        SeedPeer("torch, best of each half", _best_of_each_half),
    ),
    "neurons": (SeedPeer(OURS, _our_neurons), SeedPeer(GATHER, _gathered_neurons)),
    "values": (
        SeedPeer(OURS, _our_values),
        SeedPeer(GATHER, _gathered_values),
        SeedPeer("torch embedding_bag", partial(_bag)),
    ),
}


def line_up(cell: SeedCell) -> list[SeedPeer]:
    """Everyone who computes a cell, ours first.

    Args:
        cell: of the suite.
    """
    return [peer for peer in LINE_UP[cell.operator] if cell.mode in peer.modes]
