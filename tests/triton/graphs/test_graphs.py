"""torch.compile's graphs of the public functions on CUDA, forward and backward: which kernels, and nothing besides that hurts."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedonemoe.ops import library

ROOT = Path(__file__).resolve().parents[3]
SYNCHRONISING = ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "_unique2")
KERNELS: dict[str, dict[str, list[str]]] = {}

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has an accelerator library of its own")


@functools.cache
def traced(case):
    command = [sys.executable, "-m", "tests.triton.graphs.trace", case]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(params=["route", "experts_mlp", "experts_merged"])
def case(request):
    return request.param


@pytest.mark.parametrize("dynamic", ["False", "True"])
def test_graphs(case, dynamic):
    found = traced(case)[dynamic]
    # One graph each way, whatever the number of tokens: no guard on it.
    assert [len(graphs) for graphs in found.values()] == [1, 1]
    for direction, (graph,) in found.items():
        assert graph["kernels"] == KERNELS[case][direction]
        assert graph["copied"] == []
        assert [name for name in graph["others"] if name.split(".")[0] in SYNCHRONISING] == []
        for file in graph["files"]:
            assert Path(file).is_relative_to(ROOT / "ops" / "triton")


def test_an_edited_kernel_is_another_build(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    for path in (ROOT / "ops" / "triton").glob("*.py"):
        (tmp_path / "triton" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    builds = {library._fingerprint()}
    for path in sorted((tmp_path / "triton").glob("*.py")):
        path.write_text(path.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
        builds.add(library._fingerprint())
    assert len(builds) == 1 + len(list((tmp_path / "triton").iterdir()))
