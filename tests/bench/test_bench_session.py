"""What all suites share: the registry, resuming, comparing with an older file, percentiles and loads, exit statuses."""

import argparse
import copy
import importlib
import json
import logging
import math
import re
import warnings
from dataclasses import dataclass

import pytest
import torch

from asv_bench import suites
from fusedonemoe import bench
from fusedonemoe.bench import IN_THE_REPOSITORY, REGISTRY, results
from fusedonemoe.bench.catalogue import SUITES

pytest.importorskip("rich")
comparison = importlib.import_module("fusedonemoe.bench.comparison")
session = importlib.import_module("fusedonemoe.bench.session")
report = importlib.import_module("fusedonemoe.bench.report")


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(list(argv))


@dataclass(frozen=True)
class Named:
    name: str


def settings(**changes):
    machine = {"cpu": "one", "cpu_capability": "AVX2", "cores": 4, "threads": 2}
    return {"suite": "quick", "date": "2026-01-02", "versions": {"torch": "2.13"}, **machine, "peers": None} | changes


def cell_json(name, seconds, **others):
    rows = [{"peer": "fusedonemoe", "seconds": seconds, "failed": False}]
    return {"name": name, "rows": rows + [{"peer": peer, "seconds": s, "failed": False} for peer, s in others.items()]}


def run(argv, cells, **described):
    """A run whose cells are measured at once: name to (ours, other)."""
    measured = []

    def measure(cell):
        measured.append(cell.name)
        if cells[cell.name] is None:
            raise KeyboardInterrupt
        return cell_json(cell.name, *cells[cell.name][:1], other=cells[cell.name][1])

    names = [Named(name) for name in cells]
    options = {"to_json": lambda cell: cell, "show": lambda cell: None, "order": list(cells)}
    return session.run_cells(arguments(*argv), settings(**described), names, measure=measure, **options), measured


def test_every_suite_of_the_registry_can_be_run():
    assert set(SUITES) <= set(REGISTRY) == {"quick", "cpu", "gpu", "quantized"}
    assert set(suites.REGISTRY) == set(IN_THE_REPOSITORY)
    for suite in [*REGISTRY.values(), *suites.REGISTRY.values()]:
        module = importlib.import_module(suite.module)
        assert callable(module.run) and suite.purpose
        assert {"cells", "resume", "compare", "minutes"} <= suite.options


def test_help_lists_the_suites():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    text = parser.format_help()
    assert all(f"\n  {name}" in text and suite.purpose in text for name, suite in REGISTRY.items())


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--suite", "quick", "--dry"], "--dry: not with --suite quick, but with gpu"),
        (["--suite", "quantized", "--picture", "a.png"], "--picture: not with --suite quantized, but with quick, cpu, gpu"),
        (["--resume"], "--resume needs the file of --json"),
        (["--suite", "gpu", "--dry", "--compare", "a.json"], "--compare compares times, and --dry has none"),
        (["--suite", "gpu", "--dry", "--picture", "a.png"], "--picture shows times, and --dry has none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(argv, told, capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    assert bench.run(arguments(*argv)) == bench.EXIT_USAGE
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("suite", IN_THE_REPOSITORY)
def test_a_suite_that_only_the_repository_has_names_its_command(suite, capsys):
    with pytest.raises(SystemExit) as exit_:
        arguments("--suite", suite)
    assert exit_.value.code == 2 and f"`python -m asv_bench.suites {suite}` in a checkout" in capsys.readouterr().err


def test_remarks_of_other_libraries_stay_off_the_terminal(monkeypatch, caplog):
    log = logging.getLogger("somebody.else")

    def remark(args):
        log.warning("an extension cannot be loaded")
        warnings.warn("another name in the next version", FutureWarning, stacklevel=1)
        log.error("an error")
        return 0

    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.import_module("fusedonemoe.bench.cell_suite"), "run", remark)
    with warnings.catch_warnings(record=True) as warned:
        assert bench.run(arguments()) == 0
        remark(None)
    # Only the errors while it runs; everything again behind it.
    assert [record.message for record in caplog.records] == ["an error", "an extension cannot be loaded", "an error"]
    assert len(warned) == 1


