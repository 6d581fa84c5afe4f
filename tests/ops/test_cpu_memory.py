"""The memory of the CPU kernels: each operand is between two pages that must not be touched.

Results are torch's: the sanitizers watch what is written into them.
"""

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
    from fusedonemoe.ops.cpu import native
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

    assert native.refusal(torch.float32, True) is None
    ops = torch.ops.fusedonemoe
"""

TOUCH = """
    ctypes.memset(empty((4,), torch.float32).data_ptr() + 16, 0, 1)
"""

EXPERTS = """
    def check(name, needs, arguments, act=(), *rest):
        forward, backward = getattr(ops, name), getattr(ops, name + "_backward")
        y, *saved = forward(*arguments, *act, *rest)
        dy = torch.ones_like(y)
        before = [y, *backward(dy, *saved, *arguments, *act, [True] * needs)]
        arguments = [guard(a) for a in arguments]
        y, *saved = forward(*arguments, *act, *rest)
        after = [y, *backward(guard(dy), *map(guard, saved), *arguments, *act, [True] * needs)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        kept.clear()

    widths = [(1, 1), (17, 33), (33, 17), (64, 48), (100, 37), (130, 131)]
    for (D, F), T, dtype in itertools.product(widths, (1, 7, 40), (torch.float32, torch.bfloat16)):
        for layout in ("gate_up", "interleaved", "plain"):
            inputs = make_mlp_inputs(T, D, F, 3, 2, dtype=dtype, gated=layout != "plain", bias=True)
            for save_percent in (100, 30):
                act = ("silu", layout, 1.0, 1.0)
                check("experts_mlp_cpu", 6, vars(inputs).values(), act, save_percent)
        check("experts_merged_cpu", 3, vars(make_merged_inputs(T, D, F, 3, 2, dtype=dtype)).values())
    for T, (E, K) in itertools.product((1, 3), [(1, 1), (5, 2), (8, 8), (16, 1), (33, 8), (64, 3), (1030, 70)]):
        keys = torch.randn(T, E)
        assert torch.equal(ops.select_float32(guard(keys), K), ops.select_float32(keys, K))
        kept.clear()
    print("checked")
"""

QUANTIZED = """
    from fusedonemoe.functional import QuantizedWeight, quantize_weight

    def results(arguments, act, guard):
        y, *saved = ops.experts_mlp_quantized_cpu(*arguments, *act, 30)
        dy = guard(torch.ones_like(y))
        return [y, *ops.experts_mlp_quantized_cpu_backward(dy, *map(guard, saved), *arguments, *act, [True] * 4)]

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
            after = results([guard(argument) for argument in arguments], act, guard)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            kept.clear()
    print("checked")
"""

NEURONS = """
    def results(x, ids, w, down, up, dy):
        y, s = ops.experts_neurons_cpu(x, ids, w, down, up, "silu")
        out = [y, s, *ops.experts_neurons_cpu_backward(dy, s, x, ids, w, down, up, "silu", [True] * 4)]
        return [*out, ops.experts_values_cpu(ids, w, up), *ops.experts_values_cpu_backward(dy, ids, w, up, [True] * 2)]

    for D, T, dtype in itertools.product((1, 17, 33, 64, 100, 256, 270), (1, 9), (torch.float32, torch.bfloat16, torch.float16)):
        ids = torch.randint(-1, 12, (T, 5))
        x, down, up, dy = (torch.randn(n, D).to(dtype) for n in (T, 11, 11, T))
        arguments = (x, ids, torch.rand(T, 5), down, up, dy)
        before = results(*arguments)
        after = results(*map(guard, arguments))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        kept.clear()
    print("checked")
"""


@pytest.mark.parametrize("kernels", [EXPERTS, QUANTIZED, NEURONS], ids=["experts", "quantized", "neurons"])
@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_is_read_outside_of_an_operand(side, kernels):
    assert finished(process(GUARDED + kernels, side))[0] == "checked"


def test_the_pages_around_a_tensor_are_guarded():
    touching = process(GUARDED + TOUCH, "end")
    touching.communicate(timeout=600)
    assert touching.returncode < 0
