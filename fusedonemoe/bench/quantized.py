"""Quantised and bfloat16 experts: time, the floor that memory sets, and the error that rounding the weights makes.

The calls of a form rotate through inputs with different experts, so that few tokens find no weights in a cache.
Times are medians, of all forms in turns; shares of bfloat16's time are medians of the shares within a turn.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.bench import lines, report
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.lines import LinesResult, result_of, times_of
from fusedonemoe.bench.peers import BUDGET, OURS, relative_error
from fusedonemoe.bench.results import quartiles
from fusedonemoe.bench.timing import Timer, time_interleaved
from fusedonemoe.bench.workloads import LeastWork, floor_of
from fusedonemoe.testing import make_experts, make_mlp_inputs

TOKENS = (1, 16, 512)
SIZES = (2048, 768, 128, 8)  # D, F, E, K of Qwen3-30B-A3B
PLAIN, PACKED = "bfloat16", "bfloat16, packed"
FORMS: dict[str, dict[str, object]] = {
    "int8": {"dtype": "int8"},
    "int4, groups of 128": {"dtype": "int4", "group_size": 128},
    "int4, groups of 32": {"dtype": "int4", "group_size": 32},
}
ROTATION, ROUNDS = 16, 48


@dataclass(frozen=True)
class QuantizedCell(lines.SizedCell):
    """One table."""

    @property
    def name(self) -> str:
        """Letters and numbers; the dtype is always bfloat16."""
        return super().name.removesuffix("-bfloat16")

    @property
    def described(self) -> dict[str, Any]:
        """The operator, sizes and mode, for the file."""
        return {"operator": "quantized", **self.by_letter, "mode": "forward"}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        error: of the output, relative to that of the plain formulation on the same rounded weights; None for bfloat16.
    """

    weights: str  # their form
    weight_bytes: float  # of the experts that a call reads, on average
    floor_seconds: float  # the longer of those bytes at the machine's read bandwidth and the products at its rate in bfloat16
    seconds: float | None = None  # median; None when the output was wrong
    p95_seconds: float | None = None  # of it
    p99_seconds: float | None = None  # of it
    calls: int = 0  # how many were timed
    speed_up: float | None = None  # median over the turns of bfloat16's time as a multiple of this one's
    quartiles: tuple[float, float] | None = None  # of that multiple
    weight_error: float | None = None  # relative root mean square change of the outputs by rounding the weights
    error: float | None = None
    note: str = ""  # in place of a time

    @property
    def name(self) -> str:
        """This library, and the form of the weights."""
        return f"{OURS} {self.weights}"

    @property
    def problem(self) -> str:
        """The problem with it; empty otherwise."""
        return self.note


