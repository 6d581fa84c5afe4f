"""Small line charts as SVG, drawn at about the width of a telephone so that their text needs no zoom there."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 44
# Every colour has a contrast of 4.5 and more on white, and every line a marker of its own.
OUR_COLOURS = ("#b93a06", "#8f5a00", "#a3125a")
COLOURS = ("#0b5cad", "#00695c", "#6a1b9a", "#4e342e", "#37474f", "#2e6b1f", "#1a237e", "#7b1fa2", "#006064", "#5d4037")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "bar")
FLOOR_COLOUR = "#222222"
LEAST_PIXELS = 30.0  # between the labels of two ticks


@dataclass(frozen=True)
class Style:
    """The style of a line."""

    colour: str  # of line and markers
    marker: str = ""  # one of ``MARKERS``, or empty
    width: float = 1.6  # of the line
    dashes: str = ""  # of the line, as SVG has them; empty for a whole one

    def path(self, d: str) -> str:
        """Return a line along an SVG path."""
        dashes = f' stroke-dasharray="{self.dashes}"' if self.dashes else ""
        return f'<path d="{d}" fill="none" stroke="{self.colour}" stroke-width="{self.width}"{dashes}/>'


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str  # in the legend
    points: tuple[tuple[float, float], ...]  # of x and y
    style: Style


@dataclass(frozen=True)
class Axis:
    """One axis."""

    label: str  # what it shows, with the unit
    logarithmic: bool = True  # or linear from zero
    show: Callable[[float], str] = lambda value: f"{value:g}"  # of a tick's value
    at: tuple[float, ...] = ()  # values that have ticks; chosen where there are none


def style_of(index: int, *, ours: bool) -> Style:
    """The style of a peer."""
    colours = OUR_COLOURS if ours else COLOURS
    return Style(colours[index % len(colours)], MARKERS[(index + (not ours)) % len(MARKERS)], 2.6 if ours else 1.6)


def marker(style: Style, x: float, y: float, size: float = 3.6) -> str:
    """A marker as an SVG element; nothing for a style without one."""
    fill = f'fill="{style.colour}"'
    stroke = f'stroke="{style.colour}" stroke-width="1.8"'
    left, right, up, down = x - size, x + size, y - size, y + size
    return {
        "": "",
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" {fill}/>',
        "square": f'<rect x="{left:.1f}" y="{up:.1f}" width="{2 * size:.1f}" height="{2 * size:.1f}" {fill}/>',
        "triangle": f'<path d="M{x:.1f} {up:.1f}L{right:.1f} {down:.1f}L{left:.1f} {down:.1f}Z" {fill}/>',
        "diamond": f'<path d="M{x:.1f} {up:.1f}L{right:.1f} {y:.1f}L{x:.1f} {down:.1f}L{left:.1f} {y:.1f}Z" {fill}/>',
        "cross": f'<path d="M{left:.1f} {up:.1f}L{right:.1f} {down:.1f}M{left:.1f} {down:.1f}L{right:.1f} {up:.1f}" {stroke}/>',
        "bar": f'<path d="M{x:.1f} {up - 1:.1f}V{down + 1:.1f}" {stroke}/>',
    }[style.marker]


def legend(lines: Iterable[Line]) -> str:
    """Return the names of lines with a piece of each, as an HTML list."""
    items = []
    for line in lines:
        drawn = line.style.path("M0 7H26") + marker(line.style, 13, 7)
        sample = f'<svg width="26" height="14" viewBox="0 0 26 14" aria-hidden="true">{drawn}</svg>'
        items.append(f"<li>{sample} {escape(line.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Scale:
    """From values to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        self.low, self.high = 0.0, max(values) * (1.0 if axis.at else 1.06) or 1.0
        if axis.logarithmic:
            # A line along the edge would be half a line, and a single value has no span.
            pad = max((max(values) / min(values)) ** 0.04, 1.05)
            self.low, self.high = min(values) / pad, max(values) * pad

    def __call__(self, value: float) -> float:
        if self.axis.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Values with labels that do not touch."""
        kept: list[float] = []
        for value in self.axis.at or self._round_values():
            inside = self.low <= value <= self.high * (1 + 1e-9)
            if inside and all(abs(self(value) - self(other)) >= LEAST_PIXELS for other in kept):
                kept.append(value)
        return kept

    def _round_values(self) -> list[float]:
        if not self.axis.logarithmic:
            step = 10 ** math.floor(math.log10(self.high))
            while self.high / step < 3:
                step /= 2
            return [step * n for n in range(int(self.high / step) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        tens = [10.0**power for power in powers]
        # Powers of ten come first: a value between them is left out where its label would touch.
        return tens + [ten * factor for factor in (2, 5, 3) for ten in tens]


def chart(lines: Sequence[Line], x: Axis, y: Axis, *, title: str, description: str, name: str) -> str:
    """Draw lines with at least one point each as an SVG element; ``name`` is an id that no other chart of the page has.

    The title is read aloud and shown next to the mouse; the description is the picture in words and numbers.
    """
    across = _Scale(x, [px for line in lines for px, _ in line.points], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [py for line in lines for _, py in line.points], HEIGHT - BOTTOM, TOP)
    parts = []
    for value in up.ticks():
        at = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(y.show(value))}</text>')
    for value in across.ticks():
        at = across(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{escape(x.show(value))}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{middle_x:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    turned = f'transform="rotate(-90 12 {middle_y:.0f})"'
    parts.append(f'<text x="12" y="{middle_y:.0f}" text-anchor="middle" {turned}>{escape(y.label)}</text>')
    for line in lines:
        pixels = [(across(px), up(py)) for px, py in line.points]
        parts.append(line.style.path("M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in pixels)))
        parts += [marker(line.style, px, py) for px, py in pixels]
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>{"".join(parts)}</svg>'
    )
