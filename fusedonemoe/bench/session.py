"""A run of cells, the same for every suite: progress, a file that is whole at every moment, --resume, --compare and the exit."""

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

from fusedonemoe.bench import comparison, earlier, report
from fusedonemoe.bench.runner import threads

EXIT_DISAGREE = 1
EXIT_USAGE = 2
EXIT_SLOWER = 3
# What two runs must have in common for the cells of one to stand for those of the other.
IDENTITY = ("schema", "suite", "dry", "versions", "cpu", "cpu_capability", "threads", "gpu", "peers", "impl", "allocators")


class Named(Protocol):
    """Whatever a suite measures one after the other."""

    @property
    def name(self) -> str:
        """What ``--cells`` matches."""


C = TypeVar("C", bound=Named)
R = TypeVar("R")


def selected(cells: Sequence[C], pattern: re.Pattern[str] | None) -> list[C]:
    """The cells whose name matches; those that there are, on stderr, where none does.

    Args:
        cells: of the suite.
        pattern: None for all.
    """
    found = [cell for cell in cells if pattern is None or pattern.search(cell.name)]
    if not found and pattern is not None:
        print(f"--cells {pattern.pattern!r} matches none of\n  " + "\n  ".join(c.name for c in cells), file=sys.stderr)
    return found


def peers_exist(names: set[str], pattern: re.Pattern[str] | None) -> bool:
    """Whether the pattern matches one of the names at least; those that there are, on stderr, where it does not.

    Args:
        names: of all peers of the cells.
        pattern: None for all.
    """
    if pattern is None or any(map(pattern.search, names)):
        return True
    print(f"--peers {pattern.pattern!r} matches none of\n  " + "\n  ".join(sorted(names)), file=sys.stderr)
    return False


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results so that the file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def has_failed(cell: dict[str, Any]) -> bool:
    """Whether a peer's answer was off, or it raised."""
    return any(row["failed"] for row in cell["rows"])


def finished_cells(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of an earlier run that need no second measurement: same settings, and nothing in them failed.

    Args:
        path: of the results; it need not exist.
        settings: of this run.
    """
    if not path.exists():
        return []
    try:
        before = earlier.read(path)
    except ValueError:
        print(f"{path} holds no results: starting afresh", file=sys.stderr)
        return []
    wanted = json.loads(json.dumps({"schema": report.SCHEMA, **settings}))
    if other := [name for name in IDENTITY if before.get(name) != wanted.get(name)]:
        print(f"{path} is of another {', '.join(other)}: starting afresh", file=sys.stderr)
        return []
    return [cell for cell in before["cells"] if not has_failed(cell)]


@contextmanager
def _kept(path: Path | None, results: dict[str, Any], *, wanted: bool) -> Iterator[Callable[[], None]]:
    """Yields what writes the results so far; without a path into the folder for temporary files, if that is wanted."""
    kept = path or Path(tempfile.gettempdir(), f"fusedonemoe-bench-{os.getpid()}.json")

    def keep() -> None:
        if path or wanted:
            write(kept, results)

    try:
        yield keep
    except BaseException:
        if results["cells"] and (path or wanted):
            hint = "; --resume goes on from there" if path else ""
            print(f"the {len(results['cells'])} finished cells are in {kept}{hint}", file=sys.stderr)
        raise
    if path is None:
        kept.unlink(missing_ok=True)


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
    """Measure the cells that are left, and tell what came of it.

    Args:
        args: of the command; ``json``, ``resume``, ``compare``, ``minutes`` and ``picture`` are read here.
        settings: what the run is described by in the file.
        cells: those asked for.
        measure: a cell.
        to_json: of what was measured; its ``rows`` have ``failed``.
        show: prints a result as soon as it is there.
        order: names of all cells of the suite, for the file.
        summary: prints all results at the end.
        minutes: without ``--minutes``, begin no cell after so long.
        long: whether stderr is told of every cell where it is no terminal, and unfinished runs are kept without ``--json``.

    Returns:
        The exit status: 0; 1 when a peer's outputs disagreed or it raised; 2 when there is nothing to compare with; 3 when
        ours is slower than in the file of ``--compare``.
    """
    old: dict[str, Any] | None = None
    if args.compare:
        try:
            old = comparison.load(args.compare, settings)
        except comparison.IncomparableError as reason:
            print(f"--compare {args.compare}: {reason}", file=sys.stderr)
            return EXIT_USAGE
    path = Path(args.json) if args.json else None
    done = finished_cells(path, settings) if path and args.resume else []
    # What stands in the file and was not asked for stays in it.
    known = {cell["name"] for cell in done}
    left = [cell for cell in cells if cell.name not in known]
    results: dict[str, Any] = {"schema": report.SCHEMA, **settings, "cells": done}
    if len(left) < len(cells):
        print(f"{len(cells) - len(left)} of {len(cells)} cells are in {path} already", file=sys.stderr)
    begun, budget = time.monotonic(), args.minutes or minutes
    with _kept(path, results, wanted=long) as keep, report.progress(len(left), in_pipes=long) as advance:
        for cell in left:
            if budget and time.monotonic() - begun > 60 * budget:
                print(f"stopped after {budget:g} minutes; --resume goes on with {cell.name}", file=sys.stderr)
                break
            advance(cell.name)
            result = measure(cell)
            results["cells"].append(to_json(result))
            keep()
            show(result)
    rank = {name: index for index, name in enumerate(order)}
    results["cells"].sort(key=lambda cell: rank.get(cell["name"], len(rank)))
    if path:
        write(path, results)
    summary(results)
    if args.picture:
        from fusedonemoe.bench.picture import draw

        draw(args.picture, results)
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
    long: bool = False,
) -> int:
    """Choose the cells asked for, say what they are measured with, and measure them on so many threads as were asked for.

    Args:
        args: of the command; ``suite``, ``cells``, ``peers`` and ``threads`` are read here.
        everything: all cells of the suite.
        measure: as of :func:`run_cells`.
        to_json: likewise.
        show: likewise.
        peers: names of those who compute a cell, for a suite that takes ``--peers``.
        summary: as of :func:`run_cells`.
        described: what the file says of the run beside versions and machine.
        long: as of :func:`run_cells`.

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
        return run_cells(
            args, settings, cells, measure=measure, to_json=to_json, show=show, order=order, summary=summary, long=long
        )
