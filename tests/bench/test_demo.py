"""The demo: its text, its models, the fairness of its comparison, and that what it says follows from its numbers."""

import argparse
import dataclasses
import re
import sys
from unittest.mock import Mock

import pytest
import torch

from fusedonemoe.bench.peers import Peer, masked_block
from fusedonemoe.bench.workloads import Cell
from fusedonemoe.cli.demo import FULL, PICTURE, QUICK, add_arguments, run
from fusedonemoe.cli.demo.text import Corpus, load_corpus, source_files, split_files, training_batches, validation_batches

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from fusedonemoe.cli.demo import output, program
from fusedonemoe.cli.demo.model import ByteTransformer, balance_loss, count_parameters
from fusedonemoe.cli.demo.train import Trainer, learning_rate_at, smoothed, train_side_by_side, verdict

CPU = torch.device("cpu")
TINY = dataclasses.replace(QUICK, window=16, batch=2, steps=4, validations=2, validation_batches=2)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def corpus():
    text = torch.arange(4096).remainder(97).to(torch.uint8)
    return Corpus(text, text.flip(0), ("train.py",), ("val.py",))


def make_trainers(settings):
    trainers = []
    for name in ("MoE", "dense"):
        torch.manual_seed(0)
        model = ByteTransformer(settings, use_experts=name == "MoE")
        trainers.append(Trainer(name, model, settings, compiled=False))
    return trainers


# Text


def test_split_is_disjoint_complete_and_repeatable():
    files = [f"{i:03}.py" for i in range(57)]
    train, val = split_files(files)
    assert not set(train) & set(val)
    assert sorted(train + val) == files
    assert len(val) == 5
    assert (train, val) == split_files(files)


def test_source_files_are_sorted_and_leave_out_what_is_not_the_library(tmp_path):
    for name in ("b.py", "a/c.py", "test/t.py", "site-packages/p/q.py", "_sysconfigdata_x.py", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n")
    assert source_files(tmp_path) == ["a/c.py", "b.py"]


def test_standard_library_is_enough_text_and_loads_the_same_twice():
    corpus = load_corpus()
    assert corpus.train.numel() > 2_000_000
    assert corpus.val.numel() > 200_000
    assert not set(corpus.train_files) & set(corpus.val_files)
    again = load_corpus()
    assert torch.equal(corpus.train, again.train) and torch.equal(corpus.val, again.val)


def test_too_few_files_raise(tmp_path):
    (tmp_path / "one.py").write_text("pass\n")
    with pytest.raises(FileNotFoundError, match="must hold at least 10 Python source files, got 1"):
        load_corpus(tmp_path)


def test_batches_follow_the_seed_and_targets_are_one_byte_ahead(corpus):
    def draw(seed):
        return list(training_batches(corpus.train, batch=3, window=8, steps=2, seed=seed, device=CPU))

    for inputs, targets in draw(0):
        assert inputs.shape == targets.shape == (3, 8)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal((inputs + 1) % 97, targets)  # the text counts up
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(draw(0), draw(0), strict=True))
    assert not torch.equal(draw(0)[0][0], draw(1)[0][0])


def test_validation_windows_span_the_text(corpus):
    batches = validation_batches(corpus.val, batch=2, window=8, batches=3, device=CPU)
    assert len(batches) == 3
    assert torch.equal(batches[0][0][0], corpus.val[:8].long())
    assert torch.equal(batches[-1][1][-1], corpus.val[-8:].long())


# Models


