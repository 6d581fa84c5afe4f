"""The benchmark: wrong answers get no time, memory and floors are exact, peers take turns, and priorities come back."""

import argparse
import importlib
import json
import os
import time
from typing import Any

import pytest
import torch

from fusedonemoe import bench
from fusedonemoe.bench import memory, peers, workloads
from fusedonemoe.bench.catalogue import SUITES
from fusedonemoe.bench.inputs import make_inputs
from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.peers import GROUPED, OURS, PEERS, YARDSTICK, Peer
from fusedonemoe.bench.workloads import Cell

pytest.importorskip("rich")
runner = importlib.import_module("fusedonemoe.bench.runner")
timing = importlib.import_module("fusedonemoe.bench.timing")
report = importlib.import_module("fusedonemoe.bench.report")
ceilings = importlib.import_module("fusedonemoe.bench.ceilings")

TINY = {operator: Cell(operator, T=6, D=16, F=8, E=8, K=2, dtype=torch.float32) for operator in ("block", "merged")}
has_scheduler = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="Linux's scheduling calls")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """The ceilings' own arrays are as large as a cache; their values are not what these tests are about, nor are pauses."""
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "GEMM_SIZES", (16,))


@pytest.fixture
def tiny_suite(monkeypatch):
    monkeypatch.setitem(SUITES, "quick", tuple(TINY.values()))


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*argv, "--no-rt"])


def measure(cell, peers=None, **options):
    options = {"ceilings": ceilings.Ceilings(), "rounds": 2, "seconds": 0.01} | options
    return runner.run_cell(cell, timing.Timer(real_time=False), peers=peers or PEERS[cell.operator], **options)


def row_of(result, peer):
    return next(row for row in result.rows if row.peer == peer)


def altered(change):
    """A peer that does what ours does, and then changes the output."""
    build = PEERS["merged"][0].build

    def wrong(cell, weights):
        forward: Any = build(cell, weights)
        return lambda *draw: change(forward(*draw))

    return Peer("altered", wrong)


