"""The suite seeds: all rows of the published tables, peers that agree, wrong answers without a time, work that is counted."""

import argparse
import importlib
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from asv_bench import suites
from fusedonemoe import bench
from fusedonemoe.bench.peers import ALL_PAIRS, OURS, YARDSTICK

pytest.importorskip("rich")
suite = importlib.import_module("asv_bench.suites.seed_suite")
cells = importlib.import_module("asv_bench.suites.seed_cells")
peers = importlib.import_module("asv_bench.suites.seed_peers")
inputs = importlib.import_module("asv_bench.suites.seed_inputs")
ceilings = importlib.import_module("fusedonemoe.bench.ceilings")

NAMED = {cell.name: cell for cell in cells.CELLS}
# One row of each operator in each mode.
KINDS = {(cell.operator, cell.mode, cell.gated, cell.dtype): cells.shrunk(cell) for cell in cells.CELLS}
SMALL = {f"{operator}-{mode}-{'gated' if gated else 'plain'}-{dtype}": c for (operator, mode, gated, dtype), c in KINDS.items()}
TRAINING = cells.shrunk(NAMED["flashmoe-expert-D1024-K8-float32-training"])
EXPERTS = cells.shrunk(replace(NAMED["momoe-T4096-bfloat16-training-save50-scaled"], dtype=torch.float32))


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "GEMM_SIZES", (16,))


def arguments(*argv):
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    return parser.parse_args(["seeds", "--no-rt", *argv])


def dry(cell, **options):
    return suite.run_cell(cell, ceilings.Ceilings(), dry=True, **options)


def row_of(result, peer):
    return next(row for row in result.rows if row.peer == peer)


def test_the_tables_are_whole():
    systems = Counter(cell.system for cell in cells.CELLS)
    assert systems == {"FusedOneMoE": 3, "candle-moe": 4 + 6 + 3, "MoMoE": 12, "MoeKernel": 4, "FlashMoE": 10 + 8 + 16}
    assert len(NAMED) == len(cells.CELLS) and {cell.operator for cell in cells.CELLS} == set(cells.OPERATORS)
    original = NAMED["fusedonemoe-E1024-float32-forward"]
    assert (original.T, original.D, original.F, original.E, original.K) == (512, 128, 512, 1024, 8) and not original.published
    assert [(c.E, c.K, c.published) for c in cells.CELLS if c.system == "MoeKernel"] == [
        (4, 2, ""),
        (8, 2, "T 16384"),
        (16, 4, "T 65536, D 2048, F 4096"),
        (32, 8, "T 262144, D 4096, F 8192"),
    ]
    momoe = [cell for cell in cells.CELLS if cell.system == "MoMoE"]
    assert Counter((c.T, c.mode, c.save_percent) for c in momoe) == Counter(
        (T, *use) for T in (512, 2048, 4096) for use in [("forward", 100), *(("training", p) for p in (100, 50, 0))]
    )


def test_what_is_smaller_than_published_says_so():
    for cell in cells.CELLS:
        assert ("scaled" in cell.name) == bool(cell.published), cell.name
        there = int(cell.label.partition("-T")[2].partition("-")[0] or cell.T)
        assert there == cell.T or f"T {there}" in cell.published, cell.name
    assert NAMED["candle-nomic-T8192-bfloat16-forward-scaled"].published == "float16, T 8192"


@pytest.mark.parametrize("cell", SMALL.values(), ids=SMALL)
def test_every_peer_agrees_with_float64(cell):
    result = dry(cell)
    assert [(row.peer, row.note) for row in result.rows if row.note != suite.RAN] == []
    assert all(0 <= row.error < 2e-2 for row in result.rows) and result.rows[0].peer == OURS
    assert any(row.peer == YARDSTICK[cell.operator] for row in result.rows)
    assert all(bool(row.held_bytes) == (cell.mode == "training") for row in result.rows)


def test_the_answer_of_many_pairs_is_that_of_all_pairs(monkeypatch):
    cell = replace(SMALL["product-keys-training-gated-torch.float32"], T=50, E=49, K=10)
    made = inputs.make_inputs(cell)
    exact = inputs.exact_answer(cell, made)
    monkeypatch.setattr(inputs, "GATHERED", 1)
    for name, tensor in inputs.exact_answer(cell, made).items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-12, atol=1e-12, msg=name)


