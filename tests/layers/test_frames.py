"""Python frames of an eager call: for one token of a small layer they take longer than the arithmetic."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedonemoe
from fusedonemoe import MoE
from fusedonemoe.ops.cpu import native

LIBRARY = (str(Path(fusedonemoe.__file__).parent), str(Path(native.__file__).parents[1]))

pytestmark = pytest.mark.skipif(native.refusal(torch.float32, True) is not None, reason="needs the compiled CPU kernels")


def frames_of(call: Callable[[], Any]) -> list[str]:
    """The files of the Python functions that ``call`` calls; NamedTuples are made in ``<string>``."""
    files = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files[1:]  # the call itself


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_has_few_frames(dtype, gated):
    moe = MoE(hidden_size=64, intermediate_size=32, num_experts=8, top_k=2, gated=gated, dtype=dtype)
    x, leaf = torch.randn(1, 64).to(dtype), torch.randn(1, 64).to(dtype).requires_grad_()
    outputs = [moe(leaf) for _ in range(2)]
    with torch.no_grad():
        moe(x)
        assert 10 < len(frames_of(lambda: moe(x))) <= 50
    assert 10 < len(frames_of(lambda: moe(leaf))) <= 60
    outputs[0].sum().backward()
    total = outputs[1].sum()
    ours = [file for file in frames_of(total.backward) if file == "<string>" or file.startswith(LIBRARY)]
    assert 3 < len(ours) <= 40  # without those of torch.autograd, which are the same for any function
