"""The suite ``fine-grained``: single neurons, value memory, and the product-key router.

The peers are the PyTorch code of the papers: rows of the tables are gathered into a tensor of ``[T, K, D]``, and the router takes
the best of all ``G * G`` sums.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from fusedonemoe import functional as F
from fusedonemoe.bench import report, runner, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.exact import IDS, OUTPUT, gradient_of
from fusedonemoe.bench.inputs import Inputs
from fusedonemoe.bench.peers import ALL_PAIRS, GATHER, GROUPED, OURS, Forward, Peer, Weights, chosen
from fusedonemoe.bench.results import CellResult
from fusedonemoe.bench.timing import Timer
from fusedonemoe.bench.workloads import Cell, LeastWork
from fusedonemoe.ops import neurons
from fusedonemoe.ops.neurons import NeuronNeeds, ValueNeeds
from fusedonemoe.testing import make_experts

READY_PAIRS = "torch topk of ready sums"


@dataclass(frozen=True)
class FineCell(Cell):
    """A cell of one of the operators ``"neurons"``, ``"values"`` and ``"keys"``.

    The router has two lists of logits with ``G`` keys each: ``E = G * G``, and no ``D``. None has an ``F``.
    """

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tables, by name."""
        names = {"neurons": ("down_table", "up_table"), "values": ("up_table",), "keys": ()}[self.operator]
        return dict.fromkeys(names, (self.E, self.D))

    @property
    def tables(self) -> int:
        """The number of tables."""
        return len(self.weight_shapes)

    @property
    def parameters(self) -> int:
        """All weights that a call may read."""
        return self.tables * self.E * self.D

    @property
    def active_parameters(self) -> int:
        """The weights that one token is multiplied with."""
        return self.tables * self.K * self.D


def least_work(cell: FineCell, *, experts_hit: int) -> LeastWork:
    """Count the work of one call, as :func:`fusedonemoe.bench.workloads.least_work` does."""
    T, D, E, N = cell.T, cell.D, cell.E, cell.T * cell.K
    if cell.operator == "keys":  # both lists of logits in, an int64 id and a float32 weight for each pair out
        return LeastWork(flops=0, touched_bytes=T * 2 * round(E**0.5) * cell.dtype.itemsize + N * (8 + 4))
    rows = cell.tables * experts_hit + cell.tables * T  # of x and y; value memory has no x
    if cell.mode == "training":
        rows += cell.tables * (experts_hit + E) + cell.tables * T  # of dy and dx
    moved = rows * D * cell.dtype.itemsize + N * (8 + 4)
    return LeastWork(flops=2 * cell.tables * N * D * (3 if cell.mode == "training" else 1), touched_bytes=moved)


def make_inputs(cell: FineCell) -> Inputs:
    """Draw the inputs of a cell; the same for every peer and every run."""
    draw, rotation = torch.Generator().manual_seed(7), range(cell.rotation)
    sample = torch.arange(cell.T, device="cpu")
    if cell.operator == "keys":
        logits, experts = _clear_logits(cell, draw)
        return Inputs(("logits",), tuple((each,) for each in logits), {}, experts, sample)

    def normal(rows: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, cell.D, generator=draw, device="cpu") * scale).to(cell.dtype)

    ids = tuple(make_experts(cell.T, cell.E, cell.K, routing="distinct", seed=seed) for seed in rotation)
    scores = [torch.rand(cell.T, cell.K, generator=draw, device="cpu") for _ in rotation]
    xs = [(normal(cell.T),) if cell.operator == "neurons" else () for _ in rotation]
    scales = {"down_table": cell.D**-0.5, "up_table": 1.0}
    weights = {name: normal(cell.E, scales[name]) for name in cell.weight_shapes}
    dys = tuple(normal(cell.T) for _ in rotation) if cell.mode == "training" else ()
    names = ("x", "experts", "weights") if cell.operator == "neurons" else ("experts", "weights")
    draws = tuple((*x, e, w) for x, e, w in zip(xs, ids, scores, strict=True))
    return Inputs(names, draws, weights, ids, sample, dys, dys[0] if dys else None)


