"""The pages of the history show every measured value of every benchmark, and load nothing from elsewhere."""

import json
import re
import sys
from pathlib import Path

import pytest

from fusedonemoe.report.pictures import Album
from tests.repo.test_asv import CLASSES, benchmarks_of, cases_of
from tests.repo.test_results import built

DOCS = Path(__file__).resolve().parents[2] / "docs"
make_id = pytest.importorskip("docutils.nodes").make_id
pytest.importorskip("sphinx")
sys.path.insert(0, str(DOCS / "_ext"))

import history  # noqa: E402

NAN = float("nan")
COLUMNS = ["result", "params", "version", "stats_q_25", "stats_q_75"]
TIME, SIZE = "bench_made.Up.time_x", "bench_made.Up.track_bytes"
CASES = [["'cpu'"], ["'a'", "'b'"]]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Results of a machine at four commits, of which one was measured with another version of the benchmark."""
    box = tmp_path / "results" / "box"
    box.mkdir(parents=True)
    described = {TIME: {"unit": "seconds", "version": "v2"}, SIZE: {"unit": "bytes", "version": "v1"}, "version": 2}
    (tmp_path / "results" / "benchmarks.json").write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "milestones.txt").write_text("# commits\nbbbbbbb the second <change>\n", encoding="utf-8")
    (box / "machine.json").write_text("{}", encoding="utf-8")
    times = {
        "d": [[0.5, 0.25], CASES, "v2", [0.4, 0.2], [0.6, 0.3]],
        "b": [[2.0, NAN], CASES, "v2", [1.9, None], [2.1, None]],
        "a": [[9.0, 9.0], CASES, "v1", [9.0, 9.0], [9.0, 9.0]],
        "c": [None, CASES, "v2"],
    }
    for commit, row in times.items():
        results = {TIME: row} if commit in "ac" else {TIME: row, SIZE: [[0, 3e6], CASES, "v1"]}
        result = {
            "commit_hash": commit * 40,
            "date": 86_400_000 * ord(commit),
            "python": "3.11",
            "requirements": {"torch": "9.9"},
            "result_columns": COLUMNS,
            "results": results,
        }
        (box / f"{commit * 8}-env.json").write_text(json.dumps(result), encoding="utf-8")
    caches = (history.benchmarks, history.settings)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(history, "ASV", tmp_path)
    yield
    for cached in caches:
        cached.cache_clear()


def test_values_are_those_of_this_version_in_the_order_of_commits(made):
    (setting,) = history.settings()
    assert setting.name == "box, Python 3.11, torch 9.9"
    assert "".join(result["commit_hash"][0] for result in setting.commits) == "abcd"
    found = history.cases(setting, TIME, "v2")
    assert found["cpu, a"] == [None, history.Value(2.0, 1.9, 2.1), None, history.Value(0.5, 0.4, 0.6)]
    assert found["cpu, b"] == [None, None, None, history.Value(0.25, 0.2, 0.3)]
    assert history.cases(setting, SIZE, "v1")["cpu, a"] == [None, history.Value(0), None, history.Value(0)]
    assert history.cases(setting, "bench_made.Up.none", "v1") == {}


def cells(html):
    """Rows of the tables in a text, each as the text of its cells."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_a_benchmark_has_a_picture_and_a_table(made):
    html = history.shown(Album(), TIME)
    assert html.count("<svg class") == 1 and "cpu, a 2000 at first, 500 at last; cpu, b 250 at first, 250 at last." in html
    assert cells(html) == [
        ["commit", "cpu, a", "cpu, b"],
        ["1 aaaaaaaa", "", ""],
        ["2 bbbbbbbb", "2000 (1900 to 2100)", ""],
        ["3 cccccccc", "", ""],
        ["4 dddddddd", "500 (400 to 600)", "250 (200 to 300)"],
    ]
    assert cells(history.shown(Album(), SIZE))[2] == ["2 bbbbbbbb", "0", "3"]


def test_the_list_has_every_case(made):
    assert cells(history.listed())[1:] == [
        [TIME, "cpu, a", "2000", "500", "ms", "0.25"],
        [TIME, "cpu, b", "250", "250", "ms", "1.00"],
        [SIZE, "cpu, a", "0", "0", "MB", ""],
        [SIZE, "cpu, b", "3", "3", "MB", "1.00"],
    ]
    assert '<a href="history/made.html#bench-made-up-time-x">' in history.listed()


def test_the_overview_names_the_commits(made, monkeypatch):
    monkeypatch.setattr(history, "OVERVIEW", ((TIME, "cpu, a", "a"), (TIME, "cpu, none", "absent")))
    html = history.overview(Album())
    assert "a 4 at first, 1 at last." in html and "absent" not in html
    assert cells(html)[2] == ["2 bbbbbbbb", "1970-04-09", "the second &lt;change&gt;"]


def test_every_case_of_the_overview_is_measured():
    for benchmark, case, _ in history.OVERVIEW:
        name, _, method = benchmark.rpartition(".")
        assert method in benchmarks_of(CLASSES[name])
        assert case in [", ".join(parts) for parts in cases_of(CLASSES[name])], benchmark


def test_every_benchmark_has_a_page():
    for name in CLASSES:
        page = (DOCS / f"{history.page_of(name)}.md").read_text(encoding="utf-8")
        assert f"```{{history}} {name.partition('.')[0]}\n" in page


def test_the_build_shows_every_committed_benchmark(tmp_path):
    asked = ["```{history} overview\n```", "```{history} list\n```"]
    asked += [f"```{{history}} {family}\n```" for family in sorted({name.partition(".")[0] for name in history.benchmarks()})]
    html, warnings = built(tmp_path, "# Page\n\n" + "\n\n".join(asked) + "\n")
    assert warnings == ""
    for benchmark in history.benchmarks():
        assert f'id="{make_id(benchmark)}"' in html
    own = re.sub(r"<head>.*?</head>", "", html, flags=re.DOTALL)
    assert not re.search(r'\b(?:src|srcset|data)="(?:https?:)?//', own)
    names = re.findall(r'<svg class="chart" role="img" [^>]*aria-labelledby="(\S+) (\S+)"', html)
    assert len(names) > 70 and all(html.count(f'id="{name}"') == 1 for pair in names for name in pair)


def test_the_build_complains_of_a_family_without_results(tmp_path):
    assert (
        "history: asv_bench/results has nothing of bench_none" in built(tmp_path, "# Page\n\n```{history} bench_none\n```\n")[1]
    )
