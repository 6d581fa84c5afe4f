"""The picture: every peer's time in every cell, in multiples of the floor."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fusedonemoe import files
from fusedonemoe.bench.libraries import ON_CPUS
from fusedonemoe.bench.peers import OURS, is_ours

# Okabe and Ito's colours, which all common forms of colour blindness tell apart; ours have the warm ones to themselves.
OUR_COLOURS = ("#D55E00", "#E69F00", "#F0E442")
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANEL_WIDTH, ROW_HEIGHT, PANEL_MARGIN = 6.4, 0.27, 0.9
# Longer times are drawn at the edge: one that is a thousand times the floor would squeeze all others together.
MOST_SHOWN = 100.0

TITLES = {
    "forward": "forward",
    "recorded": "forward with gradients recorded",
    "training": "forward and backward",
    "decode": "forward in a CUDA graph",
}


def _panel_of(cell: dict[str, Any]) -> tuple[str, str, str]:
    return cell.get("operator", ""), cell.get("mode", "forward"), cell.get("allocator", "default")


def _label(cell: dict[str, Any]) -> str:
    label = cell.get("label") or (f"T{cell['T']} E{cell['E']} K{cell['K']}" if {"T", "E", "K"} <= cell.keys() else cell["name"])
    skew = ", skewed" if cell.get("routing") == "skewed" else ""
    saved = f", save {cell['save_percent']} %" if cell.get("save_percent", 100) != 100 else ""
    return label + skew + saved


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _styles(peers: list[str]) -> dict[str, dict[str, Any]]:
    """Return the style of each peer; peers of the suite for CPUs look the same in every picture."""
    peers = _unique([*(peer.name for peer in ON_CPUS), *peers])
    ours, others = [p for p in peers if is_ours(p)], [p for p in peers if not is_ours(p)]
    styles: dict[str, dict[str, Any]] = {}
    for n, peer in enumerate(ours):
        shape = {"marker": "*", "s": 120, "zorder": 3.5} if peer == OURS else {"marker": "h", "s": 75, "zorder": 3}
        styles[peer] = {"color": OUR_COLOURS[n % len(OUR_COLOURS)], "edgecolors": "black"} | shape
    for n, peer in enumerate(others):
        # Six colours and seven markers have no common divisor, so 42 peers look different.
        style = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]}
        styles[peer] = style | {"s": 34, "zorder": 4, "edgecolors": "white"}
    return styles


def _draw_panel(axes: Axes, cells: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    for line, cell in enumerate(cells):
        axes.axhline(line, color="0.9", linewidth=0.8, zorder=1)
        floor = cell.get("floor_seconds")
        rows = {row["peer"]: row for row in cell["rows"] if row.get("seconds") and floor}
        for peer, style in styles.items():
            if row := rows.get(peer):
                style = style | {"linewidths": 0.5}
                if not row.get("comparable", True):  # hollow
                    style |= {"facecolors": "none", "edgecolors": style.pop("color"), "linewidths": 1.0}
                axes.scatter([min(row["seconds"] / floor, MOST_SHOWN)], [line], clip_on=False, **style)
    axes.axvline(1, color="0.35", linewidth=1, zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(right=MOST_SHOWN)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_yticks(range(len(cells)), labels=[_label(cell) for cell in cells])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", which="major", color="0.93", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelbottom=True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _caption(results: dict[str, Any]) -> list[str]:
    """Return the lines below the picture: the machine, and the meaning of special marks."""
    rows = [(row, cell.get("floor_seconds")) for cell in results["cells"] for row in cell["rows"] if row.get("seconds")]
    gpu = results.get("gpu")
    device = gpu["name"] if gpu else f"{results['cpu']} ({results['cpu_capability']}), {results['threads']} threads"
    lines = [f"{device}, torch {results['versions']['torch']}, {results['date'][:10]}"]
    if any(not row.get("comparable", True) for row, _ in rows):
        lines.append("Hollow: wrote no gradients for the experts that no token chose.")
    if any(floor and row["seconds"] > MOST_SHOWN * floor for row, floor in rows):
        lines.append(f"At the right edge: more than {MOST_SHOWN:g} times the floor.")
    return lines


def _format_of(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def check(path: Path) -> None:
    """Check that a picture of this ending can be written, else raise UnwritableError."""
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if _format_of(path) not in known:
        raise files.UnwritableError(f"cannot write {files.shown(path)}: its ending must be one of {', '.join(known)}")
    files.check(path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's ending; raise UnwritableError where it cannot be written."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=_format_of(path))
    files.write(path, drawn.getvalue())


def draw(path: Path, results: dict[str, Any]) -> None:
    """Write the picture of results as they are in a file, as PNG or the format of the path's ending; raise UnwritableError."""
    cells = results["cells"]
    peers = _unique(row["peer"] for cell in cells for row in cell["rows"] if row.get("seconds"))
    styles = _styles(peers)
    panels, dtypes = _unique(map(_panel_of, cells)), _unique(cell.get("dtype", "") for cell in cells)
    several = len({operator for operator, _, _ in panels}) > 1
    shown = {(p, d): [c for c in cells if _panel_of(c) == p and c.get("dtype", "") == d] for p in panels for d in dtypes}
    heights = [max(2, *(len(shown[panel, dtype]) for dtype in dtypes)) * ROW_HEIGHT + PANEL_MARGIN for panel in panels]
    # Without pyplot: no window system is asked for, and nothing global stays behind.
    figure = Figure(figsize=(PANEL_WIDTH * max(len(dtypes), 1), sum(heights) + 2.0), layout="constrained")
    grid = figure.subplots(len(panels), len(dtypes), squeeze=False, sharex=True, height_ratios=heights)
    for row, panel in enumerate(panels):
        for column, dtype in enumerate(dtypes):
            axes = grid[row][column]
            if not shown[panel, dtype]:
                axes.set_axis_off()
                continue
            _draw_panel(axes, shown[panel, dtype], styles)
            operator, mode, allocator = panel
            title = f"{operator + ', ' if several else ''}{TITLES.get(mode, mode)}, {dtype}"
            axes.set_title(title + (", huge pages" if allocator != "default" else ""), fontsize=11, loc="left")
    for axes in filter(lambda axes: axes.axison, grid[-1]):
        axes.set_xlabel("time in multiples of the floor (1 is the least this machine needs)")
    handles = [grid[0][0].scatter([], [], label=peer, linewidths=0.5, **styles[peer]) for peer in styles if peer in peers]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(dtypes), frameon=False)
    figure.suptitle("\n".join(_caption(results)), fontsize=10)
    save(figure, path)