def _clear_logits(cell: FineCell, draw: torch.Generator) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Draw logits whose best K + 1 sums are further apart than their rounding in float32, so that all peers pick the same."""
    tokens, found = cell.rotation * cell.T, 0
    xs: list[Tensor] = []
    experts: list[Tensor] = []
    while found < tokens:
        x = torch.randn(512, 2, round(cell.E**0.5), generator=draw, device="cpu")
        best = (x[:, 0, :, None].double() + x[:, 1, None, :].double()).flatten(1).topk(min(cell.K + 1, cell.E))
        clear = (best.values.diff() < -1e-5).all(1)
        xs.append(x[clear])
        experts.append(best.indices[clear, : cell.K])
        found += int(clear.sum())
    return torch.cat(xs)[:tokens].split(cell.T), torch.cat(experts)[:tokens].split(cell.T)


def exact_answer(cell: FineCell, inputs: Inputs) -> dict[str, Tensor]:
    """Return the answer for the first draw, by the formulation in float64 that the tests compare with the oracle."""
    draw = [t.double() if t.is_floating_point() else t for t in inputs.draws[0]]
    if cell.operator == "keys":
        G, ids = round(cell.E**0.5), inputs.experts[0]
        a, b = (half.gather(1, keys) for half, keys in zip(draw[0].unbind(1), (ids // G, ids % G), strict=True))
        return {OUTPUT: (a + b).softmax(1), IDS: ids}
    up = inputs.weights["up_table"].double()
    gradients: tuple[Tensor, ...] = ()
    dy = inputs.dy_checked.double() if inputs.dy_checked is not None else None
    if cell.operator == "values":
        experts, weights = draw
        y = neurons.experts_values(experts, weights, up)
        if dy is not None:
            gradients = neurons.experts_values_backward(dy, experts, weights, up, ValueNeeds(True, True))
    else:
        (x, experts, weights), down = draw, inputs.weights["down_table"].double()
        y, s = neurons.experts_neurons(x, experts, weights, down, up, "silu")
        if dy is not None:
            needs = NeuronNeeds(True, True, True, True)
            gradients = neurons.experts_neurons_backward(dy, s, x, experts, weights, down, up, "silu", needs)
    names = [*(name for name in inputs.names if name != "experts"), *inputs.weights]
    return {OUTPUT: y} | {gradient_of(name): gradient for name, gradient in zip(names, gradients, strict=False)}


def _neurons(cell: Cell, weights: Weights, impl: str = "auto") -> Forward:
    tables = tuple(weights.values())
    return lambda x, experts, scores: F.experts_neurons(x, experts, scores, *tables, impl=impl)


def _gathered_neurons(cell: Cell, weights: Weights) -> Forward:
    def forward(x: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        s = torch.einsum("td,tkd->tk", x, embedding(experts, weights["down_table"]))
        return torch.einsum("tk,tkd->td", silu(s) * scores.to(x.dtype), embedding(experts, weights["up_table"]))

    return forward


def _values(cell: Cell, weights: Weights, impl: str = "auto") -> Forward:
    return lambda experts, scores: F.experts_values(experts, scores, weights["up_table"], impl=impl)


def _gathered_values(cell: Cell, weights: Weights) -> Forward:
    up = weights["up_table"]
    return lambda experts, scores: torch.einsum("tk,tkd->td", scores.to(up.dtype), embedding(experts, up))


def _keys(cell: Cell, weights: Weights) -> Forward:
    return lambda logits: F.route_product_key(logits, cell.K, norm_topk_prob=True)


def _sums(logits: Tensor) -> Tensor:
    return (logits[:, 0, :, None] + logits[:, 1, None, :]).flatten(1)


def _all_pairs(cell: Cell, weights: Weights, ready: bool = False) -> Forward:
    kept: dict[int, Tensor] = {}

    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        sums = kept.get(logits.data_ptr())
        if sums is None:
            sums = _sums(logits)
            if ready:  # the first call for a draw is not timed
                kept[logits.data_ptr()] = sums
        values, experts = sums.topk(cell.K)
        return values.softmax(-1), experts

    return forward


_BOTH = ("forward", "training")
PEERS: dict[str, tuple[Peer, ...]] = {
    "keys": (Peer(OURS, _keys), Peer(ALL_PAIRS, _all_pairs), Peer(READY_PAIRS, partial(_all_pairs, ready=True))),
    "neurons": (
        Peer(OURS, _neurons, _BOTH),
        Peer(GROUPED, partial(_neurons, impl="grouped"), _BOTH),
        Peer(GATHER, _gathered_neurons, _BOTH),
    ),
    "values": (
        Peer(OURS, _values, _BOTH),
        Peer(GROUPED, partial(_values, impl="grouped"), _BOTH),
        Peer(GATHER, _gathered_values, _BOTH),
    ),
}

# T, D, E, K of FlashMoE's two published sizes, with fewer tokens and columns.
_SIZES = ((1024, 256, 16384, 64), (128, 256, 102400, 512))
_KEYS = 128
CELLS: tuple[FineCell, ...] = (
    FineCell("keys", 4096, 0, 0, _KEYS * _KEYS, 16, torch.float32, label="keys"),
    *(
        FineCell(operator, T, D, 0, E, K, dtype, mode=mode, label=f"{operator}-{E}")
        for operator, (T, D, E, K), dtype, mode in product(
            ("neurons", "values"), _SIZES, (torch.float32, torch.bfloat16), ("forward", "training")
        )
    ),
)


def run_cell(cell: FineCell, timer: Timer, ceilings: Ceilings, peers: list[Peer], **options: float) -> CellResult:
    """Measure one cell with the runner of all suites."""
    with torch.no_grad():
        inputs = make_inputs(cell)
        exact = exact_answer(cell, inputs)
    given = {"inputs": inputs, "exact": exact, "count_work": least_work}
    return runner.run_cell(cell, timer, peers=peers, ceilings=ceilings, **given, **options)  # type: ignore[arg-type]


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them; the exit status is that of ``session.run_cells``."""
    measure = partial(run_cell, timer=Timer(real_time=not args.no_rt), ceilings=Ceilings())
    return session.run_suite(
        args,
        CELLS,
        measure=lambda cell: measure(cell, peers=chosen(PEERS[cell.operator], args.peers)),
        to_json=report.cell_to_json,
        show=report.print_cell,
        peers=lambda cell: [peer.name for peer in PEERS[cell.operator]],
    )
