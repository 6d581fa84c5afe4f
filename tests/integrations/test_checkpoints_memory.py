"""Loading holds one expert at a time beside the weights it fills, whatever the file."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fusedonemoe import Experts, MoEConfig
from fusedonemoe.integrations.checkpoints import load_experts, to_state_dict

E, D, F_ = 24, 256, 512
ONE_EXPERT = 3 * D * F_ * 4  # bytes


class _Peak(TorchDispatchMode):
    """The process's private memory after every operation; files that are mapped do not count, for the kernel can drop them."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def start(self) -> int:
        """What is held now; memory that was freed but kept for reuse is given back first, or it would hide what follows."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.most = self.now()
        return self.most

    @staticmethod
    def now() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, self.now())
        return out


@pytest.fixture(scope="module")
def config() -> MoEConfig:
    return MoEConfig(hidden_size=D, intermediate_size=F_, num_experts=E, top_k=1)


def _saved(config: MoEConfig, layout: str, path: Path) -> Path:
    state = to_state_dict(Experts(config), layout)
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def _extra(path: Path, into: Experts, layout: str) -> int:
    with _Peak() as peak:
        before = peak.start()
        load_experts(path, layout, into=into)
        return peak.most - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layout", ["hf", "hf_stacked", "hf_transposed", "granite", "torchtitan", "mixtral"])
def test_loading_needs_less_than_two_experts_beside_the_module(config, layout, file, tmp_path):
    path = _saved(config, layout, tmp_path / file)
    into = Experts(config)  # initialised, so every page of it is there already
    _extra(path, into, layout)  # what a first call imports is not the load's
    assert _extra(path, into, layout) < 2 * ONE_EXPERT


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measure_sees_a_copy_of_the_stack(config, tmp_path):
    with _Peak() as peak:
        before = peak.start()
        torch.empty(E * ONE_EXPERT // 4).fill_(1.0)
        assert peak.most - before > 20 * ONE_EXPERT
