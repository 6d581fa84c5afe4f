"""The page: one HTML file with its style and pictures inside it, readable on a telephone and by a screen reader."""

from collections.abc import Callable, Sequence
from html import escape

from fusedonemoe import __version__
from fusedonemoe.report.pictures import Album, Figure, grid, latency, memory, scaling, usage
from fusedonemoe.report.runs import Run
from fusedonemoe.report.tables import figures, heat_map, settings

STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff}
header,main,footer{max-width:82rem;margin:0 auto;padding:0 1rem}
h1{font-size:1.7rem;line-height:1.2;margin:1.5rem 0 .5rem}
h2{font-size:1.3rem;margin:2.5rem 0 .5rem;padding-top:.8rem;border-top:1px solid #767676}
h3{font-size:1.05rem;margin:1.3rem 0 .3rem}
p{max-width:46rem;margin:.4rem 0 .8rem}
a{color:#0b4f94}
a:focus-visible,.wide:focus-visible,summary:focus-visible{outline:3px solid #0b4f94;outline-offset:2px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:#fff;padding:.5rem;z-index:1}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;list-style:none}
nav a{display:inline-block;padding:.3rem 0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.2rem}
figure{margin:0;min-width:0}
figcaption{font-size:.85rem;font-weight:600;overflow-wrap:anywhere}
.chart{display:block;width:100%;height:auto;font:12px system-ui,sans-serif;fill:#1a1a1a}
.chart .grid{stroke:#dedede;fill:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem .8rem;padding:0;margin:.2rem 0;font-weight:400}
.legend svg{vertical-align:middle;fill:none}
details{margin:1rem 0}
summary{cursor:pointer;padding:.4rem 0;font-weight:600;color:#0b4f94}
.wide{overflow-x:auto;max-height:38rem;overflow-y:auto;border:1px solid #c4c4c4;margin:.6rem 0 1.2rem}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.4rem .5rem}
.wide caption{position:sticky;left:0;max-width:min(78rem,calc(100vw - 3rem))}
th,td{padding:.2rem .5rem;border:1px solid #dedede;text-align:right;vertical-align:top}
th{font-weight:600;text-align:left;background:#f3f3f3}
.wide tbody th{position:sticky;left:0;font-weight:400;background:#f8f8f8;white-space:nowrap}
.wide thead th{position:sticky;top:0;z-index:1}
.heat thead th{vertical-align:bottom;min-width:5rem}
.heat td{text-align:center}
.none{color:#595959}
header td,main>section>table td{text-align:left;overflow-wrap:anywhere}
footer{margin:2.5rem auto;font-size:.85rem;color:#474747}
@media (max-width:40rem){
.wide tbody th{white-space:normal;min-width:8.5rem;max-width:8.5rem;overflow-wrap:anywhere;font-size:.78rem}
}
@media print{.wide{overflow:visible;max-height:none}}
"""


def _pictured(runs: Sequence[Run], draw: Callable[[Run], list[Figure]], absent: str) -> str:
    """The pictures of every run that has some, or what to run for them."""
    parts = [f"<h3>{escape(run.name)}</h3>{grid(found)}" for run in runs if (found := draw(run))]
    return "".join(parts) or f"<p>{absent}</p>"


def page_of(runs: Sequence[Run]) -> str:
    """Return the whole page, with the runs in this order."""
    album = Album()
    bench, suites = "<code>python -m fusedonemoe bench --suite", "<code>python -m asv_bench.suites"
    sections = {
        "machine": ("What was measured on", "", "".join(map(settings, runs))),
        "latency": (
            "Latency against tokens",
            "Medians, both axes logarithmic. The dashed line is the floor: the least that this machine needs, by the best matrix "
            "product and the best bandwidth that it showed during the run.",
            _pictured(runs, lambda run: latency(album, run), f"No two cells differ in T alone: {bench} cpu --json FILE</code>."),
        ),
        "ratios": (
            "Ratios",
            "Each peer's time in multiples of ours, in each cell. A peer with a wrong output has no time.",
            "".join(map(heat_map, runs)) or "<p>In no file have ours and another a time in one cell.</p>",
        ),
        "memory": (
            "Memory against save_percent",
            "Bytes that the experts' training step holds between forward and backward, without parameters. Peers have no dial.",
            _pictured(runs, lambda run: memory(album, run), f"No file has it: {suites} memory --json FILE</code>."),
        ),
        "scaling": (
            "Scaling in experts",
            "Time against all experts E at equal work of a token, and against the experts of a token K.",
            _pictured(
                runs, lambda run: scaling(album, run), f"No two cells differ in E or K alone: {suites} seeds --json FILE</code>."
            ),
        ),
        "usage": (
            "How experts are used",
            "Rows of each expert in multiples of the mean, the busiest first, as the cells' inputs route them.",
            _pictured(runs, lambda run: usage(album, run), f"No file has it: {bench} quick --json FILE</code> of this version."),
        ),
        "figures": (
            "Every figure",
            "Percentiles are of the timed calls, or of the requests of a serving cell. Errors are relative to float64.",
            "".join(map(figures, runs)),
        ),
    }
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, (heading, _, _) in sections.items())
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{f"<p>{lead}</p>" if lead else ""}{content}</section>'
        for name, (heading, lead, content) in sections.items()
    )
    title = f"FusedOneMoE benchmark: {'; '.join(run.name for run in runs)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
        '<a class="skip" href="#main">Skip to the figures</a>'
        f'<header><h1>{escape(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="main">{body}</main>'
        f"<footer><p>Written by FusedOneMoE {escape(__version__)}; every number was measured by its benchmark.</p></footer>"
        "</body></html>\n"
    )
