"""The files that a run of the benchmark writes: two runs at once, Ctrl-C, a full disk, pipes, and what is noticed before."""

import argparse
import errno
import importlib
import json
import os
import threading
from dataclasses import dataclass

import pytest

from fusedonemoe import bench, files
from fusedonemoe.__main__ import main

pytest.importorskip("rich")
session = importlib.import_module("fusedonemoe.bench.session")
report = importlib.import_module("fusedonemoe.bench.report")
comparison = importlib.import_module("fusedonemoe.bench.comparison")
isolated = importlib.import_module("fusedonemoe.bench.isolated")
catalogue = importlib.import_module("fusedonemoe.bench.catalogue")

SETTINGS = {"suite": "quick", "date": "2026-01-02", "versions": {"torch": "2"}, "cpu": "one", "cpu_capability": "A", "threads": 2}
full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


@dataclass(frozen=True)
class Named:
    name: str


def cell(name, seconds=1.0):
    row = {"peer": "fusedonemoe", "seconds": seconds, "failed": False, "times_best": None}
    return {"name": name, "operator": "block", "dtype": "float32", "T": 1, "E": 2, "K": 1, "floor_seconds": 0.5, "rows": [row]}


def run(argv, names, measure=cell, **options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    cells = [Named(name) for name in names]
    kept = {"to_json": lambda result: result, "show": lambda result: None, "order": list(names), "long": False} | options
    return session.run_cells(parser.parse_args(argv), dict(SETTINGS), cells, measure=lambda c: measure(c.name), **kept)


def full(*args):
    """In place of os.replace, as on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def names_in(file):
    return [each["name"] for each in json.loads(file.read_text())["cells"]]


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_runs_at_once_both_end_and_the_file_is_of_one(tmp_path, capsys):
    file, ended, problems, all_here = tmp_path / "r.json", [], [], threading.Barrier(3)

    def one(seconds):
        def measure(name):
            if name == "0":
                all_here.wait()
            return cell(name, seconds)

        try:
            ended.append(run(["--json", str(file)], [f"{n}" for n in range(60)], measure))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=one, args=(float(n),)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and ended == [0, 0, 0] and listed(tmp_path) == ["r.json"]
    cells = json.loads(file.read_text())["cells"]
    assert len(cells) == 60 and len({each["rows"][0]["seconds"] for each in cells}) == 1
    assert 1 <= capsys.readouterr().err.count(f"another program has written {file} too") <= 3


def test_a_run_whose_file_another_program_writes_says_so_once(tmp_path, capsys):
    file = tmp_path / "r.json"

    def measure(name):
        files.write(file, b"another")
        return cell(name)

    assert run(["--json", str(file)], ["a", "b", "c"], measure) == 0 and names_in(file) == ["a", "b", "c"]
    assert capsys.readouterr().err == f"another program has written {file} too; now it has the cells of this run alone\n"
    file.unlink()
    assert run(["--json", str(file)], ["a", "b"]) == 0 and capsys.readouterr().err == ""


def interrupted_at(name):
    def measure(each):
        if each == name:
            raise KeyboardInterrupt
        return cell(each)

    return measure


def test_ctrl_c_keeps_the_finished_cells_and_no_temporary_file(tmp_path, capsys):
    file = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        run(["--json", str(file)], ["a", "b", "c"], interrupted_at("c"))
    assert names_in(file) == ["a", "b"] and listed(tmp_path) == ["r.json"]
    assert f"the 2 finished cells are in {file}; --resume goes on from there" in capsys.readouterr().err


def test_ctrl_c_while_the_file_is_written_loses_nothing(tmp_path, monkeypatch):
    file, replace = tmp_path / "r.json", os.replace

    def once(*args):
        monkeypatch.setattr("fusedonemoe.files.os.replace", replace)
        raise KeyboardInterrupt

    monkeypatch.setattr("fusedonemoe.files.os.replace", once)
    with pytest.raises(KeyboardInterrupt):
        run(["--json", str(file)], ["a", "b"])
    assert names_in(file) == ["a"] and listed(tmp_path) == ["r.json"]


def test_a_run_that_is_resumed_and_interrupted_at_once_changes_nothing(tmp_path):
    file = tmp_path / "r.json"
    failed = cell("b")
    failed["rows"][0]["failed"] = True
    assert run(["--json", str(file)], ["a", "b"], lambda name: failed if name == "b" else cell(name)) == session.EXIT_DISAGREE
    before = file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(["--json", str(file), "--resume"], ["a", "b"], interrupted_at("b"))
    assert file.read_bytes() == before


def test_a_disk_that_becomes_full_ends_with_two_and_keeps_the_older_file(tmp_path, capsys, monkeypatch):
    file, measured = tmp_path / "r.json", []

    def measure(name):
        measured.append(name)
        if name == "c":
            monkeypatch.setattr("fusedonemoe.files.os.replace", full)
        return cell(name)

    assert run(["--json", str(file)], ["a", "b", "c", "d"], measure) == session.EXIT_USAGE
    assert names_in(file) == ["a", "b"] and listed(tmp_path) == ["r.json"] and measured == ["a", "b", "c"]
    err = capsys.readouterr().err
    assert f"the 2 finished cells are in {file}; --resume goes on from there\ncannot write {file}: No space left" in err


def test_a_run_without_a_file_is_kept_where_it_is_nobody_elses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run([], ["a", "b"], interrupted_at("b"), long=True)
    (kept,) = tmp_path.iterdir()
    assert names_in(kept) == ["a"] and kept.stat().st_mode & 0o077 == 0
    assert f"the 1 finished cells are in {kept}\n" in capsys.readouterr().err
    kept.unlink()
    for argv in ([], ["--minutes", "1e-9"]):
        assert run(argv, ["a"], long=True) == 0 and listed(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        run([], ["a"], interrupted_at("a"), long=True)
    assert listed(tmp_path) == []


def test_a_run_goes_on_without_a_folder_for_temporary_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert run([], ["a"], long=True) == 0
    assert "cells that are finished before an interruption will be lost: No such file or directory" in capsys.readouterr().err
    job = isolated.Job(catalogue.SUITES["cpu"][0], None, 1)
    (row,) = isolated.run_job(job).rows
    assert row.failed and row.note == "failed: the process could not be started: No such file or directory"


def test_a_pipe_gets_all_cells_once(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(json.loads(pipe.read_text())))
    reader.start()
    assert run(["--json", str(pipe)], ["b", "a"]) == 0
    reader.join()
    assert [each["name"] for each in got[0]["cells"]] == ["b", "a"] and listed(tmp_path) == ["pipe"]


def test_stdout_gets_the_cells_behind_the_tables(capfd):
    assert run(["--json", "/dev/stdout"], ["a", "b"], show=lambda result: print(f"table {result['name']}")) == 0
    out = capfd.readouterr().out
    assert out.startswith("table a\ntable b\n{") and len(json.loads(out[out.index("{") :])["cells"]) == 2
    with pytest.raises(KeyboardInterrupt):
        run(["--json", "/dev/stdout"], ["a", "b"], interrupted_at("b"))
    out, err = capfd.readouterr()
    assert len(json.loads(out)["cells"]) == 1 and err == "the 1 finished cells are in /dev/stdout\n"


@pytest.mark.parametrize("option", ["--json", "--picture"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "Is a directory"),
        ("file/r.png", "Not a directory"),
        pytest.param("/dev/full", "No space left on device", marks=full_device),
        ("/proc/nothing/r.png", "No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_noticed_before_the_first_cell(option, name, told, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    path = tmp_path / name
    assert run([option, str(path)], ["a"], measure=None) == session.EXIT_USAGE
    assert capsys.readouterr().err.startswith(f"cannot write {path}: {told}") and listed(tmp_path) == ["file"]


def test_a_picture_has_a_format_and_a_file_of_its_own(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "a.xyz"
    assert run(["--picture", str(picture)], ["a"], measure=None) == session.EXIT_USAGE
    err = capsys.readouterr().err
    assert err.startswith(f"cannot write {picture}: its ending must be one of ") and "svg" in err
    same = ["--json", str(tmp_path / "x.png"), "--picture", str(tmp_path / "." / "x.png")]
    assert main(["bench", *same]) == 2 and "--picture and --json name the same file" in capsys.readouterr().err
    for ending in ("png", "svg"):
        made = tmp_path / f"made.{ending}"
        assert run(["--picture", str(made)], ["a"]) == 0 and made.stat().st_size > 1000
    # A cell of an older file that lacks what is only drawn has its name.
    old = {key: cell("a")[key] for key in ("name", "rows", "floor_seconds")}
    (tmp_path / "r.json").write_text(json.dumps({"schema": 1, **SETTINGS, "cells": [old | {"mode": "new"}]}))
    argv = ["--json", str(tmp_path / "r.json"), "--resume", "--picture", str(made)]
    assert run(argv, ["a"], measure=None) == 0 and "<!-- a -->" in made.read_text()


def test_brackets_are_text_and_no_markup(tmp_path, capsys):
    old = {"schema": 1, **SETTINGS, "date": "[/x]", "versions": {"[/y]": "[/z]"}, "cells": [cell("a")]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert run(["--compare", str(tmp_path / "old.json")], ["a"]) == 0
    out = capsys.readouterr().out
    assert "compared with the run of [/x]" in out and "[/y] was [/z], is missing" in out
    row = importlib.import_module("fusedonemoe.bench.results").Row("a", note="failed: no [/tmp/x]", failed=True)
    result = importlib.import_module("fusedonemoe.bench.results").CellResult(
        catalogue.SUITES["quick"][0], (row,), None, 0.0, 0.0, 0.0, False
    )
    report.print_cell(result)
    assert "failed: no [/tmp/x]" in capsys.readouterr().out


def test_the_page_is_whole_and_no_input_of_its_own(tmp_path, capsys, monkeypatch):
    results, made = tmp_path / "r.json", tmp_path / "r.html"
    results.write_text(json.dumps({"schema": 1, **SETTINGS, "cells": [cell("a"), cell("b")]}))
    made.write_text("old")
    monkeypatch.setattr("fusedonemoe.files.os.replace", full)
    assert main(["report", str(results), "-o", str(made)]) == 2
    assert capsys.readouterr().err == f"cannot write {made}: No space left on device\n"
    assert made.read_text() == "old" and listed(tmp_path) == ["r.html", "r.json"]
    monkeypatch.undo()
    for same in (results, tmp_path / "." / "r.json"):
        assert main(["report", str(results), "-o", str(same)]) == 2
        assert "its results are what the page is made of" in capsys.readouterr().err
    assert main(["report", str(results), "-o", str(made)]) == 0 and made.read_text().startswith("<!DOCTYPE html>")


@full_device
def test_the_page_is_not_made_where_it_cannot_be_written(tmp_path, capsys, monkeypatch):
    results = tmp_path / "r.json"
    results.write_text(json.dumps({"schema": 1, **SETTINGS, "cells": [cell("a")]}))
    monkeypatch.setattr(importlib.import_module("fusedonemoe.report.page"), "page_of", None)
    for path in ("/dev/full", tmp_path, results / "r.html"):
        assert main(["report", str(results), "-o", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"cannot write {path}: ")


def test_a_page_on_stdout_is_alone_there(tmp_path, capfd):
    results = tmp_path / "r.json"
    results.write_text(json.dumps({"schema": 1, **SETTINGS, "cells": [cell("a")]}))
    assert main(["report", str(results), "-o", "/dev/stdout"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("<!DOCTYPE html>") and out.endswith("</html>\n") and err == "/dev/stdout: 1 cells of 1 file\n"
