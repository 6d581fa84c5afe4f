"""Inputs of the rows of the reference systems, and their answers in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asv_bench.suites.seed_cells import ROUTERS, WITH_ROUTER, SeedCell
from fusedonemoe.bench.inputs import unambiguous_tokens
from fusedonemoe.testing import make_experts

# A step of the answer gathers at most so many numbers of a table; in float64, eight times the bytes.
GATHERED = 1 << 26
OUTPUT, IDS = "outputs", "ids"
Answer = dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "relu2": lambda z: nn.functional.relu(z).square(),
    "identity": lambda z: z,
}


@dataclass(frozen=True)
class SeedInputs:
    """Inputs of a cell.

    Attributes:
        draws: for each draw what a call takes: of a router, logits ``[T, E]`` or ``[T, 2, G]``; of a block, x ``[T, D]``; of
            experts x, ids ``[T, K]`` and weights ``[T, K]`` float32; of a value memory, ids and weights.
        weights: by name; ``router`` ``[E, D]``, ``proj`` ``[E, D, F]`` and ``down`` ``[F, D]`` of the original; ``up``
            ``[E, G, D]`` and ``down`` ``[E, D, F]`` of experts; ``down`` and ``up`` tables ``[E, D]``.
        experts: ids ``[T, K]`` of each draw; none of a router, whose ids are its answer.
        dy: gradient of the output; None in a forward cell.
    """

    draws: tuple[tuple[Tensor, ...], ...]
    weights: dict[str, Tensor]
    experts: tuple[Tensor, ...]
    dy: Tensor | None = None


def make_inputs(cell: SeedCell) -> SeedInputs:
    """Draw the inputs of a cell; the same for every peer and every run."""
    generator = torch.Generator().manual_seed(7)
    T, D, F, E, K = cell.T, cell.D, cell.F, cell.E, cell.K

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = cell.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").mul_(scale).to(dtype)

    if cell.operator in ROUTERS:
        shape = (T, E) if cell.operator == "topk" else (T, 2, math.isqrt(E))
        logits = tuple((normal(*shape, dtype=torch.float32),) for _ in range(cell.rotation))
        return SeedInputs(logits, {}, (), normal(T, K, dtype=torch.float32) if cell.mode == "training" else None)
    if cell.operator in WITH_ROUTER:
        xs, experts, router = unambiguous_tokens(cell, cell.rotation)
        weights = {"router": router}
        if cell.operator == "original":
            weights |= {"proj": normal(E, D, F, scale=D**-0.5), "down": normal(F, D, scale=F**-0.5)}
        else:
            weights |= {"up": normal(E, F, D, scale=D**-0.5), "down": normal(E, D, F, scale=F**-0.5)}
        return SeedInputs(tuple((x,) for x in xs), weights, experts)
    experts = tuple(_ids(cell, seed) for seed in range(cell.rotation))
    if cell.operator == "mlp":
        weights = {"up": normal(E, cell.G, D, scale=D**-0.5), "down": normal(E, D, F, scale=F**-0.5)}
    elif cell.operator == "neurons":
        weights = {"down": normal(E, D, scale=D**-0.5), "up": normal(E, D)}
    else:
        weights = {"table": normal(E, D)}
    draws = []
    for ids in experts:
        scores = torch.rand(T, K, generator=generator, device="cpu").add_(0.25).div_(K**0.5)
        draws.append((ids, scores) if cell.operator == "values" else (normal(T, D), ids, scores))
    return SeedInputs(tuple(draws), weights, experts, normal(T, D) if cell.mode == "training" else None)


def _ids(cell: SeedCell, seed: int) -> Tensor:
    """Distinct experts for each token; of a large table, drawn a token at a time."""
    if cell.T * cell.E <= GATHERED:
        return make_experts(cell.T, cell.E, cell.K, routing="distinct", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(cell.E, generator=generator, device="cpu")[: cell.K] for _ in range(cell.T)])


def _route(cell: SeedCell, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids of a router, best first, ties to the lower id."""
    if cell.operator == "product-keys":
        a, b = logits.log_softmax(-1).unbind(-2)
        G = logits.shape[-1]
        if cell.T * cell.E <= GATHERED:
            best = (a[:, :, None] + b[:, None, :]).flatten(1).topk(cell.K, dim=1)
            return best.values.exp(), best.indices
        # Of more pairs, those of the best K keys of each half: each of the others is beaten by K pairs that share a key with it.
        (a, i), (b, j) = (half.topk(min(cell.K, G), dim=1) for half in (a, b))
        best = (a[:, :, None] + b[:, None, :]).flatten(1).topk(cell.K, dim=1)
        return best.values.exp(), (i[:, :, None] * G + j[:, None, :]).flatten(1).gather(1, best.indices)
    if cell.operator == "original":
        picked, ids = logits.topk(cell.K, dim=1)
        return picked.sigmoid(), ids
    scores, ids = logits.softmax(1).topk(cell.K, dim=1)
    return (scores / scores.sum(1, keepdim=True) if cell.operator == "moekernel" else scores), ids


