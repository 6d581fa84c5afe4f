"""torch.compile's graphs of the public functions on CUDA, forward and backward: which kernels, and nothing besides that hurts."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedonemoe.ops.library import registration

ROOT = Path(__file__).resolve().parents[3]
# All that runs, in order. The plan of few rows is one kernel, of many rows three; which one it is, the traced T decides.
PLAN = {"False": ["plan_one_tile_kernel"], "True": ["count_kernel", "scan_kernel", "place_kernel"]}
TABLE_GRADIENT = ["experts_kernel", "segments_kernel", "add_segments_kernel"]
KERNELS = {
    "route": {"forward": ["_route_kernel"], "backward": ["_route_backward_kernel"]},
    "experts_mlp": {
        "forward": ["_route_kernel", "PLAN", "up_kernel", "rows_kernel", "combine_kernel"],
        "backward": [
            "restore_kernel",
            "column_sums_kernel",
            "dh_kernel",
            "outer_kernel",
            "routing_gradient_kernel",
            "outer_kernel",
            "column_sums_kernel",
            "rows_kernel",
            "combine_kernel",
            "_route_backward_kernel",
        ],
    },
    # Nothing recorded: no plan where the graph was traced with few rows.
    "inference": {"forward": ["_route_kernel", "PLAN", "up_kernel", "rows_kernel", "combine_kernel"], "backward": []},
    "decode": {"forward": ["_route_kernel", "_up_kernel", "_down_kernel"], "backward": []},
    "experts_mlp_lora": {
        "forward": ["_route_kernel", "PLAN", *["rows_kernel", "rows_kernel"] * 2, "combine_kernel"],
        "backward": [
            "restore_kernel",
            *["rows_kernel", "rows_kernel", "outer_kernel", "rows_kernel", "outer_kernel", "rows_kernel"],
            "routing_gradient_kernel",
            *["outer_kernel", "rows_kernel", "outer_kernel", "rows_kernel", "combine_kernel"],
            "_route_backward_kernel",
        ],
    },
    "experts_mlp_quantized": {
        "forward": ["_route_kernel", "PLAN", "quantized_rows_kernel", "quantized_rows_kernel", "combine_kernel"],
        "backward": [
            *["restore_kernel", "column_sums_kernel", "quantized_rows_kernel", "routing_gradient_kernel"],
            *["column_sums_kernel", "quantized_rows_kernel", "combine_kernel", "_route_backward_kernel"],
        ],
    },
    "experts_merged": {
        "forward": ["_route_kernel", "PLAN", "rows_kernel", "combine_kernel"],
        "backward": [
            "outer_kernel",
            "restore_kernel",
            "rows_kernel",
            "routing_gradient_kernel",
            "combine_kernel",
            "_route_backward_kernel",
        ],
    },
    "experts_neurons": {
        "forward": ["_route_kernel", "scores_kernel", "sums_kernel"],
        "backward": ["scores_backward_kernel", "sums_kernel", "PLAN", *TABLE_GRADIENT * 2, "_route_backward_kernel"],
    },
    "experts_values": {
        "forward": ["_route_kernel", "sums_kernel"],
        "backward": ["scores_kernel", "PLAN", *TABLE_GRADIENT, "_route_backward_kernel"],
    },
}

# The activation and weighting of adapted and quantised layers are torch's, for Inductor to fuse: one element or one row after the
# other. Copies are of adapters' gradients, and of the interleaved gradient of the pre-activations.
POINTWISE = {
    *("_to_copy.default", "abs.default", "add.Tensor", "clamp.default", "clone.default", "index_select.default", "le.Scalar"),
    *("mul.Tensor", "rsub.Scalar", "sigmoid.default", "stack.default", "sum.dim_IntList"),
}
OTHERS: dict[str, set[str]] = {"experts_mlp_lora": POINTWISE, "experts_mlp_quantized": POINTWISE}

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has an accelerator library of its own")


@functools.cache
def traced(case):
    command = [sys.executable, "-m", "tests.triton.graphs.trace", case]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(params=KERNELS)
def case(request):
    return request.param


@pytest.mark.parametrize("dynamic", ["False", "True"])
def test_graphs(case, dynamic):
    found = traced(case)[dynamic]
    # One graph each way, whatever the number of tokens: no guard on it.
    assert [len(graphs) for graphs in found.values()] == [bool(kernels) for kernels in KERNELS[case].values()]
    for direction, graph in ((direction, graph) for direction, graphs in found.items() for graph in graphs):
        expected = [[name] if name != "PLAN" else PLAN[dynamic] for name in KERNELS[case][direction]]
        assert graph["kernels"] == list(itertools.chain(*expected))
        # No torch operator that computes, copies or synchronises.
        assert set(graph["others"]) <= OTHERS.get(case, set())
        assert graph["copied"] == []
        for file in graph["files"]:
            assert Path(file).resolve().is_relative_to(ROOT / "ops" / "triton")  # what the operators' build covers


def test_an_edited_kernel_is_another_build(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    for path in (ROOT / "ops" / "triton").glob("*.py"):
        (tmp_path / "triton" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(registration, "__file__", str(tmp_path / "library" / "registration.py"))
    builds = {registration._fingerprint()}
    for path in sorted((tmp_path / "triton").glob("*.py")):
        path.write_text(path.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
        builds.add(registration._fingerprint())
    assert len(builds) == 1 + len(list((tmp_path / "triton").iterdir()))
