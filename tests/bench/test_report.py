"""The page: whole HTML, nothing loaded, pictures with words, and every ratio readable."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from fusedonemoe.__main__ import main
from fusedonemoe.report import pictures, runs, svg, tables
from fusedonemoe.report.page import page_of

ROOT = Path(__file__).parents[2]
RESULTS = [ROOT / "docs" / "results" / f"{suite}.json" for suite in ("quick", "cpu")]
VOID = {"meta", "link", "br", "img"}
HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Tags in order, with the headings' levels, ids, and what stands in titles; fails on tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def row(peer, seconds, **more):
    return {"peer": peer, "seconds": seconds, "failed": False, "note": ""} | more


def cell(name, rows, **more):
    sizes = {"T": 8, "D": 4, "F": 3, "E": 16, "K": 2, "dtype": "float32", "operator": "block", "mode": "forward"}
    return {"name": name, "floor_seconds": 0.001, "floor_bound_by": "bytes", "rows": rows} | sizes | more


def a_run(*cells, suite="quick"):
    described = {"suite": suite, "date": "2026-01-02T03:04:05", "versions": {"torch": "2", "gone": None}, "cpu": "one & two"}
    return runs.Run(f"{suite}, 2026-01-02", described, tuple(cells))


def everything():
    """A run with something for every picture."""
    pair = [
        row("fusedonemoe", 0.002, paired_seconds=0.002),
        row("other", 0.004, paired_seconds=0.001),
        row("late", None, note="skipped: x"),
    ]
    held = [row("fusedonemoe 100 %", 0.1, save_percent=100, held_bytes=9_000_000, formula_bytes=9_000_000, peak_bytes=12_000_000)]
    held += [row("fusedonemoe 0 %", 0.2, save_percent=0, held_bytes=1_000_000, formula_bytes=1_000_000, peak_bytes=5_000_000)]
    held += [row("other", 0.1, save_percent=None, held_bytes=20_000_000)]
    return a_run(
        *(cell(f"T{T}", pair, T=T, load=[2.0, 1.0, 0.0], experts_hit=11.0) for T in (1, 8, 64)),
        cell("E32", pair, E=32),
        cell("K4", pair, K=4),
        cell("dial", held, operator="experts", mode="backward"),
        *(
            cell(
                f"momoe{p}",
                [row("fusedonemoe", 0.1, held_bytes=1000 + p), row("other", 0.2, held_bytes=5000)],
                save_percent=p,
                label="m",
                mode="training",
            )
            for p in (100, 0)
        ),
        cell(HOSTILE, [row("fusedonemoe", 0.1), row(HOSTILE, 0.3, note=HOSTILE)], operator="serving", published="T 4096"),
    )


@pytest.fixture(scope="module")
def page():
    return Page(page_of([everything()]))


def test_nothing_is_loaded_from_anywhere(page):
    html = page_of([everything()])
    assert not re.search(r"https?://|//cdn|@import|url\(", html)
    assert not page.all("script") and not page.all("img") and [link["href"] for link in page.all("link")] == ["data:,"]


def test_the_page_has_a_language_a_title_landmarks_and_headings_in_order(page):
    assert page.all("html") == [{"lang": "en"}] and len(page.all("title")) >= 1
    assert all(len(page.all(tag)) == 1 for tag in ("header", "main", "footer", "nav", "h1"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    viewport = next(meta for meta in page.all("meta") if meta.get("name") == "viewport")
    assert viewport["content"] == "width=device-width, initial-scale=1"


def test_every_picture_has_a_title_and_a_description(page):
    charts = [attributes for attributes in page.all("svg") if attributes.get("class") == "chart"]
    # One along T, E and K each, two dials, one routing.
    assert len(charts) == 6 and all(chart["role"] == "img" for chart in charts)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(set(chart["aria-labelledby"].split()) <= set(ids) for chart in charts)
    assert len(page.all("desc")) == len(charts) == len(page.all("figure"))
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in ids}
    told = " ".join(page.text)
    assert "floor 1 ms at 1" in told and "fusedonemoe 2 ms at 1" in told and "other 4 ms at 1, 4 ms at 64" in told


def test_every_table_has_a_caption_and_scoped_headings(page):
    assert len(page.all("table")) == len(page.all("caption")) > 3
    assert all(heading.get("scope") in ("row", "col") for heading in page.all("th"))
    wide = [attributes for attributes in page.all("div") if attributes.get("class") == "wide"]
    assert wide and all(w["tabindex"] == "0" and w["role"] == "region" and w["aria-label"] for w in wide)


def test_names_are_text_and_never_markup(page):
    assert "".join(page.text).count(HOSTILE) >= 3 and not page.all("script")


def test_ratios_are_of_the_same_turns_and_of_those_that_did_everything():
    rows = [row("fusedonemoe", 2.0), row("a", 4.0, paired_seconds=1.0), row("b", 4.0), row("c", 1.0, comparable=False)]
    assert runs.times_ours(cell("x", rows)) == {"a": 4.0, "b": 2.0}
    assert runs.times_ours(cell("x", rows[1:])) == {}
    assert tables.heat_map(a_run(cell("x", rows[1:]))) == ""
    html = tables.heat_map(a_run(cell("x", rows), cell("y", [row("fusedonemoe", 1.0), row("b", 20.0)])))
    assert "4.00" in html and ">20<" in html and '<td class="none">-</td>' in html


def contrast(style):
    background = [int(c) for c in re.findall(r"\d+", style.partition(")")[0])]
    text = 0 if style.endswith("#000") else 255

    def luminance(colour):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted([luminance(background), luminance([text] * 3)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_colour_is_readable():
    ratios = [1.01**n for n in range(-400, 401)]
    assert min(contrast(tables._colour(ratio)) for ratio in ratios) >= 4.5
    assert tables._colour(1.0).startswith("background:rgb(255,255,255)")
    lines = [*svg.OUR_COLOURS, *svg.COLOURS, svg.FLOOR_COLOUR]
    for colour in lines:
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
        assert contrast(f"rgb({red},{green},{blue});#fff") >= 4.5, colour
    assert len({(s.colour, s.marker) for s in (svg.style_of(n, ours=False) for n in range(30))}) == 30


def test_families_differ_in_one_size_alone():
    cells = everything().cells
    assert [[c["name"] for c in family] for family in runs.families(cells, "T")] == [["T1", "T8", "T64"]]
    assert [[c["name"] for c in family] for family in runs.families(cells, "E")] == [["T8", "E32"]]
    assert [[c["name"] for c in family] for family in runs.families(cells, "K")] == [["T8", "K4"]]
    assert runs.families([{"name": "no sizes", "rows": []}], "T") == []


def test_ticks_do_not_touch_and_lie_inside():
    for values in ([1, 512], [0.02, 3000], [5, 5], [1e-6, 2e-6], [3, 4, 1000]):
        for logarithmic in (True, False):
            scale = svg._Scale(svg.Axis("x", logarithmic=logarithmic), values, 60, 350)
            ticks = sorted(scale.ticks())
            assert len(ticks) >= 1 and all(59 <= scale(tick) <= 351 for tick in ticks), (values, logarithmic, ticks)
            assert all(scale(b) - scale(a) >= svg.LEAST_PIXELS for a, b in pairwise(ticks))
    given = svg._Scale(svg.Axis("T", at=(1.0, 4.0, 512.0)), [1, 512], 60, 350)
    assert given.ticks() == [1.0, 4.0, 512.0]


def test_many_pictures_are_folded():
    html = pictures.grid(["<figure></figure>"] * (pictures.SHOWN + 3))
    assert html.count("<figure>") == pictures.SHOWN + 3 and "<summary>3 more</summary>" in html
    assert "details" not in pictures.grid(["<figure></figure>"] * pictures.SHOWN)


def test_mfu_has_a_column_where_a_file_has_it():
    assert "12.3%" in page_of([a_run(cell("x", [row("fusedonemoe", 1.0, mfu=0.1234)]))])
    assert "MFU" not in page_of([a_run(cell("x", [row("fusedonemoe", 1.0)]))])


def test_what_no_file_has_is_said_with_the_command():
    html = page_of([a_run(cell("x", [row("fusedonemoe", 1.0)]))])
    assert "asv_bench.suites memory --json FILE" in html and "bench --suite cpu --json FILE" in html


def test_the_command_writes_the_page_of_the_committed_results(tmp_path, capsys):
    file = tmp_path / "new" / "report.html"
    assert main(["report", *map(str, RESULTS), "-o", str(file)]) == 0
    count = sum(len(json.loads(path.read_text(encoding="utf-8"))["cells"]) for path in RESULTS)
    assert f"report.html: {count} cells of 2 files" in capsys.readouterr().out
    page = Page(file.read_text(encoding="utf-8"))
    assert len(page.all("desc")) > 15 and "".join(page.text).count("Qwen") == 0
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "no results"),
        ("[]", "no results"),
        ("{}", "suite is missing: it must be text"),
        (json.dumps({"suite": "gpu", "date": "2026", "cells": []}), "a dry run has none"),
    ],
)
def test_files_without_results_are_refused(content, told, tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text(content)
    assert main(["report", str(file), "-o", str(tmp_path / "r.html")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "r.html").exists()
    assert main(["report", str(tmp_path / "none.json")]) == 2


def test_help_asks_for_nothing_that_pages_need():
    program = """
import sys
from fusedonemoe.__main__ import main
try:
    main(['report', '--help'])
except SystemExit:
    print('rich' in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.endswith("False\n") and "RESULTS.json" in run.stdout
