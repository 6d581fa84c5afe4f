"""The memory dial: what a training step of the experts holds for its backward pass, and what holding less costs.

Bytes are those of the distinct storages that autograd saves between forward and backward, parameters left out. Times are of
the backward pass alone, of all lines in turns, and every share is the median of the shares within a turn.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.bench import report
from fusedonemoe.bench.memory import held_bytes
from fusedonemoe.bench.peers import BUDGET, OURS, TRANSFORMERS, relative_error
from fusedonemoe.bench.priority import RealTime
from fusedonemoe.bench.results import quartiles
from fusedonemoe.bench.runner import order_of_round, threads
from fusedonemoe.testing import MLPInputs, make_mlp_inputs

PERCENTS = (100, 75, 50, 25, 0)
# T, D, F, E, K: the sizes at which the README's promise is made.
SIZES = (2048, 1024, 512, 32, 4)
ROUNDS = 15


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: who.
        save_percent: the dial; None for a peer, who has none.
        held_bytes: between forward and backward, parameters left out.
        formula_bytes: what ours promises; None for a peer.
        seconds: median of the backward pass; None when an output was wrong.
        relative: median over the turns of its time as a share of that of ``save_percent=100``.
        quartiles: of that share.
        note: in place of a time.
    """

    name: str
    save_percent: int | None
    held_bytes: int
    formula_bytes: int | None
    seconds: float | None = None
    relative: float | None = None
    quartiles: tuple[float, float] | None = None
    note: str = ""


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
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, D, inner = inputs.down_proj.shape
    settings: dict[str, Any] = {
        "hidden_size": D,
        "moe_intermediate_size": inner,
        "num_experts": E,
        "num_experts_per_tok": inputs.experts.shape[1],
        "experts_implementation": "grouped_mm",
    }
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(Qwen3MoeConfig(**settings))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(inputs.up_proj.detach()), nn.Parameter(inputs.down_proj.detach())
    leaves = [inputs.x, inputs.weights, experts.gate_up_proj, experts.down_proj]
    return lambda: experts(inputs.x, inputs.experts, inputs.weights), leaves


def _timed(backward: Callable[[], Any]) -> float:
    start = time.perf_counter()
    backward()
    return time.perf_counter() - start


def measure(
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    percents: Sequence[int] = PERCENTS,
    rounds: int = ROUNDS,
    real_time: bool = True,
) -> list[Line]:
    """One table: ours at every setting of the dial, and transformers' grouped_mm if it is installed.

    Args:
        sizes: T, D, F, E, K.
        dtype: of x and the weights.
        impl: of ours.
        percents: settings; 100, with which all are compared, first.
        rounds: how often each backward is timed, all in turns.
        real_time: ask for real-time priority while timing.
    """
    T, D, inner, E, K = sizes
    inputs = make_mlp_inputs(T, D, inner, E, K, dtype=dtype, routing="distinct", requires_grad=True)
    leaves = [inputs.x, inputs.weights, inputs.up_proj, inputs.down_proj]
    dy = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)

    def ours(save_percent: int) -> Callable[[], Tensor]:
        arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
        return lambda: F.experts_mlp(*arguments, save_percent=save_percent, impl=impl)

    calls = {f"{OURS} {p} %": (p, ours(p), leaves) for p in percents}
    if find_spec("transformers") and all(n * dtype.itemsize % 16 == 0 for n in (D, inner)):
        calls[TRANSFORMERS] = (None, *_transformers_experts(inputs))  # type: ignore[assignment]

    lines: dict[str, Line] = {}
    backwards: dict[str, Callable[[], Any]] = {}
    expected: list[Tensor] | None = None
    for name, (percent, call, wanted) in calls.items():
        held, y = held_bytes(call, wanted[2:])
        # The graph is kept, and so is what it holds: every backward of a turn starts from the same.
        backwards[name] = lambda y=y, wanted=wanted: torch.autograd.grad(y, wanted, dy, retain_graph=True)  # type: ignore[misc]
        answer = [y.detach().double(), *(gradient.double() for gradient in backwards[name]())]
        expected = expected or answer
        error = max(relative_error(a, b) for a, b in zip(answer, expected, strict=True))
        formula = None if percent is None else formula_bytes(inputs, percent)
        lines[name] = Line(name, percent, held, formula)
        if not error <= BUDGET[dtype]:
            lines[name] = Line(name, percent, held, formula, note=f"off by {error:.1e}")
            del backwards[name]
        del y, answer

    times: dict[str, list[float]] = {name: [] for name in backwards}
    for turn in range(rounds):
        for name in order_of_round(list(backwards), turn):
            with RealTime(real_time):
                times[name].append(_timed(backwards[name]))
    first = times[next(iter(lines))]
    return [_with_times(line, times.get(line.name), first) for line in lines.values()]


def _with_times(line: Line, times: list[float] | None, first: list[float]) -> Line:
    if not times:
        return line
    shares = [mine / its for mine, its in zip(times, first, strict=True)]
    return replace(line, seconds=median(times), relative=median(shares), quartiles=quartiles(shares))


def table_of(title: str, lines: Sequence[Line]) -> Table:
    """The lines as a table.

    Args:
        title: above it.
        lines: from :func:`measure`.
    """
    table = Table(title=title, title_justify="left")
    for heading in ("who", "held MB", "formula MB", "x held at 0 %", "backward ms", "x backward at 100 %", "quartiles"):
        table.add_column(heading, justify="left" if heading == "who" else "right", no_wrap=heading == "who")
    least = next((line.held_bytes for line in lines if line.save_percent == 0), None)
    for line in lines:
        table.add_row(
            line.name,
            f"{line.held_bytes / 1e6:.2f}",
            "" if line.formula_bytes is None else f"{line.formula_bytes / 1e6:.2f}",
            f"{line.held_bytes / least:.2f}" if least else "",
            report.milliseconds(line.seconds) if line.seconds else line.note,
            f"{line.relative:.2f}" if line.relative else "",
            "-".join(f"{share:.2f}" for share in line.quartiles or ()),
            style="red" if line.note else None,
        )
    return table


def run(args: argparse.Namespace) -> int:
    """Print the tables, in float32 and bfloat16.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status: 0; 1 when somebody's output or gradients were off, or ours held something else than the formula says.
    """
    with threads(args.threads):
        settings = report.describe_run(suite=args.suite)
        report.print_heading(settings)
        tables = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = "-".join(f"{letter}{n}" for letter, n in zip("TDFEK", SIZES, strict=True)) + "-" + str(dtype)[6:]
            tables[name] = measure(SIZES, dtype, rounds=ROUNDS, real_time=not args.no_rt)
            report.console().print(table_of(name, tables[name]), highlight=False)
    if args.json:
        result = {"schema": 1, **settings, "tables": {name: list(map(asdict, lines)) for name, lines in tables.items()}}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    wrong = [
        line
        for lines in tables.values()
        for line in lines
        if line.note or (line.formula_bytes and abs(line.held_bytes - line.formula_bytes) > 0.02 * line.formula_bytes)
    ]
    for line in wrong:
        print(f"{line.name}: {line.note or 'holds something else than the formula says'}", file=sys.stderr)
    return 1 if wrong else 0
