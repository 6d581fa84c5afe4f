"""The suite for GPUs in tests: cells shrunk to a CPU's size, and calls of its runner."""

import argparse
import importlib
from dataclasses import replace

import pytest
import torch

from fusedonemoe import bench
from fusedonemoe.bench.gpu_cells import CELLS, shrunk
from fusedonemoe.bench.gpu_peers import TORCH_LINE_UP

pytest.importorskip("rich")
suite = importlib.import_module("fusedonemoe.bench.gpu_suite")
runner = importlib.import_module("fusedonemoe.bench.gpu_runner")
timing = importlib.import_module("fusedonemoe.bench.gpu_timing")
report = importlib.import_module("fusedonemoe.bench.report")

CPU = torch.device("cpu")
NAMED = {cell.name: cell for cell in CELLS}
QWEN = shrunk(NAMED["qwen3-30b-T512-bfloat16-forward"])
TRAINING = replace(QWEN, mode="training", dtype=torch.float32)
GPT_OSS = shrunk(NAMED["gpt-oss-20b-T4096-bfloat16-training"])
MERGED = shrunk(NAMED["merged-E32-bfloat16-training"])
ROUTER = shrunk(NAMED["router-T512-E8-float32-forward"])
OUR_EXPERTS = TORCH_LINE_UP["experts"][0]


def arguments(*argv):
    """What the command line makes of these options."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--suite", "gpu", *argv])


def measure(cell, peers, **options):
    """The result of a cell on the CPU."""
    return runner.run_cell(cell, timing.Timer(CPU), peers=peers, rounds=2, seconds=0.001, **options)


def row_of(result, peer):
    """The row of the peer of this name."""
    return next(row for row in result.rows if row.peer == peer)
