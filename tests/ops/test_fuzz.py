"""A cut of the fuzz, and what makes it one: it reaches every option, repeats itself, sees planted faults and outlives a crash."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fusedonemoe import functional as F
from tests.fuzz import run
from tests.fuzz.__main__ import main
from tests.fuzz.bounds import PRECISIONS, Bounded, contract
from tests.fuzz.cases import CASES, Result, place_of, run_case, schedule
from tests.fuzz.check import Outcome
from tests.fuzz.exact_routing import softmax

SEED, CUT = 21, 8 * len(schedule(tuple(CASES)))  # eight rounds of all operators


@pytest.fixture(scope="module")
def cut():
    return run.fuzz(SEED, range(CUT))


def test_the_cut_finds_nothing(cut):
    assert not cut.failed, "\n".join(map(cut.describe, cut.failed))
    assert sum(cut.cases.values()) == CUT


def test_the_cut_reaches_every_operator_implementation_dtype_and_option(cut):
    assert {operator for operator, _ in cut.cases} == set(CASES)
    assert {"auto", "dense", "grouped", "cpu", "portable"} <= {impl for operator, impl in cut.cases if operator == "experts_mlp"}
    assert not cut.missing()
    assert any("True" in taken for (_, name), taken in cut.reached.items() if name == "compiled")


def test_few_bounds_of_the_cut_would_be_met_by_zeros(cut):
    assert sum(cut.compared.values()) > 2 * CUT
    assert sum(cut.unmeasured.values()) < 0.05 * sum(cut.compared.values())


def test_a_case_follows_from_seed_and_number_alone():
    for index in (3, 40):
        first, _, second = run_case(5, index), run_case(6, index + 1), run_case(5, index)
        assert first == second
    assert run_case(5, 40).options != run_case(6, 40).options


def test_each_operator_counts_its_own_cases():
    turns: dict[str, int] = {}
    for index in range(2 * len(schedule(tuple(CASES)))):
        operator, turn = place_of(index, False)
        assert turn == turns.get(operator, 0)
        turns[operator] = turn + 1
    assert set(turns) == set(CASES)


def planted(change):
    """The library's function with a changed result."""
    original = F.experts_mlp
    return lambda *args, **options: change(original(*args, **options), args[0])


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.05


FAULTS = {
    "zeros": lambda y, x: y * 0,
    "one token lost": lambda y, x: torch.cat((y[:1] * 0, y[1:])),
    "a hundredth off": lambda y, x: y * 1.02,
    "another dtype": lambda y, x: y.to(torch.float64),
    "another shape": lambda y, x: y[None],
    "a gradient off": lambda y, x: HalfGradient.apply(y),
    "NaN": lambda y, x: y + torch.nan,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    monkeypatch.setattr(F, "experts_mlp", planted(FAULTS[fault]))
    mine = [index for index in range(CUT) if place_of(index, False)[0] == "experts_mlp"]
    assert any(run_case(SEED, index).outcome.failures for index in mine[:12])


def test_an_input_that_is_changed_is_found(monkeypatch):
    monkeypatch.setattr(F, "tokens_per_expert", lambda experts, E: (experts.zero_(), torch.zeros(E, dtype=torch.int64))[1])
    mine = [index for index in range(CUT) if place_of(index, False)[0] == "plan, tokens_per_expert"]
    assert any("changed its input" in failure for index in mine[:8] for failure in run_case(SEED, index).outcome.failures)


def fake_worker(*messages, dies=True):
    """A worker that says these lines, and dies unless told otherwise."""
    lines = "".join(f"print({json.dumps(message)!r});" for message in messages)
    program = f"import os, sys; sys.stdin.read(); {lines} sys.stdout.flush(); {'os.abort()' if dies else ''}"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def test_a_case_that_kills_its_process_is_a_failure_and_the_next_one_runs(monkeypatch):
    fine = dataclasses.asdict(Result(8, "route", "auto"))
    workers = [fake_worker({"begins": 8}, fine, dies=False), fake_worker({"begins": 7})]
    monkeypatch.setattr(run, "_start", lambda *args: workers.pop())
    died, next_ = run.run_all(SEED, [7, 8])
    assert died.outcome.failures == ["the process died with exit status -6"] and died.index == 7
    assert next_ == Result(8, "route", "auto")


def test_a_case_that_hangs_is_a_failure(monkeypatch):
    program = "import sys, time; sys.stdin.read(); print('{\"begins\": 7}', flush=True); time.sleep(60)"
    pipe = subprocess.PIPE
    worker = subprocess.Popen([sys.executable, "-c", program], text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    monkeypatch.setattr(run, "_start", lambda *args: worker)
    monkeypatch.setattr(run, "TIME_OUT", 2.0)
    (result,) = run.run_all(SEED, [7])
    assert result.outcome.failures == ["no answer in 2 s"] and worker.poll() is not None


def test_a_worker_that_cannot_begin_is_an_error_and_no_failure(monkeypatch):
    monkeypatch.setattr(run, "_start", lambda *args: fake_worker())
    with pytest.raises(RuntimeError, match="ended before its next case"):
        list(run.run_all(SEED, [7]))


def test_the_command_sums_up_and_fails_with_1(capsys, monkeypatch):
    monkeypatch.setattr(run, "run_all", lambda *args: iter([Result(5, "route", "auto")]))
    assert main(["--seed", "3", "--case", "5"]) == 0
    assert "1 cases, 0 failed" in capsys.readouterr().out
    result = Result(5, "route", "auto", {"impl": "auto"}, outcome=Outcome(["it is wrong"]))
    monkeypatch.setattr(run, "run_all", lambda *args: iter([result]))
    assert main(["--seed", "3", "--case", "5"]) == 1
    assert "python -m tests.fuzz --seed 3 --case 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--only", "nothing"], ["--cases", "0"], ["--seed", "-1"], ["--case", "0", "--only", "MoE"]]
)
def test_a_wrong_command_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_bound_holds_what_float32_computes_and_refuses_zeros():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 40), (40, 3)))
    work = PRECISIONS[torch.float32]
    exact = contract("ad,db->ab", Bounded(a, None, work), Bounded(b, None, work), 40)
    outcome = Outcome()
    outcome.hold("product", torch.from_numpy(a) @ torch.from_numpy(b), exact)
    assert not outcome.failures and not outcome.unmeasured
    outcome.hold("zeros", torch.zeros(5, 3), exact)
    assert len(outcome.failures) == 1
    outcome = Outcome()
    outcome.hold("lost", torch.zeros(5, 3), Bounded(exact.value, 10 * np.abs(exact.value), work))
    assert outcome.unmeasured == 1


def test_the_exact_softmax_of_large_logits_is_right():
    work = PRECISIONS[torch.float32]
    p = softmax(Bounded(np.array([[1e30, 1e30, -1e30], [0.0, -np.inf, 0.0], [np.nan, 0.0, 0.0]]), None, work))
    assert np.array_equal(p.value[:2], [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    assert (p.error[:2] < 1e-6).all() and np.isinf(p.error[2]).all()
