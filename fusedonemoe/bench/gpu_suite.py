"""The command ``bench --suite gpu``: cells in turn, each written to the file when it is done, and taken up again from there."""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from fusedonemoe.bench import gpu_libraries, report, session
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
# Without --minutes no cell is begun after so long: GPUs are lent by the minute.
MINUTES = 8.0


def describe_run(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """What every figure depends on, the device and its driver included."""
    settings = report.describe_run(suite=SUITE, peers=args.peers)
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
    return settings | {"gpu": gpu, "impl": impl, "dry": args.dry, "tf32": torch.backends.cuda.matmul.allow_tf32}


def cell_to_json(result: GpuResult) -> dict[str, Any]:
    """A cell as plain values; of a dry run, without any time."""
    cell = report.cell_to_json(result)
    for row, values in zip(result.rows, cell["rows"], strict=True):
        values |= {"of_dense": result.of_dense(row), "of_copy": result.of_copy(row)}
    return cell | {"dense_seconds": result.dense_seconds, "copy_seconds": result.copy_seconds}


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Args:
        args: of the command.

    Returns:
        0; 1 when a peer's outputs disagreed or it raised; 2 when nothing could be run.
    """
    cells = session.selected(CELLS, args.cells)
    if not cells or not session.peers_exist({peer.name for cell in cells for peer in line_up(cell)}, args.peers):
        return session.EXIT_USAGE
    if not args.dry and not torch.cuda.is_available():
        print("there is no CUDA device; --dry runs every code path at small sizes on the CPU, without times", file=sys.stderr)
        return session.EXIT_USAGE
    return _run_cells(cells, torch.device("cpu" if args.dry else "cuda"), args)


def _run_cells(cells: list[GpuCell], device: torch.device, args: argparse.Namespace) -> int:
    settings: dict[str, Any] = describe_run(device, args) | {"conditions": []}
    print_heading(settings)
    timer, watch = Timer(device), _Watch(settings["conditions"])

    def measure(cell: GpuCell) -> GpuResult:
        result = _measured(cell, timer, args)
        # A collection looks at all objects of all modules, for half a second; from here on only at what is new. They
        # stay frozen: this is the last thing that the process does.
        gc.collect()
        gc.freeze()
        watch(cell.name)
        return result

    return session.run_cells(
        args,
        settings,
        cells,
        measure=measure,
        to_json=cell_to_json,
        show=print_cell,
        order=[cell.name for cell in CELLS],
        summary=lambda results: None if args.dry else report.console().print(summary_of(results), highlight=False),
        minutes=None if args.dry else MINUTES,
    )


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
        floor = seconds / cell["floor_seconds"] if seconds and cell.get("floor_seconds") else None
        shares = [show(ours.get(name)) for name in ("of_dense", "of_copy", "times_best")]
        milliseconds = report.milliseconds(seconds) if seconds else ours.get("note") or cell["rows"][0].get("note") or ""
        table.add_row(cell["name"], milliseconds, show(floor), *shares, best, style="red" if failed else None)
    return table
