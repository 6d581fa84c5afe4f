"""The benchmark of adapters: agreement before times, memory beside the frozen gradients, the command's exit status."""

import argparse
import importlib
import json

import pytest
import torch

from fusedonemoe import bench

pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("peft")
lora = importlib.import_module("fusedonemoe.bench.lora")

SIZES = (12, 32, 32, 16, 2, 1)


def measure(**options):
    torch._dynamo.reset()
    return {line.name: line for line in lora.measure(SIZES, torch.float32, backend="aot_eager", real_time=False, **options)}


def test_every_line_has_its_bytes_and_its_share_of_pefts_time():
    lines = measure(rounds=1)
    assert list(lines) == ["peft", "fusedonemoe", "fusedonemoe, compiled", "fusedonemoe, no adapters"]
    frozen = 16 * 3 * 32 * 32 * 4
    # PEFT adds a delta to all of the weights, and keeps the sum.
    assert lines["peft"].peak_bytes > frozen and lines["peft"].share > 1
    for name in ("fusedonemoe", "fusedonemoe, compiled"):
        assert lines[name].share < lines["peft"].share - 0.8 and lines[name].seconds > 0 and lines[name].relative > 0
    assert lines["peft"].relative == 1 and not any(line.note for line in lines.values())


def test_wrong_numbers_get_no_time(monkeypatch):
    from fusedonemoe.lora import LoRAExperts

    real = LoRAExperts.forward
    monkeypatch.setattr(LoRAExperts, "forward", lambda self, *args: 1.01 * real(self, *args))
    lines = measure(rounds=1)
    assert lines["peft"].seconds and lines["fusedonemoe"].seconds is None and lines["fusedonemoe"].note.startswith("off by")


@pytest.mark.parametrize("fails", [False, True])
def test_the_command(fails, monkeypatch, capsys, tmp_path):
    made = {
        "peft": lora.Line("peft", 10**6, 1.2, 0.5, 1.0),
        "fusedonemoe": lora.Line("fusedonemoe", 10**5, 0.11 if fails else 0.05, 0.2, 0.4),
    }
    monkeypatch.setattr(lora, "measure", lambda *args, **options: list(made.values()))
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(["--suite", "lora", "--no-rt", "--json", str(tmp_path / "lora.json")])
    assert bench.run(args) == int(fails)
    captured = capsys.readouterr()
    assert "5.0 %" in captured.out or fails
    assert ("fusedonemoe: adds 11.0 % of the frozen gradients, more than 10 %" in captured.err) == fails
    assert json.loads((tmp_path / "lora.json").read_text())["tables"]["T256-D512-F256-E64-K8-L4-float32"][0]["name"] == "peft"


def test_without_peft_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["--suite", "lora"])) == 2
    assert "compares with ['transformers', 'peft']" in capsys.readouterr().err
