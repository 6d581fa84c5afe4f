"""The tables of the page: machine and versions, ratios as a heat map, and every figure."""

import math
from collections.abc import Callable, Sequence
from html import escape

from fusedonemoe.bench.peers import OURS
from fusedonemoe.bench.report import floors, megabytes, milliseconds, number
from fusedonemoe.report.runs import Cell, Row, Run, peers_of, times_ours

# A ratio this large, or its inverse, has the strongest colour.
STRONGEST = 10.0
FASTER, SLOWER = (11, 92, 173), (185, 58, 6)


def region(table: str, label: str) -> str:
    """A table that scrolls by itself where it is wider than the page, with the keyboard as well."""
    return f'<div class="wide" role="region" aria-label="{escape(label)}" tabindex="0">{table}</div>'


def settings(run: Run) -> str:
    """Make the table of a run's machine, versions and date."""
    given, gpu = run.settings, run.settings.get("gpu")
    versions = ", ".join(f"{name} {number}" for name, number in given.get("versions", {}).items() if number)
    facts = {
        "suite": given["suite"],
        "date": given["date"],
        "processor": f"{given.get('cpu', '?')} ({given.get('cpu_capability', '?')})",
        "threads": f"{given.get('threads', '?')} on {given.get('cores', '?')} cores",
        **({"GPU": gpu["name"]} if gpu else {}),
        "versions": versions,
        "cells": str(len(run.cells)),
    }
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{escape(str(value))}</td></tr>' for name, value in facts.items())
    return f"<table><caption>{escape(run.name)}: what was measured on</caption><tbody>{rows}</tbody></table>"


def _colour(ratio: float) -> str:
    """Return the colours of a ratio: blue where ours is faster, red where it is slower, and black or white text."""
    share = min(abs(math.log(ratio)) / math.log(STRONGEST), 1.0)
    strong = FASTER if ratio >= 1 else SLOWER
    mixed = [round(255 + (channel - 255) * share) for channel in strong]
    red, green, blue = ((c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in mixed)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    # Black and white are equally well read where (L + 0.05)^2 is 0.05 * 1.05.
    text = "#000" if (luminance + 0.05) ** 2 > 0.0525 else "#fff"
    return f"background:rgb({mixed[0]},{mixed[1]},{mixed[2]});color:{text}"


def heat_map(run: Run) -> str:
    """Make the table of every peer's time in multiples of ours, cell by cell; nothing where ours is alone."""
    peers = [peer for peer in peers_of(run.cells) if peer != OURS]
    compared = [(cell["name"], ratios) for cell in run.cells if (ratios := times_ours(cell))]
    if not compared:
        return ""
    body = [(escape(name), *(_ratio(ratios.get(peer)) for peer in peers)) for name, ratios in compared]
    caption = f"{run.name}: time in multiples of ours. Blue above 1: ours is faster. Red below 1: ours is slower."
    return region(_table(caption, ("cell", *peers), body, kind=' class="heat"'), f"ratios of {run.name}")


def _ratio(value: float | None) -> str:
    if value is None:
        return '<td class="none">-</td>'
    return f'<td style="{_colour(value)}">{value:{".2f" if value < 10 else ".0f"}}</td>'


def _times_ours(cell: Cell, row: Row) -> str:
    return number(1.0 if row["peer"] == OURS and row.get("seconds") else times_ours(cell).get(row["peer"]))


def _millions(cell: Cell, name: str) -> str:
    return number(cell[name] / 1e6 if cell.get(name) else None, ".3g")


COLUMNS: dict[str, Callable[[Cell, Row], str]] = {
    "p50 ms": lambda cell, row: milliseconds(row.get("seconds")),
    "p95 ms": lambda cell, row: milliseconds(row.get("p95_seconds")),
    "p99 ms": lambda cell, row: milliseconds(row.get("p99_seconds")),
    "tokens/s": lambda cell, row: number(row.get("tokens_per_second"), ",.0f"),
    "x floor": lambda cell, row: number(floors(row, cell.get("floor_seconds"))),
    "MFU": lambda cell, row: number(row.get("mfu"), ".1%"),
    "x ours": _times_ours,
    "error": lambda cell, row: number(row.get("error"), ".1e"),
    "peak MB": lambda cell, row: megabytes(row.get("peak_bytes")),
    "held MB": lambda cell, row: megabytes(row.get("held_bytes")),
    "success": lambda cell, row: number(row.get("success_rate"), ".1%"),
    "note": lambda cell, row: escape(row.get("note") or ""),
}
WORK: dict[str, Callable[[Cell], str]] = {
    "published at": lambda cell: escape(cell.get("published") or ""),
    "GFLOP": lambda cell: number(cell["flops"] / 1e9 if cell.get("flops") else None, ".3g"),
    "M parameters": lambda cell: _millions(cell, "parameters"),
    "M active": lambda cell: _millions(cell, "active_parameters"),
    "floor ms": lambda cell: milliseconds(cell.get("floor_seconds")),
    "bound by": lambda cell: escape(cell.get("floor_bound_by") or ""),
}


def _table(caption: str, headings: Sequence[str], rows: Sequence[tuple[str, ...]], kind: str = "") -> str:
    """Make a table whose first column names its rows, without columns that are empty throughout; cells are text or ``<td>``."""
    kept = [0, *(n for n in range(1, len(headings)) if any(row[n] for row in rows))]
    head = "".join(f'<th scope="col">{escape(headings[n])}</th>' for n in kept)
    body = ""
    for row in rows:
        cells = (row[n] if row[n].startswith("<td") else f"<td>{row[n]}</td>" for n in kept[1:])
        body += f'<tr><th scope="row">{row[0]}</th>{"".join(cells)}</tr>'
    return f"<table{kind}><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figures(run: Run) -> str:
    """Make the tables of every row of every cell, and of the work of each cell."""
    work = [(escape(cell["name"]), *(show(cell) for show in WORK.values())) for cell in run.cells]
    rows = [
        (escape(cell["name"]), escape(row["peer"]), *(show(cell, row) for show in COLUMNS.values()))
        for cell in run.cells
        for row in cell["rows"]
    ]
    every = _table(f"{run.name}: every peer in every cell", ("cell", "peer", *COLUMNS), rows)
    asked = _table(f"{run.name}: work of a call", ("cell", *WORK), work)
    return region(every, f"figures of {run.name}") + region(asked, f"work of {run.name}")
