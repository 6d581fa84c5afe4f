"""Prints results as tables and turns them into JSON, with a description of the machine."""

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fusedonemoe.bench.libraries import PACKAGES
from fusedonemoe.bench.peers import OURS, PREPACKED, YARDSTICK, is_ours
from fusedonemoe.bench.results import CellResult
from fusedonemoe.bench.workloads import ALLOCATORS, Floor, LeastWork
from fusedonemoe.cli.overview import cpu_model, version_of

SCHEMA = 1
# Fields of rows that only cells with weights in several forms have.
OF_SOME = ("weight_bytes", "floor_seconds", "weight_error")
# A pipe has no width of its own, and the tables do not fit into the 80 columns that are assumed for one.
PIPE_WIDTH = 180


def console() -> Console:
    """Return the console for tables. It prints texts unchanged: brackets in an error message are no commands for colours."""
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(width=PIPE_WIDTH, markup=False, emoji=False)


def describe_run(*, suite: str, peers: re.Pattern[str] | None = None) -> dict[str, Any]:
    """Describe what every figure depends on: versions, machine, threads, date; of the suite ``cpu``, the allocators."""
    packages = ("fusedonemoe", "torch", "transformers", "numpy", *PACKAGES.get(suite, ()))
    settings = {
        "suite": suite,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version_of(name) or None for name in packages}},
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
    """Show a bar on stderr while cells run; ``in_pipes``, a line for each cell when stderr is no terminal, instead of nothing.

    Yields:
        A function that takes the name of the cell that begins.
    """
    console, start, begun = Console(stderr=True), time.monotonic(), count()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    # Drawn between cells only: a thread that redraws would share the cores, and the priority, with what is timed.
    with Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, left="")

        def advance(name: str) -> None:
            done = next(begun)
            left = time_left(time.monotonic() - start, done, total)
            bar.update(task, description=name, completed=done, left=left, refresh=True)
            if in_pipes and not console.is_terminal:
                print(f"[{done}/{total}] {name} {left}".rstrip(), file=sys.stderr, flush=True)

        yield advance


def time_left(elapsed: float, done: int, total: int) -> str:
    """Estimate the time left from the cells so far, in words; nothing before the first."""
    if not done:
        return ""
    minutes = elapsed / done * (total - done) / 60
    return f"about {minutes:.0f} min left" if minutes >= 1.5 else f"about {60 * minutes:.0f} s left"


def number(value: float | None, form: str = ".2f") -> str:
    """Format a number; nothing for None."""
    return "" if value is None else format(value, form)


def milliseconds(seconds: float | None) -> str:
    """Format a time in milliseconds; to tens of nanoseconds where it is short, nothing for 0 and None."""
    return f"{seconds * 1e3:{'.2f' if seconds >= 1e-4 else '.4f'}}" if seconds else ""


def megabytes(size: float | None) -> str:
    """Format bytes in megabytes; nothing for None."""
    return number(None if size is None else size / 1e6, ".1f")


def make_table(title: str, headings: Iterable[str], *, names: Container[str] = ("cell", "peer"), caption: str = "") -> Table:
    """Make a table whose columns are numbers, but for those of ``names``."""
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in names else "right", no_wrap=heading in names)
    return table


def _columns(cell: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """Return the text of each column for a row of a cell of a file; in ``ms`` the note where there is no time."""
    rows, floor = cell["rows"], cell["floor_seconds"]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "peer": lambda row: row["peer"] if row["comparable"] else f"{row['peer']} *",
        "ms": lambda row: milliseconds(row["seconds"]) or row["note"],
        "p95 p99": lambda row: " ".join(filter(None, map(milliseconds, (row["p95_seconds"], row["p99_seconds"])))),
        "tokens/s": lambda row: number(row["tokens_per_second"], ",.0f"),
        "x floor": lambda row: number(floors(row, floor)),
        "MFU": lambda row: number(row["mfu"], ".1%"),
    }
    if cell["copy_seconds"] is not None:
        columns |= {"of dense": lambda row: number(row["of_dense"]), "of copy": lambda row: number(row["of_copy"])}
    # Cells with a label are for the comparison with the best; the others show the promised memory.
    if cell["label"]:
        columns["x best peer"] = lambda row: number(row["times_best"])
    columns |= {
        f"x faster than {cell['yardstick']}": lambda row: number(row["times_faster"]),
        "error": lambda row: number(row["error"], ".1e"),
        "peak MB": lambda row: megabytes(row["peak_bytes"]),
    }
    if not cell["label"] and any(row["promised_bytes"] for row in rows):
        columns["promised MB"] = lambda row: megabytes(row["promised_bytes"]) if row["seconds"] else ""
    if any(row["held_bytes"] for row in rows):
        columns["held MB"] = lambda row: megabytes(row["held_bytes"])
    if any(row.get("weight_bytes") for row in rows):
        columns |= {
            "read MB": lambda row: megabytes(row.get("weight_bytes")),
            "GB/s": lambda row: number(row["weight_bytes"] / row["seconds"] / 1e9 if row["seconds"] else None, ".1f"),
            "change of outputs": lambda row: number(row.get("weight_error"), ".2%"),
        }
    return columns


