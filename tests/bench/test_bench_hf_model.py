"""The suite of a whole transformers model: its table, its JSON, and its exit status where tokens differ."""

import argparse
import importlib
import json

import pytest
import torch

from asv_bench import suites

pytest.importorskip("rich")
hf_model = importlib.import_module("asv_bench.suites.hf_model")

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

    def sampler(self, dtype):
        self.flops_per_s[dtype], self.bytes_per_s = 1e11, 1e10
        return lambda: None

    monkeypatch.setattr(hf_model.Ceilings, "sampler", sampler)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    return parser.parse_args(["transformers", "--no-rt", *argv])


def test_the_command_prints_and_writes(capsys, tmp_path):
    assert suites.run(arguments("--json", str(tmp_path / "model.json"), "--threads", "1")) == 0
    printed = capsys.readouterr().out
    assert "qwen3-moe-float32" in printed and "qwen3-moe-bfloat16" in printed and "the same" in printed
    cells = {cell["name"]: cell for cell in json.loads((tmp_path / "model.json").read_text())["cells"]}
    assert list(cells) == [f"qwen3-moe-{dtype}-{mode}" for dtype in ("float32", "bfloat16") for mode in ("training", "decode")]
    for cell in cells.values():
        ours, default = cell["rows"]
        assert (ours["peer"], default["peer"]) == ("fusedonemoe", "grouped_mm") and not ours["failed"]
        assert default["times_faster"] == 1.0 and default["error"] == 0.0
        assert all(row["p99_seconds"] >= row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in (ours, default))
        assert cell["floor_seconds"] == max(cell["flops"] / 1e11, cell["touched_bytes"] / 1e10)
        assert ours["mfu"] == pytest.approx(cell["flops"] / ours["seconds"] / 1e11)
        assert cell["parameters"] > cell["active_parameters"] > 0
    assert (cells["qwen3-moe-float32-training"]["T"], cells["qwen3-moe-float32-decode"]["T"]) == (6, 1)


@pytest.mark.parametrize("length", [1, 5])
def test_the_least_work_is_that_of_the_products_that_run(length):
    from torch.utils.flop_counter import FlopCounterMode

    model = hf_model.make_model(torch.float32, SIZES)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None], use_cache=False)
    # Eager attention multiplies all pairs.
    assert hf_model.account_of(model).forward_flops(length, length * length) == counter.get_total_flops()


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
    assert suites.run(arguments("--cells", "float32-decode")) == 1
    assert "fusedonemoe: greedy generation in float32 gave other tokens" in capsys.readouterr().err


def test_other_gradients_get_no_time(monkeypatch):
    real = hf_model.training_step

    def wrong(model, tokens):
        loss = real(model, tokens)
        if model.get_experts_implementation() == {"": "fusedonemoe"}:
            next(p for p in model.parameters() if p.dim() == 3).grad *= 1.01
        return loss

    monkeypatch.setattr(hf_model, "training_step", wrong)
    cell = hf_model.ModelCell(torch.float32, 1, "training", SIZES)
    ours, default = hf_model.measure(cell, ceilings=hf_model.Ceilings(), real_time=False).lines
    assert ours.note.startswith("off by") and ours.seconds is None and default.seconds


def test_a_decoding_step_leaves_the_cache_as_it_was():
    model = hf_model.make_model(torch.float32, SIZES)
    step, token = hf_model.decoder(model, torch.tensor([[1, 2, 3]])), torch.tensor([[4]])
    first = step(token)
    step(torch.tensor([[5]]))
    assert torch.equal(step(token), first)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3, 4]])).logits[:, -1:], first)
