"""Measured tiles: the search, the cache, and what refuses to be measured."""

import importlib.metadata
import json
from itertools import count
from unittest.mock import Mock

import pytest
import torch

from fusedonemoe import Experts, MoE, MoEConfig, tune, tuning
from fusedonemoe.ops import triton
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.rules import Tile, Tiles

NAMES = ("rows", "up", "down", "dh", "dx", "dup", "ddown")
START = Tiles(*[Tile(64, 64, 64, 4, 3)] * 6)
BY_RULE = rules.tiles_by_rule("sm90", torch.bfloat16, 64, 2048, 768)
CONFIG = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(rules, "_read", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    return tmp_path / "tiles-triton-0.0.json"


def a_layer(rows=64):
    return rules.layer_of("sm90", torch.bfloat16, rows, 2048, 768, gated=True)


def never():
    return 0.0


def test_the_search_finds_the_fastest_neighbours_of_each_kernel():
    def milliseconds(tiles):
        return (
            10 - (tiles.up.BLOCK_M == 128) - (tiles.down.BLOCK_N == 128) - (tiles.ddown.num_warps == 8) + (tiles.dx.BLOCK_K != 64)
        )

    best, least, first, tried, complete = tuning.search(START, NAMES, milliseconds, 1.0, never)
    assert (least, first, complete) == (7, 10, True)
    assert {t.BLOCK_M for t in best[:4]} == {128} and best.dup.BLOCK_M == best.ddown.BLOCK_M == 64
    assert best.down.BLOCK_N == 128 and best.ddown.num_warps == 8
    assert best.up == START.up._replace(BLOCK_M=128) and best.dx == START.dx._replace(BLOCK_M=128)
    assert tried <= 1 + 3 + 6 * 7, "few enough to be measured"


def test_noise_does_not_win():
    best, *_ = tuning.search(START, NAMES, lambda tiles: 10.0 if tiles == START else 9.9, 1.0, never)
    assert best == START


def test_tiles_that_do_not_fit_lose():
    best, least, *_ = tuning.search(START, ("up",), lambda tiles: 5.0 if tiles == START else float("inf"), 1.0, never)
    assert (best, least) == (START, 5.0)


def test_the_search_ends_when_its_time_is_over():
    ticks = count()
    best, _, _, tried, complete = tuning.search(START, NAMES, lambda tiles: 100.0 - next(ticks), 3.5, lambda: next(ticks))
    assert tried < 5 and not complete and best != START


def test_what_was_measured_is_used_here_and_in_later_processes(cache, monkeypatch):
    best = START._replace(up=Tile(64, 256, 32, 8, 2))
    assert rules.tiles_for("sm90", torch.bfloat16, 64, 2048, 768, gated=True) == BY_RULE
    assert rules.keep(a_layer(), best) == cache
    for _ in ("this process", "a later one"):
        assert rules.tiles_for("sm90", torch.bfloat16, 60, 2048, 768, gated=True) == best
        for D, F_, gated in ((2048, 768, False), (2048, 512, True)):
            other = rules.tiles_by_rule("sm90", torch.bfloat16, 64, D, F_)
            assert rules.tiles_for("sm90", torch.bfloat16, 64, D, F_, gated) == other != best
        other = rules.tiles_by_rule("sm80", torch.bfloat16, 64, 2048, 768)
        assert rules.tiles_for("sm80", torch.bfloat16, 64, 2048, 768, gated=True) == other
        monkeypatch.setattr(rules, "_read", None)
    more = START._replace(down=Tile(64, 128, 32, 8, 2))
    rules.keep(a_layer(1000), more)
    assert len(json.loads(cache.read_text())) == 2
    assert rules.tiles_for("sm90", torch.bfloat16, 1000, 2048, 768, gated=True) == more
    assert rules.tiles_for("sm90", torch.bfloat16, 64, 2048, 768, gated=True) == best


@pytest.mark.parametrize(
    "content", ["", "[1]", '[{"layer": {}}]', "{", "3", "null", "[" * 100_000, "\0", '[{"layer": {}, "tiles": []}]']
)
def test_a_damaged_cache_is_no_cache(cache, content):
    cache.write_text(content)
    assert rules.tiles_for("sm90", torch.bfloat16, 64, 2048, 768, gated=True) == BY_RULE


@pytest.mark.parametrize("number", [0, -1, 3, 2048, 64.0, "64", None, True, float("nan"), 10**400, [64]])
def test_a_tile_with_another_number_is_no_tile(cache, number):
    entry = {"layer": a_layer()._asdict(), "tiles": START._replace(up=START.up._replace(BLOCK_N=number))._asdict()}
    cache.write_text(json.dumps([entry]))
    assert rules.tiles_for("sm90", torch.bfloat16, 64, 2048, 768, gated=True) == BY_RULE


@pytest.mark.parametrize(
    ("rows", "bucket"), [(0, 1), (0.1, 1), (1, 1), (2, 2), (3, 4), (4, 4), (60, 64), (100, 128), (2048, 2048)]
)
def test_rows_per_expert_fall_into_powers_of_two(rows, bucket):
    assert a_layer(rows).rows == bucket


def test_tiles_are_tried_inside_the_block_only():
    def fail():
        with rules.trying(START):
            assert rules.tiles_for("sm90", torch.bfloat16, 1, 16, 16, gated=False) == START
            raise RuntimeError("out of time")

    with pytest.raises(RuntimeError, match="out of time"):
        fail()
    assert rules.tiles_for("sm90", torch.bfloat16, 1, 16, 16, gated=False) != START


@pytest.mark.parametrize(
    ("layer", "tokens", "error", "message"),
    [
        (torch.nn.Linear(2, 2), 4096, TypeError, "^layer must be a MoE or Experts, got Linear$"),
        (MoE(CONFIG), 4.0, TypeError, "^tokens must be an integer, got float$"),
        (MoE(CONFIG), True, TypeError, "^tokens must be an integer, got bool$"),
        (MoE(CONFIG), 0, ValueError, "^tokens must be at least 1, got 0$"),
        (Experts(CONFIG), 4096, ValueError, "^layer cannot be tuned: the Triton kernels do not run on device 'cpu'$"),
        (MoE(CONFIG.replace(impl="dense")), 4096, ValueError, "^layer cannot be tuned: it names impl='dense'$"),
    ],
)
def test_what_cannot_be_tuned_is_refused(layer, tokens, error, message, monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", True)
    with pytest.raises(error, match=message):
        tune(layer, tokens)


@pytest.mark.parametrize(
    ("seconds", "error", "message"),
    [
        (float("nan"), ValueError, "^seconds must be a number from 0, got nan$"),
        (-1, ValueError, "^seconds must be a number from 0, got -1$"),
        ("60", TypeError, "^seconds must be a number, got str$"),
        (None, TypeError, "^seconds must be a number, got NoneType$"),
        (True, TypeError, "^seconds must be a number, got bool$"),
    ],
)
def test_a_time_that_is_none_is_refused(seconds, error, message):
    with pytest.raises(error, match=message):
        tune(MoE(CONFIG), 4096, seconds=seconds)


def test_a_cache_that_cannot_be_written_is_noticed_before_anything_is_measured(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(tuning, "refusal", lambda *args, **kind: None)
    monkeypatch.setattr(tuning, "search", None)
    with pytest.raises(OSError, match=r"^cannot write .*tiles-triton-0\.0\.json: Is a directory$"):
        tune(MoE(CONFIG), 4096)


def test_a_failure_keeps_what_was_measured_before(cache, monkeypatch):
    rules.keep(a_layer(), START)
    before = cache.read_bytes()
    monkeypatch.setattr("fusedonemoe.files.os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"^cannot write .*: No space left on device$"):
        rules.keep(a_layer(1000), START)
    assert cache.read_bytes() == before and list(cache.parent.iterdir()) == [cache]


def test_nothing_is_measured_while_a_graph_is_made(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"^tune measures, so it cannot run under torch\.compile"):
        tune(MoE(CONFIG), 4096)


def test_memory_is_asked_for_first(monkeypatch):
    needed = tuning._bytes_needed(MoEConfig(hidden_size=10, intermediate_size=3, num_experts=7, top_k=2), 5, 2, backward=True)
    assert needed == 2 * 2 * (5 * 2 * (3 * 6 + 2 * 3 + 2 * 10) + 7 * 10 * (6 + 3))
    weight = type("OnGPU", (), {"is_cuda": True, "device": "cuda"})()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    tuning._check_memory(weight, 7 * 10**8)
    with pytest.raises(RuntimeError, match=r"^tuning needs 0\.90 GB of device memory, and 1\.00 GB are free$"):
        tuning._check_memory(weight, 9 * 10**8)
