"""``--compare OLD.json``: every cell now and in an older run on the same machine.

Two runs are never measured in turns, so the change of the others' times from one run to the next is taken for the machine's
drift: ours is slower only where it lost more than that.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from fusedonemoe.bench import records, report
from fusedonemoe.bench.peers import is_ours
from fusedonemoe.bench.records import DamagedError

# Settings of the machine. Times of different machines are not compared.
MACHINE = ("cpu", "cpu_capability", "cores", "threads")
# Ours counts as slower beyond this multiple of its time.
TOLERANCE = 1.15


class Pair(NamedTuple):
    """A row of both runs."""

    cell: str
    peer: str
    before: float  # seconds in the older run
    now: float  # seconds in this one
    ratio: float  # of the second to the first


def machine_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a machine."""
    gpu = settings.get("gpu")
    return {name: settings.get(name) for name in MACHINE} | ({"gpu": gpu["name"]} if gpu else {})


def load(path: str | os.PathLike[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Read an older file; raise DamagedError where it holds no results, no times, or those of another suite or machine."""
    try:
        old = records.read(Path(path))
    except DamagedError as error:
        raise DamagedError(f"no results of the benchmark ({error})") from error
    schema, suite = old.get("schema", "missing"), old["suite"]
    if schema != report.SCHEMA or suite != settings["suite"]:
        expected = f"expected schema {report.SCHEMA} and suite {settings['suite']}"
        raise DamagedError(f"{expected}, got schema {schema} and suite {suite}")
    if settings.get("dry") or not any(row.get("seconds") for cell in old["cells"] for row in cell["rows"]):
        raise DamagedError("a dry run has no times")
    before, now = machine_of(old), machine_of(settings)
    if other := [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]:
        told = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in sorted(other))
        raise DamagedError(f"measured on another machine, whose times are no measure for this one: {told}")
    return old


def pairs_of(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Pair]:
    """Yield the rows that have times in both results."""
    before = {(cell["name"], row["peer"]): row.get("seconds") for cell in old["cells"] for row in cell["rows"]}
    for cell in new["cells"]:
        for row in cell["rows"]:
            seconds = before.get((cell["name"], row["peer"]))
            if seconds and row.get("seconds"):
                yield Pair(cell["name"], row["peer"], seconds, row["seconds"], row["seconds"] / seconds)


def drift_of(pairs: list[Pair]) -> float:
    """Return the median change of the others' times; 1 where there are none."""
    others = [pair.ratio for pair in pairs if not is_ours(pair.peer)]
    return median(others) if others else 1.0


def print_comparison(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print every row of ours that both results have; return whether one of ours is slower than it was."""
    console = report.console()
    before, after = old.get("versions", {}), new["versions"]
    for name in sorted(before.keys() | after.keys()):
        if (was := before.get(name)) != (now := after.get(name)):
            console.print(f"other version: {name} was {was or 'missing'}, is {now or 'missing'}", highlight=False)
    pairs = list(pairs_of(old, new))
    headings = ("cell", "peer", "ms before", "ms now", "x before", "others x before")
    table = report.make_table(f"compared with the run of {old['date']}", headings)
    slower = 0
    for pair in pairs:
        if is_ours(pair.peer):
            drift = drift_of([other for other in pairs if other.cell == pair.cell])
            bad = min(pair.ratio, pair.ratio / drift) > TOLERANCE  # by more than the drift explains
            slower += bad
            figures = (report.milliseconds(pair.before), report.milliseconds(pair.now), f"{pair.ratio:.2f}", f"{drift:.2f}")
            table.add_row(pair.cell, pair.peer, *figures, style="red" if bad else None)
    console.print(table, highlight=False)
    if missing := {cell["name"] for cell in new["cells"]} - {pair.cell for pair in pairs}:
        console.print(f"without a time in the older file: {', '.join(sorted(missing))}", highlight=False)
    console.print(f"{slower} slower by more than {TOLERANCE - 1:.0%}; the others' times, all cells: x {drift_of(pairs):.2f}")
    return slower > 0