def floors(row: Mapping[str, Any], of_cell: float | None) -> float | None:
    """Return a row's time in multiples of its floor: that of the bytes it reads if it has one, else that of the cell."""
    floor = row.get("floor_seconds") or of_cell
    return row["seconds"] / floor if row.get("seconds") and floor else None


def title_of(name: str, accounts: Mapping[str, Any]) -> str:
    """Return the heading of a table: name, floor with its rates, work, and all and active parameters."""
    title = name
    if accounts["floor_seconds"]:
        title += f"   floor {milliseconds(accounts['floor_seconds'])} ms (by {accounts['floor_bound_by']}: "
        title += f"{accounts['flops_per_s'] / 1e9:.0f} GFLOP/s, {accounts['bytes_per_s'] / 1e9:.0f} GB/s)"
    if accounts["touched_bytes"] is not None:
        title += f"\n{accounts['flops'] / 1e9:.3g} GFLOP, {accounts['touched_bytes'] / 1e6:.3g} MB; "
        title += f"{accounts['parameters'] / 1e6:.3g} M parameters, {accounts['active_parameters'] / 1e6:.3g} M active"
    return title


def accounts_of(
    floor: Floor | None, rates: tuple[float, float], work: LeastWork | None, parameters: tuple[int, int]
) -> dict[str, Any]:
    """Return what :func:`title_of` shows, by its name in a file; ``parameters`` are all, and those that one token meets."""
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
    cell = cell_to_json(result)
    title = title_of(cell["name"], cell)
    if result.floor and result.real_time is False:
        title = "   without real-time priority\n".join(title.split("\n", 1))
    # An absent peer has a line below the table, and no row of empty cells in it.
    notes = [f"* {row.note}" for row in result.rows if not row.comparable]
    notes += [f"{row.peer}: {row.note}" for row in result.rows if row.is_absent]
    columns = _columns(cell)
    table = make_table(title, columns, caption="\n".join(notes))
    for row, values in zip(result.rows, cell["rows"], strict=True):
        if not row.is_absent:
            table.add_row(*(show(values) for show in columns.values()), style="red" if row.failed else None)
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
    prepacked = any(row["peer"] == PREPACKED for cell in results["cells"] for row in cell["rows"])
    shares = ["of_dense", "of_copy"] if any(cell.get("copy_seconds") for cell in results["cells"]) else []
    headings = ["cell", "ms", "x floor", *(share.replace("_", " ") for share in shares), "x best peer"]
    headings += ["prepacked x floor", "x best peer"] if prepacked else []
    table = make_table("ours and the best peer of each cell", [*headings, "best peer"], names=("cell", "best peer"))
    for cell in results["cells"]:
        rows, figures = {row["peer"]: row for row in cell["rows"]}, []
        for name, more in ((OURS, shares), *([(PREPACKED, [])] if prepacked else [])):
            row = rows.get(name, {})
            figures.append(number(floors(row | {"floor_seconds": None}, cell.get("floor_seconds"))))
            figures += [number(row.get(share)) for share in (*more, "times_best")]
        ours: dict[str, Any] = rows.get(OURS) or cell["rows"][0]
        shown = milliseconds(ours.get("seconds")) or ours.get("note") or ""
        failed = any(row["failed"] for row in cell["rows"])
        best = best_peer(cell) or {"peer": ""}
        table.add_row(cell["name"], shown, *figures, best["peer"], style="red" if failed else None)
    return table


def best_peer(cell: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of the fastest other peer that wrote everything; None where none has a time."""
    others = [r for r in cell["rows"] if r.get("times_best") and r.get("comparable", True) and not is_ours(r["peer"])]
    return min(others, key=lambda row: row["times_best"], default=None)


def cell_to_json(result: CellResult) -> dict[str, Any]:
    """Return a cell as plain values; times in seconds, memory in bytes."""
    cell = result.cell
    return {
        "name": cell.name,
        **asdict(cell),
        "dtype": str(cell.dtype).removeprefix("torch."),
        **accounts_of(
            result.floor, (result.flops_per_s, result.bytes_per_s), result.work, (cell.parameters, cell.active_parameters)
        ),
        **{name: getattr(result, name) for name in ("experts_hit", "real_time", "load", "dense_seconds", "copy_seconds")},
        "yardstick": YARDSTICK[cell.operator],
        "rows": [
            {name: value for name, value in asdict(row).items() if value is not None or name not in OF_SOME}
            | result.compared(row)
            for row in result.rows
        ],
    }
