"""The command ``bench --suite gpu``: cells in turn, each written to the file when it is done, and taken up again from there."""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fusedonemoe.bench import gpu_libraries, report
from fusedonemoe.bench.gpu_cells import CELLS, SUITE, GpuCell
from fusedonemoe.bench.gpu_libraries import line_up
from fusedonemoe.bench.gpu_peers import chosen, our_impl
from fusedonemoe.bench.gpu_runner import GpuResult, run_cell
from fusedonemoe.bench.gpu_timing import ROUNDS, SECONDS_PER_PEER, Timer, conditions
from fusedonemoe.bench.peers import OURS, UnavailableError, is_ours
from fusedonemoe.bench.results import Row

# nvidia-smi takes a while, and clocks drift slowly.
SECONDS_BETWEEN_CONDITIONS = 15.0
# The row of a cell that failed as a whole.
WHOLE_CELL = "(cell)"
# What two runs must have in common for the cells of one to stand for those of the other.
IDENTITY = ("schema", "suite", "dry", "versions", "gpu", "peers", "impl")


def describe_run(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """What every figure depends on, the device and its driver included."""
    settings = report.describe_run(suite=SUITE)
    settings["versions"] |= {name: report.version_of(name) for name in gpu_libraries.PACKAGES}
    gpu: dict[str, Any] | None = None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "cache_bytes": found.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    try:
        impl = our_impl(device)
    except UnavailableError as reason:
        impl = str(reason)
    peers = args.peers.pattern if args.peers else None
    return settings | {"gpu": gpu, "impl": impl, "dry": args.dry, "peers": peers, "tf32": torch.backends.cuda.matmul.allow_tf32}


def cell_to_json(result: GpuResult) -> dict[str, Any]:
    """A cell as plain values; of a dry run, without any time."""
    cell = report.cell_to_json(result)
    for row, values in zip(result.rows, cell["rows"], strict=True):
        values |= {"of_dense": result.of_dense(row), "of_copy": result.of_copy(row)}
    return cell | {"dense_seconds": result.dense_seconds, "copy_seconds": result.copy_seconds}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results so that the file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def finished_cells(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of an earlier run that need no second measurement: same settings, and nothing in them failed.

    Args:
        path: of the results; it need not exist.
        settings: from :func:`describe_run`.
    """
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        print(f"{path} holds no results: starting afresh", file=sys.stderr)
        return []
    wanted = json.loads(json.dumps({"schema": report.SCHEMA, **settings}))
    if other := [name for name in IDENTITY if before.get(name) != wanted.get(name)]:
        print(f"{path} is of another {', '.join(other)}: starting afresh", file=sys.stderr)
        return []
    return [cell for cell in before["cells"] if not any(row["failed"] for row in cell["rows"])]


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Args:
        args: of the command.

    Returns:
        0; 1 when a peer's outputs disagreed or it raised; 2 when nothing could be run.
    """
    cells = [cell for cell in CELLS if args.cells is None or args.cells.search(cell.name)]
    if not cells:
        print(f"--cells {args.cells.pattern!r} matches none of\n  " + "\n  ".join(c.name for c in CELLS), file=sys.stderr)
        return 2
    names = {peer.name for cell in cells for peer in line_up(cell)}
    if args.peers and not any(map(args.peers.search, names)):
        print(f"--peers {args.peers.pattern!r} matches none of\n  " + "\n  ".join(sorted(names)), file=sys.stderr)
        return 2
    if not args.dry and not torch.cuda.is_available():
        print("there is no CUDA device; --dry runs every code path at small sizes on the CPU, without times", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.dry else "cuda")
    return _run_cells(cells, device, args)


def _run_cells(cells: list[GpuCell], device: torch.device, args: argparse.Namespace) -> int:
    begun = time.monotonic()
    settings = describe_run(device, args)
    print_heading(settings)
    path = Path(args.json) if args.json else None
    done = finished_cells(path, settings) if path and args.resume else []
    # What stands in the file and was not asked for stays in it.
    left = {cell.name for cell in cells} - {cell["name"] for cell in done}
    results: dict[str, Any] = {"schema": report.SCHEMA, **settings, "conditions": [], "cells": done}
    if len(left) < len(cells):
        print(f"{len(cells) - len(left)} of {len(cells)} cells are in {path} already", file=sys.stderr)
    timer, watch, failed = Timer(device), _Watch(results["conditions"]), False
    with report.progress(len(left), in_pipes=True) as advance:
        for cell in cells:
            if cell.name not in left:
                continue
            if not args.dry and time.monotonic() - begun > 60 * args.minutes:
                print(f"stopped after {args.minutes:g} minutes; --resume goes on with {cell.name}", file=sys.stderr)
                break
            advance(cell.name)
            result = _measured(cell, timer, args)
            # A collection looks at all objects of all modules, for half a second; from here on only at what is new. They
            # stay frozen: this is the last thing that the process does.
            gc.collect()
            gc.freeze()
            failed |= any(row.failed for row in result.rows)
            results["cells"].append(cell_to_json(result))
            watch(cell.name)
            if path:
                write(path, results)
            print_cell(result)
    order = {cell.name: index for index, cell in enumerate(CELLS)}
    results["cells"].sort(key=lambda cell: order.get(cell["name"], len(order)))
    if path:
        write(path, results)
    if not args.dry:
        report.console().print(summary_of(results), highlight=False)
    if args.picture:
        from fusedonemoe.bench.picture import draw

        draw(args.picture, results)
    return int(failed)


def _measured(cell: GpuCell, timer: Timer, args: argparse.Namespace) -> GpuResult:
    """A cell's result; one row that says why where the cell could not be set up."""
    rounds, seconds = (1, 0.0) if args.dry else (ROUNDS, SECONDS_PER_PEER)
    try:
        return run_cell(cell, timer, peers=chosen(line_up(cell), args.peers), dry=args.dry, rounds=rounds, seconds=seconds)
    except torch.OutOfMemoryError:
        row = Row(WHOLE_CELL, note="skipped: out of memory")
    except Exception as error:  # The other cells are worth having.
        row = Row(WHOLE_CELL, note=f"failed: {type(error).__name__}: {str(error)[:200]}", failed=True)
    if timer.on_gpu:
        torch.cuda.empty_cache()
    return GpuResult(cell, (row,), None, 0.0, 0.0, 0.0, None)


class _Watch:
    """Notes clocks and temperature beside the cell they were seen after, not too often."""

    def __init__(self, seen: list[dict[str, str]]) -> None:
        self.seen = seen
        self.last = float("-inf")

    def __call__(self, name: str) -> None:
        if time.monotonic() - self.last >= SECONDS_BETWEEN_CONDITIONS:
            if found := conditions():
                self.seen.append({"after": name, **found})
            self.last = time.monotonic()


def print_heading(settings: dict[str, Any]) -> None:
    """Say what is about to be measured with what."""
    where = (settings["gpu"]["name"] if settings["gpu"] else settings["cpu"]) + (
        ", a dry run: nothing is timed" if settings["dry"] else ""
    )
    versions = " ".join(f"{name} {number or 'missing'}" for name, number in settings["versions"].items())
    line = f"suite {SUITE} on {where}, impl {settings['impl']}, {settings['date']}\n{versions}\n"
    report.console().print(line, highlight=False)


def print_cell(result: GpuResult) -> None:
    """Print one cell's table; of a cell without times, a line for each row."""
    if result.floor:
        table = report.table_of(result, {"of dense": result.of_dense, "of copy": result.of_copy})
        report.console().print(table, highlight=False)
        return
    report.console().print(result.cell.name, highlight=False)
    for row in result.rows:
        error = "" if row.error is None else f" (error {row.error:.1e})"
        report.console().print(f"  {row.peer}: {row.note}{error}", highlight=False, style="red" if row.failed else None)


def summary_of(results: dict[str, Any]) -> Table:
    """All cells as one table: ours, the ceilings and the fastest other."""
    table = Table(title="ours and the best peer of each cell", title_justify="left")
    table.add_column("cell", no_wrap=True)
    for heading in ("ms", "x floor", "of dense", "of copy", "x best peer"):
        table.add_column(heading, justify="right")
    table.add_column("best peer")
    for cell in results["cells"]:
        failed = any(row["failed"] for row in cell["rows"])
        ours: dict[str, Any] = next((row for row in cell["rows"] if row["peer"] == OURS), {})
        others = [r for r in cell["rows"] if r.get("times_best") and not is_ours(r["peer"])]
        best = min(others, key=lambda row: row["times_best"])["peer"] if others else ""
        show: Callable[[float | None], str] = lambda value: "" if value is None else f"{value:.2f}"  # noqa: E731
        seconds = ours.get("seconds")
        floor = seconds / cell["floor_seconds"] if seconds and cell["floor_seconds"] else None
        shares = [show(ours.get(name)) for name in ("of_dense", "of_copy", "times_best")]
        milliseconds = report.milliseconds(seconds) if seconds else ours.get("note", cell["rows"][0]["note"])
        table.add_row(cell["name"], milliseconds, show(floor), *shares, best, style="red" if failed else None)
    return table