@pytest.mark.parametrize("use_experts", [True, False])
def test_model_runs_forward_and_backward(use_experts, corpus):
    torch.manual_seed(0)
    model = ByteTransformer(TINY, use_experts=use_experts)
    (batch,) = training_batches(corpus.train, batch=2, window=16, steps=1, seed=0, device=CPU)
    loss = model(*batch)
    (loss.cross_entropy + loss.balance).backward()
    assert 4 < loss.cross_entropy < 8  # log(256) is 5.5
    E = TINY.num_experts if use_experts else 0
    assert loss.tokens_per_expert.shape == (TINY.num_layers, E)
    assert (loss.tokens_per_expert.sum(1) == (2 * 16 * TINY.top_k if use_experts else 0)).all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_prediction_looks_at_no_later_byte(corpus):
    torch.manual_seed(0)
    model = ByteTransformer(TINY, use_experts=True)
    text = corpus.train[:16].long()[None]
    changed = text.clone()
    changed[0, 10:] = 5
    before, after = model.logits(text), model.logits(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("settings", [FULL, QUICK])
def test_both_models_have_the_same_active_parameters_but_for_the_router(settings):
    with torch.device("meta"):
        moe, dense = (count_parameters(ByteTransformer(settings, use_experts=use)) for use in (True, False))
    router = settings.num_layers * settings.num_experts * settings.hidden_size
    assert moe.active - router == dense.active == dense.total
    assert moe.total > 1.5 * dense.total


def test_balance_loss_is_one_when_balanced_and_E_when_all_choose_one_expert():
    E = 8
    even = balance_loss(torch.zeros(5, 3, E), torch.full((E,), 30))
    torch.testing.assert_close(even, torch.tensor(1.0))
    collapsed = torch.full((64, E), -100.0)
    collapsed[:, 2] = 100.0
    counts = torch.zeros(E, dtype=torch.int64)
    counts[2] = 64
    torch.testing.assert_close(balance_loss(collapsed, counts), torch.tensor(float(E)))


def test_balance_loss_pushes_the_busy_expert_down():
    logits = torch.zeros(16, 4, requires_grad=True)
    loss = balance_loss(logits, torch.tensor([40, 8, 8, 8]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1:] < 0).all()


def test_generation_repeats_and_slides_past_the_window():
    torch.manual_seed(0)
    model = ByteTransformer(TINY, use_experts=True)
    text = model.generate(b"import ", 3 * TINY.window, temperature=0.8, seed=1)
    assert len(text) == 3 * TINY.window
    assert text == model.generate(b"import ", 3 * TINY.window, temperature=0.8, seed=1)
    assert text != model.generate(b"import ", 3 * TINY.window, temperature=0.8, seed=2)


# Training


def test_learning_rate_rises_peaks_and_falls():
    rates = [learning_rate_at(step, FULL) for step in range(FULL.steps)]
    peak = rates.index(max(rates))
    assert 0 < peak < FULL.steps // 5
    assert max(rates) == pytest.approx(FULL.learning_rate)
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.1 * FULL.learning_rate


def test_smoothing_starts_as_a_mean_and_keeps_a_constant():
    assert smoothed([4.0, 2.0]) == pytest.approx([4.0, 3.0])
    assert smoothed([1.5] * 50) == pytest.approx([1.5] * 50)
    assert smoothed([]) == []


def test_training_learns_and_repeats(corpus):
    settings = dataclasses.replace(TINY, steps=30)
    runs = []
    for _ in range(2):
        trainers = make_trainers(settings)
        on_step = Mock()
        train_side_by_side(trainers, corpus, settings, seed=0, device=CPU, on_step=on_step)
        assert on_step.call_count == settings.steps
        runs.append([trainer.history for trainer in trainers])
    for history, again in zip(*runs, strict=True):
        assert history.train == again.train
        assert [step for step, _ in history.val] == [15, 30]
        assert history.train[-1] < history.train[0] - 0.5
    rows = settings.validation_batches * settings.tokens_per_step * settings.top_k
    assert (runs[0][0].tokens_per_expert.sum(1) == rows).all()


@pytest.mark.parametrize(
    ("moe", "dense", "expected", "unexpected"),
    [
        (2.1, 2.25, "0.150 below the dense baseline's 2.250: the better model", "above"),
        (2.25, 2.1, "0.150 above the dense baseline's 2.100: the worse model", "below"),
        (2.1, 2.1002, "level with the dense baseline: 2.100", "better"),
    ],
)
def test_verdict_follows_the_numbers(moe, dense, expected, unexpected):
    assert expected in verdict(moe, dense)
    assert unexpected not in verdict(moe, dense)


# Throughput


LAYER = Cell("block", T=32, D=16, F=8, E=6, K=2, dtype=torch.float32, mode="training")


def nan_gradient(y):
    """Right in value; 0 / 0 in the derivative."""
    return y + (0 * y).square().sqrt()


def wrong_layer(change):
    def build(cell, weights):
        forward = masked_block(cell, weights)
        return lambda x: change(forward(x))

    return Peer("wrong", build, ("training",), metered=False)


def test_all_ways_to_compute_the_layer_agree():
    peers = program.line_up(compiled=False)
    assert [peer.name for peer in program.line_up(compiled=True)] == [
        "fusedonemoe, compiled",
        "fusedonemoe, eager",
        "per-expert loop, eager",
        "all experts, masked, compiled",
        "all experts, masked, eager",
    ]
    result = program.compare(LAYER, peers=peers, device=CPU, rounds=2)
    assert [row.peer for row in result.rows] == ["fusedonemoe, eager", "per-expert loop, eager", "all experts, masked, eager"]
    assert all(row.seconds and row.error is not None and row.error < 1e-5 and row.calls >= 2 for row in result.rows)


@pytest.mark.parametrize(
    "change",
    [lambda y: y * 1.01, lambda y: 0 * y, lambda y: y * float("nan"), nan_gradient],
    ids=["scaled", "zero", "nan", "nan-gradient"],
)
def test_no_time_for_a_peer_that_disagrees(change, capsys):
    peers = [*program.line_up(compiled=False)[:1], wrong_layer(change)]
    result = program.compare(LAYER, peers=peers, device=CPU, rounds=1)
    right, wrong = result.rows
    assert right.seconds and wrong.seconds is None and wrong.failed
    output.show_throughput(Console(width=100), "shape", result)
    row = next(line for line in capsys.readouterr().out.splitlines() if "wrong" in line)
    assert "not timed" in row and ("disagree" in row or "gradients" in row)


# The program


def test_picture_needs_no_more_than_one_step(corpus, tmp_path):
    settings = dataclasses.replace(TINY, steps=1, validations=1)
    trainers = make_trainers(settings)
    train_side_by_side(trainers, corpus, settings, seed=0, device=CPU, on_step=lambda: None)
    output.draw_picture(tmp_path / "new" / "demo.png", trainers, settings)
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_whole_or_the_older_one(corpus, tmp_path, monkeypatch):
    settings = dataclasses.replace(TINY, steps=1, validations=1)
    trainers, path = make_trainers(settings), tmp_path / PICTURE
    train_side_by_side(trainers, corpus, settings, seed=0, device=CPU, on_step=lambda: None)
    path.write_bytes(b"old")
    monkeypatch.setattr("fusedonemoe.files.os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=f"cannot write {path}: No space left on device"):
        output.draw_picture(path, trainers, settings)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_terminal_shows_a_bar_and_no_colour_when_asked(corpus, monkeypatch, capsys):
    trainers = make_trainers(TINY)
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(force_terminal=True, width=100)
    with output.training_display(console, trainers, TINY) as on_step:
        train_side_by_side(trainers, corpus, TINY, seed=0, device=CPU, on_step=on_step)
    out = capsys.readouterr().out
    assert "4/4" in out and "held out" in out
    assert not re.search(r"\x1b\[(3|4|9)\d", out), "colours despite NO_COLOR"


def test_sample_cannot_command_the_terminal(capsys):
    output.show_sample(Console(width=60), b"def f", b"\x1b[2J\x07[red]\xff\n  x", name="model")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "[red]" in out, "text is not markup"


def check_quick_run(out, folder):
    moe, dense = (float(re.findall(rf"{name} [\d.]+ \(held out ([\d.]+)", out)[-1]) for name in ("MoE", "dense"))
    assert " ".join(verdict(moe, dense).split()) in " ".join(out.split())
    assert (folder / "fusedonemoe-demo.png").stat().st_size > 10_000
    for part in ("Text: the source of Python's standard library", "What the MoE model makes of", "per-expert loop", "s in all"):
        assert part in out
    assert "not timed" not in out
    assert "\x1b" not in out


def test_quick_run_without_compilation(tmp_path, capsys):
    assert run(parse("--quick", "--no-compile", "--output", str(tmp_path / "pictures"))) == 0
    check_quick_run(capsys.readouterr().out, tmp_path / "pictures")


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    assert run(parse("--quick", "--steps", "5", "--output", str(tmp_path))) == 0
    out = capsys.readouterr().out
    check_quick_run(out, tmp_path)
    assert "step 5/5" in out
    assert "compiled" in out


@pytest.mark.parametrize(
    ("absent", "named"), [(["rich"], "rich"), (["matplotlib"], "matplotlib"), (["rich", "matplotlib"], "rich and matplotlib")]
)
def test_missing_extra_is_named(monkeypatch, capsys, absent, named):
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    assert run(parse("--quick")) == 2
    error = capsys.readouterr().err
    assert f"The demo needs {named}: pip install 'fusedonemoe[cli,plot]'" in error


def test_disagreement_is_exit_code_1(monkeypatch, tmp_path, capsys):
    peers = [*program.line_up(compiled=False)[:1], wrong_layer(lambda y: 2 * y)]
    monkeypatch.setattr(program, "line_up", lambda *, compiled: peers)
    assert run(parse("--quick", "--no-compile", "--steps", "1", "--output", str(tmp_path))) == 1
    assert "disagrees with float64" in capsys.readouterr().err


def test_unusable_device_is_exit_code_2(capsys):
    assert run(parse("--quick", "--device", "nowhere")) == 2
    assert "The demo cannot run here" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--threads"])
def test_counts_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        parse(option, "0")
    assert "must be at least 1, got 0" in capsys.readouterr().err