def test_a_run_is_taken_up_where_it_was_interrupted(tmp_path, capsys):
    file = tmp_path / "new" / "r.json"
    argv = ["--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        run(argv, {"a": (1.0, 2.0), "b": None})
    assert f"the 1 finished cells are in {file}; --resume goes on from there" in capsys.readouterr().err
    assert run([*argv, "--resume"], {"c": (1.0, 2.0), "a": (9.0, 9.0), "b": (3.0, 4.0)}) == (0, ["c", "b"])
    cells = json.loads(file.read_text())["cells"]
    assert [cell["name"] for cell in cells] == ["c", "a", "b"] and cells[1]["rows"][0]["seconds"] == 1.0
    # What is not asked for stays; another machine or other peers begin afresh.
    assert run([*argv, "--resume"], {"a": (9.0, 9.0)}) == (0, []) and len(json.loads(file.read_text())["cells"]) == 3
    assert run([*argv, "--resume"], {"a": (9.0, 9.0)}, peers="x") == (0, ["a"])
    assert run([*argv, "--resume"], {"a": (9.0, 9.0)}, cpu="two", peers="x") == (0, ["a"])
    assert "was measured with different cpu; starting over" in capsys.readouterr().err
    assert [path.name for path in file.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"suite": "quick", "date": "2026", "tables": {}}'])
def test_a_file_of_something_else_is_neither_resumed_nor_lost(content, tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text(content)
    assert run(["--json", str(file), "--resume"], {"a": (1.0, 2.0)}) == (session.EXIT_USAGE, [])
    assert capsys.readouterr().err.startswith(f"--resume {file}: ") and file.read_text() == content
    assert run(["--json", str(file)], {"a": (1.0, 2.0)}) == (0, ["a"])  # on request it is overwritten


def test_no_cell_begins_after_the_minutes(tmp_path, capsys):
    status, measured = run(["--minutes", "1e-9", "--json", str(tmp_path / "r.json")], {"a": (1.0, 1.0), "b": (1.0, 1.0)})
    assert (status, measured) == (0, []) and "--resume goes on with a" in capsys.readouterr().err


def test_a_failed_row_is_the_exit_status_and_measured_again(tmp_path):
    file = tmp_path / "r.json"
    failed = cell_json("a", 1.0)
    failed["rows"][0]["failed"] = True
    options = {"to_json": lambda cell: cell, "show": lambda cell: None, "order": ["a"]}
    parsed = arguments("--json", str(file))
    assert session.run_cells(parsed, settings(), [Named("a")], measure=lambda cell: failed, **options) == session.EXIT_DISAGREE
    assert session.finished_cells(file, settings()) == []


@pytest.fixture
def old(tmp_path):
    file = tmp_path / "old.json"
    assert run(["--json", str(file)], {"a": (1.0, 2.0), "b": (1.0, 2.0)})[0] == 0
    return file


@pytest.mark.parametrize(
    ("now", "status"),
    [
        ({"a": (1.1, 2.0), "b": (0.5, 2.0)}, 0),
        ({"a": (1.2, 2.0), "b": (1.0, 2.0)}, session.EXIT_SLOWER),
        ({"a": (2.0, 4.0), "b": (2.2, 4.0)}, 0),  # the whole machine is slower, and ours with it
        ({"a": (1.0, 1.0), "b": (1.0, 1.0)}, 0),  # the others became faster: ours is as fast as it was
        ({"new": (9.0, 9.0)}, 0),
    ],
)
def test_ours_is_slower_only_beyond_what_the_machine_lost(old, now, status, capsys):
    assert run(["--compare", str(old)], now)[0] == status
    out = capsys.readouterr().out
    assert "compared with the run of 2026-01-02" in out
    assert ("without a time in the older file: new" in out) == ("new" in now)


def test_other_versions_are_told_and_another_machine_is_refused(old, capsys):
    assert run(["--compare", str(old)], {"a": (1.0, 2.0)}, versions={"torch": "2.14", "numpy": "2"})[0] == 0
    out = capsys.readouterr().out
    assert "other version: torch was 2.13, is 2.14" in out and "other version: numpy was missing, is 2" in out
    assert run(["--compare", str(old)], {"a": (1.0, 2.0)}, cpu="two", threads=4) == (session.EXIT_USAGE, [])
    assert (
        "another machine, whose times are no measure for this one: cpu was one, is two; threads was 2, is 4"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda old: old.update(suite="cpu"), "expected schema 1 and suite quick, got schema 1 and suite cpu"),
        (lambda old: old.update(schema=0), "got schema 0"),
        (lambda old: [row.update(seconds=None) for cell in old["cells"] for row in cell["rows"]], "a dry run has no times"),
        (lambda old: old.pop("cells"), "no results of the benchmark (cells is missing: it must be a list)"),
    ],
)
def test_files_that_cannot_be_compared_say_why(old, change, told, capsys):
    content = json.loads(old.read_text())
    change(content)
    old.write_text(json.dumps(content))
    assert run(["--compare", str(old)], {"a": (1.0, 2.0)}) == (session.EXIT_USAGE, [])
    assert told in capsys.readouterr().err
    assert run(["--compare", str(old.parent / "none.json")], {"a": (1.0, 2.0)})[0] == session.EXIT_USAGE


