"""The suite ``compile``: the block, a model around it and its overhead, eager and compiled, in turns call by call.

A compiled call must not be slower than the same call in eager mode. The overhead is measured at the smallest sizes, compared
with two plain linear maps of the same widths, compiled in the same process. In the cells of a block's forward, a compiled
``x + 1`` takes turns too: it takes as long as PyTorch's own part of a compiled call, with the caches as a block leaves them.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from asv_bench.suites import lines
from asv_bench.suites.lines import LinesResult, result_of, times_of
from asv_bench.suites.model_work import EXPERTS_RANK
from asv_bench.suites.serving_models import EAGER
from fusedonemoe import MoE
from fusedonemoe.bench import report
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.peers import BUDGET, OURS, relative_error
from fusedonemoe.bench.results import quartiles
from fusedonemoe.bench.timing import Timer, order_of_round
from fusedonemoe.bench.workloads import LeastWork, mfu_of

LINEAR = "two linear maps"
SUM = "compiled x + 1"
# The eager line of each compiled one.
EAGERLY = {OURS: EAGER, LINEAR: f"{LINEAR}, eager"}
# Eager time over compiled time, at least; the noise that is allowed; and microseconds, at most.
BARS = {"block": 1.0, "model": 1.05}
NOISE = 0.02
OVERHEAD_US, EAGER_US = 20.0, 30.0
TOKENS = (1, 16, 512, 2048)
SIZES = ((128, 64, 32, 2), (512, 256, 64, 8), (1024, 512, 64, 8))
SMALLEST = (1, 64, 32, 8, 2)
LAYERS, HEADS = 4, 8
CONTEXT = 64  # tokens in the cache, before the one of a decoding step
SEQUENCES = 4  # of the other steps of the model
# Every line has these turns, and so many seconds of timed calls in all of them; in a turn at least and at most so many calls.
ROUNDS, SECONDS, FEWEST, MOST = 5, 2.0, 3, 400
WARM_UP_CALLS = 3
# Calls of a line in a row: in the cell of the overhead, which is that of a call whose code is in the caches.
IN_A_ROW = {"overhead": 20}

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class CompileCell(lines.SizedCell):
    """One table.

    Attributes:
        operator: ``"block"``, ``"model"`` or ``"overhead"``.
        mode: ``"forward"``; ``"training"``, forward and backward; ``"decode"``, one token of each sequence behind a cache.
    """

    operator: str
    mode: str

    @property
    def name(self) -> str:
        """The text that ``--cells`` matches."""
        return f"{self.operator}-{super().name}-{self.mode}"

    @property
    def described(self) -> dict[str, Any]:
        """The operator, sizes, mode and bar, for the file."""
        return {"operator": self.operator, **self.by_letter, "mode": self.mode, "bar": BARS.get(self.operator)}


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        name: as printed.
        error: of the output or, in training, a gradient, the greatest, relative to the eager call's.
        seconds: median; None where the answer was wrong.
        spread: lower and upper quartile.
        p95_seconds: 95 of 100 calls took no longer.
        p99_seconds: 99 of 100 calls took no longer.
        calls: how many were timed.
        mfu: of its own operations.
        times_faster: the eager median divided by its own.
        meets_bar: whether it does; None without a bar.
        note: in place of a time.
    """

    name: str
    error: float = 0.0
    seconds: float | None = None
    spread: tuple[float, float] | None = None
    p95_seconds: float | None = None
    p99_seconds: float | None = None
    calls: int = 0
    mfu: float | None = None
    times_faster: float | None = None
    meets_bar: bool | None = None
    note: str = ""

    @property
    def problem(self) -> str:
        """The problem with it; empty otherwise. A missed bar is a result."""
        return self.note


