"""The suite ``serving``: requests of mixed lengths to a small compiled model, one by one and from several clients at once.

The clients are threads in a closed loop: each sends its next request when it has the answer to its last. Latency is what a
client waits; torch's threads are shared out among the clients. A request succeeds when its answer is that of float64; answers
are compared when the clock has stopped.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from asv_bench.suites.serving_models import CELLS, PEERS, Blocks, LoopBlock, ServingCell, ServingPeer, blocks_of
from fusedonemoe.bench import report, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.peers import UnavailableError, chosen, is_ours, relative_error
from fusedonemoe.bench.results import percentile, quartiles
from fusedonemoe.bench.timing import PAUSE_SECONDS, at_real_time, order_of_round, threads
from fusedonemoe.bench.workloads import Cell, LeastWork, floor_of, least_work, mfu_of

# Lengths of requests: steps of a decoder, and prompts.
LENGTHS = (1, 1, 8, 32, 128)
DISTINCT = 10
ROUNDS = 4
# Three roundings of float32 in a row, and what they do to the next router's logits.
BUDGET = 1e-4
TARGET_MS, TARGET_TOKENS = 100.0, 1000.0


@dataclass(frozen=True)
class ServingRow:
    """The result of one peer in one cell.

    Attributes:
        peer: its name.
        note: why there is no time; empty otherwise.
        failed: whether the note is a failure and not a peer that is absent, or a request did not succeed.
        calls: requests.
        success_rate: the share that was answered, and answered rightly.
        error: the greatest of all answers, ``||y - y64|| / ||y64||``.
        seconds: median latency.
        spread: lower and upper quartile.
        p95_seconds: 95 of 100 clients waited no longer.
        p99_seconds: 99 of 100 clients waited no longer.
        tokens_per_second: of all clients together.
        meets_latency: whether the 95th percentile is within the target.
        meets_throughput: whether the tokens in a second are.
    """

    peer: str
    note: str = ""
    failed: bool = False
    calls: int = 0
    success_rate: float | None = None
    error: float | None = None
    seconds: float | None = None
    spread: tuple[float, float] | None = None
    p95_seconds: float | None = None
    p99_seconds: float | None = None
    tokens_per_second: float | None = None
    meets_latency: bool | None = None
    meets_throughput: bool | None = None


@dataclass(frozen=True)
class ServingResult:
    """A measured cell.

    Attributes:
        cell: what was measured.
        rows: one for each peer, ours first.
        floor_seconds: the median over the requests of what each needs at least; None in a dry run.
        floor_tokens_per_second: what the machine could answer at most.
        flops_per_s: the matrix-product rate that the floors were computed with.
        bytes_per_s: the read bandwidth that the floors were computed with.
        flops: of a request, the mean.
        tokens: of a request, the mean.
    """

    cell: ServingCell
    rows: tuple[ServingRow, ...]
    floor_seconds: float | None
    floor_tokens_per_second: float | None
    flops_per_s: float
    bytes_per_s: float
    flops: float
    tokens: float


@dataclass
class _Answered:
    """A request that was sent: which one, how long its client waited, and what came back."""

    index: int
    seconds: float
    answer: Tensor | Exception


def serve(
    model: Callable[[Tensor], Tensor], xs: Sequence[Tensor], order: Sequence[int], clients: int
) -> tuple[list[_Answered], float]:
    """Send requests from several clients in closed loops.

    Args:
        model: what answers.
        xs: the distinct requests.
        order: which of them are sent, in this order.
        clients: threads that send them.

    Returns:
        Every request with its latency and answer or exception, and the seconds that all took together.
    """
    turn = count()

    def client() -> list[_Answered]:
        answered = []
        with torch.no_grad():  # A thread begins with gradients recorded, whatever its parent does.
            while (position := next(turn)) < len(order):
                index = order[position]
                start = time.perf_counter()
                try:
                    answer: Tensor | Exception = model(xs[index])
                except Exception as error:  # A request that fails is a result; the client sends its next.
                    answer = error
                answered.append(_Answered(index, time.perf_counter() - start, answer))
        return answered

    start = time.perf_counter()
    if clients == 1:
        return client(), time.perf_counter() - start
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client) for _ in range(clients)]
        answered = [each for future in futures for each in future.result()]
    return answered, time.perf_counter() - start


def _row_of(
    peer: str, answered: list[_Answered], wall: float, exact: Sequence[Tensor], targets: tuple[float, float]
) -> ServingRow:
    errors, problems, tokens = [], [], 0
    for each in answered:
        if isinstance(each.answer, Exception):
            problems.append(f"{type(each.answer).__name__}: {each.answer}")
            continue
        tokens += each.answer.shape[0]
        errors.append(relative_error(each.answer, exact[each.index]))
        if not errors[-1] <= BUDGET:
            problems.append("outputs disagree")
    latencies = [each.seconds for each in answered]
    p95, rate = percentile(latencies, 95), tokens / wall
    row = ServingRow(
        peer,
        note="; ".join(sorted(set(problems))),
        failed=bool(problems),
        calls=len(answered),
        success_rate=1 - len(problems) / len(answered),
        error=max(errors, default=None),
    )
    if problems:
        return row
    return replace(
        row,
        seconds=median(latencies),
        spread=quartiles(latencies),
        p95_seconds=p95,
        p99_seconds=percentile(latencies, 99),
        tokens_per_second=rate,
        meets_latency=p95 * 1e3 <= targets[0],
        meets_throughput=rate >= targets[1],
    )


def run_cell(
    cell: ServingCell,
    ceilings: Ceilings,
    *,
    peers: Sequence[ServingPeer] = PEERS,
    targets: tuple[float, float] = (TARGET_MS, TARGET_TOKENS),
    dry: bool = False,
    real_time: bool = True,
) -> ServingResult:
    """Measure one cell.

    Args:
        cell: what to measure.
        ceilings: of the run; sampled between the rounds.
        peers: who.
        targets: milliseconds within which 95 of 100 requests are to be answered, and tokens in a second.
        dry: a small model, few requests, and no times kept.
        real_time: ask for real-time priority while the requests of a single client are answered.
    """
    asked = cell
    if dry:
        cell = replace(cell, requests=2 * cell.clients, D=16, F=24, E=6, K=2)
    generator = torch.Generator().manual_seed(5)
    blocks = blocks_of(cell)
    layers = [LoopBlock(block, torch.float64) for block in blocks]
    wide = Blocks(layers)
    lengths = [LENGTHS[n % len(LENGTHS)] for n in range(DISTINCT)]
    xs = [torch.randn(length, cell.D, generator=generator, device="cpu") for length in lengths]
    order = torch.randint(DISTINCT, (cell.requests,), generator=generator, device="cpu").tolist()
    exact: list[Tensor] = []
    works: list[list[LeastWork]] = []
    with torch.no_grad():
        for x in xs:
            exact.append(wide(x.double()))
            block = Cell("block", x.shape[0], cell.D, cell.F, cell.E, cell.K, torch.float32)
            works.append([least_work(block, experts_hit=layer.hit) for layer in layers])
    # Of torch's pool, for each client; compiled graphs are of one number of threads.
    each = max(torch.get_num_threads() // cell.clients, 1)
    rows: dict[str, ServingRow] = {}
    models: dict[str, Callable[[Tensor], Tensor]] = {}
    for peer in peers:
        try:
            models[peer.name] = peer.build(cell, blocks)
            # Every length once, untimed: compilation and first allocations are no request's latency.
            with threads(each):
                answered, _ = serve(models[peer.name], xs, range(DISTINCT), 1)
            rows[peer.name] = _row_of(peer.name, answered, 1.0, exact, targets)
        except UnavailableError as reason:
            rows[peer.name] = ServingRow(peer.name, note=f"skipped: {reason}")
        except Exception as error:  # A peer is other people's code: its failure is a result, and the others still run.
            rows[peer.name] = ServingRow(peer.name, note=f"failed: {type(error).__name__}: {error}", failed=True)
        if rows[peer.name].note:
            models.pop(peer.name, None)
    sent: dict[str, list[_Answered]] = {name: [] for name in models}
    walls = dict.fromkeys(models, 0.0)
    rounds = 1 if dry else ROUNDS
    between = ceilings.sampler(torch.float32) if not dry else lambda: None
    for turn in range(rounds):
        with at_real_time(real_time):
            between()
        share = order[turn * len(order) // rounds : (turn + 1) * len(order) // rounds]
        for name in order_of_round(list(models), turn):
            time.sleep(PAUSE_SECONDS)
            # More threads than cores at real-time priority would spend their slices waiting for one another.
            with at_real_time(real_time and cell.clients == 1), threads(each):
                answered, wall = serve(models[name], xs, share, cell.clients)
            sent[name] += answered
            walls[name] += wall
    for name, answered in sent.items():
        rows[name] = _row_of(name, answered, walls[name], exact, targets)
    flops, tokens = (
        sum(values) / len(order) for values in ([sum(w.flops for w in works[i]) for i in order], [lengths[i] for i in order])
    )
    if dry:
        clean = {"seconds": None, "spread": None, "p95_seconds": None, "p99_seconds": None, "tokens_per_second": None}
        kept = (replace(row, **clean, meets_latency=None, meets_throughput=None) for row in rows.values())  # type: ignore[arg-type]
        return ServingResult(asked, tuple(kept), None, None, 0.0, 0.0, flops, tokens)
    rate, bandwidth = ceilings.flops_per_s[torch.float32], ceilings.bytes_per_s
    floors = [sum(floor_of(w, flops_per_s=rate, bytes_per_s=bandwidth).seconds for w in works[i]) for i in order]
    most = sum(lengths[i] for i in order) / sum(floors)
    return ServingResult(asked, tuple(rows.values()), median(floors), most, rate, bandwidth, flops, tokens)


def _mfu(result: ServingResult, row: ServingRow) -> float | None:
    """Return the MFU of all clients together."""
    return mfu_of(row.tokens_per_second and result.tokens / row.tokens_per_second, result.flops, result.flops_per_s)


def cell_to_json(result: ServingResult, targets: tuple[float, float]) -> dict[str, Any]:
    """A cell as plain values; times in seconds."""
    cell = result.cell
    others = [row.seconds for row in result.rows if row.seconds and not is_ours(row.peer)]
    best = min(others, default=None)
    rows = [
        asdict(row) | {"mfu": _mfu(result, row), "times_best": row.seconds / best if row.seconds and best else None}
        for row in result.rows
    ]
    values = asdict(result) | asdict(cell)
    del values["cell"]
    return values | {
        "name": cell.name,
        "operator": "serving",
        "mode": cell.name,
        "dtype": "float32",
        "parameters": cell.parameters,
        "active_parameters": cell.active_parameters,
        "target_ms": targets[0],
        "target_tokens": targets[1],
        "rows": rows,
    }


def table_of(result: ServingResult) -> Table:
    """One cell as a table: a row for each peer.

    Args:
        result: of the cell.
    """
    title = (
        f"{result.cell.name}: {result.cell.parameters / 1e6:.3g} M parameters, {result.cell.active_parameters / 1e6:.3g} M active"
    )
    if result.floor_seconds and result.floor_tokens_per_second:
        title += f"   floor {report.milliseconds(result.floor_seconds)} ms, {result.floor_tokens_per_second:,.0f} tokens/s"
    table = Table(title=title, title_justify="left")
    headings = ("requests", "success", "p50 ms", "p95 ms", "p99 ms", "tokens/s", "of the floor", "MFU", "error", "targets")
    table.add_column("peer", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in result.rows:
        times = [report.milliseconds(t) if t else "" for t in (row.seconds, row.p95_seconds, row.p99_seconds)]
        rate, most = row.tokens_per_second, result.floor_tokens_per_second
        met = {True: "met", False: "missed", None: row.note}
        told = f"{met[row.meets_latency]} {met[row.meets_throughput]}" if row.seconds else row.note
        table.add_row(
            row.peer,
            str(row.calls),
            "" if row.success_rate is None else f"{row.success_rate:.1%}",
            *times,
            f"{rate:,.0f}" if rate else "",
            f"{rate / most:.2f}" if rate and most else "",
            report.number(_mfu(result, row), ".1%"),
            "" if row.error is None else f"{row.error:.1e}",
            told,
            style="red" if row.failed else None,
        )
    return table


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Args:
        args: of the command.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; a missed target is no failure.
    """
    targets = (args.target_ms or TARGET_MS, args.target_tokens or TARGET_TOKENS)
    peers = chosen(PEERS, args.peers)
    measure = partial(run_cell, ceilings=Ceilings(), peers=peers, targets=targets, dry=args.dry, real_time=not args.no_rt)

    def show(result: ServingResult) -> None:
        report.console().print(table_of(result), highlight=False)
        for row in result.rows:
            if row.failed:
                print(f"{result.cell.name}, {row.peer}: {row.note}", file=sys.stderr)

    return session.run_suite(
        args,
        CELLS,
        measure=measure,
        to_json=partial(cell_to_json, targets=targets),
        show=show,
        peers=lambda cell: [peer.name for peer in PEERS],
        described={"dry": args.dry},
    )
