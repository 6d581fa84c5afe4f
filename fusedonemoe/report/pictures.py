"""The pictures of the page: latency against tokens, memory against the dial, scaling, and how experts are used."""

from collections.abc import Callable, Iterator, Sequence
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
MILLISECONDS = Axis("time in ms", show=lambda value: f"{value:g}")

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


def styles_of(peers: Sequence[str]) -> dict[str, Style]:
    """Return the style of each peer of a run: a peer looks the same in all its pictures."""
    ours, others = ([p for p in peers if is_ours(p) == mine] for mine in (True, False))
    return {p: style_of(n, ours=True) for n, p in enumerate(ours)} | {p: style_of(n, ours=False) for n, p in enumerate(others)}


def _points(cells: Sequence[Cell], along: str, value: Callable[[Cell], float | None]) -> tuple[tuple[float, float], ...]:
    return tuple((float(cell[along]), found) for cell in cells if (found := value(cell)))


def _seconds(cell: Cell, peer: str) -> float | None:
    return next((row["seconds"] * 1e3 for row in compared(cell) if row["peer"] == peer), None)


def _floor(cell: Cell) -> float | None:
    floor = cell.get("floor_seconds")
    return floor * 1e3 if floor else None


def _against(album: Album, run: Run, along: str, label: str) -> Iterator[Figure]:
    """Draw times of cells that differ in one size, with the floor."""
    styles = styles_of(peers_of(run.cells))
    for cells in families(run.cells, along):
        lines = [Line(peer, _points(cells, along, lambda cell, peer=peer: _seconds(cell, peer)), styles[peer]) for peer in styles]  # type: ignore[misc]
        floor = Line("floor", _points(cells, along, _floor), FLOOR)
        drawn = [line for line in (floor, *lines) if line.points]
        title = title_of(cells[0], along)
        told = [
            f"{line.name} {first[1]:.3g} ms at {first[0]:g}, {last[1]:.3g} ms at {last[0]:g}"
            for line in drawn
            for first, last in [(line.points[0], line.points[-1])]
        ]
        x = Axis(label, at=tuple(float(cell[along]) for cell in cells))
        yield album.figure(
            drawn, x, MILLISECONDS, title, f"Median time against {label}, both axes logarithmic: {'; '.join(told)}."
        )


def latency(album: Album, run: Run) -> list[Figure]:
    """Draw time against tokens."""
    return list(_against(album, run, "T", "tokens T"))


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
    for cells in _dialled(run.cells):
        rows = [row | {"save_percent": cell["save_percent"]} for cell in cells for row in cell["rows"] if row["peer"] == OURS]
        peers = [row for row in cells[0]["rows"] if row["peer"] != OURS and row.get("held_bytes")]
        figures.append(_dial(album, title_of(cells[0]), rows, peers))
    return figures


def _dialled(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Yield groups of training cells that differ in ``save_percent`` alone."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        if "save_percent" in cell and any(row["peer"] == OURS and row.get("held_bytes") for row in cell["rows"]):
            groups.setdefault(tuple(cell.get(k) for k in ("label", "dtype", "mode", "routing")), []).append(cell)
    return (group for group in groups.values() if len({cell["save_percent"] for cell in group}) > 1)


def _dial(album: Album, title: str, rows: Sequence[Row], peers: Sequence[Row]) -> Figure:
    rows = sorted(rows, key=lambda row: row["save_percent"])

    def line(name: str, value: str, style: Style) -> Line:
        return Line(name, tuple((float(row["save_percent"]), row[value] / 1e6) for row in rows if row.get(value)), style)

    ours = style_of(0, ours=True)
    lines = [line("fusedonemoe, held", "held_bytes", ours), line("fusedonemoe, formula", "formula_bytes", FLOOR)]
    lines.append(line("fusedonemoe, peak of the step", "peak_bytes", Style(ours.colour, "diamond", 1.4, "3 3")))
    for index, peer in enumerate(peers):
        style = style_of(index, ours=False)
        lines.append(Line(f"{peer['peer']}, held", tuple((p, peer["held_bytes"] / 1e6) for p in (0.0, 100.0)), style))
        if peak := peer.get("peak_bytes"):
            dotted = Style(style.colour, style.marker, 1.4, "3 3")
            lines.append(Line(f"{peer['peer']}, peak of the step", ((0.0, peak / 1e6), (100.0, peak / 1e6)), dotted))
    lines = [line for line in lines if line.points]
    told = "; ".join(f"{line.name} {line.points[0][1]:.3g} MB at 0 %, {line.points[-1][1]:.3g} MB at 100 %" for line in lines)
    x = Axis("save_percent", logarithmic=False, at=(0.0, 25.0, 50.0, 75.0, 100.0))
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
        x = Axis("experts, the busiest first, %", logarithmic=False, at=(0.0, 25.0, 50.0, 75.0, 100.0))
        figures.append(album.figure(lines, x, Axis("rows / mean", logarithmic=False), title, told))
    return figures
