"""Prints results as tables and writes them as JSON, with what they were measured on."""

import json
import os
import platform
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

from fusedonemoe.bench.peers import YARDSTICK
from fusedonemoe.bench.runner import CellResult, Row

PACKAGES = ("fusedonemoe", "torch", "transformers", "numpy")
SCHEMA = 1
# A pipe has no width of its own, and the tables do not fit into the 80 columns that are assumed for one.
PIPE_WIDTH = 120


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the kernel tells it, else what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_run(*, suite: str) -> dict[str, Any]:
    """What every figure depends on: versions, machine, threads, date."""
    return {
        "suite": suite,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def print_heading(settings: dict[str, Any]) -> None:
    """Say what is about to be measured with what."""
    versions = " ".join(f"{name} {number or 'missing'}" for name, number in settings["versions"].items())
    _console().print(
        f"suite {settings['suite']} on {settings['cpu']} ({settings['cpu_capability']}), {settings['threads']} threads "
        f"of {settings['cores']} cores, {settings['date']}\n{versions}\n",
        highlight=False,
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr while cells run, nothing when stderr is not a terminal.

    Yields:
        A function that takes the name of the cell that begins.
    """
    console = Console(stderr=True)
    # Drawn between cells only: a thread that redraws would share the cores, and the priority, with what is timed.
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)
        begun = 0

        def advance(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, completed=begun, refresh=True)
            begun += 1

        yield advance


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _cells_of(result: CellResult, row: Row) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.seconds is None or row.spread is None:
        return row.peer, row.note, "", "", "", error, "", ""
    faster = result.times_faster(row)
    promised = result.promised_bytes(row)
    return (
        row.peer,
        f"{row.seconds * 1e3:.2f}",
        f"{row.spread[0] * 1e3:.2f}-{row.spread[1] * 1e3:.2f}",
        f"{row.seconds / result.floor.seconds:.2f}",
        "" if faster is None else f"{faster:.2f}",
        error,
        _megabytes(row.peak_bytes),
        _megabytes(promised),
    )


def table_of(result: CellResult) -> Table:
    """One cell as a table: a row for each peer."""
    floor, name = result.floor, result.cell.name
    table = Table(
        title=f"{name}   floor {floor.seconds * 1e3:.2f} ms (by {floor.bound_by}: {result.flops_per_s / 1e9:.0f} GFLOP/s, "
        f"{result.bytes_per_s / 1e9:.0f} GB/s)" + ("" if result.real_time else "   without real-time priority"),
        title_justify="left",
    )
    table.add_column("peer", no_wrap=True)
    headings = (
        "ms",
        "quartiles",
        "x floor",
        f"x faster than {YARDSTICK[result.cell.operator]}",
        "error",
        "peak MB",
        "promised MB",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(*_cells_of(result, row), style="red" if row.failed else None)
    return table


def print_cell(result: CellResult) -> None:
    """Print one cell's table on stdout."""
    _console().print(table_of(result), highlight=False)


def to_json(settings: dict[str, Any], results: list[CellResult]) -> dict[str, Any]:
    """Settings and results as plain values; times in seconds, memory in bytes."""
    cells = []
    for result in results:
        cell = asdict(result.cell) | {"dtype": str(result.cell.dtype).removeprefix("torch.")}
        rows = [
            asdict(row) | {"times_faster": result.times_faster(row), "promised_bytes": result.promised_bytes(row)}
            for row in result.rows
        ]
        cells.append(
            {
                "name": result.cell.name,
                **cell,
                "floor_seconds": result.floor.seconds,
                "floor_bound_by": result.floor.bound_by,
                "flops_per_s": result.flops_per_s,
                "bytes_per_s": result.bytes_per_s,
                "experts_hit": result.experts_hit,
                "real_time": result.real_time,
                "yardstick": YARDSTICK[result.cell.operator],
                "rows": rows,
            }
        )
    return {"schema": SCHEMA, **settings, "cells": cells}


def write_json(path: str, settings: dict[str, Any], results: list[CellResult]) -> None:
    """Write :func:`to_json` to a file."""
    Path(path).write_text(json.dumps(to_json(settings, results), indent=1) + "\n", encoding="utf-8")
