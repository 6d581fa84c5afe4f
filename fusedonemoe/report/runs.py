"""Files of results: read, checked, and their cells put together by what they differ in."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedonemoe.bench import records
from fusedonemoe.bench.peers import OURS, is_ours
from fusedonemoe.bench.records import DamagedError
from fusedonemoe.files import shown

Cell = dict[str, Any]
Row = dict[str, Any]
# Fields that identify a cell, with its sizes.
_KIND = ("operator", "system", "dtype", "mode", "allocator", "routing", "activation", "gated", "save_percent")
_SIZES = ("T", "D", "F", "E", "K")


@dataclass(frozen=True)
class Run:
    """One file."""

    name: str  # the suite and the day, for headings
    settings: dict[str, Any]  # everything but the cells
    cells: tuple[Cell, ...]  # those in which a peer has a time


def load(path: Path) -> Run:
    """Read a file; raise DamagedError where it cannot be read, is something else, or a dry run."""
    try:
        results = records.read(path)
    except DamagedError as error:
        raise DamagedError(f"{shown(path)}: no results of `bench --json` ({error})") from error
    cells = [cell for cell in results["cells"] if any(row.get("seconds") for row in cell["rows"])]
    name = f"{results['suite']}, {results['date'][:10]}"
    if not cells:
        raise DamagedError(f"{shown(path)}: nothing in it has a time; a dry run has none")
    return Run(name, {key: value for key, value in results.items() if key != "cells"}, tuple(cells))


def timed(cell: Cell) -> list[Row]:
    """Return the rows that have a time."""
    return [row for row in cell["rows"] if row.get("seconds")]


def compared(cell: Cell) -> list[Row]:
    """Return the rows with a time that wrote everything that the others write."""
    return [row for row in timed(cell) if row.get("comparable", True)]


def times_ours(cell: Cell) -> dict[str, float]:
    """Return each other peer's time in multiples of ours, by name; nothing where ours has no time.

    Peers that were timed in turns with ours at another moment than the others are compared with ours of that moment.
    """
    ours = next((row["seconds"] for row in timed(cell) if row["peer"] == OURS), None)
    if ours is None:
        return {}
    return {row["peer"]: row["seconds"] / (row.get("paired_seconds") or ours) for row in compared(cell) if row["peer"] != OURS}


def peers_of(cells: Iterable[Cell]) -> list[str]:
    """Return all peers with a time in one of the cells, ours first."""
    names = dict.fromkeys(row["peer"] for cell in cells for row in timed(cell))
    return sorted(names, key=lambda name: (name != OURS, not is_ours(name)))


def families(cells: Iterable[Cell], along: str) -> list[list[Cell]]:
    """Group cells that differ in one size alone, in the order of that size; single cells are left out."""
    groups: dict[tuple[Any, ...], dict[Any, Cell]] = {}
    for cell in cells:
        if all(name in cell for name in _SIZES) and along in cell:
            key = tuple(cell.get(name) for name in _KIND) + tuple(cell[name] for name in _SIZES if name != along)
            groups.setdefault(key, {}).setdefault(cell[along], cell)
    return [[group[size] for size in sorted(group)] for group in groups.values() if len(group) > 1]


def title_of(cell: Cell, without: str = "") -> str:
    """Return a title for a cell, without a size that the picture has on an axis."""
    sizes = " ".join(f"{name} {cell[name]}" for name in _SIZES if name != without and cell.get(name, 1) != 1)
    mode = cell.get("mode", "forward")
    saved = f", save {cell['save_percent']} %" if mode == "training" and cell.get("save_percent", 100) != 100 else ""
    huge = ", huge pages" if cell.get("allocator", "default") != "default" else ""
    system = f"{cell['system']}: " if cell.get("system") else ""
    scaled = ", scaled" if cell.get("published") else ""
    return f"{system}{cell.get('operator', '?')}, {mode}{saved}{huge}, {cell.get('dtype', '?')}{scaled}; {sizes}"
