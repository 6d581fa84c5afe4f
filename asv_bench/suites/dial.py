"""The memory dial: the bytes that a training step of the experts holds for its backward pass, and the cost of holding less.

Bytes held are those of the distinct storages that autograd saves between forward and backward, parameters left out; the peak is
the most that a step, forward and backward, has at one moment besides its inputs, output and gradients. Times are of the backward
pass alone, of all lines in turns, and every share is the median of the shares within a turn.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asv_bench.suites import lines
from asv_bench.suites.lines import LinesResult, result_of, times_of
from fusedonemoe import functional as F
from fusedonemoe.bench import report
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.memory import held_bytes, peak_extra_bytes
from fusedonemoe.bench.peers import BUDGET, LOOP, OURS, TRANSFORMERS, qwen3_moe_config, relative_error
from fusedonemoe.bench.results import quartiles
from fusedonemoe.bench.timing import Timer, time_interleaved
from fusedonemoe.bench.workloads import LeastWork
from fusedonemoe.testing import MLPInputs, make_mlp_inputs

PERCENTS = (100, 75, 50, 25, 0)
# T, D, F, E, K: the sizes at which the README's promise is made.
SIZES = (2048, 1024, 512, 32, 4)
# Beside these: fewer tokens, more experts for each token, and an eighth of MoMoE's own example.
MORE_SIZES = ((256, 1024, 512, 32, 4), (1024, 1024, 384, 64, 8), (2048, 512, 256, 32, 8))
DRY_SIZES = (24, 16, 8, 4, 2)
ROUNDS = 15
ROUNDS_OF_MANY = 9


@dataclass(frozen=True)
class DialCell(lines.SizedCell):
    """One table."""

    @property
    def described(self) -> dict[str, Any]:
        """The operator, sizes and mode, for the file."""
        return {"operator": "experts", **self.by_letter, "mode": "backward"}

    @property
    def least_backward(self) -> LeastWork:
        """Two products for each of the forward; the weights read, their gradients written, and x and both its gradients."""
        T, D, F, E, K = self.sizes
        return LeastWork(12 * T * K * D * F, (2 * E * 3 * D * F + 3 * T * D) * self.dtype.itemsize)


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        name: as printed.
        save_percent: the dial; None for a peer, who has none.
        held_bytes: between forward and backward, parameters left out.
        formula_bytes: what ours promises; None for a peer.
        peak_bytes: most bytes of a step besides its inputs and results.
        seconds: median of the backward pass; None when an output was wrong.
        p95_seconds: 95 of 100 calls took no longer.
        p99_seconds: 99 of 100 calls took no longer.
        calls: how many were timed.
        relative: median over the turns of its time as a share of that of ``save_percent=100``.
        quartiles: of that share.
        error: the greatest of output and gradients, relative to the first line's.
        note: in place of a time.
    """

    name: str
    save_percent: int | None
    held_bytes: int
    formula_bytes: int | None
    peak_bytes: int | None = None
    seconds: float | None = None
    p95_seconds: float | None = None
    p99_seconds: float | None = None
    calls: int = 0
    relative: float | None = None
    quartiles: tuple[float, float] | None = None
    error: float | None = None
    note: str = ""

    @property
    def problem(self) -> str:
        """The problem with it: its note, or bytes that differ from the formula; empty otherwise."""
        if not self.note and self.formula_bytes and abs(self.held_bytes - self.formula_bytes) > 0.02 * self.formula_bytes:
            return "holds a different number of bytes than the formula"
        return self.note


def formula_bytes(inputs: MLPInputs, save_percent: int) -> int:
    """x, the routing (ids, weights, int32 order and offsets), and ``floor(N p / 100)`` rows of pre-activations.

    Args:
        inputs: of the call.
        save_percent: ``p``.
    """
    N, (E, G, _) = inputs.experts.numel(), inputs.up_proj.shape
    routing = inputs.experts.nbytes + inputs.weights.nbytes + 4 * N + 4 * (E + 1)
    return inputs.x.nbytes + routing + N * save_percent // 100 * G * inputs.x.element_size()