WRONG = {
    "zeros": torch.zeros_like,
    "five percent off": lambda y: y * 1.05,
    "a token missing": lambda y: torch.cat((y[:-1], torch.zeros_like(y[-1:]))),
    "not finite": lambda y: torch.full_like(y, float("nan")),
    "another shape": lambda y: y[:, :1],
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_output_gets_no_time(change, dtype):
    cell = Cell("merged", T=6, D=16, F=8, E=8, K=2, dtype=dtype)
    wrong = row_of(measure(cell, peers=[PEERS["merged"][0], altered(change)]), "altered")
    assert wrong.failed and wrong.note == "outputs disagree"
    assert wrong.seconds is None and wrong.peak_bytes is None and wrong.calls == 0


def test_a_planted_wrong_peer_fails_the_command(tiny_suite, monkeypatch, capsys):
    assert bench.run(arguments("--cells", "merged")) == 0
    assert "outputs disagree" not in capsys.readouterr().out
    monkeypatch.setitem(PEERS, "merged", (*PEERS["merged"], altered(lambda y: 2 * y)))
    assert bench.run(arguments("--cells", "merged")) == bench.EXIT_DISAGREE
    line = next(line for line in capsys.readouterr().out.splitlines() if "altered" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "altered",
        "outputs disagree",
        "",
        "",
        "",
        "",
        "",
        "1.0e+00",
        "",
        "",
    ]


def test_a_peer_that_raises_fails_and_the_others_still_run():
    def broken(cell, weights):
        raise RuntimeError("no such kernel")

    result = measure(TINY["merged"], peers=[Peer("broken", broken), *PEERS["merged"]])
    assert row_of(result, "broken").note == "failed: RuntimeError: no such kernel"
    assert row_of(result, "broken").failed
    assert row_of(result, OURS).seconds > 0


def test_a_missing_package_is_a_note_and_no_failure(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    result = measure(TINY["block"])
    absent = row_of(result, YARDSTICK["block"])
    assert absent.note.startswith("skipped: transformers is not installed") and not absent.failed
    assert row_of(result, OURS).seconds > 0 and result.compared(row_of(result, OURS))["times_faster"] is None


def test_without_rich_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.run(arguments()) == bench.EXIT_USAGE
    assert "pip install 'fusedonemoe[bench]'" in capsys.readouterr().err


def test_cells_that_match_nothing_are_listed(tiny_suite, capsys):
    assert bench.run(arguments("--cells", "E99")) == bench.EXIT_USAGE
    assert TINY["block"].name in capsys.readouterr().err


def test_bad_options_are_refused(capsys):
    for argv in (["--cells", "("], ["--threads", "0"], ["--threads", "two"], ["--suite", "tpu"]):
        with pytest.raises(SystemExit) as exit_:
            arguments(*argv)
        assert exit_.value.code == 2
    capsys.readouterr()
    assert arguments("--quick").suite == arguments().suite == "quick"


@pytest.mark.parametrize("operator", TINY)
def test_tiny_cells_from_end_to_end(tiny_suite, tmp_path, capsys, operator):
    if operator == "block":
        pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    file = tmp_path / "results.json"
    assert bench.run(arguments("--cells", f"^{operator}", "--threads", "1", "--json", str(file))) == 0
    assert torch.get_num_threads() == threads
    out, err = capsys.readouterr()
    assert TINY[operator].name in out and OURS in out
    assert err == ""  # no progress bar into a pipe
    written = json.loads(file.read_text(encoding="utf-8"))
    described = {"schema", "suite", "date", "versions", "cpu", "cpu_capability", "cores", "threads", "peers", "cells"}
    assert described == set(written)
    assert written["threads"] == 1 and written["versions"]["torch"] == torch.__version__ and written["cpu"]
    (cell,) = written["cells"]
    assert (cell["T"], cell["D"], cell["F"], cell["E"], cell["K"], cell["dtype"]) == (6, 16, 8, 8, 2, "float32")
    assert cell["floor_seconds"] > 0 and cell["yardstick"] == YARDSTICK[operator] and cell["real_time"] is False
    assert [row["peer"] for row in cell["rows"]] == [peer.name for peer in PEERS[operator]]
    for row in cell["rows"]:
        assert 0 < row["spread"][0] <= row["seconds"] <= row["spread"][1] and row["calls"] >= runner.ROUNDS
        assert row["seconds"] <= row["p95_seconds"] <= row["p99_seconds"]
        assert row["tokens_per_second"] == pytest.approx(6 / row["seconds"])
        assert row["mfu"] == pytest.approx(cell["flops"] / row["seconds"] / cell["flops_per_s"]) and f"{row['mfu']:.1%}" in out
        assert 0 <= row["error"] < 1e-5 and row["peak_bytes"] > 0
        base = next(r["seconds"] for r in cell["rows"] if r["peer"] == cell["yardstick"])
        assert row["times_faster"] == pytest.approx(base / row["seconds"])
        assert row["promised_bytes"] == (3 * 12 * (8 + 16) * 4 if row["peer"] == GROUPED else None)


def test_every_dtype_and_operator_of_the_quick_suite():
    cells = SUITES["quick"]
    assert {(cell.operator, cell.E, cell.dtype) for cell in cells} == {
        (operator, E, dtype)
        for operator in ("block", "merged")
        for E in (32, 128, 1024)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(cell.dtype in peers.BUDGET and peers.BUDGET[cell.dtype] < 0.1 for cell in cells)


def test_the_selection_is_the_same_in_every_dtype():
    cell = Cell("block", T=64, D=32, F=8, E=64, K=8, dtype=torch.bfloat16)
    inputs = make_inputs(cell, torch.device("cpu"), 3)
    for (x,), experts in zip(inputs.draws, inputs.experts, strict=True):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            picked = (x.to(dtype) @ inputs.weights["router"].to(dtype).t()).topk(cell.K, dim=1).indices
            assert torch.equal(picked.sort(1).values, experts.sort(1).values)


def test_every_expert_of_every_token_is_no_choice():
    cell = Cell("block", T=3, D=8, F=4, E=2, K=2, dtype=torch.float32)
    assert make_inputs(cell, torch.device("cpu"), 3).experts[0].sort(1).values.tolist() == [[0, 1]] * 3
    assert not any(row.failed for row in measure(cell).rows)


def test_the_meter_is_exact():
    def pattern():
        a = torch.empty(1000)  # 4000 bytes
        b = torch.empty(3000)  # 12000
        del a
        c = torch.empty(500)  # 2000, in the place of a
        d = torch.empty(250)  # 1000
        del b
        e = torch.empty(100)  # 400, kept
        del c, d
        return e

    assert peak_extra_bytes(pattern) == 12000 + 4000
    assert peak_extra_bytes(lambda: torch.empty(10)) == 0
    assert peak_extra_bytes(lambda: (torch.empty(10), None, torch.empty(5))) == 0


def test_the_meter_leaves_out_the_result_but_not_what_stood_in_its_place():
    # (address, size): a temporary at address 7, then the result at the same place beside another temporary.
    events = [(7, 100), (7, -100), (8, 30), (7, 60), (8, -30)]
    assert memory._replay(events, kept={7}) == 100
    assert memory._replay(events[2:], kept={7}) == 30
    assert memory._replay(events, kept=set()) == 100
    assert memory._replay([], kept={7}) == 0


def test_the_meter_sees_inside_opaque_operators_and_past_what_was_there():
    x = torch.ones(1000)
    assert peak_extra_bytes(lambda: x + x) == 0
    assert peak_extra_bytes(lambda: (x + x) * x) == 4000
    rows, weights, offsets = torch.randn(8, 4), torch.randn(2, 4, 4), torch.tensor([0, 4, 8], dtype=torch.int32)
    inside = peak_extra_bytes(lambda: torch.ops.fusedonemoe.grouped_mm(rows, weights, offsets))
    assert inside > 0


def test_floor_arithmetic():
    cell = Cell("block", T=10, D=4, F=3, E=8, K=2, dtype=torch.bfloat16)
    work = workloads.least_work(cell, experts_hit=5)
    assert work.flops == 6 * 20 * 4 * 3 + 2 * 10 * 4 * 8
    assert work.touched_bytes == 2 * (5 * 3 * 4 * 3 + 8 * 4 + 2 * 10 * 4)
    merged = workloads.least_work(Cell("merged", T=10, D=4, F=3, E=8, K=2, dtype=torch.float32), experts_hit=5)
    assert merged.flops == 2 * 20 * 4 * 3
    assert merged.touched_bytes == 4 * (5 * 4 * 3 + 10 * 4 + 10 * 3) + 20 * 12
    assert workloads.floor_of(work, flops_per_s=work.flops, bytes_per_s=4 * work.touched_bytes) == workloads.Floor(1.0, "flops")
    assert workloads.floor_of(work, flops_per_s=4 * work.flops, bytes_per_s=work.touched_bytes / 2) == workloads.Floor(
        2.0, "bytes"
    )
    assert cell.promised_bytes == 3 * 20 * 7 * 2


def test_ceilings_keep_the_best():
    found = ceilings.Ceilings()
    found.sampler(torch.float32)()
    assert found.flops_per_s[torch.float32] > 0 and found.bytes_per_s > 0
    found.flops_per_s[torch.float32] = found.bytes_per_s = 1e30
    found.sampler(torch.float32)()
    found.sampler(torch.bfloat16)()
    assert found.flops_per_s[torch.float32] == found.bytes_per_s == 1e30 > found.flops_per_s[torch.bfloat16] > 0


def test_peers_take_turns():
    assert timing.order_of_round("abc", 0) == ["a", "b", "c"]
    assert timing.order_of_round("abc", 1) == ["b", "c", "a"]
    assert timing.order_of_round("abc", 5) == ["c", "a", "b"]
    assert timing.order_of_round([], 3) == []
    log: list[str] = []

    def call_of(name):
        def call(_):
            log.append(name)
            time.sleep(1e-3)

        return call

    calls = {name: call_of(name) for name in "ab"}
    timer = timing.Timer(real_time=False)
    times = timing.time_interleaved(timer, calls, rounds=3, seconds=0.0, between=lambda: log.append("|"))
    # One untimed and one timed call a turn.
    assert "".join(log) == "|aabb|bbaa|aabb"
    assert {name: len(samples) for name, samples in times.items()} == {"a": 3, "b": 3}
    assert min(times["a"] + times["b"]) >= 1e-3 and timer.granted is False


def scheduling():
    return {t: (os.sched_getscheduler(t), os.sched_getparam(t).sched_priority) for t in map(int, os.listdir("/proc/self/task"))}


@has_scheduler
def test_the_schedulers_policy_is_restored():
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = scheduling()
    with timing.at_real_time() as granted:
        inside = scheduling()
    if granted:
        assert all(inside[t] == (os.SCHED_RR, 1) for t in before)
    after = scheduling()
    assert {t: after[t] for t in before if t in after} == {t: before[t] for t in before if t in after}
    with pytest.raises(ZeroDivisionError), timing.at_real_time():
        1 / 0  # noqa: B018 - any exception will do
    assert os.SCHED_RR not in {policy for policy, _ in scheduling().values()}


@has_scheduler
def test_priority_is_optional(monkeypatch):
    def refuse(*_):
        raise PermissionError

    with timing.at_real_time(wanted=False) as granted:
        assert os.SCHED_RR not in {policy for policy, _ in scheduling().values()}
    assert not granted
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with timing.at_real_time() as granted:
        pass
    assert not granted


def test_a_cell_without_priority_says_so():
    table = report.table_of(measure(TINY["merged"]))
    assert "without real-time priority" in str(table.title)
