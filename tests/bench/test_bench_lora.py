"""The benchmark of adapters: agreement before times, memory beside the frozen gradients, the command's exit status."""

import argparse
import importlib
import json

import pytest
import torch

from asv_bench import suites

pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("peft")
lora = importlib.import_module("asv_bench.suites.lora")

SIZES = (12, 32, 32, 16, 2, 1)


@pytest.fixture
def ceilings(monkeypatch):
    def sampler(self, dtype):
        self.flops_per_s, self.bytes_per_s = {dtype: 1e11}, 1e10
        return lambda: None

    monkeypatch.setattr(lora.Ceilings, "sampler", sampler)
    return lora.Ceilings()


def measure(ceilings):
    torch._dynamo.reset()
    return lora.measure(lora.LoraCell(torch.float32, 1, SIZES), ceilings=ceilings, backend="aot_eager", real_time=False)


def by_name(result):
    return {line.name: line for line in result.lines}


def test_every_line_has_its_bytes_and_its_share_of_pefts_time(ceilings):
    result = measure(ceilings)
    lines = by_name(result)
    assert list(lines) == ["peft", "fusedonemoe", "fusedonemoe, compiled", "fusedonemoe, no adapters"]
    frozen = 16 * 3 * 32 * 32 * 4
    # PEFT adds a delta to all of the weights, and keeps the sum.
    assert lines["peft"].peak_bytes > frozen and lines["peft"].share > 1
    for name in ("fusedonemoe", "fusedonemoe, compiled"):
        assert lines[name].share < lines["peft"].share - 0.8 and lines[name].seconds > 0 and lines[name].relative > 0
        assert lines[name].p99_seconds >= lines[name].seconds and 0 < lines[name].error < 1e-5
    assert lines["peft"].relative == 1 and not any(line.note for line in lines.values())
    # Of each expert, r rows of D and of F, and 2 F and D rows of r.
    adapters = 16 * lora.RANK * ((32 + 64) + (32 + 32))
    assert result.parameters - result.active_parameters == 1024 * 32 + (16 - 2) * 3 * 32 * 32 + adapters * 14 // 16
    assert result.floor.seconds == max(result.work.flops / 1e11, result.work.touched_bytes / 1e10)


def test_wrong_numbers_get_no_time(monkeypatch, ceilings):
    from fusedonemoe.layers.lora import LoRAExperts

    real = LoRAExperts.forward
    monkeypatch.setattr(LoRAExperts, "forward", lambda self, *args: 1.01 * real(self, *args))
    lines = by_name(measure(ceilings))
    assert lines["peft"].seconds and lines["fusedonemoe"].seconds is None and lines["fusedonemoe"].note.startswith("off by")


@pytest.mark.parametrize("fails", [False, True])
def test_the_command(fails, monkeypatch, capsys, tmp_path):
    made = [
        lora.Line("peft", 10**6, 1.2, 0.5, 0.6, 0.6, 9, 1.0, 0.0),
        lora.Line("fusedonemoe", 10**5, 0.11 if fails else 0.05, 0.2, 0.3, 0.3, 9, 0.4, 1e-7),
    ]
    work = lora.adapter_work(lora.Account(100, 10, 10, 4, 4, 4), length=256, adapters=2)
    monkeypatch.setattr(lora, "measure", lambda cell, **options: lora.LinesResult(cell, tuple(made), work, 100, 10))
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    args = parser.parse_args(["lora", "--no-rt", "--json", str(tmp_path / "lora.json")])
    assert suites.run(args) == int(fails)
    captured = capsys.readouterr()
    assert "5.0 %" in captured.out or fails
    assert ("fusedonemoe: adds 11.0 % of the frozen gradients, more than 10 %" in captured.err) == fails
    cells = {cell["name"]: cell for cell in json.loads((tmp_path / "lora.json").read_text())["cells"]}
    assert list(cells) == [f"T256-D512-F256-E64-K8-L4-{dtype}" for dtype in ("float32", "bfloat16")]
    peft, ours = cells["T256-D512-F256-E64-K8-L4-float32"]["rows"]
    assert (peft["peer"], peft["failed"], peft["tokens_per_second"]) == ("peft", False, 512.0)
    assert (ours["failed"], ours["p95_seconds"]) == (fails, 0.3)


def test_without_peft_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    assert suites.run(parser.parse_args(["lora"])) == 2
    assert "compares with ['transformers', 'peft']" in capsys.readouterr().err
