"""The suite serving: closed loops of clients, requests that fail, targets, and the command."""

import argparse
import importlib
import json
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from asv_bench import suites
from fusedonemoe import bench
from fusedonemoe.bench.peers import OURS, UnavailableError

pytest.importorskip("rich")
serving = importlib.import_module("asv_bench.suites.serving")
models = importlib.import_module("asv_bench.suites.serving_models")
ceilings = importlib.import_module("fusedonemoe.bench.ceilings")

TARGETS = (100.0, 1000.0)
TINY = replace(models.CELLS[1], requests=12, D=16, F=24, E=6, K=2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Graphs without a code generator, which takes seconds; and small arrays for the ceilings."""
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "GEMM_SIZES", (16,))
    quick = models.ServingPeer(OURS, partial(models._compiled, backend="eager"))
    monkeypatch.setattr(serving, "PEERS", (quick, *models.PEERS[1:]))
    torch.compiler.reset()


def measure(*peers, cell=TINY, **options):
    return serving.run_cell(cell, ceilings.Ceilings(), peers=peers or serving.PEERS, real_time=False, **options)


def loop_then(change):
    """A peer that computes the right answer, and changes it."""

    def build(cell, blocks):
        model = models.PEERS[-1].build(cell, blocks)
        return lambda x: change(model(x))

    return models.ServingPeer("altered", build)


def test_every_request_is_sent_once_by_one_of_the_clients():
    seen: list[int] = []
    threads: set[int] = set()
    together = threading.Barrier(3, timeout=20)

    def model(x):
        if len(threads) < 3 and threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            together.wait()  # no request of the first three is answered before all three are sent
        assert not torch.is_grad_enabled()
        seen.append(int(x))
        return x

    order = [0, 1, 1, 0, 2, 2, 2, 1]
    answered, wall = serving.serve(model, [torch.tensor(n) for n in range(3)], order, clients=3)
    assert sorted(seen) == sorted(order) == sorted(each.index for each in answered) and len(threads) == 3
    assert all(int(each.answer) == each.index and 0 < each.seconds <= wall for each in answered)


def test_one_client_keeps_the_order():
    seen = []
    serving.serve(lambda x: seen.append(int(x)), [torch.tensor(0), torch.tensor(1)], [1, 0, 1], clients=1)
    assert seen == [1, 0, 1]


def test_every_peer_answers_rightly():
    pytest.importorskip("transformers")
    result = measure()
    assert [(row.peer, row.note, row.success_rate) for row in result.rows] == [(p.name, "", 1.0) for p in serving.PEERS]
    for row in result.rows:
        assert row.calls == 12 and row.seconds <= row.p95_seconds <= row.p99_seconds and row.tokens_per_second > 0
        assert row.error < 1e-6 and row.meets_latency is not None and row.meets_throughput is not None
    assert result.floor_seconds > 0 and result.floor_tokens_per_second > 0 and result.flops > 0


WRONG = {
    "zeros": torch.zeros_like,
    "one percent off": lambda y: y * 1.01,
    "not finite": lambda y: y * float("nan"),
    "another shape": lambda y: y[:, :1],
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_gets_no_time(change):
    (row,) = measure(loop_then(change)).rows
    assert row.failed and row.note == "outputs disagree" and row.success_rate == 0.0 and row.seconds is None


def test_requests_that_fail_now_and_then_are_counted():
    calls = []

    def sometimes(y):
        calls.append(0)
        if len(calls) > serving.DISTINCT and len(calls) % 4 == 0:  # not while every length is warmed up
            raise RuntimeError("overloaded")
        return y

    (row,) = measure(loop_then(sometimes)).rows
    assert row.failed and row.note == "RuntimeError: overloaded" and row.seconds is None
    assert row.success_rate == pytest.approx(9 / 12)


def test_absent_and_broken_peers_are_rows():
    def absent(cell, blocks):
        raise UnavailableError("not installed")

    def broken(cell, blocks):
        raise ValueError("no")

    rows = measure(models.ServingPeer("a", absent), models.ServingPeer("b", broken), serving.PEERS[-1]).rows
    assert [(row.note, row.failed) for row in rows] == [
        ("skipped: not installed", False),
        ("failed: ValueError: no", True),
        ("", False),
    ]
    assert rows[-1].seconds > 0


def test_targets_are_met_or_missed():
    answered = [serving._Answered(0, seconds, torch.ones(2, 3)) for seconds in (0.01, 0.02, 0.03, 0.2)]
    row = serving._row_of("a", answered, 0.5, [torch.ones(2, 3).double()], (100.0, 16.0))
    assert (row.p95_seconds, row.tokens_per_second, row.meets_latency, row.meets_throughput) == (0.2, 16.0, False, True)
    row = serving._row_of("a", answered, 0.5, [torch.ones(2, 3).double()], (200.0, 16.1))
    assert (row.meets_latency, row.meets_throughput) == (True, False)


def test_the_loop_is_the_layer_and_counts_experts():
    (block, *_) = models.blocks_of(TINY)
    loop, x = models.LoopBlock(block, torch.float32), torch.randn(40, TINY.D)
    torch.testing.assert_close(loop(x), block(x).detach())
    assert loop.hit == TINY.E and (loop(x[:1]), loop.hit)[1] == TINY.K


def arguments(*argv):
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    return parser.parse_args(["serving", "--no-rt", *argv])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serving, "CELLS", (replace(TINY, clients=1), TINY))
    file = tmp_path / "r.json"
    run = ["--json", str(file), "--threads", "1", "--peers", "loop", "--target-ms", "1e6", "--target-tokens", "1e-6"]
    assert suites.run(arguments(*run, "--cells", "seq")) == 0
    assert suites.run(arguments(*run, "--resume")) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 cells are in" in err and "met met" in out and "concurrent-4" in out
    written = json.loads(file.read_text())["cells"]
    assert [cell["name"] for cell in written] == ["sequential", "concurrent-4"]
    for cell in written:
        assert (cell["target_ms"], cell["target_tokens"]) == (1e6, 1e-6) and cell["floor_seconds"] > 0
        assert [row["peer"] for row in cell["rows"]] == [OURS, models.LOOP]
        for row in cell["rows"]:
            rate = row["tokens_per_second"] * cell["flops"] / cell["tokens"]
            assert row["mfu"] == pytest.approx(rate / cell["flops_per_s"]) and f"{row['mfu']:.1%}" in out
        assert all(row["meets_latency"] and row["meets_throughput"] and row["success_rate"] == 1 for row in cell["rows"])
        assert cell["active_parameters"] < cell["parameters"] == 2 * 6 * (3 * 16 * 24 + 16)
    # A dry run answers and keeps no times.
    assert suites.run(arguments("--dry", "--peers", "loop", "--json", str(file))) == 0
    rows = [row for cell in json.loads(file.read_text())["cells"] for row in cell["rows"]]
    assert all(row["seconds"] is None and row["success_rate"] == 1 for row in rows)
    assert suites.run(arguments("--dry", "--peers", "nobody")) == bench.EXIT_USAGE
