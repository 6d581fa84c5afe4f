"""The memory of the CPU kernels: each tensor stands between two pages that nobody may touch."""

import sys

import pytest
import torch

from fusedonemoe.ops.cpu import native
from tests.ops.test_cpu_build import finished, process

_REFUSAL = native.refusal(torch.float32, True)
pytestmark = [
    pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}"),
    pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux"),
]

GUARDED = """
    import ctypes, itertools, math, mmap, sys, torch
    from fusedonemoe.ops.cpu import mlp, native, neurons, selection
    from fusedonemoe.ops.records import MLP_ARGUMENTS, QUANTIZED_ARGUMENTS, SavedRows
    from fusedonemoe.testing import make_merged_inputs, make_mlp_inputs

    libc, PAGE, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

    def empty(shape, dtype, device="cpu"):
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device=device)
        inside = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, inside + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (start, start + PAGE + inside):
            assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
        kept.append(memory)
        first = start + PAGE + (0 if sys.argv[1] == "start" else inside - size)
        return torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=dtype).view(shape)

    def guard(tensor):
        return None if tensor is None else empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def mlp_of(arguments):
        def forward(*flat):
            *flat, act, save_percent = flat
            return mlp.experts_mlp(arguments.call((*flat, *act)), save_percent)

        def backward(dy, z, order, offsets, *flat):
            *flat, act, needs = flat
            call = arguments.call((*flat, *act))
            gradients = mlp.experts_mlp_backward(dy, SavedRows(z, order, offsets), call, arguments.needs(needs))
            return arguments.results(gradients, call.x)

        return forward, backward
"""

TOUCH = """
    ctypes.memset(empty((4,), torch.float32).data_ptr() + 16, 0, 1)
"""

EXPERTS = """
    def check(forward, backward, needs, arguments, *rest):
        y, *saved = forward(*arguments, *rest)
        dy = torch.ones_like(y)
        before = [y, *backward(dy, *saved, *arguments, *rest[:1], [True] * needs)]
        real, native.new = native.new, empty
        arguments = [guard(a) for a in arguments]
        y, *saved = forward(*arguments, *rest)
        after = [y, *backward(guard(dy), *map(guard, saved), *arguments, *rest[:1], [True] * needs)]
        native.new = real
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        kept.clear()

    widths = [(1, 1), (17, 33), (33, 17), (64, 48), (100, 37), (130, 131)]
    for (D, F), T, dtype in itertools.product(widths, (1, 7, 40), (torch.float32, torch.bfloat16)):
        for layout in ("gate_up", "interleaved", "plain"):
            inputs = make_mlp_inputs(T, D, F, 3, 2, dtype=dtype, gated=layout != "plain", bias=True)
            for save_percent in (100, 30):
                act = ("silu", layout, 1.0, 1.0)
                check(*mlp_of(MLP_ARGUMENTS), 6, vars(inputs).values(), act, save_percent)
        merged = native.experts_merged, native.experts_merged_backward
        check(*merged, 3, vars(make_merged_inputs(T, D, F, 3, 2, dtype=dtype)).values())
    plain_empty = torch.empty
    for T, (E, K) in itertools.product((1, 3), [(1, 1), (5, 2), (8, 8), (16, 1), (33, 8), (64, 3), (1030, 70)]):
        keys = torch.randn(T, E)
        before, keys = selection.select(keys, K), guard(keys)
        torch.empty = empty
        after = selection.select(keys, K)
        torch.empty = plain_empty
        assert torch.equal(before, after)
        kept.clear()
    print("checked")
"""

QUANTIZED = """
    from fusedonemoe.functional import QuantizedWeight, quantize_weight

    forward, backward = mlp_of(QUANTIZED_ARGUMENTS)

    def results(arguments, act, guard):
        y, *saved = forward(*arguments, act, 30)
        return [y, *backward(guard(torch.ones_like(y)), *map(guard, saved), *arguments, act, [True] * 4)]

    widths = [(1, 1), (17, 33), (33, 17), (64, 48), (100, 37), (130, 131), (32, 64), (160, 96)]
    for (D, F), T, layout in itertools.product(widths, (1, 7, 40), ("gate_up", "interleaved", "plain")):
        inputs = make_mlp_inputs(T, D, F, 3, 2, dtype=torch.bfloat16, gated=layout != "plain", bias=True)
        act = ("silu", layout, 1.0, 1.0)
        forms = [{}, *({"dtype": "int4", "group_size": 32, "symmetric": s} for s in (True, False) if D % 32 == F % 32 == 0)]
        for form in forms:
            weights = [quantize_weight(weight, **form) for weight in (inputs.up_proj, inputs.down_proj)]
            parts = [part for weight in weights for part in weight]
            arguments = [inputs.x, inputs.experts, inputs.weights, *parts, inputs.up_bias, inputs.down_bias]
            before = results(arguments, act, lambda tensor: tensor)
            real, native.new = native.new, empty
            after = results([guard(argument) for argument in arguments], act, guard)
            native.new = real
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            kept.clear()
    print("checked")
"""

NEURONS = """
    def results(x, ids, w, down, up, dy):
        y, s = neurons.experts_neurons(x, ids, w, down, up, "silu")
        out = [y, s, *neurons.experts_neurons_backward(dy, s, x, ids, w, down, up, "silu", (True,) * 4)]
        return [*out, neurons.experts_values(ids, w, up), *neurons.experts_values_backward(dy, ids, w, up, (True,) * 2)]

    for D, T, dtype in itertools.product((1, 17, 33, 64, 100, 256, 270), (1, 9), (torch.float32, torch.bfloat16, torch.float16)):
        ids = torch.randint(-1, 12, (T, 5))
        x, down, up, dy = (torch.randn(n, D).to(dtype) for n in (T, 11, 11, T))
        arguments = (x, ids, torch.rand(T, 5), down, up, dy)
        before = results(*arguments)
        real, native.new = native.new, empty
        after = results(*map(guard, arguments))
        native.new = real
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        kept.clear()
    print("checked")
"""


@pytest.mark.parametrize("kernels", [EXPERTS, QUANTIZED, NEURONS], ids=["experts", "quantized", "neurons"])
@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_is_read_or_written_outside_of_a_tensor(side, kernels):
    assert finished(process(GUARDED + kernels, side))[0] == "checked"


def test_the_pages_around_a_tensor_are_guarded():
    touching = process(GUARDED + TOUCH, "end")
    touching.communicate(timeout=600)
    assert touching.returncode < 0