@torch.no_grad()
def measure(cell: QuantizedCell, ceilings: Ceilings, *, real_time: bool = True) -> LinesResult[QuantizedCell, Line]:
    """Measure one table.

    Args:
        cell: what to measure.
        ceilings: of the machine; sampled once more now and then between the rounds.
        real_time: ask for real-time priority while timing.
    """
    (tokens, D, inner, E, K), dtype = cell.sizes, cell.dtype
    inputs = make_mlp_inputs(tokens, D, inner, E, K, dtype=dtype)
    up, down = inputs.up_proj, inputs.down_proj
    xs = [torch.randn(tokens, D, generator=torch.Generator().manual_seed(i), device="cpu").to(dtype) for i in range(ROTATION)]
    ids = [make_experts(tokens, E, K, routing="distinct", seed=i) for i in range(ROTATION)]
    weights = torch.full((tokens, K), 1 / K, device="cpu")
    hit = sum(experts.unique().numel() for experts in ids) / ROTATION / E
    calls: dict[str, Callable[[int], Tensor]] = {PLAIN: lambda i: F.experts_mlp(xs[i], ids[i], weights, up, down)}
    packed = F.pack_experts(up, down)
    calls[PACKED] = lambda i: F.experts_mlp(xs[i], ids[i], weights, packed=packed)
    sizes_of = {PLAIN: up.nbytes + down.nbytes, PACKED: packed.nbytes}
    errors, changes = {}, {}
    plain = calls[PLAIN](0)
    for name, form in FORMS.items():
        made = [F.quantize_weight(weight, **form) for weight in (up, down)]  # type: ignore[arg-type]
        sizes_of[name] = sum(weight.nbytes for weight in made)
        calls[name] = lambda i, made=made: F.experts_mlp_quantized(xs[i], ids[i], weights, *made)  # type: ignore[misc]
        expected = F.experts_mlp_quantized(xs[0], ids[0], weights, *made, impl="grouped")
        actual = calls[name](0)
        errors[name] = relative_error(actual.double(), expected.double())
        changes[name] = float((actual.double() - plain.double()).norm() / plain.double().norm())

    notes = {name: f"off by {error:.1e}" for name, error in errors.items() if not error <= BUDGET[dtype]}
    turns = {name: call for name, call in calls.items() if name not in notes}
    # A sample takes longer than all forms together.
    sample, rounds = ceilings.sampler(dtype), count()
    times = time_interleaved(
        Timer(real_time=real_time),
        turns,
        rounds=cell.rounds,
        between=lambda: None if next(rounds) % max(cell.rounds // 4, 1) else sample(),
        inputs=ROTATION,
    )
    flops = 6 * tokens * K * inner * D
    works = {name: LeastWork(flops, round(hit * size)) for name, size in sizes_of.items()}
    found = []
    for name, work in works.items():
        floor = floor_of(work, flops_per_s=ceilings.flops_per_s[dtype], bytes_per_s=ceilings.bytes_per_s).seconds
        line = Line(name, hit * sizes_of[name], floor, error=errors.get(name), note=notes.get(name, ""))
        if taken := times.get(name):
            shares = [its / mine for its, mine in zip(times[PLAIN], taken, strict=True)]
            line = replace(line, speed_up=median(shares), quartiles=quartiles(shares), **times_of(taken))
            line = replace(line, weight_error=changes.get(name))
        found.append(line)
    # The floor of the table is that of the smallest form; every line has its own.
    least = min(works.values(), key=lambda work: work.touched_bytes)
    return result_of(cell, found, ceilings, work=least, parameters=E * 3 * D * inner, active_parameters=K * 3 * D * inner)


def table_of(result: LinesResult[QuantizedCell, Line]) -> Table:
    """Make a table of the lines."""
    table = Table(title=result.title, title_justify="left")
    for heading in (
        "weights",
        "read MB",
        "floor ms",
        "ms",
        "p95 ms",
        "x floor",
        "GB/s",
        "x as fast as bfloat16",
        "quartiles",
        "change of outputs",
    ):
        table.add_column(heading, justify="left" if heading == "weights" else "right", no_wrap=heading == "weights")
    for line in result.lines:
        table.add_row(
            line.weights,
            f"{line.weight_bytes / 1e6:.1f}",
            report.milliseconds(line.floor_seconds),
            report.milliseconds(line.seconds) if line.seconds else line.note,
            report.milliseconds(line.p95_seconds) if line.p95_seconds else "",
            f"{line.seconds / line.floor_seconds:.2f}" if line.seconds else "",
            f"{line.weight_bytes / line.seconds / 1e9:.1f}" if line.seconds else "",
            f"{line.speed_up:.2f}" if line.speed_up else "",
            "-".join(f"{share:.2f}" for share in line.quartiles or ()),
            "" if line.weight_error is None else f"{line.weight_error:.2%}",
            style="red" if line.note else None,
        )
    return table


def cells() -> list[QuantizedCell]:
    """Return the tables. That of one token has more rounds, because they are short."""
    return [QuantizedCell(torch.bfloat16, ROUNDS if T == 1 else ROUNDS // 4, (T, *SIZES)) for T in TOKENS]


def run(args: argparse.Namespace) -> int:
    """Print the tables.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 1 when an output was off.
    """
    ceilings = Ceilings()
    return lines.run(args, cells(), measure=lambda cell: measure(cell, ceilings, real_time=not args.no_rt), table_of=table_of)