def altered(cell, change):
    """A peer that does what ours does, and then changes the answer."""

    def build(cell, weights):
        forward = peers.LINE_UP[cell.operator][0].build(cell, weights)
        return lambda *draw: change(forward(*draw))

    return peers.SeedPeer("altered", build)


def test_the_loop_as_published_is_another_function_and_says_so():
    cell = SMALL["original-forward-gated-torch.float32"]
    made = inputs.make_inputs(cell)
    ((x,), *_), weights = made.draws, made.weights
    published = next(peer for peer in peers.line_up(cell) if peer.differs)
    y = published.build(cell, weights)(x)
    for t in range(cell.T):
        picked, experts = (weights["router"] @ x[t]).topk(cell.K)
        mixed = sum(picked[0] * (x[t] @ weights["proj"][e]) for e in experts)
        torch.testing.assert_close(y[t], mixed.relu().square() @ weights["down"], rtol=1e-4, atol=1e-5)
    assert inputs.exact_answer(cell, made)[inputs.OUTPUT].sub(y).abs().max() > 0.1
    result = suite.run_cell(cell, ceilings.Ceilings(), rounds=1, seconds=0.0, real_time=False)
    row = row_of(result, published.name)
    assert row.seconds and not row.comparable and not row.failed and "another function" in row.note
    assert result.best_peer.peer != published.name


