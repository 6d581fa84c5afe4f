"""Quantised experts beside bfloat16 ones: time, the floor that memory sets, and what rounding the weights costs.

Every call of a form takes another of several inputs, whose experts are others, so that few tokens find no weights in a cache.
Times are medians, of all forms in turns; shares of bfloat16's time are medians of the shares within a turn.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.bench import report
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.peers import BUDGET, relative_error
from fusedonemoe.bench.priority import RealTime
from fusedonemoe.bench.runner import order_of_round
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
class Line:
    """One line of the table.

    Attributes:
        name: the form of the weights.
        weight_bytes: of the experts that a call reads, on average.
        floor_seconds: those bytes at the machine's read bandwidth, or the products at its rate in bfloat16, what is longer.
        seconds: median; None when the output was wrong.
        speed_up: median over the turns of bfloat16's time as a multiple of this one's.
        quartiles: of that multiple.
        weight_error: relative root mean square change of the outputs that comes of rounding the weights.
        note: in place of a time.
    """

    name: str
    weight_bytes: float
    floor_seconds: float
    seconds: float | None = None
    speed_up: float | None = None
    quartiles: tuple[float, float] | None = None
    weight_error: float | None = None
    note: str = ""


def _seconds(call: Callable[[int], Tensor], i: int) -> float:
    start = time.perf_counter()
    call(i)
    return time.perf_counter() - start


@torch.no_grad()
def measure(tokens: int, sizes: Sequence[int], ceilings: Ceilings, *, rounds: int = ROUNDS, real_time: bool = True) -> list[Line]:
    """One table.

    Args:
        tokens: T.
        sizes: D, F, E, K.
        ceilings: of the machine; sampled once more between the rounds.
        rounds: how often each form is timed, all in turns.
        real_time: ask for real-time priority while timing.
    """
    D, inner, E, K = sizes
    dtype = torch.bfloat16
    inputs = make_mlp_inputs(tokens, D, inner, E, K, dtype=dtype)
    up, down = inputs.up_proj, inputs.down_proj
    xs = [torch.randn(tokens, D, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(ROTATION)]
    ids = [make_experts(tokens, E, K, routing="distinct", seed=i) for i in range(ROTATION)]
    weights = torch.full((tokens, K), 1 / K)
    hit = sum(experts.unique().numel() for experts in ids) / ROTATION / E
    calls: dict[str, Callable[[int], Tensor]] = {PLAIN: lambda i: F.experts_mlp(xs[i], ids[i], weights, up, down)}
    packed = F.pack_experts(up, down)
    calls[PACKED] = lambda i: F.experts_mlp(xs[i], ids[i], weights, up, down, packed=packed)
    sizes_of = {PLAIN: up.nbytes + down.nbytes, PACKED: packed.nbytes}
    notes, errors = {}, {}
    plain = calls[PLAIN](0)
    for name, form in FORMS.items():
        made = [F.quantize_weight(weight, **form) for weight in (up, down)]  # type: ignore[arg-type]
        sizes_of[name] = sum(weight.nbytes for weight in made)
        calls[name] = lambda i, made=made: F.experts_mlp_quantized(xs[i], ids[i], weights, *made)  # type: ignore[misc]
        expected = F.experts_mlp_quantized(xs[0], ids[0], weights, *made, impl="grouped")
        actual = calls[name](0)
        if not (error := relative_error(actual.double(), expected.double())) <= BUDGET[dtype]:
            notes[name] = f"off by {error:.1e}"
        errors[name] = float((actual.double() - plain.double()).norm() / plain.double().norm())

    times: dict[str, list[float]] = {name: [] for name in calls if name not in notes}
    sample = ceilings.sampler(dtype)
    for turn in range(rounds):
        for name in order_of_round(list(times), turn):
            with RealTime(real_time):
                times[name].append(_seconds(calls[name], turn % ROTATION))
        if turn % max(rounds // 4, 1) == 0:
            with RealTime(real_time):
                sample()
    products = 6 * tokens * K * inner * D / ceilings.flops_per_s[dtype]
    lines = []
    for name in calls:
        read = hit * sizes_of[name]
        floor = max(read / ceilings.bytes_per_s, products)
        if name in notes:
            lines.append(Line(name, read, floor, note=notes[name]))
            continue
        shares = sorted(its / mine for its, mine in zip(times[PLAIN], times[name], strict=True))
        quartiles = (shares[len(shares) // 4], shares[(3 * len(shares)) // 4])
        lines.append(Line(name, read, floor, median(times[name]), median(shares), quartiles, errors.get(name)))
    return lines


def table_of(title: str, lines: Sequence[Line]) -> Table:
    """The lines as a table.

    Args:
        title: above it.
        lines: from :func:`measure`.
    """
    table = Table(title=title, title_justify="left")
    for heading in (
        "weights",
        "read MB",
        "floor ms",
        "ms",
        "x floor",
        "GB/s",
        "x as fast as bfloat16",
        "quartiles",
        "change of outputs",
    ):
        table.add_column(heading, justify="left" if heading == "weights" else "right", no_wrap=heading == "weights")
    for line in lines:
        table.add_row(
            line.name,
            f"{line.weight_bytes / 1e6:.1f}",
            report.milliseconds(line.floor_seconds),
            report.milliseconds(line.seconds) if line.seconds else line.note,
            f"{line.seconds / line.floor_seconds:.2f}" if line.seconds else "",
            f"{line.weight_bytes / line.seconds / 1e9:.1f}" if line.seconds else "",
            f"{line.speed_up:.2f}" if line.speed_up else "",
            "-".join(f"{share:.2f}" for share in line.quartiles or ()),
            "" if line.weight_error is None else f"{line.weight_error:.2%}",
            style="red" if line.note else None,
        )
    return table


def run(args: argparse.Namespace) -> int:
    """Print the tables.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status: 0; 1 when an output was off.
    """
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        settings = report.describe_run(suite=args.suite)
        report.print_heading(settings)
        ceilings, tables = Ceilings(), {}
        for tokens in TOKENS:
            name = "-".join(f"{letter}{n}" for letter, n in zip("TDFEK", (tokens, *SIZES), strict=True))
            rounds = ROUNDS if tokens == 1 else ROUNDS // 4
            tables[name] = measure(tokens, SIZES, ceilings, rounds=rounds, real_time=not args.no_rt)
            report.console().print(table_of(name, tables[name]), highlight=False)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        result = {"schema": 1, **settings, "tables": {name: list(map(asdict, lines)) for name, lines in tables.items()}}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    wrong = [line for lines in tables.values() for line in lines if line.note]
    for line in wrong:
        print(f"{line.name}: {line.note}", file=sys.stderr)
    return 1 if wrong else 0
