"""Prints results as tables and turns them into JSON, with a description of the machine."""

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fusedonemoe.bench import gpu_libraries, libraries
from fusedonemoe.bench.peers import OURS, PREPACKED, YARDSTICK, is_ours
from fusedonemoe.bench.results import CellResult, Row
from fusedonemoe.bench.workloads import ALLOCATORS, Floor, LeastWork

PACKAGES = ("fusedonemoe", "torch", "transformers", "numpy")
SCHEMA = 1
# Fields of rows that only cells with weights in several forms have.
OF_SOME = ("weight_bytes", "floor_seconds", "weight_error")
# A pipe has no width of its own, and the tables do not fit into the 80 columns that are assumed for one.
PIPE_WIDTH = 180


def console() -> Console:
    """Return the console for tables. It prints texts unchanged: brackets in an error message are no commands for colours."""
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(width=PIPE_WIDTH, markup=False, emoji=False)


def version_of(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Return the processor's name from the kernel, else from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_run(*, suite: str, peers: re.Pattern[str] | None = None) -> dict[str, Any]:
    """Describe what every figure depends on: versions, machine, threads, date; of the suite ``cpu``, the allocators."""
    packages = (*PACKAGES, *{"cpu": libraries.PACKAGES, "gpu": gpu_libraries.PACKAGES}.get(suite, ()))
    settings = {
        "suite": suite,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in packages}},
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "peers": peers.pattern if peers else None,
    }
    return settings | ({"allocators": ALLOCATORS, "huge_pages": huge_pages()} if suite == "cpu" else {})


def huge_pages() -> str | None:
    """Return when the kernel hands out huge pages: ``"always"``, ``"madvise"`` or ``"never"``; None where it does not tell."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    words = setting.read_text(encoding="utf-8").split() if setting.exists() else []
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def print_heading(settings: dict[str, Any]) -> None:
    """Print the suite, the machine and the versions."""
    versions = " ".join(f"{name} {number or 'missing'}" for name, number in settings["versions"].items())
    where = f"{settings['cpu']} ({settings['cpu_capability']}), {settings['threads']} threads of {settings['cores']} cores"
    where = settings["gpu"]["name"] if settings.get("gpu") else where
    where += f", impl {settings['impl']}" if settings.get("impl") else ""
    where += ", a dry run: nothing is timed" if settings.get("dry") else ""
    console().print(f"suite {settings['suite']} on {where}, {settings['date']}\n{versions}\n", highlight=False)


@contextmanager
def progress(total: int, *, in_pipes: bool = False) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr while cells run.

    Args:
        total: how many cells.
        in_pipes: whether stderr gets a line for each cell when it is no terminal, instead of nothing.

    Yields:
        A function that takes the name of the cell that begins.
    """
    console = Console(stderr=True)
    # Drawn between cells only: a thread that redraws would share the cores, and the priority, with what is timed.
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
    start = time.monotonic()
    with bar:
        task = bar.add_task("", total=total, left="")
        begun = 0

        def advance(name: str) -> None:
            nonlocal begun
            left = time_left(time.monotonic() - start, begun, total)
            bar.update(task, description=name, completed=begun, left=left, refresh=True)
            if in_pipes and not console.is_terminal:
                print(f"[{begun}/{total}] {name} {left}".rstrip(), file=sys.stderr, flush=True)
            begun += 1

        yield advance


def time_left(elapsed: float, done: int, total: int) -> str:
    """Estimate the time left from the cells so far, in words; nothing before the first."""
    if not done:
        return ""
    minutes = elapsed / done * (total - done) / 60
    return f"about {minutes:.0f} min left" if minutes >= 1.5 else f"about {60 * minutes:.0f} s left"


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def milliseconds(seconds: float) -> str:
    """Format a time in milliseconds; to tens of nanoseconds where it is short."""
    return f"{seconds * 1e3:.2f}" if seconds >= 1e-4 else f"{seconds * 1e3:.4f}"


def _milliseconds(timed: Row | Floor | None) -> str:
    return milliseconds(timed.seconds) if timed and timed.seconds else ""