def test_the_older_file_may_be_the_one_that_is_written(old):
    assert run(["--compare", str(old), "--json", str(old)], {"a": (5.0, 2.0)})[0] == session.EXIT_SLOWER
    assert [cell["name"] for cell in json.loads(old.read_text())["cells"]] == ["a"]


def test_a_gpu_is_part_of_the_machine():
    gpu = {"name": "A"}
    assert comparison.machine_of(settings(gpu=gpu)) != comparison.machine_of(settings(gpu={"name": "B"}))
    assert comparison.machine_of(settings(gpu=gpu | {"cuda": "13"})) == comparison.machine_of(settings(gpu=gpu))


def test_patterns_that_match_nothing_are_told(capsys):
    names = ["a-1", "b-2"]
    assert session.matching("--cells", names, None) == names
    assert session.matching("--cells", names, re.compile("^b")) == names[1:]
    assert session.matching("--cells", names, re.compile("c")) == []
    assert "--cells 'c' matches none of\n  a-1\n  b-2" in capsys.readouterr().err


def test_percentiles_are_samples():
    samples = [float(n) for n in range(1, 101)]
    assert [results.percentile(samples, p) for p in (0.1, 50, 95, 99, 100)] == [1.0, 50.0, 95.0, 99.0, 100.0]
    assert results.percentile([3.0], 99) == results.percentile([3.0], 1) == 3.0
    assert results.percentile([2.0, 1.0, 3.0], 95) == 3.0
    row = results.Row("a").timed(samples, None)
    assert (row.seconds, row.p95_seconds, row.p99_seconds, row.calls) == (50.5, 95.0, 99.0, 100)


def test_the_load_is_in_multiples_of_the_mean():
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]])
    assert results.load_of([ids], 4) == (2.0, 1.5, 0.5, 0.0)
    assert results.load_of([ids[:2], ids[2:]], 4) == results.load_of([ids], 4)
    assert results.load_of([torch.zeros(0, 2, dtype=torch.int64)], 3) == (0.0, 0.0, 0.0)
    many = results.load_of([torch.arange(1000) % 500], 1000)
    assert len(many) == results.LOAD_POINTS and many[0] == 2.0 and many[-1] == 0.0 and math.isclose(many[10], 2.0)


def test_the_summary_is_of_finished_cells_as_well():
    rows = [{"peer": "fusedonemoe", "seconds": 2.0, "times_best": 0.5, "failed": False}]
    rows += [{"peer": "b", "seconds": 4.0, "times_best": 1.0, "failed": False, "comparable": True}]
    faster = {"peer": "a", "seconds": 1.0, "times_best": 0.25, "failed": False, "comparable": False}
    cell = {"name": "x", "floor_seconds": 1.0, "rows": [*rows, faster]}
    assert report.best_peer(cell)["peer"] == "b"
    table = report.summary_of({"cells": [cell, copy.deepcopy(cell) | {"floor_seconds": None}]})
    assert [list(column.cells) for column in table.columns] == [
        ["x", "x"],
        ["2000.00", "2000.00"],
        ["2.00", ""],
        ["0.50", "0.50"],
        ["b", "b"],
    ]
