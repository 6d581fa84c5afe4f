"""A run of cells, the same for every suite: progress, a file that is always complete, --resume, --compare and the exit status."""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fusedonemoe import files
from fusedonemoe.bench import comparison, records, report
from fusedonemoe.bench.records import DamagedError
from fusedonemoe.bench.timing import threads
from fusedonemoe.files import reason_of

EXIT_DISAGREE = 1
EXIT_USAGE = 2
EXIT_SLOWER = 3
# Settings that two runs must share before the cells of one may replace those of the other.
IDENTITY = ("schema", "suite", "dry", "versions", "cpu", "cpu_capability", "threads", "gpu", "peers", "impl", "allocators")


class Named(Protocol):
    """A cell of any suite."""

    @property
    def name(self) -> str:
        """The text that ``--cells`` matches."""


C = TypeVar("C", bound=Named)
R = TypeVar("R")


def selected(cells: Sequence[C], pattern: re.Pattern[str] | None) -> list[C]:
    """Return the cells whose name matches a pattern, None for all; where none does, print their names on stderr."""
    found = [cell for cell in cells if pattern is None or pattern.search(cell.name)]
    if not found and pattern is not None:
        print(f"--cells {pattern.pattern!r} matches none of\n  " + "\n  ".join(c.name for c in cells), file=sys.stderr)
    return found


def peers_exist(names: set[str], pattern: re.Pattern[str] | None) -> bool:
    """Tell whether a pattern, None for all, matches one of the peers' names; where it does not, print them on stderr."""
    if pattern is None or any(map(pattern.search, names)):
        return True
    print(f"--peers {pattern.pattern!r} matches none of\n  " + "\n  ".join(sorted(names)), file=sys.stderr)
    return False


def has_failed(cell: dict[str, Any]) -> bool:
    """Tell whether a peer's answer was off, or it raised."""
    return any(row["failed"] for row in cell["rows"])


def finished_cells(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of an earlier run with the same settings in which nothing failed.

    Args:
        path: of the results; it need not exist.
        settings: of this run.

    Raises:
        DamagedError: the path holds something else, which must not be lost.
    """
    if files.stamp_of(path) is None:
        return []
    if files.is_stream(path):
        raise DamagedError("a pipe or a device cannot be read again")
    before = records.read(path)
    wanted = json.loads(json.dumps({"schema": report.SCHEMA, **settings}))
    if other := [name for name in IDENTITY if before.get(name) != wanted.get(name)]:
        print(f"{path} was measured with different {', '.join(other)}; starting over", file=sys.stderr)
        return []
    return [cell for cell in before["cells"] if not has_failed(cell)]


class _Keeper:
    """Keeps the results of a run in a file.

    A pipe or a device gets them once, when the run ends. Where two runs write one file, it has all cells of the run that wrote
    last and none of the other; a run that finds the other's version prints a message.
    """

    def __init__(self, path: Path | None, cells: int) -> None:
        self.path = path
        self.cells = cells  # that are in the file
        self.once = path is not None and files.is_stream(path)
        self._seen = files.stamp_of(path) if path else None
        self._told = False

    def __call__(self, results: dict[str, Any], *, last: bool = False) -> None:
        """Write the results so far; without a path, nothing."""
        if self.path is None or (self.once and not last):
            return
        found, expected = files.stamp_of(self.path), self._seen
        self._seen = files.write(self.path, (json.dumps(results, indent=1) + "\n").encode())
        self.cells = len(results["cells"])
        if not (self.once or self._told or found in (None, expected)):
            self._told = True
            print(f"another program has written {self.path} too; now it has the cells of this run alone", file=sys.stderr)


def _temporary_file() -> Path | None:
    """Make a file for a run without ``--json``; None, and a line on stderr, where there is no room for one."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="fusedonemoe-bench-", suffix=".json")
    except OSError as error:
        print(f"cells that are finished before an interruption will be lost: {reason_of(error)}", file=sys.stderr)
        return None
    os.close(descriptor)
    return Path(name)


@contextmanager
def _kept(path: Path | None, results: dict[str, Any], *, wanted: bool) -> Iterator[_Keeper]:
    """Yield the writer of the results so far; without a path it writes to a temporary file, if that is wanted."""
    temporary = _temporary_file() if path is None and wanted else None
    keep = _Keeper(path or temporary, len(results["cells"]))
    try:
        yield keep
    except BaseException as error:
        if len(results["cells"]) > keep.cells and not isinstance(error, files.UnwritableError | BrokenPipeError):
            keep(results, last=True)
        if keep.path and keep.cells:
            hint = "; --resume goes on from there" if path and not keep.once else ""
            print(f"the {keep.cells} finished cells are in {keep.path}{hint}", file=sys.stderr)
        elif temporary:
            temporary.unlink(missing_ok=True)
        raise
    if temporary:
        temporary.unlink(missing_ok=True)


def _before(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]] | str:
    """Return the results of ``--compare`` and the finished cells of ``--json``, or an error message."""
    try:
        old = comparison.load(args.compare, settings) if args.compare else None
    except comparison.IncomparableError as reason:
        return f"--compare {files.shown(args.compare)}: {reason}"
    try:
        done = finished_cells(args.json, settings) if args.json and args.resume else []
    except DamagedError as reason:
        return f"--resume {files.shown(args.json)}: {reason}; nothing was changed in it"
    try:
        if args.json:
            files.check(args.json)
        if args.picture:
            from fusedonemoe.bench import picture

            picture.check(args.picture)
    except files.UnwritableError as reason:
        return str(reason)
    return old, done


