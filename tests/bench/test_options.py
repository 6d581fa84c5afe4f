"""Options: what is out of range ends a command with 2, the option, what was expected and what came, before any work."""

import argparse
import importlib

import pytest

from asv_bench import suites
from fusedonemoe.__main__ import main
from fusedonemoe.cli import MODULES, options

NUMBERS = {
    "demo": {"--steps": 1, "--seed": 0, "--threads": 1, "--nproc": 1},
    "bench": {"--threads": 1},
}
WHOLE = [(command, option) for command, least in NUMBERS.items() for option in least]
POSITIVE = {"--minutes": "bench", "--target-ms": "suites", "--target-tokens": "suites"}
HUGE = "9" * 5000
NOT_WHOLE = ["", " ", "x", "1.5", "1e3", "nan", "inf", "-inf", "0x10", "1_0", "\0", "1 2"]


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Fails where a command is run, and not only parsed."""
    for command in NUMBERS:
        monkeypatch.setattr(importlib.import_module(MODULES[command]), "run", None)


def main_of_suites(argv):
    parser = argparse.ArgumentParser()
    suites.add_arguments(parser)
    parser.parse_args(["serving", *argv[1:]])


def refusal(capsys, *argv):
    run = main_of_suites if argv[0] == "suites" else main
    with pytest.raises(SystemExit) as stopped:
        run(list(argv))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and len(err.splitlines()[-1]) < 300
    return err.splitlines()[-1]


@pytest.mark.parametrize(("command", "option"), WHOLE)
def test_whole_numbers_have_bounds(command, option, capsys):
    least = NUMBERS[command][option]
    for text in NOT_WHOLE:
        told = refusal(capsys, command, f"{option}={text}")
        assert f"argument {option}: must be a whole number from {least} to " in told and f"got {text!r}" in told
    for text in (str(least - 1), "-5", f"-{HUGE}"):
        told = refusal(capsys, command, f"{option}={text}")
        assert f"argument {option}: must be at least {least}, got {text[:20]}" in told
    for text in (str(2**64), HUGE):
        told = refusal(capsys, command, f"{option}={text}")
        assert f"argument {option}: must be at most " in told and f", got {text[:20]}" in told


@pytest.mark.parametrize("option", POSITIVE)
def test_amounts_are_finite_and_above_zero(option, capsys):
    for text in ("", "x", "0", "-0.0", "-1", "nan", "inf", "-inf", "1e999", "1,5", "0x1p3", HUGE):
        told = refusal(capsys, POSITIVE[option], f"{option}={text}")
        assert f"argument {option}: must be a finite number above 0, got {text[:20]!r}"[:-1] in told


def test_the_bounds_themselves_are_accepted():
    parser = argparse.ArgumentParser()
    importlib.import_module("fusedonemoe.cli.demo").add_arguments(parser)
    parsed = parser.parse_args(["--seed", str(2**63 - 1), "--steps", "1", "--threads", str(options.MOST_THREADS), "--nproc", "1"])
    assert (parsed.seed, parsed.steps, parsed.threads, parsed.nproc) == (2**63 - 1, 1, options.MOST_THREADS, 1)
    assert parser.parse_args(["--seed", " +7 "]).seed == 7


@pytest.mark.parametrize("option", ["--cells", "--peers"])
@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 20000, "(?P<a>x)(?P<a>y)"])
def test_patterns_that_are_none_are_refused(option, pattern, capsys):
    assert "is not a regular expression" in refusal(capsys, "bench", option, pattern)


@pytest.mark.parametrize(
    ("command", "option"),
    [("bench", "--json"), ("bench", "--compare"), ("bench", "--picture"), ("report", "-o"), ("demo", "--output")],
)
@pytest.mark.parametrize("text", ["", "a\0b"])
def test_what_names_no_file_is_refused(command, option, text, capsys):
    argv = [command, "r.json"] if command == "report" else [command]
    assert f"must be the name of a file or a folder, got {text!r}" in refusal(capsys, *argv, option, text)


def test_results_must_be_named(capsys):
    assert "must be the name of a file or a folder" in refusal(capsys, "report", "")


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63 - 2])
def test_torch_takes_the_largest_seeds_and_those_that_the_demo_counts_up_to(seed):
    torch = importlib.import_module("torch")
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        torch.Generator().manual_seed(seed + 100)
    finally:
        torch.set_rng_state(state)