def _megabytes(size: float | None) -> str:
    return _number(None if size is None else size / 1e6, ".1f")


def _columns(result: CellResult) -> dict[str, Callable[[Row], str]]:
    """Return the text of each column for a row; in ``ms`` the note where there is no time."""

    def tail(row: Row) -> str:
        return " ".join(milliseconds(seconds) for seconds in (row.p95_seconds, row.p99_seconds) if seconds)

    columns: dict[str, Callable[[Row], str]] = {
        "peer": lambda row: row.peer if row.comparable else f"{row.peer} *",
        "ms": lambda row: _milliseconds(row) or row.note,
        "p95 p99": tail,
        "tokens/s": lambda row: _number(result.tokens_per_second(row), ",.0f"),
        "x floor": lambda row: _number(result.times_floor(row)),
        "of dense": lambda row: _number(result.of_dense(row)),
        "of copy": lambda row: _number(result.of_copy(row)),
        "x best peer": lambda row: _number(result.times_best(row)),
        f"x faster than {YARDSTICK[result.cell.operator]}": lambda row: _number(result.times_faster(row)),
        "error": lambda row: _number(row.error, ".1e"),
        "peak MB": lambda row: _megabytes(row.peak_bytes),
        "promised MB": lambda row: _megabytes(result.promised_bytes(row)) if row.seconds else "",
        "held MB": lambda row: _megabytes(row.held_bytes),
        "read MB": lambda row: _megabytes(row.weight_bytes),
        "GB/s": lambda row: _number(row.weight_bytes / row.seconds / 1e9 if row.weight_bytes and row.seconds else None, ".1f"),
        "change of outputs": lambda row: _number(row.weight_error, ".2%"),
    }
    if not any(row.held_bytes for row in result.rows):
        del columns["held MB"]
    if not any(row.weight_bytes for row in result.rows):
        del columns["read MB"], columns["GB/s"], columns["change of outputs"]
    if result.copy_seconds is None:
        del columns["of dense"], columns["of copy"]
    # Cells with a label are for the comparison with the best; the others show the promised memory.
    del columns["promised MB" if result.cell.label else "x best peer"]
    return columns


def title_of(
    name: str, floor: Floor | None, rates: tuple[float, float], work: LeastWork | None, parameters: tuple[int, int]
) -> str:
    """Return the heading of a table: name, floor with its rates, work, and all and active parameters."""
    title = name
    if floor:
        title += f"   floor {milliseconds(floor.seconds)} ms (by {floor.bound_by}: {rates[0] / 1e9:.0f} GFLOP/s, "
        title += f"{rates[1] / 1e9:.0f} GB/s)"
    if work:
        title += f"\n{work.flops / 1e9:.3g} GFLOP, {work.touched_bytes / 1e6:.3g} MB; "
        title += f"{parameters[0] / 1e6:.3g} M parameters, {parameters[1] / 1e6:.3g} M active"
    return title


def accounts_of(
    floor: Floor | None, rates: tuple[float, float], work: LeastWork | None, parameters: tuple[int, int]
) -> dict[str, Any]:
    """Return what :func:`title_of` shows as plain values."""
    return {
        "floor_seconds": floor and floor.seconds,
        "floor_bound_by": floor and floor.bound_by,
        "flops_per_s": rates[0],
        "bytes_per_s": rates[1],
        "flops": work and work.flops,
        "touched_bytes": work and work.touched_bytes,
        "parameters": parameters[0],
        "active_parameters": parameters[1],
    }


def table_of(result: CellResult) -> Table:
    """Make a table of one cell: a row for each peer."""
    cell = result.cell
    parameters = (cell.parameters, cell.active_parameters)
    title = title_of(cell.name, result.floor, (result.flops_per_s, result.bytes_per_s), result.work, parameters)
    if result.floor and result.real_time is False:
        title = "   without real-time priority\n".join(title.split("\n", 1))
    # An absent peer has a line below the table, and no row of empty cells in it.
    notes = [f"* {row.note}" for row in result.rows if not row.comparable]
    notes += [f"{row.peer}: {row.note}" for row in result.rows if row.is_absent]
    table = Table(title=title, title_justify="left", caption="\n".join(notes) or None, caption_justify="left")
    columns = _columns(result)
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "peer" else "right", no_wrap=heading == "peer")
    for row in result.rows:
        if row.is_absent:
            continue
        table.add_row(*(show(row) for show in columns.values()), style="red" if row.failed else None)
    return table


