"""The benchmark of quantised experts, at a size that takes no time."""

import importlib
import json
from typing import Any

import pytest
import torch

from fusedonemoe.__main__ import main
from fusedonemoe.ops.cpu import native

pytest.importorskip("rich")
quantized: Any = importlib.import_module("fusedonemoe.bench.quantized")

_REFUSAL = native.refusal(torch.bfloat16, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(quantized, "SIZES", (128, 256, 8, 2))
    monkeypatch.setattr(quantized, "TOKENS", (1, 5))
    monkeypatch.setattr(quantized, "ROUNDS", 4)

    def sampler(self, dtype):
        self.flops_per_s, self.bytes_per_s = {dtype: 1e11}, 1e10
        return lambda: None

    monkeypatch.setattr(quantized.Ceilings, "sampler", sampler)


def test_every_form_is_timed_and_bytes_are_those_of_the_experts_that_are_hit(small):
    cell = quantized.QuantizedCell(torch.bfloat16, 4, (1, *quantized.SIZES))
    result = quantized.measure(cell, quantized.Ceilings(), real_time=False)
    lines = result.lines
    assert result.floor.seconds == min(line.floor_seconds for line in lines) and result.active_parameters == 2 * 3 * 128 * 256
    assert [line.weights for line in lines] == [quantized.PLAIN, quantized.PACKED, *quantized.FORMS]
    weights = 2 * 3 * 128 * 256  # of the two experts of one token
    int4 = weights // 2
    expected = [2 * weights, 2 * weights, weights + 2 * 4 * (512 + 128), int4 + 4 * weights // 128, int4 + 4 * weights // 32]
    assert [line.weight_bytes for line in lines] == expected
    for line in lines:
        assert line.seconds and line.speed_up and line.quartiles and not line.note
        assert line.floor_seconds == line.weight_bytes / 1e10
        assert line.p99_seconds >= line.seconds and line.calls == 4
    assert lines[0].speed_up == 1.0
    assert [line.weight_error is None for line in lines] == [True, True, False, False, False]
    assert lines[2].weight_error < 0.02 < lines[4].weight_error


def test_a_wrong_output_gets_no_time_and_fails_the_command(small, monkeypatch, capsys):
    right = quantized.F.experts_mlp_quantized

    def wrong(*arguments, impl="auto"):
        return right(*arguments) * (1.0 if impl == "grouped" else 1.1)

    monkeypatch.setattr(quantized.F, "experts_mlp_quantized", wrong)
    assert main(["bench", "--suite", "quantized", "--no-rt"]) == 1
    assert "fusedonemoe int8: off by" in capsys.readouterr().err


def test_the_command_prints_and_writes_tables(small, tmp_path, capsys):
    assert main(["bench", "--suite", "quantized", "--no-rt", "--json", str(tmp_path / "out.json")]) == 0
    assert "int4, groups of 32" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert [cell["name"] for cell in written] == ["T1-D128-F256-E8-K2", "T5-D128-F256-E8-K2"]
    assert [row["peer"] for row in written[0]["rows"]][:3] == [
        "fusedonemoe bfloat16",
        "fusedonemoe bfloat16, packed",
        "fusedonemoe int8",
    ]
    assert main(["bench", "--suite", "quantized", "--cells", "x"]) == 2


def test_the_command_goes_on_and_compares(small, tmp_path, capsys):
    file = str(tmp_path / "out.json")
    run = ["bench", "--suite", "quantized", "--no-rt", "--json", file]
    assert main([*run, "--cells", "T1-"]) == 0
    assert main([*run, "--resume"]) == 0
    assert "1 of 2 cells are in" in capsys.readouterr().err
    assert main(["bench", "--suite", "quantized", "--no-rt", "--compare", file]) in (0, 3)
    assert "compared with the run of" in capsys.readouterr().out