def _transformers_experts(inputs: MLPInputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, D, inner = inputs.down_proj.shape
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(qwen3_moe_config(D, inner, E, inputs.experts.shape[1]))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(inputs.up_proj.detach()), nn.Parameter(inputs.down_proj.detach())
    leaves = [inputs.x, inputs.weights, experts.gate_up_proj, experts.down_proj]
    return lambda: experts(inputs.x, inputs.experts, inputs.weights), leaves


def _loop_experts(inputs: MLPInputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A loop over the experts that autograd differentiates, each with parameters of its own."""
    pairs = [[w.detach().clone().requires_grad_() for w in stack.unbind()] for stack in (inputs.up_proj, inputs.down_proj)]

    def forward() -> Tensor:
        y = torch.zeros_like(inputs.x)
        for e, (gate_up, down) in enumerate(zip(*pairs, strict=True)):
            token, choice = torch.where(inputs.experts == e)
            if token.numel():
                gate, up = nn.functional.linear(inputs.x[token], gate_up).chunk(2, dim=-1)
                out = nn.functional.linear(nn.functional.silu(gate) * up, down)
                y = y.index_add(0, token, out * inputs.weights[token, choice, None].to(out.dtype))
        return y

    return forward, [inputs.x, inputs.weights, *pairs[0], *pairs[1]]


def _gradients(name: str, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the four inputs; the loop's as whole stacks, with zeros for an expert that no token chose."""
    if name != LOOP:
        return [g for g in gradients if g is not None]
    dx, dweights, *rest = gradients
    E = like[2].shape[0]
    stacks = [
        torch.stack([torch.zeros_like(w[0]) if g is None else g for g in half])
        for half, w in ((rest[:E], like[2]), (rest[E:], like[3]))
    ]
    return [g for g in (dx, dweights, *stacks) if g is not None]


def measure(
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    percents: Sequence[int] = PERCENTS,
    rounds: int = ROUNDS,
    real_time: bool = True,
    between: Callable[[], None] = lambda: None,
) -> list[Line]:
    """One table: ours at every setting of the dial, a loop over experts, and transformers' grouped_mm if it is installed.

    Args:
        sizes: T, D, F, E, K.
        dtype: of x and the weights.
        impl: of ours.
        percents: settings; 100, with which all are compared, first.
        rounds: how often each backward is timed, all in turns; 0 times nothing.
        real_time: ask for real-time priority while timing.
        between: runs before every turn.
    """
    T, D, inner, E, K = sizes
    inputs = make_mlp_inputs(T, D, inner, E, K, dtype=dtype, routing="distinct", requires_grad=True)
    leaves = [inputs.x, inputs.weights, inputs.up_proj, inputs.down_proj]
    dy = torch.randn(T, D, generator=torch.Generator().manual_seed(1), device="cpu").to(dtype)

    def ours(save_percent: int) -> Callable[[], Tensor]:
        arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
        return lambda: F.experts_mlp(*arguments, save_percent=save_percent, impl=impl)

    calls: dict[str, tuple[int | None, Callable[[], Tensor], list[Tensor]]] = {
        f"{OURS} {p} %": (p, ours(p), leaves) for p in percents
    }
    if find_spec("transformers") and all(n * dtype.itemsize % 16 == 0 for n in (D, inner)):
        calls[TRANSFORMERS] = (None, *_transformers_experts(inputs))
    calls[LOOP] = (None, *_loop_experts(inputs))

    found: dict[str, Line] = {}
    backwards: dict[str, Callable[[], Any]] = {}
    expected: list[Tensor] | None = None
    for name, (percent, call, wanted) in calls.items():
        held, y = held_bytes(call, wanted[2:])
        # The graph is kept, and so is what it holds: every backward of a turn starts from the same.
        backwards[name] = partial(torch.autograd.grad, y, wanted, dy, retain_graph=True, allow_unused=True)
        answer = [y.detach().double(), *(g.double() for g in _gradients(name, backwards[name](), leaves))]
        expected = expected or answer
        error = max(relative_error(a, b) for a, b in zip(answer, expected, strict=True))
        formula = None if percent is None else formula_bytes(inputs, percent)
        peak = peak_extra_bytes(partial(_step, call, wanted, dy))
        found[name] = Line(name, percent, held, formula, peak, error=error)
        if not error <= BUDGET[dtype]:
            found[name] = replace(found[name], note=f"off by {error:.1e}")
            del backwards[name]
        del y, answer

    turns = {name: lambda turn, backward=backward: backward() for name, backward in backwards.items()}
    times = time_interleaved(Timer(real_time=real_time), turns, rounds=rounds, between=between)
    first = times[next(iter(found))]
    return [_with_times(line, times.get(line.name), first) for line in found.values()]


def _step(call: Callable[[], Tensor], wanted: Sequence[Tensor], dy: Tensor) -> list[Tensor | None]:
    y = call()
    gradients = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return [y.detach(), *gradients]


def _with_times(line: Line, times: list[float] | None, first: list[float]) -> Line:
    if not times:
        return line
    shares = [mine / its for mine, its in zip(times, first, strict=True)]
    return replace(line, relative=median(shares), quartiles=quartiles(shares), **times_of(times))


def table_of(result: LinesResult[DialCell, Line]) -> Table:
    """The lines as a table.

    Args:
        result: of a cell.
    """
    floor = result.floor
    table = Table(title=result.title, title_justify="left")
    headings = (
        "held MB",
        "formula MB",
        "x held at 0 %",
        "peak MB",
        "backward ms",
        "p95 ms",
        "x floor",
        "x backward at 100 %",
        "quartiles",
    )
    table.add_column("who", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    least = next((line.held_bytes for line in result.lines if line.save_percent == 0), None)
    for line in result.lines:
        table.add_row(
            line.name,
            f"{line.held_bytes / 1e6:.2f}",
            "" if line.formula_bytes is None else f"{line.formula_bytes / 1e6:.2f}",
            f"{line.held_bytes / least:.2f}" if least else "",
            "" if line.peak_bytes is None else f"{line.peak_bytes / 1e6:.2f}",
            report.milliseconds(line.seconds) if line.seconds else line.problem,
            report.milliseconds(line.p95_seconds) if line.p95_seconds else "",
            f"{line.seconds / floor.seconds:.2f}" if line.seconds and floor else "",
            f"{line.relative:.2f}" if line.relative else "",
            "-".join(f"{share:.2f}" for share in line.quartiles or ()),
            style="red" if line.problem else None,
        )
    return table


def cells_of(suite: str) -> list[DialCell]:
    """The tables of a suite, in float32 and bfloat16.

    Args:
        suite: ``"dial"``, the one that README promises; or ``"memory"``.
    """
    sizes, rounds = ((SIZES,), ROUNDS) if suite == "dial" else ((SIZES, *MORE_SIZES), ROUNDS_OF_MANY)
    return [DialCell(dtype, rounds, each) for each in sizes for dtype in (torch.float32, torch.bfloat16)]


def run(args: argparse.Namespace) -> int:
    """Print the tables.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 1 when an output or a gradient was off, or ours held a
        different number of bytes than the formula.
    """
    ceilings = Ceilings()

    def measured(cell: DialCell) -> LinesResult[DialCell, Line]:
        if args.dry:
            found = measure(DRY_SIZES, cell.dtype, percents=(100, 0), rounds=0, real_time=False)
        else:
            between = ceilings.sampler(cell.dtype)
            found = measure(cell.sizes, cell.dtype, rounds=cell.rounds, real_time=not args.no_rt, between=between)
        _, D, inner, E, K = cell.sizes
        return result_of(
            cell,
            found,
            None if args.dry else ceilings,
            work=cell.least_backward,
            parameters=E * 3 * D * inner,
            active_parameters=K * 3 * D * inner,
        )

    return lines.run(args, cells_of(args.suite), measure=measured, table_of=table_of, described={"dry": args.dry})
