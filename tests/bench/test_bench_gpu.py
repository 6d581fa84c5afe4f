"""The suite for GPUs, in dry runs on the CPU: every cell, mode and wrapper runs, wrong peers get no time, and runs resume."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedonemoe import bench
from fusedonemoe.bench import libraries
from fusedonemoe.bench.inputs import make_inputs
from fusedonemoe.bench.peers import OURS, PEERS, PLAIN, YARDSTICK, Peer
from fusedonemoe.bench.workloads import MODES, Cell, least_work, products
from fusedonemoe.ops.choice import IMPLEMENTATIONS
from tests.bench.gpu_suite import CELLS, CPU, NAMED, QWEN, ROUTER, arguments, report, runner, suite, timing


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """All cells of the suite, run once: the exit status, what was printed, and the file."""
    file = tmp_path_factory.mktemp("dry") / "results.json"
    command = [sys.executable, "-m", "fusedonemoe", "bench", "--suite", "gpu", "--dry", "--json", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    return run.returncode, run.stdout + run.stderr, json.loads(file.read_text(encoding="utf-8"))


def test_every_cell_runs_dry_without_a_failure(dry_run):
    status, printed, results = dry_run
    assert status == 0, printed
    assert [cell["name"] for cell in results["cells"]] == [cell.name for cell in CELLS]
    for cell in results["cells"]:
        notes = {row["peer"]: row["note"] for row in cell["rows"]}
        assert notes[OURS] == runner.RAN and not any(row["failed"] for row in cell["rows"]), (cell["name"], notes)
        assert all(note == runner.RAN or note.startswith("skipped: ") for note in notes.values())
        assert all(row["error"] is not None for row in cell["rows"] if row["note"] == runner.RAN)


def test_every_peer_in_torch_runs_dry_in_each_of_its_modes(dry_run):
    ran = {
        (cell["operator"], row["peer"], cell["mode"])
        for cell in dry_run[2]["cells"]
        for row in cell["rows"]
        if row["note"] == runner.RAN
    }
    in_suite = {(cell.operator, cell.mode) for cell in CELLS}
    expected = {
        (operator, peer.name, mode)
        for operator, peers in PEERS.items()
        for peer in peers
        for mode in peer.modes
        if (operator, mode) in in_suite and (importlib.util.find_spec("transformers") or "transformers" not in peer.name)
    }
    assert expected <= ran
    assert {mode for _, _, mode in ran} == set(MODES)


def test_a_dry_run_shows_no_times(dry_run):
    _, printed, results = dry_run
    assert results["dry"] is True and results["gpu"] is None
    for cell in results["cells"]:
        assert cell["floor_seconds"] is cell["dense_seconds"] is cell["copy_seconds"] is None
        for row in cell["rows"]:
            assert row["seconds"] is row["spread"] is row["peak_bytes"] is row["times_best"] is row["of_dense"] is None
    assert "nothing is timed" in printed and "floor " not in printed and not re.search(r"\d\.\d\d+ *(ms|│)", printed)


def test_the_schema_of_the_file(dry_run):
    results = dry_run[2]
    head = {"schema", "suite", "date", "versions", "cpu", "cpu_capability", "cores", "threads", "cells"}
    assert head | {"gpu", "impl", "dry", "peers", "tf32", "conditions"} == set(results)
    assert {"torch", "triton", "liger-kernel", "fusedonemoe"} <= set(results["versions"])
    for cell in results["cells"]:
        declared = NAMED[cell["name"]]
        for field in ("label", "mode", "operator", "T", "D", "F", "E", "K", "activation", "layout", "routing", "save_percent"):
            assert cell[field] == getattr(declared, field)
        assert cell["yardstick"] == YARDSTICK[declared.operator] and cell["real_time"] is None
        row_fields = {"peer", "note", "failed", "seconds", "spread", "calls", "error", "peak_bytes", "times_best", "of_copy"}
        assert all(row_fields <= row.keys() for row in cell["rows"])


def test_the_cells_of_the_suite():
    assert len(NAMED) == len(CELLS) and {cell.mode for cell in CELLS} == set(MODES)
    qwen = {cell.T for cell in CELLS if cell.label.startswith("qwen3-30b") and cell.mode == "forward"}
    assert qwen == {1, 8, 64, 512, 4096, 32768}
    oss = NAMED["gpt-oss-20b-T4096-bfloat16-training"]
    assert (oss.activation, oss.bias, oss.layout, oss.transposed) == ("swiglu_oai", True, "interleaved", True)
    nomic = NAMED["nomic-T8192-bfloat16-training"]
    assert (nomic.activation, nomic.gated, nomic.bias, nomic.G) == ("gelu", False, True, nomic.F)
    count = {prefix: sum(cell.label.startswith(prefix) for cell in CELLS) for prefix in ("momoe", "candle-nomic", "candle-qwen3")}
    assert count == {"momoe": 12, "candle-nomic": 6, "candle-qwen3": 6}
    assert {cell.E for cell in CELLS if cell.operator == "merged"} == {32, 128, 1024}
    models = {"mixtral", "olmoe", "deepseek-v2-lite", "qwen3-next", "granite", "router"}
    assert all(any(cell.label.startswith(model) for cell in CELLS) for model in models)
    assert {cell.T for cell in CELLS if cell.mode == "decode"} == {1, 8, 64}
    assert all(cell.routing == "uniform" or cell.name.endswith("-skewed") for cell in CELLS)


def test_the_dense_products_have_the_cells_operations():
    for cell in CELLS:
        work = least_work(cell, experts_hit=min(cell.E, cell.T * cell.K))
        assert sum(2 * m * k * n for m, k, n in products(cell)) == work.flops, cell.name
        assert work.touched_bytes > 0


def test_least_work_counted_by_hand():
    cell = Cell("experts", T=10, D=4, F=3, E=8, K=2, dtype=torch.bfloat16)
    forward = least_work(cell, experts_hit=5)
    assert forward.flops == 2 * 20 * 36 and forward.touched_bytes == 2 * (5 * 36 + 2 * 40) + 4 * 80
    training = least_work(replace(cell, mode="training"), experts_hit=5)
    assert training.flops == 3 * forward.flops
    assert training.touched_bytes == 2 * (2 * 5 * 36 + 8 * 36 + 3 * 40) + 2 * 4 * 80
    assert replace(cell, gated=False).weight_bytes == 2 * 8 * 24
    router = least_work(replace(cell, operator="router"), experts_hit=5)
    assert (router.flops, router.touched_bytes) == (0, 4 * 80 + 12 * 20)


def test_a_cell_that_does_not_fit_leaves_the_others(monkeypatch, tmp_path):
    def too_large(cell, device, draws):
        if cell.label == "large":
            raise torch.OutOfMemoryError("2 GiB")
        return make_inputs(cell, device, draws)

    monkeypatch.setattr(runner, "make_inputs", too_large)
    monkeypatch.setitem(suite.SUITES, "gpu", (replace(QWEN, label="large"), QWEN))
    file = tmp_path / "results.json"
    assert suite.run(arguments("--dry", "--json", str(file), "--peers", "nobody|grouped_mm")) == 0
    large, small = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert [row["note"] for row in large["rows"]] == ["skipped: out of memory"]
    assert small["rows"][0]["note"] == runner.RAN


@pytest.fixture
def two_cells(monkeypatch):
    cells = (replace(QWEN, label="a"), replace(ROUTER, label="b"))
    monkeypatch.setitem(suite.SUITES, "gpu", cells)
    measured = []
    run_cell = runner.run_cell

    def counted(cell, *args, **options):
        measured.append(cell.label)
        return run_cell(cell, *args, **options)

    monkeypatch.setattr(runner, "run_cell", counted)
    return measured


def test_a_run_resumes_where_it_stopped(two_cells, tmp_path, monkeypatch, capsys):
    file = tmp_path / "new" / "results.json"
    run = ["--dry", "--json", str(file), "--resume", "--peers", "^torch"]
    assert suite.run(arguments(*run, "--cells", "^a-")) == 0
    assert two_cells == ["a"] and [cell["label"] for cell in json.loads(file.read_text())["cells"]] == ["a"]
    assert suite.run(arguments(*run)) == 0 and two_cells == ["a", "b"]
    assert [cell["label"] for cell in json.loads(file.read_text())["cells"]] == ["a", "b"]
    assert suite.run(arguments(*run)) == 0 and two_cells == ["a", "b"]
    assert "2 of 2 cells are in" in capsys.readouterr().err
    # A cell with a failure is measured again, and only that.
    results = json.loads(file.read_text())
    results["cells"][1]["rows"][0]["failed"] = True
    file.write_text(json.dumps(results))
    assert suite.run(arguments(*run)) == 0 and two_cells == ["a", "b", "b"]
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]
    # Without --resume all cells are; and all of them where the versions are others.
    assert suite.run(arguments("--dry", "--json", str(file), "--peers", "^torch")) == 0
    assert two_cells == ["a", "b", "b", "a", "b"]
    monkeypatch.setattr(report, "version_of", lambda package: "0.0")
    assert suite.run(arguments(*run)) == 0 and two_cells[5:] == ["a", "b"]
    assert "was measured with different versions; starting over" in capsys.readouterr().err
    # A damaged file is not lost.
    file.write_text("{")
    assert suite.run(arguments(*run)) == 2 and two_cells[7:] == [] and file.read_text() == "{"


def test_an_interrupted_run_has_its_finished_cells_in_the_file(two_cells, tmp_path, monkeypatch):
    run_cell = runner.run_cell

    def interrupted(cell, *args, **options):
        if cell.label == "b":
            raise KeyboardInterrupt
        return run_cell(cell, *args, **options)

    monkeypatch.setattr(runner, "run_cell", interrupted)
    file = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        suite.run(arguments("--dry", "--json", str(file)))
    assert [cell["label"] for cell in json.loads(file.read_text())["cells"]] == ["a"]


@pytest.fixture
def as_if_measured(monkeypatch):
    """What is not dry runs on the CPU too, by the wall clock."""
    monkeypatch.setattr(suite, "GPU_SECONDS_PER_PEER", 0.001)
    monkeypatch.setattr(suite, "GPU_ROUNDS", 2)
    return lambda *argv: suite.run(arguments(*argv), CPU)


def test_measured_cells_have_all_columns(two_cells, as_if_measured, tmp_path, capsys):
    file = tmp_path / "results.json"
    drawn = ["--picture", str(tmp_path / "picture.png")] if importlib.util.find_spec("matplotlib") else []
    assert as_if_measured("--json", str(file), *drawn) == 0
    out = capsys.readouterr().out
    assert all(heading in out for heading in ("x floor", "MFU", "of dense", "of copy", "x best peer", "error", "peak MB"))
    results = json.loads(file.read_text())
    experts, router = results["cells"]
    assert results["dry"] is False and experts["dense_seconds"] > 0 and router["dense_seconds"] is None
    assert experts["floor_seconds"] == max(experts["dense_seconds"], experts["copy_seconds"])
    rows = {row["peer"]: row for row in experts["rows"]}
    ours, plain = rows[OURS], rows[PLAIN]
    assert ours["of_dense"] == pytest.approx(experts["dense_seconds"] / ours["seconds"])
    assert ours["mfu"] == pytest.approx(ours["of_dense"]) and all(row["mfu"] is None for row in router["rows"])
    assert ours["of_copy"] == pytest.approx(experts["copy_seconds"] / ours["seconds"])
    assert plain["times_faster"] == 1 and plain["peak_bytes"] > 0 and ours["spread"][0] <= ours["seconds"] <= ours["spread"][1]
    others = [row["times_best"] for peer, row in rows.items() if row["seconds"] and not peer.startswith(OURS)]
    assert min(others) == 1
    assert not drawn or (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_no_cell_begins_after_the_minutes(two_cells, as_if_measured, tmp_path, capsys):
    assert as_if_measured("--minutes", "1e-9", "--json", str(tmp_path / "r.json")) == 0
    assert two_cells == [] and "--resume goes on with a-" in capsys.readouterr().err


def test_a_wrong_peer_fails_the_command(two_cells, as_if_measured, monkeypatch, tmp_path, capsys):
    ours, grouped = PEERS["experts"][:2]

    def zeros(cell, weights):
        forward: Any = ours.build(cell, weights)
        return lambda *draw: forward(*draw) * 0

    peers = (ours, grouped, Peer("zeros", zeros, MODES))
    monkeypatch.setitem(PEERS, "experts", peers)
    monkeypatch.setattr(libraries, "FOR_GPUS", ())
    file = tmp_path / "results.json"
    assert as_if_measured("--json", str(file)) == bench.EXIT_DISAGREE
    rows = json.loads(file.read_text())["cells"][0]["rows"]
    assert [row["note"] for row in rows] == ["", "", "outputs disagree"] and rows[2]["seconds"] is None
    assert "disagree" in capsys.readouterr().out


def test_what_is_asked_for_wrongly_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = {
        (): "no CUDA device; --dry",
        ("--resume", "--dry"): "--resume needs the file",
        ("--dry", "--picture", "a.png"): "--dry has none",
        ("--dry", "--cells", "E99"): "matches none of",
        ("--dry", "--peers", "nobody"): "SonicMoE",
        ("--suite", "cpu", "--dry"): "--dry: not with --suite cpu, but with gpu",
    }
    for argv, message in cases.items():
        assert bench.run(arguments(*argv)) == bench.EXIT_USAGE
        assert message in capsys.readouterr().err
    for minutes in ("0", "soon", "inf"):
        with pytest.raises(SystemExit):
            arguments("--minutes", minutes)
        capsys.readouterr()


def test_conditions_are_optional(monkeypatch):
    monkeypatch.setattr(timing, "which", lambda name: None)
    assert timing.conditions() is None
    monkeypatch.setattr(timing, "which", lambda name: "/bin/nvidia-smi")
    answers = iter(["1980, 3201, 41, 512.3, 0x0, 97\n", "no devices\n"])
    monkeypatch.setattr(timing.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=next(answers)))
    assert timing.conditions()["clocks.sm"] == "1980" and timing.conditions() is None


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS or not importlib.util.find_spec("triton"), reason="no Triton kernels")
def test_ours_runs_dry_in_tritons_interpreter(tmp_path):
    file = tmp_path / "results.json"
    kinds = (
        r"qwen3-30b-T512-\w+-training$|qwen3-30b-T1-\w+-decode|gpt-oss-20b-T4096-\w+-training|merged-E32-\w+-training|router-T32-"
    )
    cells = f"^({kinds})"
    command = [sys.executable, "-m", "fusedonemoe", "bench", "--suite", "gpu", "--dry", "--cells", cells, "--json", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command += ["--peers", f"^{OURS}$"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["impl"] == "triton" and len(results["cells"]) == 5
