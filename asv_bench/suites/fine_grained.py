"""Who is measured on fine-grained experts: single neurons, value memory, and the product-key router.

The peers are what their papers' code writes in PyTorch: rows of the tables are gathered into a tensor of ``[T, K, D]``, and the
router takes the best of all ``G * G`` sums.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from fusedonemoe import functional as F
from fusedonemoe.bench import report, runner, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.exact import OUTPUT
from fusedonemoe.bench.peers import ALL_PAIRS, GATHER, GROUPED, OURS, Peer, chosen
from fusedonemoe.bench.steps import Call, Named
from fusedonemoe.bench.workloads import Cell, Inputs, KeyInputs, NeuronInputs

READY_PAIRS = "torch topk of ready sums"
# From x, experts, weights, down_table and up_table to the output.
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _call(cell: Cell, inputs: Inputs, forward: Forward) -> Call:
    """The output; in a training cell, the gradients of all that is floating beside it."""
    assert isinstance(inputs, NeuronInputs)
    given = inputs
    if cell.mode == "forward":
        tables = (given.down_table, given.up_table)
        return lambda i: {OUTPUT: forward(given.xs[i], given.experts[i], given.weights[i], *tables)}
    names = ("x", "weights", "down_table", "up_table") if cell.operator == "neurons" else ("weights", "up_table")

    def leaves(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return [tensor.detach().requires_grad_() for tensor in tensors]

    xs, weights, (down, up) = leaves(given.xs), leaves(given.weights), leaves((given.down_table, given.up_table))

    def step(i: int) -> Named:
        wanted = dict(zip(("x", "weights", "down_table", "up_table"), (xs[i], weights[i], down, up), strict=True))
        with torch.enable_grad():
            y = forward(xs[i], given.experts[i], weights[i], down, up)
            gradients = torch.autograd.grad(y, [wanted[name] for name in names], given.dys[i])
        return {OUTPUT: y.detach()} | {f"gradients of {name}": g for name, g in zip(names, gradients, strict=True)}

    return step


def _neurons(cell: Cell, inputs: Inputs, impl: str = "auto") -> Call:
    return _call(cell, inputs, partial(F.experts_neurons, impl=impl))


def _gathered_neurons(cell: Cell, inputs: Inputs) -> Call:
    def forward(x: Tensor, experts: Tensor, weights: Tensor, down: Tensor, up: Tensor) -> Tensor:
        s = torch.einsum("td,tkd->tk", x, embedding(experts, down))
        return torch.einsum("tk,tkd->td", silu(s) * weights.to(x.dtype), embedding(experts, up))

    return _call(cell, inputs, forward)


def _values(cell: Cell, inputs: Inputs, impl: str = "auto") -> Call:
    return _call(cell, inputs, lambda x, experts, weights, down, up: F.experts_values(experts, weights, up, impl=impl))


def _gathered_values(cell: Cell, inputs: Inputs) -> Call:
    def forward(x: Tensor, experts: Tensor, weights: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return torch.einsum("tk,tkd->td", weights.to(up.dtype), embedding(experts, up))

    return _call(cell, inputs, forward)


def _keys(cell: Cell, inputs: Inputs) -> Call:
    assert isinstance(inputs, KeyInputs)
    given = inputs

    def call(i: int) -> Named:
        weights, experts = F.route_product_key(given.xs[i], cell.K, norm_topk_prob=True)
        return {OUTPUT: weights, "experts": experts}

    return call


def _sums(logits: Tensor) -> Tensor:
    return (logits[:, 0, :, None] + logits[:, 1, None, :]).flatten(1)


def _all_pairs(cell: Cell, inputs: Inputs, ready: bool = False) -> Call:
    assert isinstance(inputs, KeyInputs)
    given = inputs
    sums = [_sums(x) for x in given.xs] if ready else None

    def call(i: int) -> Named:
        values, experts = (sums[i] if sums else _sums(given.xs[i])).topk(cell.K)
        return {OUTPUT: values.softmax(-1), "experts": experts}

    return call


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
CELLS: tuple[Cell, ...] = (
    Cell("keys", 4096, 0, 0, _KEYS * _KEYS, 16, torch.float32, label="keys"),
    *(
        Cell(operator, T, D, 0, E, K, dtype, mode=mode, label=f"{operator}-{E}")
        for operator, (T, D, E, K), dtype, mode in product(
            ("neurons", "values"), _SIZES, (torch.float32, torch.bfloat16), ("forward", "training")
        )
    ),
)


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them; the exit status is that of ``session.run_cells``."""
    measure = partial(runner.run_cell, ceilings=Ceilings(), real_time=not args.no_rt)
    return session.run_suite(
        args,
        CELLS,
        measure=lambda cell: measure(cell, peers=chosen(PEERS[cell.operator], args.peers)),
        to_json=report.cell_to_json,
        show=report.print_cell,
        peers=lambda cell: [peer.name for peer in PEERS[cell.operator]],
    )
