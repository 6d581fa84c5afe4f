"""The suite of a whole transformers model: its table, its JSON, and its exit status where tokens differ."""

import argparse
import importlib
import json

import pytest
import torch

from fusedonemoe import bench

pytest.importorskip("rich")
hf_model = importlib.import_module("fusedonemoe.bench.hf_model")

SIZES = {name: 32 if size > 64 else size for name, size in hf_model.SIZES.items()} | {
    "num_hidden_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(hf_model, "SIZES", SIZES)
    for name, value in {"ROUNDS": 2, "BATCH": 1, "LENGTH": 6, "CONTEXT": 4, "NEW_TOKENS": 5, "DECODES_PER_ROUND": 2}.items():
        monkeypatch.setattr(hf_model, name, value)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--suite", "transformers", "--no-rt", *argv])


def test_the_command_prints_and_writes(capsys, tmp_path):
    assert bench.run(arguments("--json", str(tmp_path / "model.json"), "--threads", "1")) == 0
    printed = capsys.readouterr().out
    assert "qwen3-moe-float32" in printed and "qwen3-moe-bfloat16" in printed and "the same" in printed
    result = json.loads((tmp_path / "model.json").read_text())
    ours, default = result["tables"]["qwen3-moe-float32"]
    assert (ours["name"], default["name"]) == ("fusedonemoe", "grouped_mm")
    assert default["training_times_faster"] == default["decode_times_faster"] == 1.0
    assert all(line["training_seconds"] > 0 and line["decode_seconds"] > 0 for line in (ours, default))


def test_each_line_runs_what_it_says():
    model = hf_model.make_model(torch.float32, SIZES)
    for name, using in hf_model.IMPLEMENTATIONS.items():
        with using(model):
            assert model.get_experts_implementation() == {"": name}


def test_other_tokens_fail_the_command(monkeypatch, capsys):
    real, calls = hf_model.greedy_tokens, []

    def wrong(*args):
        calls.append(1)
        return real(*args) + (len(calls) == 1)

    monkeypatch.setattr(hf_model, "greedy_tokens", wrong)
    assert bench.run(arguments()) == 1
    assert "gave other tokens" in capsys.readouterr().err


def test_a_decoding_step_leaves_the_cache_as_it_was():
    model = hf_model.make_model(torch.float32, SIZES)
    step, token = hf_model.decoder(model, torch.tensor([[1, 2, 3]])), torch.tensor([[4]])
    first = step(token)
    step(torch.tensor([[5]]))
    assert torch.equal(step(token), first)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3, 4]])).logits[:, -1:], first)