class Sum(nn.Module):
    """The least that can be compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """Add one."""
        return x + 1


class Layer(nn.Module):
    """A layer of a decoder: attention and the block, with a norm before and a sum after each."""

    past: Tensor | None

    def __init__(self, cell: CompileCell) -> None:
        super().__init__()
        (T, D, F, E, K), dtype = cell.sizes, cell.dtype
        self.norm, self.block_norm = nn.RMSNorm(D, dtype=dtype), nn.RMSNorm(D, dtype=dtype)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False, dtype=dtype), nn.Linear(D, D, bias=False, dtype=dtype)
        self.block = MoE(hidden_size=D, intermediate_size=F, num_experts=E, top_k=K, dtype=dtype)
        past = torch.randn(2, T, HEADS, CONTEXT, D // HEADS).to(dtype) if cell.mode == "decode" else None
        self.register_buffer("past", past)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on ``[sequences, length, D]``."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.past is not None:
            k, v = torch.cat((self.past[0], k), 2), torch.cat((self.past[1], v), 2)
        attended = scaled_dot_product_attention(q, k, v, is_causal=self.past is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.block(self.block_norm(x))


def modules_of(cell: CompileCell) -> tuple[dict[str, nn.Module], Tensor]:
    """Make the modules of a cell, by the names of their compiled lines, and the input; the same for every run.

    Args:
        cell: their sizes.
    """
    T, D, F, E, K = cell.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        made: dict[str, nn.Module]
        shape: tuple[int, ...] = (T, D)
        if cell.operator == "model":
            made = {OURS: nn.Sequential(*(Layer(cell) for _ in range(LAYERS)))}
            shape = (T, 1, D) if cell.mode == "decode" else (SEQUENCES, T // SEQUENCES, D)
        else:
            made = {OURS: MoE(hidden_size=D, intermediate_size=F, num_experts=E, top_k=K, dtype=cell.dtype)}
        if cell.operator == "overhead":
            widths = ((D, F), (F, D))
            made[LINEAR] = nn.Sequential(*(nn.Linear(*pair, bias=False, dtype=cell.dtype) for pair in widths))
        elif (cell.operator, cell.mode) == ("block", "forward"):
            made[SUM] = Sum()
        return {name: module.train(cell.mode == "training") for name, module in made.items()}, torch.randn(*shape).to(cell.dtype)


def step_of(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, *, training: bool) -> Step:
    """Return a step without arguments: a forward, and in training the gradients of the input and all parameters.

    Args:
        module: whose parameters get gradients.
        call: runs the module.
        x: the input.
        training: whether there is a backward.
    """
    if not training:
        return lambda: [call(x)]
    x = x.detach().requires_grad_()
    leaves, dy = [x, *module.parameters()], torch.ones_like(x)

    def step() -> list[Tensor]:
        y = call(x)
        y.backward(dy)
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        for leaf in leaves:
            leaf.grad = None
        return [y.detach(), *gradients]

    return step


def work_of(module: nn.Module, step: Step, x: Tensor, *, training: bool) -> tuple[LeastWork, int, int]:
    """Count a step: its work, all parameters, and those that one token is multiplied with.

    Operations are those that torch counts, attention over all pairs. The weights of one token are read at least: twice in
    training, which also writes every gradient.

    Args:
        module: of the step.
        step: in eager mode.
        x: its input.
        training: whether it has a backward.
    """
    # The flash attention of CPUs has no formula in torch; its products as matrices do.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    blocks = [each for each in module.modules() if isinstance(each, MoE)]
    shares = {id(p): (each.gate.top_k or 0, p.shape[0]) for each in blocks for p in each.parameters() if p.dim() == EXPERTS_RANK}
    counts = [(p.numel(), *shares.get(id(p), (1, 1))) for p in module.parameters()]
    parameters, active = sum(n for n, *_ in counts), sum(n * k // e for n, k, e in counts)
    size = 2 * x.numel() + (2 * active + parameters + x.numel() if training else active)
    return LeastWork(counter.get_total_flops(), size * x.element_size()), parameters, active


def timed_in_turns(
    steps: Mapping[str, Step], timer: Timer, between: Callable[[], None], in_a_row: int = 1
) -> dict[str, list[float]]:
    """Time steps in turns, and return the seconds of each call by name.

    Args:
        steps: by name.
        timer: of the processor.
        between: runs before every round, at the same priority.
        in_a_row: calls of a step, before that of the next.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(ROUNDS):
        with timer.turn():
            between()
            firsts = [min(timer.seconds([step] * WARM_UP_CALLS)) for step in steps.values()]
            count = int(SECONDS * len(names) / ROUNDS / sum(firsts))
            for n in range(0, min(max(count, FEWEST), MOST), in_a_row):
                for name in order_of_round(names, turn + n // in_a_row):
                    samples[name] += timer.seconds([steps[name]] * in_a_row)
    return samples


def measure(
    cell: CompileCell, ceilings: Ceilings, *, real_time: bool = True, compiled: Callable[[nn.Module], Any] | None = None
) -> LinesResult[CompileCell, Line]:
    """One table.

    Args:
        cell: what to measure.
        ceilings: of the run; sampled between the rounds.
        real_time: ask for real-time priority while timing.
        compiled: compiles a module; by default torch.compile, in one graph.
    """
    torch.compiler.reset()
    training = cell.mode == "training"
    modules, x = modules_of(cell)
    compiled = compiled or partial(torch.compile, fullgraph=True)
    with torch.set_grad_enabled(training):
        steps: dict[str, Step] = {}
        works = {}
        for name, module in modules.items():
            steps[name] = step_of(module, compiled(module), x, training=training)
            if name in EAGERLY:
                steps[EAGERLY[name]] = step_of(module, module, x, training=training)
                works[name] = work_of(module, steps[EAGERLY[name]], x, training=training)
        found = {name: Line(name) for name in steps}
        error = max(_error(answer, expected) for answer, expected in zip(steps[OURS](), steps[EAGER](), strict=True))
        found[OURS] = replace(found[OURS], error=error)
        # In half precision the norms of a compiled model round at other places, and a later token may get other experts.
        if (cell.operator != "model" or cell.dtype == torch.float32) and not error <= BUDGET[cell.dtype]:
            found[OURS] = replace(found[OURS], note=f"off by {error:.1e}")
            del steps[OURS]
        samples = timed_in_turns(steps, Timer(real_time=real_time), ceilings.sampler(cell.dtype), IN_A_ROW.get(cell.operator, 1))
    seconds = {name: median(taken) for name, taken in samples.items()}
    rate = ceilings.flops_per_s[cell.dtype]
    for own, (work, *_) in works.items():
        eager = EAGERLY[own]
        for name in {own, eager} & samples.keys():
            found[name] = replace(
                found[name],
                spread=quartiles(samples[name]),
                mfu=mfu_of(seconds[name], work.flops, rate),
                times_faster=seconds[eager] / seconds[name],
                meets_bar=meets_bar(cell.operator, name, seconds),
                **times_of(samples[name]),
            )
    if SUM in samples:
        found[SUM] = replace(found[SUM], spread=quartiles(samples[SUM]), **times_of(samples[SUM]))
    work, parameters, active = works[OURS]
    return result_of(cell, list(found.values()), ceilings, work=work, parameters=parameters, active_parameters=active)


def _error(answer: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(answer, expected) else relative_error(answer, expected.double())


def meets_bar(operator: str, name: str, seconds: Mapping[str, float]) -> bool | None:
    """Tell whether a line meets the bar of its cell; None where it has none.

    Args:
        operator: of the cell.
        name: of the line.
        seconds: medians by name.
    """
    if operator == "overhead":
        if name == EAGER:
            return seconds[EAGER] * 1e6 <= EAGER_US
        return (seconds[OURS] - seconds[LINEAR]) * 1e6 <= OVERHEAD_US if name == OURS else None
    return seconds[EAGER] / seconds[OURS] >= BARS[operator] - NOISE if name == OURS else None


def table_of(result: LinesResult[CompileCell, Line]) -> Table:
    """The lines as a table.

    Args:
        result: of a cell.
    """
    linear = next((line.seconds for line in result.lines if line.name == LINEAR), None)
    table = report.make_table(
        result.title, ("who", "ms", "p95 ms", "MFU", "eager / own", f"x {LINEAR}", "error", "bar"), names=("who",)
    )
    for line in result.lines:
        table.add_row(
            line.name,
            report.milliseconds(line.seconds) or line.note,
            report.milliseconds(line.p95_seconds),
            report.number(line.mfu, ".1%"),
            report.number(line.times_faster),
            report.number(line.seconds / linear if linear and line.seconds else None),
            f"{line.error:.1e}" if line.name == OURS else "",
            {True: "met", False: "missed", None: ""}[line.meets_bar],
            style="red" if line.problem or line.meets_bar is False else None,
        )
    return table


def cells() -> Sequence[CompileCell]:
    """The tables: the overhead, the block at every size, and the model."""
    dtypes, uses = (torch.float32, torch.bfloat16), ("forward", "training")
    return (
        CompileCell(torch.float32, ROUNDS, SMALLEST, "overhead", "forward"),
        *(
            CompileCell(dtype, ROUNDS, (T, *sizes), "block", mode)
            for sizes, T, dtype, mode in product(SIZES, TOKENS, dtypes, uses)
        ),
        *(
            CompileCell(dtype, ROUNDS, (T, *SIZES[1]), "model", mode)
            for dtype, (T, mode) in product(dtypes, ((16, "decode"), (512, "forward"), (512, "training")))
        ),
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 1 when an answer was off. A missed bar is no failure.
    """
    measured = partial(measure, ceilings=Ceilings(), real_time=not args.no_rt)
    return lines.run(args, cells(), measure=measured, table_of=table_of, described={"layers": LAYERS})