CHANGES = {
    "zeros": torch.zeros_like,
    "five percent off": lambda y: y * 1.05,
    "a token missing": lambda y: torch.cat((y[:-1], torch.zeros_like(y[-1:]))),
    "not finite": lambda y: y * float("nan"),
    "another shape": lambda y: y[:, :1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["original-forward-plain-torch.float32", "neurons-forward-gated-torch.bfloat16"])
def test_a_wrong_output_fails(name, change):
    cell = SMALL.get(name) or SMALL[name.replace("plain", "gated")]
    row = row_of(dry(cell, peers=[altered(cell, change)]), "altered")
    assert row.failed and row.note == "outputs disagree" and row.seconds is None


def test_wrong_ids_fail_and_ties_of_float32_are_no_mistake():
    cell = SMALL["topk-forward-gated-torch.float32"]
    row = row_of(dry(cell, peers=[altered(cell, lambda pair: (pair[0], (pair[1] + 1) % cell.E))]), "altered")
    assert row.failed and row.note == "ids disagree" and row.error == 1.0
    exact = {inputs.OUTPUT: torch.ones(2000, 2).double(), inputs.IDS: torch.tensor([[0, 1]]).repeat(2000, 1)}
    one_off = exact[inputs.IDS].clone()
    one_off[7] = torch.tensor([2, 1])
    share = suite.errors_of({inputs.IDS: one_off.flip(1)}, exact)[inputs.IDS]
    assert share == pytest.approx(1 / 2000) and 0 < share <= suite.TIED


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * 0.5


@pytest.mark.parametrize("cell", [TRAINING, EXPERTS], ids=["neurons", "mlp"])
def test_a_wrong_gradient_fails(cell):
    def halving(which):
        def build(cell, weights):
            def forward(*draw):
                halved = {name: Halved.apply(w) if name == which else w for name, w in weights.items()}
                given = [Halved.apply(t) if which == f"input {n}" else t for n, t in enumerate(draw)]
                return peers.LINE_UP[cell.operator][0].build(cell, halved)(*given)

            return forward

        return peers.SeedPeer(f"halves {which}", build)

    leaves = ["input 0", "input 2", "down", "up"]
    for row, leaf in zip(dry(cell, peers=[halving(leaf) for leaf in leaves]).rows, leaves, strict=True):
        assert row.failed and row.note == f"gradients of {leaf} disagree", row


def test_a_peer_that_raises_fails_and_one_that_is_too_large_is_a_note(monkeypatch):
    def broken(cell, weights):
        raise RuntimeError("no such kernel")

    result = dry(TRAINING, peers=[peers.SeedPeer("broken", broken), *peers.line_up(TRAINING)])
    assert row_of(result, "broken").failed and row_of(result, "broken").note == "failed: RuntimeError: no such kernel"
    assert row_of(result, OURS).note == suite.RAN
    monkeypatch.setattr(peers, "MOST_GATHERED_BYTES", 10)
    row = row_of(dry(TRAINING), "torch gather")
    assert row.note.startswith("skipped: gathers rows of") and not row.failed
    assert row_of(dry(SMALL["product-keys-forward-gated-torch.float32"]), ALL_PAIRS).is_absent
    monkeypatch.setattr(peers, "MOST_FLOPS", 10)
    assert row_of(dry(EXPERTS), "dense, masked").note.startswith("skipped: computes 4 times the work")


def test_work_is_counted():
    make = cells.SeedCell
    original = make("original", 10, 4, 3, 8, 2, torch.float32)
    assert original.parameters == 8 * 12 + 8 * 4 + 12 and original.active_parameters == 2 * 12 + 8 * 4 + 12
    work = cells.least_work(original, experts_hit=5)
    assert work.flops == 2 * (20 * 12 + 10 * (32 + 12))
    assert work.touched_bytes == 4 * (5 * 12 + 44) + 2 * 4 * 10 * 4
    mlp = make("mlp", 10, 4, 3, 8, 2, torch.bfloat16, mode="training")
    assert mlp.parameters == 8 * 36 and mlp.weight_bytes == 2 * 8 * 36
    work = cells.least_work(mlp, experts_hit=5)
    assert work.flops == 3 * 2 * 20 * 36
    assert work.touched_bytes == 2 * 2 * 5 * 36 + 2 * 8 * 36 + 3 * 2 * 10 * 4 + 2 * 20 * 12
    keys = make("product-keys", 10, 1, 1, 49, 2, torch.float32)
    assert cells.least_work(keys, experts_hit=3) == type(work)(0, 4 * 10 * 14 + 20 * 12)
    assert keys.parameters == 0
    values = cells.least_work(make("values", 10, 4, 1, 8, 2, torch.float32), experts_hit=5)
    assert values == type(work)(2 * 20 * 4, 4 * 5 * 4 + 4 * 10 * 4 + 20 * 12)


def test_a_measured_cell_has_everything(monkeypatch, tmp_path, capsys):
    cell = replace(EXPERTS, label="tiny", published="T 512")
    monkeypatch.setattr(suite, "CELLS", (cell,))
    monkeypatch.setattr(suite, "ROUNDS", 1)
    file = tmp_path / "r.json"
    assert suites.run(arguments("--json", str(file), "--threads", "1")) == 0
    assert "tiny-float32-training-save50-scaled: MoMoE publishes this row at T 512" in capsys.readouterr().out
    (written,) = json.loads(file.read_text())["cells"]
    assert (written["system"], written["published"], written["save_percent"]) == ("MoMoE", "T 512", 50)
    assert written["floor_seconds"] > 0 and written["flops"] == 3 * 2 * cell.T * cell.K * 3 * cell.D * cell.F
    assert written["active_parameters"] == cell.K * 3 * cell.D * cell.F and written["parameters"] > written["active_parameters"]
    assert sum(written["load"]) == pytest.approx(cell.E) and written["load"] == sorted(written["load"], reverse=True)
    ours, loop, dense = written["rows"]
    for row in (ours, loop, dense):
        assert row["seconds"] > 0 and row["tokens_per_second"] == pytest.approx(cell.T / row["seconds"])
        assert row["peak_bytes"] > 0 and row["held_bytes"] > 0
    assert ours["held_bytes"] < loop["held_bytes"]


def test_a_dry_run_of_the_command_resumes_and_has_no_times(tmp_path, capsys):
    file = tmp_path / "r.json"
    run = ["--dry", "--cells", "candle-router", "--json", str(file)]
    assert suites.run(arguments(*run, "--peers", "sort")) == 0
    written = json.loads(file.read_text())["cells"]
    assert [cell["name"] for cell in written] == [cell.name for cell in cells.CELLS if "candle-router" in cell.name]
    assert all(row["seconds"] is None and row["note"] == suite.RAN for cell in written for row in cell["rows"])
    assert [row["peer"] for row in written[0]["rows"]] == [OURS, "softmax, sort, gather"]
    assert suites.run(arguments(*run, "--peers", "sort", "--resume")) == 0
    assert "4 of 4 cells are in" in capsys.readouterr().err
    assert suites.run(arguments("--dry", "--cells", "nothing")) == bench.EXIT_USAGE
    assert suites.run(arguments("--dry", "--peers", "nobody")) == bench.EXIT_USAGE
    assert "NumPy, per expert" in capsys.readouterr().err
