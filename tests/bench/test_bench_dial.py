"""The dial's table: bytes beside the formula, wrong gradients get no time, and the command's exit status."""

import argparse
import importlib
import itertools
import json

import pytest
import torch

from asv_bench import suites
from fusedonemoe import bench
from fusedonemoe.testing import make_mlp_inputs

pytest.importorskip("rich")
dial = importlib.import_module("asv_bench.suites.dial")
ceilings = importlib.import_module("fusedonemoe.bench.ceilings")

SIZES = (24, 16, 8, 4, 2)


def lines_of(**options):
    return dial.measure(SIZES, torch.float32, rounds=2, real_time=False, impl="grouped", **options)


def arguments(*argv, suite="dial"):
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    return parser.parse_args([suite, "--no-rt", *argv])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(dial, "SIZES", SIZES)
    monkeypatch.setattr(dial, "ROUNDS", 1)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "GEMM_SIZES", (16,))


def test_every_setting_has_its_bytes_and_its_share_of_the_time():
    lines = [line for line in lines_of() if line.save_percent is not None]
    assert [line.save_percent for line in lines] == [100, 75, 50, 25, 0]
    assert [line.held_bytes for line in lines] == [line.formula_bytes for line in lines]
    steps = {a.held_bytes - b.held_bytes for a, b in itertools.pairwise(lines)}
    assert steps == {24 * 2 // 4 * 16 * 4}  # a quarter of the N rows of 2 F float32
    assert lines[0].relative == 1.0 and all(line.seconds > 0 and line.relative > 0 for line in lines)


def test_transformers_holds_what_its_graph_holds():
    pytest.importorskip("transformers")
    *ours, theirs, loop = lines_of()
    assert loop.name == dial.LOOP and loop.seconds and loop.held_bytes > ours[0].held_bytes
    T, D, F, _, K = SIZES
    assert theirs.save_percent is None and theirs.seconds and not theirs.note
    # Gathered rows of x, both halves of z, two products of them, and each expert's output.
    assert theirs.held_bytes > T * K * (2 * D + 4 * F) * 4 > ours[0].held_bytes > ours[-1].held_bytes


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    real = dial.F.experts_mlp

    def wrong(x, experts, weights, up, down, *, save_percent, impl):
        y = real(x, experts, weights, up, down, save_percent=save_percent, impl=impl)
        return y + (0.01 * (x - x.detach()) if save_percent == 25 else 0)  # the same output

    monkeypatch.setattr(dial.F, "experts_mlp", wrong)
    by_percent = {line.save_percent: line for line in lines_of()}
    assert by_percent[25].note.startswith("off by") and by_percent[25].seconds is None
    assert by_percent[0].seconds and not by_percent[0].note


def test_held_bytes_leaves_parameters_out():
    inputs = make_mlp_inputs(*SIZES, requires_grad=True)
    size, y = dial.held_bytes(lambda: inputs.x @ inputs.down_proj[0], [inputs.down_proj])
    assert size == inputs.x.nbytes and y.shape == (24, 8)


def test_the_command_prints_and_writes(small, capsys, tmp_path):
    assert suites.run(arguments("--json", str(tmp_path / "dial.json"), "--threads", "1")) == 0
    printed = capsys.readouterr().out
    assert "T24-D16-F8-E4-K2-bfloat16" in printed and "formula MB" in printed and "0 %" in printed
    cells = {cell["name"]: cell for cell in json.loads((tmp_path / "dial.json").read_text())["cells"]}
    rows = cells["T24-D16-F8-E4-K2-float32"]["rows"]
    assert [row["save_percent"] for row in rows[:5]] == [100, 75, 50, 25, 0] and not any(row["failed"] for row in rows)
    assert cells["T24-D16-F8-E4-K2-float32"]["floor_seconds"] > 0
    assert all(row["p99_seconds"] >= row["p95_seconds"] >= row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)


def test_the_command_fails_where_the_formula_does_not_hold(small, monkeypatch, capsys):
    real = dial.formula_bytes
    monkeypatch.setattr(dial, "formula_bytes", lambda inputs, p: real(inputs, p) * (1.03 if p == 50 else 1))
    assert suites.run(arguments()) == 1
    assert "fusedonemoe 50 %: holds a different number of bytes than the formula" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--peers", "x"], ["--picture", "x.png"], ["--dry"]])
def test_options_of_other_suites_are_refused(option, capsys):
    assert suites.run(arguments(*option)) == 2
    assert "--suite dial" in capsys.readouterr().err


def test_the_memory_suite_runs_dry_and_resumes(capsys, tmp_path):
    file = tmp_path / "memory.json"
    run = ["--dry", "--json", str(file)]
    assert suites.run(arguments(*run, "--cells", "T2048-D1024", suite="memory")) == 0
    first = json.loads(file.read_text())["cells"]
    assert [cell["name"] for cell in first] == ["T2048-D1024-F512-E32-K4-float32", "T2048-D1024-F512-E32-K4-bfloat16"]
    assert all(row["held_bytes"] and row["seconds"] is None for cell in first for row in cell["rows"])
    assert suites.run(arguments(*run, "--resume", suite="memory")) == 0
    assert "2 of 8 cells are in" in capsys.readouterr().err
    cells = json.loads(file.read_text())["cells"]
    assert [cell["name"] for cell in cells] == [cell.name for cell in dial.cells_of("memory")] and cells[:2] == first


def test_a_table_that_no_pattern_matches_is_no_run(capsys):
    assert suites.run(arguments("--cells", "nothing")) == bench.EXIT_USAGE
    assert "T2048-D1024-F512-E32-K4-float32" in capsys.readouterr().err
