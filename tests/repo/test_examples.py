"""The scripts in examples/ run, and print what is committed beside them and shown in the documentation.

After a change of one: ``python examples/NAME.py > examples/output/NAME.txt``, in the environment that ``make test`` uses.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_common

from fusedonemoe.ops.cpu.native import refusal

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = {path.stem: path for path in sorted(EXAMPLES.glob("*.py"))}
ON_TORCHRUN = "expert_parallel"
DECIMAL = re.compile(r"-?\d+\.(\d+)")


def assert_printed(printed, name):
    """Word for word what is committed; a figure with a point may differ by two of its last place, as rounding differs."""
    expected = (EXAMPLES / "output" / f"{name}.txt").read_text(encoding="utf-8")
    assert DECIMAL.sub("#", printed) == DECIMAL.sub("#", expected)
    for actual, wanted in zip(DECIMAL.finditer(printed), DECIMAL.finditer(expected), strict=True):
        assert len(actual[1]) == len(wanted[1]) and abs(float(actual[0]) - float(wanted[0])) < 2.5 * 0.1 ** len(wanted[1]), (
            f"{name} prints {actual[0]} where {wanted[0]} is committed:\n{printed}"
        )


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != ON_TORCHRUN])
def test_an_example_prints_what_is_committed(name, tmp_path, monkeypatch, capsys):
    if name == "decode" and (reason := refusal(torch.float32, True)):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)  # nothing may depend on where it is started
    torch.compiler.reset()
    # In this process, which has imported torch already: a process for each would take several times as long.
    with torch.random.fork_rng():
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    assert_printed(capsys.readouterr().out, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(_fsdp_common, "ShardPlacementResult"), reason="it needs torch 2.12")
def test_the_example_of_several_processes_prints_what_is_committed(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPTS[ON_TORCHRUN]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert_printed(run.stdout, ON_TORCHRUN)


def test_every_example_is_short_and_stands_on_its_page_with_its_output():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) >= 9
    for name, path in SCRIPTS.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, name
        assert f"../examples/{name}.py" in page and f"../examples/output/{name}.txt" in page, name
    assert {path.stem for path in (EXAMPLES / "output").iterdir()} == set(SCRIPTS)


@pytest.mark.parametrize("path", ["examples/own_model.py", "examples/transformers_model.py", "README.md"])
def test_a_model_is_changed_by_three_numbered_lines(path):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert [match[1] for line in lines if (match := re.search(r"  # (\d)\b", line))] == ["1", "2", "3"]
