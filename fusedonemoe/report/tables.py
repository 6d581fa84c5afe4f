"""The tables of the page: machine and versions, ratios as a heat map, and every figure."""

import math
from collections.abc import Callable, Sequence
from html import escape

from fusedonemoe.bench.peers import OURS
from fusedonemoe.bench.report import milliseconds
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
    compared = [(cell, ratios) for cell in run.cells if (ratios := times_ours(cell))]
    if not compared:
        return ""
    head = "".join(f'<th scope="col">{escape(peer)}</th>' for peer in peers)
    body = []
    for cell, ratios in compared:
        shown = "".join(
            f'<td style="{_colour(ratios[peer])}">{_ratio(ratios[peer])}</td>' if peer in ratios else '<td class="none">-</td>'
            for peer in peers
        )
        body.append(f'<tr><th scope="row">{escape(cell["name"])}</th>{shown}</tr>')
    caption = f"{escape(run.name)}: time in multiples of ours. Blue above 1: ours is faster. Red below 1: ours is slower."
    table = (
        f'<table class="heat"><caption>{caption}</caption><thead><tr><th scope="col">cell</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )
    return region(table, f"ratios of {run.name}")


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _megabytes(size: int | None) -> str:
    return _number(None if size is None else size / 1e6, ".1f")


def _milliseconds(seconds: float | None) -> str:
    return milliseconds(seconds) if seconds else ""


def _floors(cell: Cell, row: Row) -> str:
    # A row that reads other weights than its neighbours has a floor of its own.
    floor = row.get("floor_seconds") or cell.get("floor_seconds")
    return f"{row['seconds'] / floor:.2f}" if row.get("seconds") and floor else ""


def _times_ours(cell: Cell, row: Row) -> str:
    ratio = 1.0 if row["peer"] == OURS and row.get("seconds") else times_ours(cell).get(row["peer"])
    return _number(ratio, ".2f")


COLUMNS: dict[str, Callable[[Cell, Row], str]] = {
    "p50 ms": lambda cell, row: _milliseconds(row.get("seconds")),
    "p95 ms": lambda cell, row: _milliseconds(row.get("p95_seconds")),
    "p99 ms": lambda cell, row: _milliseconds(row.get("p99_seconds")),
    "tokens/s": lambda cell, row: _number(row.get("tokens_per_second"), ",.0f"),
    "x floor": _floors,
    "x ours": _times_ours,
    "error": lambda cell, row: _number(row.get("error"), ".1e"),
    "peak MB": lambda cell, row: _megabytes(row.get("peak_bytes")),
    "held MB": lambda cell, row: _megabytes(row.get("held_bytes")),
    "success": lambda cell, row: _number(row.get("success_rate"), ".1%"),
    "note": lambda cell, row: escape(row.get("note") or ""),
}
WORK: dict[str, Callable[[Cell], str]] = {
    "published at": lambda cell: escape(cell.get("published") or ""),
    "GFLOP": lambda cell: _number(cell["flops"] / 1e9 if cell.get("flops") else None, ".3g"),
    "M parameters": lambda cell: _number(cell["parameters"] / 1e6 if cell.get("parameters") else None, ".3g"),
    "M active": lambda cell: _number(cell["active_parameters"] / 1e6 if cell.get("active_parameters") else None, ".3g"),
    "floor ms": lambda cell: _milliseconds(cell.get("floor_seconds")),
    "bound by": lambda cell: escape(cell.get("floor_bound_by") or ""),
}


def _table(caption: str, headings: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """A table whose first column names its rows; columns that are empty throughout are left out."""
    kept = [0, *(n for n in range(1, len(headings)) if any(row[n] for row in rows))]
    head = "".join(f'<th scope="col">{escape(headings[n])}</th>' for n in kept)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{row[n]}</td>" for n in kept[1:])}</tr>' for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figures(run: Run) -> str:
    """Make the tables of every row of every cell, and of the work of each cell."""
    work = [(escape(cell["name"]), *(show(cell) for show in WORK.values())) for cell in run.cells]
    rows = []
    for cell in run.cells:
        for row in cell["rows"]:
            names = (escape(cell["name"]), escape(row["peer"]))
            rows.append((*names, *(show(cell, row) for show in COLUMNS.values())))
    every = _table(f"{run.name}: every peer in every cell", ("cell", "peer", *COLUMNS), rows)
    asked = _table(f"{run.name}: work of a call", ("cell", *WORK), work)
    return region(every, f"figures of {run.name}") + region(asked, f"work of {run.name}")