def print_cell(result: CellResult) -> None:
    """Print one cell's table; of a cell without times, a line for each row."""
    if result.floor or not any(row.note for row in result.rows):
        console().print(table_of(result), highlight=False)
        return
    console().print(result.cell.name, highlight=False)
    for row in result.rows:
        error = "" if row.error is None else f" (error {row.error:.1e})"
        console().print(f"  {row.peer}: {row.note}{error}", highlight=False, style="red" if row.failed else None)


def summary_of(results: dict[str, Any]) -> Table:
    """Make one table of all cells: ours and the fastest other."""
    table = Table(title="ours and the best peer of each cell", title_justify="left")
    prepacked = any(row["peer"] == PREPACKED for cell in results["cells"] for row in cell["rows"])
    shares = ["of_dense", "of_copy"] if any(cell.get("copy_seconds") for cell in results["cells"]) else []
    table.add_column("cell", no_wrap=True)
    packed = ["prepacked x floor", "x best peer"] if prepacked else []
    for heading in ("ms", "x floor", *(share.replace("_", " ") for share in shares), "x best peer", *packed):
        table.add_column(heading, justify="right")
    table.add_column("best peer", no_wrap=True)
    for cell in results["cells"]:
        rows, floor = {row["peer"]: row for row in cell["rows"]}, cell.get("floor_seconds")
        figures = []
        for name, more in ((OURS, shares), *([(PREPACKED, [])] if prepacked else [])):
            row = rows.get(name, {})
            seconds = row.get("seconds")
            figures += [_number(seconds / floor if seconds and floor else None), *(_number(row.get(share)) for share in more)]
            figures.append(_number(row.get("times_best")))
        ours: dict[str, Any] = rows.get(OURS) or cell["rows"][0]
        best = best_peer(cell)
        shown = milliseconds(ours["seconds"]) if ours.get("seconds") else ours.get("note") or ""
        failed = any(row["failed"] for row in cell["rows"])
        table.add_row(cell["name"], shown, *figures, best["peer"] if best else "", style="red" if failed else None)
    return table


def best_peer(cell: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of the fastest other peer that wrote everything; None where none has a time."""
    others = [r for r in cell["rows"] if r.get("times_best") and r.get("comparable", True) and not is_ours(r["peer"])]
    return min(others, key=lambda row: row["times_best"], default=None)


def print_summary(results: dict[str, Any]) -> None:
    """Print the last table on stdout."""
    console().print(summary_of(results), highlight=False)


def cell_to_json(result: CellResult) -> dict[str, Any]:
    """Return a cell as plain values; times in seconds, memory in bytes."""
    cell, rates = result.cell, (result.flops_per_s, result.bytes_per_s)
    rows = [
        {name: value for name, value in asdict(row).items() if value is not None or name not in OF_SOME}
        | {
            "tokens_per_second": result.tokens_per_second(row),
            "times_faster": result.times_faster(row),
            "times_best": result.times_best(row),
            "promised_bytes": result.promised_bytes(row),
            "of_dense": result.of_dense(row),
            "of_copy": result.of_copy(row),
        }
        for row in result.rows
    ]
    return {
        "name": cell.name,
        **asdict(cell),
        "dtype": str(cell.dtype).removeprefix("torch."),
        **accounts_of(result.floor, rates, result.work, (cell.parameters, cell.active_parameters)),
        "experts_hit": result.experts_hit,
        "real_time": result.real_time,
        "load": result.load,
        "dense_seconds": result.dense_seconds,
        "copy_seconds": result.copy_seconds,
        "yardstick": YARDSTICK[result.cell.operator],
        "rows": rows,
    }