def _mixed(cell: SeedCell, x: Tensor, ids: Tensor, scores: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The experts of the original, ``[T, F]``, or of an MLP, ``[T, D]``: one after the other."""
    y = x.new_zeros(cell.T, cell.F if cell.operator == "original" else cell.D)
    for e in ids.unique().tolist():
        token, choice = (ids == e).nonzero(as_tuple=True)
        rows = x[token]
        if cell.operator == "original":
            out = rows @ weights["proj"][e].double()
        else:
            z = rows @ weights["up"][e].double().t()
            act = ACTIVATIONS[cell.activation]
            hidden = act(z[:, : cell.F]) * z[:, cell.F :] if cell.gated else act(z)
            out = hidden @ weights["down"][e].double().t()
        y = y.index_add(0, token, out * scores[token, choice, None])
    return y


def reference(cell: SeedCell, draw: Sequence[Tensor], weights: dict[str, Tensor]) -> Answer:
    """The answer in float64, by formulas that autograd can differentiate.

    Args:
        cell: what is computed.
        draw: of the inputs; what is floating is float64 already where gradients are asked for.
        weights: of the inputs.
    """
    if cell.operator in ROUTERS:
        scores, ids = _route(cell, draw[0].double())
        return {OUTPUT: scores, IDS: ids}
    if cell.operator in WITH_ROUTER:
        x = draw[0].double()
        scores, ids = _route(cell, x @ weights["router"].double().t())
        y = _mixed(cell, x, ids, scores, weights)
        return {OUTPUT: ACTIVATIONS[cell.activation](y) @ weights["down"].double() if cell.operator == "original" else y}
    if cell.operator == "mlp":
        return {OUTPUT: _mixed(cell, draw[0].double(), draw[1], draw[2].double(), weights)}
    outputs = []
    for part in zip(*(t.split(max(GATHERED // (cell.K * cell.D), 1)) for t in draw), strict=True):
        ids, scores = part[-2], part[-1].double()
        if cell.operator == "neurons":
            z = torch.einsum("td,tkd->tk", part[0].double(), weights["down"][ids].double())
            scores = scores * ACTIVATIONS[cell.activation](z)
        outputs.append(torch.einsum("tk,tkd->td", scores, weights["up" if cell.operator == "neurons" else "table"][ids].double()))
    return {OUTPUT: torch.cat(outputs)}


def leaves_of(draw: Sequence[Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a training step differentiates, by name: the floating tensors of a draw, and all weights."""
    named = {f"input {n}": t for n, t in enumerate(draw) if t.is_floating_point()}
    return named | weights


def gradient_name(leaf: str) -> str:
    """Return the name of a leaf's gradient in a note."""
    return f"gradients of {leaf}"


def exact_answer(cell: SeedCell, inputs: SeedInputs) -> Answer:
    """Outputs, ids and gradients of the first draw in float64.

    Args:
        cell: what is computed.
        inputs: of the cell.
    """
    draw = inputs.draws[0]
    if inputs.dy is None:
        with torch.no_grad():
            return reference(cell, draw, inputs.weights)
    with torch.enable_grad():
        wide = tuple(t.double().requires_grad_() if t.is_floating_point() else t for t in draw)
        weights = {name: w.double().requires_grad_() for name, w in inputs.weights.items()}
        answer = reference(cell, wide, weights)
        leaves = leaves_of(wide, weights)
        gradients = torch.autograd.grad(answer[OUTPUT], list(leaves.values()), inputs.dy.double())
    names = map(gradient_name, leaves)
    return {name: t.detach() for name, t in answer.items()} | dict(zip(names, gradients, strict=True))
