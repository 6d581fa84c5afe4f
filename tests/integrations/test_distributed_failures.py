"""A rank that dies, and one that does not come: the others say so within the group's timeout. And the demo in two processes."""

import dataclasses
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from fusedonemoe.cli.demo import QUICK
from fusedonemoe.cli.demo.model import ByteTransformer
from fusedonemoe.cli.demo.parallel import ALONE, Processes
from fusedonemoe.cli.demo.text import Corpus
from fusedonemoe.cli.demo.train import Trainer, train_side_by_side
from fusedonemoe.integrations.distributed import ExpertParallel
from tests.integrations.test_distributed import D, make_moe
from tests.processes import ROOT, run_in_processes

GROUP_TIMEOUT = 8  # seconds, of the group that tests.processes makes


def expect_an_error(what_happens, rank, victim):
    """Train until the victim is gone; the others get an error within the timeout of the step, and its text says what failed."""
    moe = ExpertParallel().apply(make_moe(dtype=torch.float32))
    for step in range(3):
        start = time.monotonic()
        try:
            moe(torch.randn(6, D)).sum().backward()
        except RuntimeError:
            assert time.monotonic() - start < GROUP_TIMEOUT + 6
            raise
        if step == 1 and rank == victim:
            what_happens()
            return
    raise AssertionError("the exchange went on without a rank")


def others_hear_of(what_happens, rank, folder):
    if rank == 1:
        expect_an_error(what_happens, rank, 1)
        return
    with pytest.raises(RuntimeError) as caught:
        expect_an_error(what_happens, rank, 1)
    assert re.search(r"expert parallelism over 4 ranks failed on rank \d", str(caught.value))
    assert re.search("(?i)connection|timed out|timeout", str(caught.value)), caught.value
    (folder / f"ended{rank}").write_text(str(caught.value))
    os._exit(0)  # the group is broken: there is nobody to say goodbye to


def a_rank_dies(rank, world, folder):
    others_hear_of(lambda: os._exit(0), rank, folder)


def a_rank_does_not_come(rank, world, folder):
    others_hear_of(lambda: time.sleep(GROUP_TIMEOUT + 4), rank, folder)


def a_rank_dies_before_apply(rank, world, folder):
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"ExpertParallel\.apply over 4 ranks failed on rank \d while settings were compared"):
        ExpertParallel().apply(make_moe(dtype=torch.float32))
    assert time.monotonic() - start < GROUP_TIMEOUT + 6
    (folder / f"ended{rank}").write_text("")
    os._exit(0)


@pytest.mark.parametrize("name", ["a_rank_dies", "a_rank_does_not_come", "a_rank_dies_before_apply"])
def test_the_others_hear_of_it(name, tmp_path):
    start = time.monotonic()
    failures = run_in_processes("tests.integrations.test_distributed_failures", [name], 4, tmp_path, timeout=120)
    assert time.monotonic() - start < 110
    # The one that dies says nothing, and neither do those that end with a broken group.
    reports = sorted(path.name for path in tmp_path.glob("ended*"))
    assert reports == [f"ended{rank}" for rank in range(4) if rank != 1], failures[name]


# The demo

TINY = dataclasses.replace(QUICK, window=16, batch=4, steps=4, validations=2, validation_batches=2)


def curves(processes):
    text = torch.arange(4096).remainder(97).to(torch.uint8)
    corpus = Corpus(text, text.flip(0), ("train.py",), ("val.py",))
    trainers = []
    for name in ("MoE", "dense"):
        torch.manual_seed(0)
        model = ByteTransformer(TINY, use_experts=name == "MoE", processes=processes)
        trainers.append(Trainer(name, model, TINY, compiled=False, processes=processes))
    train_side_by_side(trainers, corpus, TINY, seed=0, device=torch.device("cpu"), on_step=lambda: None)
    histories = [trainer.history for trainer in trainers]
    numbers = torch.tensor([[*h.train, *(bits for _, bits in h.val)] for h in histories], dtype=torch.float64)
    return numbers, histories[0].tokens_per_expert


def the_demo_learns_as_one_process(rank, world, folder):
    numbers, counts = curves(Processes(world, rank))
    expected, expected_counts = curves(ALONE)
    torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-5)
    assert counts.sum() == expected_counts.sum()
    assert (counts - expected_counts).abs().sum() <= 4  # a tie within rounding may fall the other way


def test_the_demo_learns_as_one_process(tmp_path):
    (failure,) = run_in_processes(
        "tests.integrations.test_distributed_failures", ["the_demo_learns_as_one_process"], 2, tmp_path
    ).values()
    assert not failure, failure


@pytest.mark.slow
def test_the_demo_under_torchrun(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "fusedonemoe", "demo", "--quick", "--no-compile", "--steps=2", "--nproc=2"]
    command += ["--threads=2", f"--output={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step 2/2") == 1  # by one of the two
    assert "2 processes" in run.stdout and (tmp_path / "fusedonemoe-demo.png").exists()


def test_processes_must_divide_the_batch(capsys):
    from fusedonemoe.cli.demo import run
    from tests.bench.test_demo import parse

    assert run(parse("--quick", "--nproc", "3")) == 2
    assert "--nproc must divide the batch of 8, got 3" in capsys.readouterr().err


def test_processes_alone_change_nothing():
    counts = torch.tensor([1, 2])
    assert ALONE.sum(counts) is counts and not dist.is_initialized()
    assert torch.equal(ALONE.part(counts), counts)
