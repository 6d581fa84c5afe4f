"""The pictures of the page: latency against tokens, memory against the dial, scaling, and how experts are used."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import count

from fusedonemoe.bench.peers import OURS, is_ours
from fusedonemoe.report.runs import Cell, Row, Run, compared, families, peers_of, title_of
from fusedonemoe.report.svg import COLOURS, FLOOR_COLOUR, Axis, Line, Style, chart, legend, style_of

# Of many pictures the first are shown, and the others are a click away.
SHOWN = 8
FLOOR = Style(FLOOR_COLOUR, width=1.6, dashes="6 4")
LOAD = Style(COLOURS[0], width=2.0)
EVEN = Style(FLOOR_COLOUR, width=1.2, dashes="2 3")
MILLISECONDS = Axis("time in ms")
QUARTERS = (0.0, 25.0, 50.0, 75.0, 100.0)

Figure = str


class Album:
    """Numbers the pictures of a page."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def figure(self, lines: Sequence[Line], x: Axis, y: Axis, title: str, description: str) -> Figure:
        """A picture with its title below and the names of its lines."""
        drawn = chart(lines, x, y, title=title, description=description, name=f"p{next(self._numbers)}")
        return f"<figure>{drawn}<figcaption>{escape(title)}{legend(lines)}</figcaption></figure>"


def grid(figures: Sequence[Figure]) -> str:
    """Pictures side by side; of many, the later ones folded away."""
    html = f'<div class="panels">{"".join(figures[:SHOWN])}</div>'
    if rest := figures[SHOWN:]:
        html += f'<details><summary>{len(rest)} more</summary><div class="panels">{"".join(rest)}</div></details>'
    return html


def _against(album: Album, run: Run, along: str, label: str) -> list[Figure]:
    """Draw times of cells that differ in one size, with the floor."""
    # A peer looks the same in all pictures of a run.
    peers, figures = peers_of(run.cells), []
    styles = {p: style_of(n, ours=mine) for mine in (True, False) for n, p in enumerate(p for p in peers if is_ours(p) == mine)}
    for cells in families(run.cells, along):
        points: dict[str, dict[float, float]] = {name: {} for name in ("floor", *styles)}
        for cell in cells:
            if floor := cell.get("floor_seconds"):
                points["floor"][float(cell[along])] = floor * 1e3
            for row in compared(cell):
                points[row["peer"]].setdefault(float(cell[along]), row["seconds"] * 1e3)
        drawn = [Line(name, tuple(at.items()), styles.get(name, FLOOR)) for name, at in points.items() if at]
        told = [
            f"{line.name} {first[1]:.3g} ms at {first[0]:g}, {last[1]:.3g} ms at {last[0]:g}"
            for line in drawn
            for first, last in [(line.points[0], line.points[-1])]
        ]
        x = Axis(label, at=tuple(float(cell[along]) for cell in cells))
        description = f"Median time against {label}, both axes logarithmic: {'; '.join(told)}."
        figures.append(album.figure(drawn, x, MILLISECONDS, title_of(cells[0], along), description))
    return figures


def latency(album: Album, run: Run) -> list[Figure]:
    """Draw time against tokens."""
    return _against(album, run, "T", "tokens T")


def scaling(album: Album, run: Run) -> list[Figure]:
    """Draw time against the number of experts, and against those of a token."""
    return [*_against(album, run, "E", "experts E"), *_against(album, run, "K", "experts per token K")]


def memory(album: Album, run: Run) -> list[Figure]:
    """Draw the bytes that a training step holds, and its peak, against ``save_percent``."""
    figures = []
    for cell in run.cells:
        rows = [row for row in cell["rows"] if row.get("save_percent") is not None and row.get("held_bytes")]
        if len(rows) > 1:
            peers = [row for row in cell["rows"] if row.get("held_bytes") and row.get("save_percent") is None]
            figures.append(_dial(album, title_of(cell), rows, peers))
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in run.cells:  # those that differ in ``save_percent`` alone are one picture
        if "save_percent" in cell and any(row["peer"] == OURS and row.get("held_bytes") for row in cell["rows"]):
            groups.setdefault(tuple(cell.get(k) for k in ("label", "dtype", "mode", "routing")), []).append(cell)
    for cells in groups.values():
        if len({cell["save_percent"] for cell in cells}) > 1:
            rows = [row | {"save_percent": cell["save_percent"]} for cell in cells for row in cell["rows"] if row["peer"] == OURS]
            peers = [row for row in cells[0]["rows"] if row["peer"] != OURS and row.get("held_bytes")]
            figures.append(_dial(album, title_of(cells[0]), rows, peers))
    return figures


def _dial(album: Album, title: str, rows: Sequence[Row], peers: Sequence[Row]) -> Figure:
    rows = sorted(rows, key=lambda row: row["save_percent"])

    def line(name: str, value: str, style: Style) -> Line:
        return Line(name, tuple((float(row["save_percent"]), row[value] / 1e6) for row in rows if row.get(value)), style)

    def across(name: str, size: float, style: Style) -> Line:
        return Line(name, ((0.0, size / 1e6), (100.0, size / 1e6)), style)

    ours = style_of(0, ours=True)
    lines = [line("fusedonemoe, held", "held_bytes", ours), line("fusedonemoe, formula", "formula_bytes", FLOOR)]
    lines.append(line("fusedonemoe, peak of the step", "peak_bytes", Style(ours.colour, "diamond", 1.4, "3 3")))
    for index, peer in enumerate(peers):
        style = style_of(index, ours=False)
        lines.append(across(f"{peer['peer']}, held", peer["held_bytes"], style))
        if peak := peer.get("peak_bytes"):
            lines.append(across(f"{peer['peer']}, peak of the step", peak, replace(style, width=1.4, dashes="3 3")))
    lines = [line for line in lines if line.points]
    told = "; ".join(f"{line.name} {line.points[0][1]:.3g} MB at 0 %, {line.points[-1][1]:.3g} MB at 100 %" for line in lines)
    x = Axis("save_percent", logarithmic=False, at=QUARTERS)
    return album.figure(lines, x, Axis("megabytes", logarithmic=False), title, f"Memory of a training step: {told}.")


def usage(album: Album, run: Run) -> list[Figure]:
    """Draw the rows of each expert; cells with the same routing are one picture."""
    seen: dict[tuple[float, ...], Cell] = {}
    for cell in run.cells:
        load = tuple(cell.get("load") or ())
        if len(load) > 1 and load[0] > 0:
            seen.setdefault(load, cell)
    figures = []
    for load, cell in seen.items():
        points = tuple((100 * rank / (len(load) - 1), value) for rank, value in enumerate(load))
        lines = [Line("rows of an expert", points, LOAD), Line("even", ((0.0, 1.0), (100.0, 1.0)), EVEN)]
        title = f"{cell['name']}: {cell.get('experts_hit', 0):.0f} of {cell.get('E', '?')} experts hit"
        middle = load[len(load) // 2]
        told = f"Times the mean: the busiest expert {load[0]:.2f}, the middle one {middle:.2f}, the idlest {load[-1]:.2f}."
        x = Axis("experts, the busiest first, %", logarithmic=False, at=QUARTERS)
        figures.append(album.figure(lines, x, Axis("rows / mean", logarithmic=False), title, told))
    return figures
