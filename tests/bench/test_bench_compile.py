"""The suite compile: its cells, the order of its calls, counted operations, bars, and the command."""

import argparse
import importlib
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from asv_bench import suites
from fusedonemoe import MoE
from fusedonemoe.bench.peers import OURS
from fusedonemoe.bench.timing import Timer
from fusedonemoe.bench.workloads import Cell, least_work, mfu_of

pytest.importorskip("rich")
compiled = importlib.import_module("asv_bench.suites.compiled")
records = importlib.import_module("fusedonemoe.bench.records")
ceilings = importlib.import_module("fusedonemoe.bench.ceilings")

EAGER, LINEAR = compiled.EAGER, compiled.LINEAR
in_eager = partial(torch.compile, fullgraph=True, backend="eager")
BLOCK = compiled.CompileCell(torch.float32, 5, (6, 16, 8, 4, 2), "block", "forward")
MODEL = replace(BLOCK, operator="model", sizes=(8, 16, 8, 4, 2))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few calls, and small arrays for the ceilings."""
    for name, value in {"ROUNDS": 2, "MOST": 3, "LAYERS": 2, "IN_A_ROW": {"overhead": 2}}.items():
        monkeypatch.setattr(compiled, name, value)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "GEMM_SIZES", (16,))


def measure(cell, change=in_eager):
    return compiled.measure(cell, ceilings.Ceilings(), real_time=False, compiled=change)


def test_the_cells_are_every_size_with_its_bar():
    cells = compiled.cells()
    blocks = {(c.sizes, c.dtype, c.mode) for c in cells if c.operator == "block"}
    assert len(blocks) == 4 * 3 * 2 * 2 and len({c.name for c in cells}) == len(cells) == len(blocks) + 6 + 1
    assert {c.sizes[0] for c in cells if c.operator == "block"} == {1, 16, 512, 2048}
    assert {c.sizes[1:] for c in cells if c.operator == "block"} == {(128, 64, 32, 2), (512, 256, 64, 8), (1024, 512, 64, 8)}
    assert {(c.operator, c.described["bar"]) for c in cells} == {("block", 1.0), ("model", 1.05), ("overhead", None)}


@pytest.mark.parametrize(("in_a_row", "expected"), [(1, "abbaabba"), (2, "aabbbbaa")])
def test_lines_take_turns(monkeypatch, in_a_row, expected):
    monkeypatch.setattr(compiled, "ROUNDS", 1)
    monkeypatch.setattr(compiled, "MOST", 4)
    seen: list[str] = []
    steps = {name: lambda name=name: seen.append(name) for name in "ab"}
    between = partial(seen.append, "between ")
    samples = compiled.timed_in_turns(steps, Timer(real_time=False), between, in_a_row)
    assert "".join(seen) == "between " + "aaabbb" + expected
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4}


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_the_operations_of_a_block_are_its_least_work(mode):
    cell = replace(BLOCK, mode=mode)
    modules, x = compiled.modules_of(cell)
    step = compiled.step_of(modules[OURS], modules[OURS], x, training=mode == "training")
    work, parameters, active = compiled.work_of(modules[OURS], step, x, training=mode == "training")
    same = Cell(operator="block", **cell.by_letter, dtype=torch.float32, mode=mode)
    assert work.flops == least_work(same, experts_hit=4).flops
    assert (parameters, active) == (same.parameters, same.active_parameters)
    assert work.touched_bytes <= least_work(same, experts_hit=2).touched_bytes


@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_the_operations_of_a_model_are_counted_with_attention(mode):
    cell = replace(MODEL, mode=mode)
    modules, x = compiled.modules_of(cell)
    with torch.no_grad():
        step = compiled.step_of(modules[OURS], modules[OURS], x, training=False)
        work, *_ = compiled.work_of(modules[OURS], step, x, training=False)
    T, D, F, E, K = cell.sizes
    seen = compiled.CONTEXT + 1 if mode == "decode" else T // compiled.SEQUENCES
    assert work.flops == compiled.LAYERS * 2 * T * (4 * D * D + E * D + K * 3 * D * F + 2 * seen * D)


def test_a_decoding_step_attends_to_the_cache():
    modules, x = compiled.modules_of(replace(MODEL, mode="decode"))
    model = modules[OURS]
    with torch.no_grad():
        before = model(x)
        model[0].past[1, 3] += 1.0  # the values of one sequence
        changed = (model(x) != before).flatten(1).any(1)
    assert before.shape == (8, 1, 16) and changed.nonzero().flatten().tolist() == [3]


USES = [(BLOCK, "forward"), (BLOCK, "training"), (MODEL, "forward"), (MODEL, "training"), (MODEL, "decode")]


@pytest.mark.parametrize(("cell", "mode"), USES, ids=lambda each: getattr(each, "operator", each))
def test_every_line_has_a_time(cell, mode):
    result = measure(replace(cell, mode=mode))
    ours, eager, *rest = result.lines
    assert [(line.name, line.calls, line.mfu, line.times_faster) for line in rest] == (
        [(compiled.SUM, 6, None, None)] if (cell, mode) == USES[0] else []
    )
    assert all(line.seconds > 0 for line in rest)
    assert (ours.name, eager.name, ours.note) == (OURS, EAGER, "") and ours.error < 1e-6
    assert ours.times_faster == eager.seconds / ours.seconds and eager.times_faster == 1.0
    assert ours.meets_bar is (ours.times_faster >= compiled.BARS[cell.operator] - compiled.NOISE) and eager.meets_bar is None
    assert ours.calls == 6 and ours.spread[0] <= ours.seconds <= ours.spread[1]
    assert ours.mfu == result.work.flops / ours.seconds / result.flops_per_s > 0


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_a_wrong_answer_gets_no_time(mode):
    class Off(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            y = self.module(x)
            # In training the output is right, and a gradient is not.
            return y * 1.01 if mode == "forward" else y + 0.01 * (y - y.detach())

    ours, eager, *_ = measure(replace(BLOCK, mode=mode), Off).lines
    assert ours.note == ours.problem == "off by 1.0e-02" and ours.seconds is None and eager.seconds > 0


def test_the_bars():
    def met(operator, name, **microseconds):
        seconds = {{"ours": OURS, "eager": EAGER, "linear": LINEAR}[key]: value * 1e-6 for key, value in microseconds.items()}
        return compiled.meets_bar(operator, name, seconds)

    assert met("block", OURS, ours=100, eager=98.1) and not met("block", OURS, ours=100, eager=97.9)
    assert met("model", OURS, ours=100, eager=103.1) and not met("model", OURS, ours=100, eager=102.9)
    assert met("block", EAGER, ours=100, eager=98) is None is met("overhead", LINEAR, ours=9, eager=9, linear=9)
    assert met("overhead", OURS, ours=40, eager=99, linear=20.1) and not met("overhead", OURS, ours=40, eager=1, linear=19.9)
    assert met("overhead", EAGER, ours=99, eager=29.9, linear=9) and not met("overhead", EAGER, ours=1, eager=30.1, linear=9)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    return parser.parse_args(["compile", "--no-rt", *argv])


def test_the_quick_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    file = tmp_path / "r.json"
    assert suites.run(arguments("--quick", "--json", str(file), "--threads", "1")) == 0
    out = capsys.readouterr().out
    assert "overhead-T1-D64-F32-E8-K2-float32-forward" in out and "MFU" in out and LINEAR in out
    overhead, block = records.read(file)["cells"]
    assert (overhead["operator"], block["name"]) == ("overhead", "block-T1-D128-F64-E32-K2-float32-forward")
    assert [row["peer"] for row in block["rows"]] == [OURS, EAGER, compiled.SUM]
    rows = {row["peer"]: row for row in overhead["rows"]}
    assert list(rows) == [OURS, EAGER, LINEAR, f"{LINEAR}, eager"]
    flops = {OURS: overhead["flops"], EAGER: overhead["flops"]}
    for name, row in rows.items():
        assert row["mfu"] == pytest.approx(flops.get(name, 2 * 2 * 64 * 32) / row["seconds"] / overhead["flops_per_s"])
        assert not row["failed"] and row["calls"] == 8
    assert [row["meets_bar"] is None for row in rows.values()] == [False, False, True, True]


def test_a_wrong_answer_ends_the_command_with_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compiled, "cells", lambda: [BLOCK])
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: lambda x: module(x) * 2)
    file = tmp_path / "r.json"
    assert suites.run(arguments("--json", str(file))) == 1
    assert "fusedonemoe: off by 1.0e+00" in capsys.readouterr().err
    assert json.loads(file.read_text())["cells"][0]["rows"][0]["failed"]


@pytest.mark.slow
def test_inductor_compiles_what_is_measured():
    seen: list[torch.nn.Module] = []

    def watched(module):
        seen.append(module)
        return torch.compile(module, fullgraph=True)

    result = measure(replace(BLOCK, operator="overhead"), watched)
    assert [line.note for line in result.lines] == [""] * 4 and all(line.seconds > 0 for line in result.lines)
    assert isinstance(seen[0], MoE) and len(seen) == 2


def test_mfu_needs_all_its_parts():
    assert mfu_of(0.5, 10, 40.0) == 0.5
    assert mfu_of(None, 10, 40.0) is mfu_of(0.5, None, 40.0) is mfu_of(0.5, 10, 0.0) is mfu_of(0.5, 0, 40.0) is None
