"""The suite for GPUs in tests: cells shrunk to a CPU's size, and calls of its runner."""

import argparse
import importlib
from dataclasses import replace

import pytest
import torch

from fusedonemoe import bench
from fusedonemoe.bench.catalogue import SUITES
from fusedonemoe.bench.peers import PEERS
from fusedonemoe.bench.workloads import shrunk

pytest.importorskip("rich")
suite = importlib.import_module("fusedonemoe.bench.cell_suite")
runner = importlib.import_module("fusedonemoe.bench.runner")
timing = importlib.import_module("fusedonemoe.bench.timing")
report = importlib.import_module("fusedonemoe.bench.report")

CELLS = SUITES["gpu"]
CPU = torch.device("cpu")
NAMED = {cell.name: cell for cell in CELLS}
QWEN = shrunk(NAMED["qwen3-30b-T512-bfloat16-forward"])
TRAINING = replace(QWEN, mode="training", dtype=torch.float32)
GPT_OSS = shrunk(NAMED["gpt-oss-20b-T4096-bfloat16-training"])
MERGED = shrunk(NAMED["merged-E32-bfloat16-training"])
ROUTER = shrunk(NAMED["router-T512-E8-float32-forward"])
OUR_EXPERTS = PEERS["experts"][0]


def arguments(*argv):
    """What the command line makes of these options."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--suite", "gpu", *argv])


def measure(cell, peers, **options):
    """The result of a cell on the CPU."""
    return runner.run_cell(cell, timing.gpu_timer(CPU), peers=peers, rounds=2, seconds=0.001, **options)


def row_of(result, peer):
    """The row of the peer of this name."""
    return next(row for row in result.rows if row.peer == peer)
