"""A directive that shows the committed results of the asv benchmarks. It reads files alone: no git, no asv, no network.

- ``{history} bench_experts``: a picture and a table for every benchmark of a file, at every measured commit.
- ``{history} overview``: a few times in multiples of their newest values, and the commits.
- ``{history} list``: every case with its first and its newest value. ``house.js`` adds a field that filters the rows.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from fusedonemoe.report.pictures import Album
from fusedonemoe.report.svg import Axis, Line, style_of
from fusedonemoe.report.tables import region

ASV = Path(__file__).resolve().parent.parent.parent / "asv_bench"
# For each unit of asv: the quantity, the unit on a page, and its size.
UNITS = {
    "seconds": ("time", "ms", 1e-3),
    "bytes": ("peak memory", "MB", 1e6),
    "relative error": ("relative error", "", 1.0),
    "graphs": ("graphs", "", 1.0),
}
# Benchmark, case, and its name in the overview.
OVERVIEW = (
    ("bench_layers.Eager.time_forward_backward", "cpu, MoE", "MoE layer, forward and backward"),
    ("bench_experts.MLPBlocks.time_forward", "cpu, auto qwen3-30b bfloat16", "experts of Qwen3's widths, forward"),
    ("bench_experts.MLPBlocks.time_forward", "cpu, auto decode bfloat16", "the same with 4 tokens"),
    ("bench_route.Route.time_forward", "cpu, softmax E1024", "routing to 1024 experts"),
    ("bench_compile.Import.timeraw_import", "", "import, compared with torch's"),
)


@dataclass(frozen=True)
class Value:
    """A measured value with its quartiles, which only times have."""

    middle: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Setting:
    """The results of one machine with one set of versions, in the order of their commits."""

    name: str
    commits: tuple[dict[str, Any], ...]


@cache
def benchmarks() -> dict[str, dict[str, Any]]:
    """Return asv's description of every benchmark by its name."""
    found = json.loads((ASV / "results" / "benchmarks.json").read_text(encoding="utf-8"))
    return {name: description for name, description in found.items() if name != "version"}


