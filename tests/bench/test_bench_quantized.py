"""The benchmark of quantised experts, at a size that takes no time."""

import importlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fusedonemoe.__main__ import main
from fusedonemoe.bench.catalogue import SUITES
from fusedonemoe.ops.cpu import native

pytest.importorskip("rich")
libraries: Any = importlib.import_module("fusedonemoe.bench.libraries")
runner: Any = importlib.import_module("fusedonemoe.bench.runner")
cell_suite: Any = importlib.import_module("fusedonemoe.bench.cell_suite")
ceilings: Any = importlib.import_module("fusedonemoe.bench.ceilings")
timing: Any = importlib.import_module("fusedonemoe.bench.timing")

_REFUSAL = native.refusal(torch.bfloat16, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SUITES, "quantized", tuple(replace(SUITES["quantized"][0], T=T, D=128, F=256, E=8, K=2) for T in (1, 5)))
    monkeypatch.setattr(cell_suite, "QUANTIZED_SECONDS_PER_PEER", 0.01)
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)

    def sampler(self, dtype):
        self.flops_per_s, self.bytes_per_s = {dtype: 1e11}, 1e10
        return lambda: None

    monkeypatch.setattr(ceilings.Ceilings, "sampler", sampler)


def test_every_form_is_timed_and_bytes_are_those_of_the_experts_that_are_hit():
    cell = SUITES["quantized"][0]
    timer = timing.Timer(real_time=False)
    result = runner.run_cell(cell, timer, ceilings=ceilings.Ceilings(), peers=libraries.QUANTIZED, seconds=0.01)
    assert result.cell.active_parameters == 2 * 3 * 128 * 256
    assert [row.peer for row in result.rows] == [
        f"fusedonemoe {form}" for form in ("bfloat16", "bfloat16, packed", *libraries.FORMS)
    ]
    weights = 2 * 3 * 128 * 256  # of the two experts of one token
    int4 = weights // 2
    expected = [2 * weights, 2 * weights, weights + 2 * 4 * (512 + 128), int4 + 4 * weights // 128, int4 + 4 * weights // 32]
    assert [row.weight_bytes for row in result.rows] == expected
    for row in result.rows:
        assert row.seconds and row.spread and not row.note and row.error < 2e-2
        assert row.floor_seconds == row.weight_bytes / 1e10
        assert row.p99_seconds >= row.seconds and row.calls >= 5
    assert [row.weight_error is None for row in result.rows] == [True, True, False, False, False]
    assert result.rows[2].weight_error < 0.02 < result.rows[4].weight_error


def test_a_wrong_output_gets_no_time_and_fails_the_command(monkeypatch, capsys):
    right = libraries.F.experts_mlp_quantized
    monkeypatch.setattr(libraries.F, "experts_mlp_quantized", lambda *draw, **weights: right(*draw, **weights) * 1.1)
    assert main(["bench", "--suite", "quantized", "--no-rt"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "fusedonemoe int8" in line)
    assert "outputs disagree" in line


def test_the_command_prints_and_writes_tables(tmp_path, capsys):
    assert main(["bench", "--suite", "quantized", "--no-rt", "--json", str(tmp_path / "out.json")]) == 0
    assert "int4, groups of 32" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert [cell["name"] for cell in written] == ["T1-D128-F256-E8-K2", "T5-D128-F256-E8-K2"]
    assert [row["peer"] for row in written[0]["rows"]][:3] == [
        "fusedonemoe bfloat16",
        "fusedonemoe bfloat16, packed",
        "fusedonemoe int8",
    ]
    for row in written[0]["rows"]:
        assert row["weights"] in row["peer"] and row["speed_up"] == row["times_faster"] > 0 and row["floor_seconds"] > 0
    assert written[0]["rows"][0]["speed_up"] == 1.0 and written[0]["operator"] == "quantized"
    assert main(["bench", "--suite", "quantized", "--cells", "x"]) == 2


def test_the_command_goes_on_and_compares(tmp_path, capsys):
    file = str(tmp_path / "out.json")
    run = ["bench", "--suite", "quantized", "--no-rt", "--json", file]
    assert main([*run, "--cells", "T1-"]) == 0
    assert main([*run, "--resume"]) == 0
    assert "1 of 2 cells are in" in capsys.readouterr().err
    assert main(["bench", "--suite", "quantized", "--no-rt", "--compare", file]) in (0, 3)
    assert "compared with the run of" in capsys.readouterr().out