def run_cells(
    args: argparse.Namespace,
    settings: dict[str, Any],
    cells: Sequence[C],
    *,
    measure: Callable[[C], R],
    to_json: Callable[[R], dict[str, Any]],
    show: Callable[[R], None],
    order: Sequence[str],
    summary: Callable[[dict[str, Any]], None] = lambda results: None,
    minutes: float | None = None,
    long: bool = True,
) -> int:
    """Measure the cells that are left, print them and write them.

    Args:
        args: of the command; ``json``, ``resume``, ``compare``, ``minutes`` and ``picture`` are read here.
        settings: the description of the run in the file.
        cells: those asked for.
        measure: measures a cell.
        to_json: turns a result into plain values; its ``rows`` have ``failed``.
        show: prints a result as soon as it is measured.
        order: names of all cells of the suite, for the file.
        summary: prints all results at the end.
        minutes: without ``--minutes``, begin no cell after so long.
        long: print a line for every cell on stderr where it is no terminal, and keep unfinished runs without ``--json``.

    Returns:
        The exit status: 0; 1 when a peer's outputs disagreed or it raised; 2 when a file cannot be read, compared with or
        written; 3 when ours is slower than in the file of ``--compare``.
    """
    found = _before(args, settings)
    if isinstance(found, str):
        print(found, file=sys.stderr)
        return EXIT_USAGE
    old, done = found
    # Cells of the file that were not asked for stay in it.
    known = {cell["name"] for cell in done}
    left = [cell for cell in cells if cell.name not in known]
    results: dict[str, Any] = {"schema": report.SCHEMA, **settings, "cells": done}
    if len(left) < len(cells):
        print(f"{len(cells) - len(left)} of {len(cells)} cells are in {args.json} already", file=sys.stderr)
    begun, budget = time.monotonic(), args.minutes or minutes
    rank = {name: index for index, name in enumerate(order)}
    try:
        with _kept(args.json, results, wanted=long) as keep, report.progress(len(left), in_pipes=long) as advance:
            for cell in left:
                if budget and time.monotonic() - begun > 60 * budget:
                    print(f"stopped after {budget:g} minutes; --resume goes on with {cell.name}", file=sys.stderr)
                    break
                advance(cell.name)
                result = measure(cell)
                results["cells"].append(to_json(result))
                keep(results)
                show(result)
            results["cells"].sort(key=lambda cell: rank.get(cell["name"], len(rank)))
            keep(results, last=True)
        summary(results)
        if args.picture:
            from fusedonemoe.bench.picture import draw

            draw(args.picture, results)
    except files.UnwritableError as reason:
        print(reason, file=sys.stderr)
        return EXIT_USAGE
    slower = comparison.print_comparison(old, json.loads(json.dumps(results))) if old else False
    if any(map(has_failed, results["cells"])):
        return EXIT_DISAGREE
    return EXIT_SLOWER if slower else 0


def run_suite(
    args: argparse.Namespace,
    everything: Sequence[C],
    *,
    measure: Callable[[C], R],
    to_json: Callable[[R], dict[str, Any]],
    show: Callable[[R], None],
    peers: Callable[[C], Iterable[str]] | None = None,
    summary: Callable[[dict[str, Any]], None] = lambda results: None,
    described: Mapping[str, Any] | None = None,
    minutes: float | None = None,
    long: bool = False,
) -> int:
    """Choose the cells asked for, print the machine, and measure them on the number of threads asked for.

    Args:
        args: of the command; ``suite``, ``cells``, ``peers`` and ``threads`` are read here, the others by :func:`run_cells`.
        everything: all cells of the suite.
        measure: this and the arguments without a text here are those of :func:`run_cells`.
        peers: names of the peers of a cell, for a suite that takes ``--peers``.
        described: further settings of the run, for the file.

    Returns:
        The exit status of :func:`run_cells`; 2 also when a pattern matches nothing.
    """
    cells = selected(everything, args.cells)
    if not cells or (peers and not peers_exist({name for cell in cells for name in peers(cell)}, args.peers)):
        return EXIT_USAGE
    with threads(args.threads):
        settings = report.describe_run(suite=args.suite, peers=args.peers) | dict(described or {})
        report.print_heading(settings)
        order = [cell.name for cell in everything]
        options: dict[str, Any] = {"order": order, "summary": summary, "minutes": minutes, "long": long}
        return run_cells(args, settings, cells, measure=measure, to_json=to_json, show=show, **options)
