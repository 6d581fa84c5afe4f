"""The suite of fine-grained experts: every peer computes the same, wrong ones get no time, and work is counted by hand."""

import argparse
import importlib
import json
from dataclasses import replace

import pytest
import torch

from asv_bench import suites
from fusedonemoe.bench import exact
from fusedonemoe.bench.peers import ALL_PAIRS, GATHER, OURS, YARDSTICK

pytest.importorskip("rich")
fine_grained = importlib.import_module("asv_bench.suites.fine_grained")
timing = importlib.import_module("fusedonemoe.bench.timing")
ceilings = importlib.import_module("fusedonemoe.bench.ceilings")

KEYS = fine_grained.FineCell("keys", 6, 0, 0, 25, 4, torch.float32, label="keys")
NEURONS = fine_grained.FineCell("neurons", 5, 16, 0, 30, 3, torch.float32, mode="training", label="neurons-30")
TINY = [
    KEYS,
    *(
        replace(NEURONS, operator=operator, dtype=dtype, mode=mode, label=f"{operator}-30")
        for operator in ("neurons", "values")
        for dtype in (torch.float32, torch.bfloat16)
        for mode in ("forward", "training")
    ),
]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "GEMM_SIZES", (16,))
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)


def measure(cell, contenders):
    timer = timing.Timer(real_time=False)
    return fine_grained.run_cell(cell, timer, ceilings.Ceilings(), contenders, rounds=1, seconds=0.001)


@pytest.mark.parametrize("cell", TINY, ids=lambda cell: cell.name)
def test_every_peer_computes_the_same(cell):
    result = measure(cell, fine_grained.PEERS[cell.operator])
    assert [row.note for row in result.rows] == [""] * 3
    assert all(row.seconds > 0 and row.peak_bytes is not None for row in result.rows)
    assert result.rows[0].peer == OURS and YARDSTICK[cell.operator] in {row.peer for row in result.rows}
    assert 1 <= result.experts_hit <= cell.E and result.floor.seconds > 0
    answer = fine_grained.exact_answer(cell, fine_grained.make_inputs(cell))
    tensors = {"keys": 2, "neurons": 5, "values": 3}[cell.operator] if cell.mode == "training" or cell is KEYS else 1
    assert len(answer) == tensors


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * 1.01


def other_outputs(weights, draw):
    return weights, draw, 1.01


def other_gradient_of_weights(weights, draw):
    x, experts, scores = draw
    return weights, (x, experts, Scaled.apply(scores)), 1.0


def other_gradient_of_a_table(weights, draw):
    return weights | {"down_table": Scaled.apply(weights["down_table"])}, draw, 1.0


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (other_outputs, "outputs, gradients of x, gradients of weights, gradients of down_table, gradients of up_table"),
        (other_gradient_of_weights, "gradients of weights"),
        (other_gradient_of_a_table, "gradients of down_table"),
    ],
)
def test_a_wrong_tensor_gets_no_time(change, names):
    honest = fine_grained.PEERS["neurons"][0]

    def build(cell, weights):
        def forward(*draw):
            changed, given, factor = change(weights, draw)
            return honest.build(cell, changed)(*given) * factor

        return forward

    row = measure(NEURONS, [replace(honest, build=build)]).rows[0]
    assert row.failed and row.seconds is None and row.note == f"{names} disagree"


def test_one_other_pair_is_a_wrong_router():
    honest = fine_grained.PEERS["keys"][1]

    def build(cell, weights):
        def forward(logits):
            scores, experts = honest.build(cell, weights)(logits)
            experts[0, 0] += 1
            return scores, experts

        return forward

    assert measure(KEYS, [replace(honest, build=build)]).rows[0].note == "ids disagree"


def test_a_tensor_that_is_missing_is_wrong():
    inputs = fine_grained.make_inputs(NEURONS)
    errors = exact.errors_of(NEURONS, inputs, {}, fine_grained.exact_answer(NEURONS, inputs))
    assert len(errors) == 5 and set(errors.values()) == {float("inf")}


def test_the_best_sums_are_clear_of_rounding():
    inputs = fine_grained.make_inputs(KEYS)
    assert len(inputs.draws) == KEYS.rotation and all(x.shape == (6, 2, 5) for (x,) in inputs.draws)
    (x,) = inputs.draws[1]
    sums = (x[:, 0, :, None].double() + x[:, 1, None, :]).flatten(1).sort(descending=True)
    assert torch.equal(sums.indices[:, :4], inputs.experts[1]) and (sums.values[:, :5].diff() < -1e-5).all()


def test_least_work_counted_by_hand():
    forward = fine_grained.least_work(replace(NEURONS, mode="forward"), experts_hit=7)
    assert forward.touched_bytes == (2 * 7 + 5 + 5) * 16 * 4 + 15 * 12 and forward.flops == 2 * 2 * 15 * 16
    training = fine_grained.least_work(NEURONS, experts_hit=7)
    # Both tables read twice and their gradients written; x, y, dy and dx.
    assert training.touched_bytes == (4 * 7 + 2 * 30 + 4 * 5) * 16 * 4 + 15 * 12 and training.flops == 3 * forward.flops
    values = fine_grained.least_work(replace(NEURONS, operator="values", mode="forward"), experts_hit=7)
    assert values.touched_bytes == (7 + 5) * 16 * 4 + 15 * 12
    assert fine_grained.least_work(KEYS, experts_hit=7).touched_bytes == 6 * 2 * 5 * 4 + 24 * 12


def test_the_cells_of_the_suite():
    cells = fine_grained.CELLS
    assert len({cell.name for cell in cells}) == len(cells) == 17
    assert {(c.T, c.D, c.E, c.K) for c in cells if c.operator != "keys"} == {(1024, 256, 16384, 64), (128, 256, 102400, 512)}
    assert [(c.T, c.E, c.K) for c in cells if c.operator == "keys"] == [(4096, 128 * 128, 16)]


def test_the_command_prints_and_writes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fine_grained, "CELLS", (KEYS, NEURONS))
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    file = tmp_path / "fine-grained.json"
    assert suites.run(parser.parse_args(["fine-grained", "--no-rt", "--peers", "torch", "--json", str(file)])) == 0
    assert GATHER in capsys.readouterr().out
    written = json.loads(file.read_text())["cells"]
    assert [cell["yardstick"] for cell in written] == [ALL_PAIRS, GATHER]
    assert all(row["times_faster"] > 0 for cell in written for row in cell["rows"])
