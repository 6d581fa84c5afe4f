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
from typing import Any, TypeVar

from fusedonemoe import files
from fusedonemoe.bench import comparison, records, report
from fusedonemoe.bench.records import DamagedError
from fusedonemoe.bench.timing import threads
from fusedonemoe.bench.workloads import Named
from fusedonemoe.files import reason_of

EXIT_DISAGREE = 1
EXIT_USAGE = 2
EXIT_SLOWER = 3
# Settings that two runs must share before the cells of one may replace those of the other.
IDENTITY = ("schema", "suite", "dry", "versions", "cpu", "cpu_capability", "threads", "gpu", "peers", "impl", "allocators")


C = TypeVar("C", bound=Named)
R = TypeVar("R")


def matching(option: str, names: Sequence[str], pattern: re.Pattern[str] | None) -> list[str]:
    """Return the names that match the pattern of an option, None for all; where none does, print them on stderr."""
    found = [name for name in names if pattern is None or pattern.search(name)]
    if not found and pattern is not None:
        print(f"{option} {pattern.pattern!r} matches none of\n  " + "\n  ".join(names), file=sys.stderr)
    return found


def has_failed(cell: dict[str, Any]) -> bool:
    """Tell whether a peer's answer was off, or it raised."""
    return any(row["failed"] for row in cell["rows"])


def finished_cells(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of an earlier run with the same settings in which nothing failed; the file need not exist.

    A DamagedError says that the path holds something else, which must not be lost.
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


@contextmanager
def _kept(path: Path | None, results: dict[str, Any], *, wanted: bool) -> Iterator[Callable[[bool], None]]:
    """Keep the results of a run in a file; without a path in a temporary one, if that is wanted.

    A pipe or a device gets them once, when the run ends. Where two runs write one file, it has all cells of the run that wrote
    last and none of the other; a run that finds the other's version prints a message.

    Yields:
        A function that writes the results so far; its argument is true at the end of the run.
    """
    temporary: Path | None = None
    if path is None and wanted:
        try:
            descriptor, name = tempfile.mkstemp(prefix="fusedonemoe-bench-", suffix=".json")
            os.close(descriptor)
            temporary = Path(name)
        except OSError as error:
            print(f"cells that are finished before an interruption will be lost: {reason_of(error)}", file=sys.stderr)
    target = path or temporary
    once = target is not None and files.is_stream(target)
    in_file, seen, told = len(results["cells"]), files.stamp_of(target) if target else None, False

    def keep(last: bool) -> None:
        nonlocal in_file, seen, told
        if target is None or (once and not last):
            return
        found, expected = files.stamp_of(target), seen
        seen = files.write(target, (json.dumps(results, indent=1) + "\n").encode())
        in_file = len(results["cells"])
        if not (once or told or found in (None, expected)):
            told = True
            print(f"another program has written {target} too; now it has the cells of this run alone", file=sys.stderr)

    try:
        yield keep
    except BaseException as error:
        if len(results["cells"]) > in_file and not isinstance(error, files.UnwritableError | BrokenPipeError):
            keep(True)
        if target and in_file:
            hint = "; --resume goes on from there" if path and not once else ""
            print(f"the {in_file} finished cells are in {target}{hint}", file=sys.stderr)
            temporary = None  # stays
        raise
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def _before(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the results of ``--compare`` and the finished cells of ``--json``; raise where a file cannot be read or written."""
    try:
        old = comparison.load(args.compare, settings) if args.compare else None
    except DamagedError as reason:
        raise DamagedError(f"--compare {files.shown(args.compare)}: {reason}") from reason
    try:
        done = finished_cells(args.json, settings) if args.json and args.resume else []
    except DamagedError as reason:
        raise DamagedError(f"--resume {files.shown(args.json)}: {reason}; nothing was changed in it") from reason
    if args.json:
        files.check(args.json)
    if args.picture:
        from fusedonemoe.bench import picture  # only now: it imports an extra

        picture.check(args.picture)
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
    summarised: bool = False,
    minutes: float | None = None,
    long: bool = False,
) -> int:
    """Measure the cells that are left, print them and write them.

    Args:
        args: of the command; ``json``, ``resume``, ``compare``, ``minutes`` and ``picture`` are read here.
        settings: the description of the run in the file.
        cells: those asked for.
        measure: returns the result of a cell, which ``show`` prints at once.
        to_json: turns a result into plain values; its ``rows`` have ``failed``.
        order: names of all cells of the suite, for the file.
        summarised: print a table of all cells at the end.
        minutes: without ``--minutes``, begin no cell after so long.
        long: print a line for every cell on stderr where it is no terminal, and keep unfinished runs without ``--json``.

    Returns:
        The exit status, as :func:`fusedonemoe.bench.run`; 2 when a file cannot be read, compared with or written.
    """
    begun, budget = time.monotonic(), args.minutes or minutes
    rank = {name: index for index, name in enumerate(order)}
    try:
        old, done = _before(args, settings)
        # Cells of the file that were not asked for stay in it.
        known = {cell["name"] for cell in done}
        left = [cell for cell in cells if cell.name not in known]
        results: dict[str, Any] = {"schema": report.SCHEMA, **settings, "cells": done}
        if len(left) < len(cells):
            print(f"{len(cells) - len(left)} of {len(cells)} cells are in {args.json} already", file=sys.stderr)
        with _kept(args.json, results, wanted=long) as keep, report.progress(len(left), in_pipes=long) as advance:
            for cell in left:
                if budget and time.monotonic() - begun > 60 * budget:
                    print(f"stopped after {budget:g} minutes; --resume goes on with {cell.name}", file=sys.stderr)
                    break
                advance(cell.name)
                result = measure(cell)
                results["cells"].append(to_json(result))
                keep(False)
                show(result)
            results["cells"].sort(key=lambda cell: rank.get(cell["name"], len(rank)))
            keep(True)
        if summarised:
            report.console().print(report.summary_of(results), highlight=False)
        if args.picture:
            from fusedonemoe.bench.picture import draw

            draw(args.picture, results)
    except (DamagedError, files.UnwritableError) as reason:
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
    peers: Callable[[C], Iterable[str]] | None = None,
    described: Mapping[str, Any] | None = None,
    **options: Any,
) -> int:
    """Choose the cells asked for, print the machine, and measure them with :func:`run_cells` on the threads asked for.

    Args:
        args: of the command.
        everything: all cells of the suite.
        peers: names of the peers of a cell, for a suite that takes ``--peers``.
        described: further settings of the run, for the file.
        options: of :func:`run_cells`, which also says what the exit status is; 2 if a pattern matches nothing.
    """
    order = [cell.name for cell in everything]
    names = matching("--cells", order, args.cells)
    cells = [cell for cell in everything if cell.name in names]
    if not cells or (peers and not matching("--peers", sorted({name for c in cells for name in peers(c)}), args.peers)):
        return EXIT_USAGE
    with threads(args.threads):
        settings = report.describe_run(suite=args.suite, peers=args.peers) | dict(described or {})
        report.print_heading(settings)
        return run_cells(args, settings, cells, order=order, **options)