@cache
def settings() -> tuple[Setting, ...]:
    """Return every setting with results, the one with the most commits first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((ASV / "results").glob("*/*.json")):
        if path.name != "machine.json":
            result = json.loads(path.read_text(encoding="utf-8"))
            versions = (f"{name} {version}" for name, version in result["requirements"].items())
            found.setdefault(", ".join([path.parent.name, f"Python {result['python']}", *versions]), []).append(result)
    ordered = [Setting(name, tuple(sorted(results, key=lambda result: result["date"]))) for name, results in found.items()]
    return tuple(sorted(ordered, key=lambda setting: -len(setting.commits)))


def cases(setting: Setting, benchmark: str, version: str) -> dict[str, list[Value | None]]:
    """Return each case's value at every commit of a setting; None where it was not measured, or by another version."""
    found: dict[str, list[Value | None]] = {}
    for index, result in enumerate(setting.commits):
        row = dict(zip(result["result_columns"], result["results"].get(benchmark, ()), strict=False))
        if row.get("version") != version or not row["result"]:
            continue
        middles, lows, highs = (row.get(name) or itertools.repeat(None) for name in ("result", "stats_q_25", "stats_q_75"))
        combinations = [", ".join(case).replace("'", "") for case in itertools.product(*row["params"])]
        for case, middle, low, high in zip(combinations, middles, lows, highs, strict=False):
            if middle is not None and not math.isnan(middle):
                found.setdefault(case, [None] * len(setting.commits))[index] = Value(middle, low, high)
    return found


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _tick(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 1e-3 else f"{value:g}"


def _written(value: Value | None, scale: float) -> str:
    if value is None:
        return ""
    middle = _number(value.middle / scale)
    if value.low is None or value.high is None:
        return middle
    return f"{middle} <small>({_number(value.low / scale)} to {_number(value.high / scale)})</small>"


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table that scrolls by itself; caption and heads are text, cells are HTML."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows)
    opening = f'<table class="{kind}"><caption>{escape(caption)}</caption>'
    return region(f"{opening}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", caption)


def _points(values: Sequence[Value | None], scale: float) -> tuple[tuple[float, float], ...]:
    return tuple((index, value.middle / scale) for index, value in enumerate(values, start=1) if value)


def _picture(album: Album, setting: Setting, series: dict[str, tuple[tuple[float, float], ...]], title: str, label: str) -> str:
    """Draw a line for each named series over the commits of a setting."""
    lines = [Line(name, points, style_of(index, ours=False)) for index, (name, points) in enumerate(series.items())]
    along = Axis("measured commit, the oldest first", logarithmic=False, at=tuple(map(float, range(1, len(setting.commits) + 1))))
    heights = [y for line in lines for _, y in line.points]
    up = Axis(label, logarithmic=0 < 10 * min(heights) < max(heights), show=_tick)
    ends = [f"{line.name} {_number(line.points[0][1])} at first, {_number(line.points[-1][1])} at last" for line in lines]
    return album.figure(lines, along, up, title, f"{label[:1].upper()}{label[1:]} at the measured commits: {'; '.join(ends)}.")


def _commit(index: int, result: dict[str, Any]) -> str:
    return f"{index + 1} <code>{result['commit_hash'][:8]}</code>"


def shown(album: Album, benchmark: str) -> str:
    """Return the picture and the table of a benchmark in every setting; nothing where no commit has a value."""
    description = benchmarks()[benchmark]
    quantity, unit, scale = UNITS[description["unit"]]
    label = f"{quantity} in {unit}" if unit else quantity
    parts = []
    for setting in settings():
        found = cases(setting, benchmark, description["version"])
        if not found:
            continue
        title = f"{benchmark.partition('.')[2]}, {setting.name}"
        series = {case or benchmark: _points(values, scale) for case, values in found.items()}
        rows = [
            [_commit(index, result), *(_written(values[index], scale) for values in found.values())]
            for index, result in enumerate(setting.commits)
        ]
        values = _table(f"{title}: {label}", ["commit", *series], rows)
        parts.append(_picture(album, setting, series, title, label))
        parts.append(f"<details><summary>Values</summary>{values}</details>")
    return "".join(parts)


def overview(album: Album) -> str:
    """Return the picture of a few times, and the table of the commits, of every setting."""
    lines = (ASV / "milestones.txt").read_text(encoding="utf-8").splitlines()
    known = [line.split(" ", 1) for line in lines if not line.startswith("#")]
    parts = []
    for setting in settings():
        series = {}
        for benchmark, case, name in OVERVIEW:
            found = _points(cases(setting, benchmark, benchmarks()[benchmark]["version"]).get(case, ()), 1.0)
            if found:
                series[name] = tuple((commit, value / found[-1][1]) for commit, value in found)
        if series:
            title = f"A few times on {setting.name}: lower is faster"
            parts.append(_picture(album, setting, series, title, "time in multiples of the newest"))
        rows = []
        for index, result in enumerate(setting.commits):
            day = datetime.fromtimestamp(result["date"] / 1000, UTC).date().isoformat()
            about = next((text for commit, text in known if result["commit_hash"].startswith(commit)), "")
            rows.append([_commit(index, result), day, escape(about)])
        parts.append(_table(f"Commits measured on {setting.name}", ["commit", "date", "change"], rows, "words"))
    return "".join(parts)


def page_of(benchmark: str) -> str:
    """Return the page with the pictures of a benchmark, without its suffix."""
    return f"history/{benchmark.partition('.')[0].removeprefix('bench_').replace('_', '-')}"


def listed() -> str:
    """Return the table of every case, with its first and its newest value in every setting."""
    parts = []
    for setting in settings():
        rows = []
        for benchmark, description in benchmarks().items():
            _, unit, scale = UNITS[description["unit"]]
            link = f'<a href="{page_of(benchmark)}.html#{nodes.make_id(benchmark)}">{escape(benchmark)}</a>'
            for case, values in cases(setting, benchmark, description["version"]).items():
                (_, first), *_, (_, last) = (*_points(values, scale), *_points(values, scale)[-1:])
                change = f"{last / first:.2f}" if first else ""
                rows.append([link, escape(case), _number(first), _number(last), unit or description["unit"], change])
        heads = ["benchmark", "case", "first", "newest", "unit", "newest / first"]
        parts.append(_table(f"Every case on {setting.name}", heads, rows, "searchable"))
    return "".join(parts)


class History(SphinxDirective):
    """A section for every benchmark of a file, the overview, or the list of all cases."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes; a file without results is an error of the build."""
        for path in ASV.glob("results/**/*.json"):
            self.env.note_dependency(str(path))
        # One numbering for a page: the ids of the pictures' titles must differ.
        album = self.env.temp_data.setdefault("album of results", Album())
        assert isinstance(album, Album)
        asked = self.arguments[0]
        if asked == "overview":
            return [_raw(overview(album))]
        if asked == "list":
            return [_raw(listed())]
        sections: list[nodes.Node] = []
        for benchmark in benchmarks():
            family, _, name = benchmark.partition(".")
            if family == asked and (content := shown(album, benchmark)):
                sections.append(nodes.section("", nodes.title("", name), _raw(content), ids=[nodes.make_id(benchmark)]))
        if not sections:
            raise self.error(f"history: asv_bench/results has nothing of {asked}")
        return sections


def _raw(html: str) -> nodes.raw:
    return nodes.raw("", f'<div class="measured history">{html}</div>', format="html")


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("history", History)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
