"""The interpreter as the value tests use it: bfloat16 is right, and planted errors are found."""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("about the interpreter only", allow_module_level=True)

InterpreterError = triton.runtime.errors.InterpreterError

BF16 = torch.bfloat16


def normal(*shape, dtype=BF16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def matmul(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + i[:, None] * K + k + i[None, :])
        b = tl.load(b_ptr + (k + i[:, None]) * BLOCK + i[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], acc.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_dot_accumulates_in_float32_and_rounds_once(dtype):
    a, b, out = normal(16, 64, dtype=dtype), normal(64, 16, dtype=dtype, seed=1), torch.empty(16, 16, dtype=dtype)
    matmul[(1,)](a, b, out, 64, BLOCK=16)
    # 0.51 ulp: one rounding, and the float32 sum just beside a tie.
    exact = a.double() @ b.double()
    half_ulp = torch.finfo(dtype).eps / 2
    slack = 1e-6 * (a.double().abs() @ b.double().abs())
    assert ((out.double() - exact).abs() <= half_ulp * exact.abs() + slack).all()


@triton.jit
def elementwise(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "scale":
        out = x * 0.3
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x < y, x, y)
    elif OP == "negate":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "max":
        out = x * 0 + tl.max(x, axis=0)
    elif OP == "cumsum":
        out = tl.cumsum(x, axis=0)
    else:
        out = x.to(tl.float32).to(tl.float16).to(tl.bfloat16)
    tl.store(out_ptr + i, out.to(tl.bfloat16))


def wide(f):
    return lambda x, y: f(x.float(), y.float()).to(BF16)


EXPECTED = {
    "add": wide(torch.add),
    "mul": wide(torch.mul),
    "scale": wide(lambda x, y: x * torch.tensor(0.3).to(BF16).float()),
    "maximum": torch.maximum,
    "where": torch.minimum,
    "negate": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "max": lambda x, y: x.max().expand_as(x),
    "cumsum": wide(lambda x, y: x.cumsum(0)),
    "casts": lambda x, y: x.half().to(BF16),
}


@pytest.mark.parametrize("op", EXPECTED)
def test_bf16_arithmetic_rounds_to_nearest_even(op):
    x, y, out = normal(64), normal(64, seed=1), torch.empty(64, dtype=BF16)
    elementwise[(1,)](x, y, out, OP=op, BLOCK=64)
    torch.testing.assert_close(out, EXPECTED[op](x, y), rtol=0, atol=0)


@triton.jit
def cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


def test_cast_to_bf16_is_torchs():
    special = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, float("inf"), float("-inf"), float("nan"), 1e-40, 65504.0])
    x = torch.cat([special, normal(54, dtype=torch.float32)])
    out = torch.empty(64, dtype=BF16)
    cast[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, x.to(BF16), rtol=0, atol=0, equal_nan=True)
    assert (out[:4].float() != x[:4]).any()  # some of these do round


@triton.jit
def copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    i = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


def test_a_right_kernel_passes_the_checks():
    x, out = normal(50, dtype=torch.float32), torch.empty(50)
    copy[(4,)](x, out, 50, BLOCK=16, STRIDE=16)
    torch.testing.assert_close(out, x, rtol=0, atol=0)


@pytest.mark.parametrize("gap", [2, 14, 40])
@pytest.mark.parametrize("n", [53, 64])
def test_out_of_bounds_is_found(n, gap):
    # Two storages in one piece of memory: the allocator cannot decide what lies behind the first.
    memory = np.ones(128, np.float32)
    x, out = torch.from_numpy(memory[:50]), torch.from_numpy(memory[50 + gap : 114 + gap])
    with pytest.raises(InterpreterError, match=r"copy, program 3, load: out of bounds: .* at byte 200 of a buffer of 200 bytes"):
        copy[(4,)](x, out, n, BLOCK=16, STRIDE=16)


def test_a_negative_offset_is_found():
    with pytest.raises(InterpreterError, match="out of bounds"):
        copy[(4,)](torch.empty(64), torch.empty(64), 64, BLOCK=16, STRIDE=-16)


def test_an_empty_buffer_is_out_of_bounds():
    with pytest.raises(InterpreterError, match="access without any storage"):
        copy[(1,)](torch.empty(0), torch.empty(0), 16, BLOCK=16, STRIDE=16)


def test_two_programs_that_write_one_element_are_found():
    with pytest.raises(InterpreterError, match=r"race: overwrites what program \d wrote"):
        copy[(4,)](normal(64), torch.empty(64, dtype=BF16), 64, BLOCK=16, STRIDE=8)


def test_reading_what_another_program_writes_is_found():
    x = normal(64, dtype=torch.float32)
    with pytest.raises(InterpreterError, match=r"race: (loads|overwrites) what"):
        copy[(3,)](x, x[8:], 48, BLOCK=16, STRIDE=16)


@triton.jit
def misaligned(x_ptr, out_ptr):
    shifted = (x_ptr.to(tl.int64) + 2).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(shifted))


def test_misalignment_is_found():
    with pytest.raises(InterpreterError, match="misaligned"):
        misaligned[(1,)](torch.zeros(4), torch.empty(1))


@triton.jit
def lanes(out_ptr, value, SAME: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(out_ptr + i // 2, tl.zeros((8,), tl.float32) + value if SAME else i.to(tl.float32))


def test_lanes_that_disagree_are_found():
    with pytest.raises(InterpreterError, match="two lanes"):
        lanes[(1,)](torch.empty(4), 1.0, SAME=False)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_lanes_that_agree_may_share_an_address(value):
    out = torch.empty(4)
    lanes[(1,)](out, value, SAME=True)
    torch.testing.assert_close(out, torch.full((4,), value), equal_nan=True)


@triton.jit
def counted(out_ptr, ticket_ptr, PLAIN: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(ticket_ptr, 1))
    if PLAIN:
        tl.store(ticket_ptr, 0)


def tickets(programs):
    out, ticket = torch.empty(programs, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    counted[(programs,)](out, ticket, PLAIN=False)
    return out


def test_programs_run_in_random_order_once_each():
    first, second = tickets(64), tickets(64)
    assert torch.equal(first.sort().values, torch.arange(64, dtype=torch.int32))
    assert not torch.equal(first, first.sort().values) and not torch.equal(first, second)


def test_plain_stores_among_atomics_are_found():
    with pytest.raises(InterpreterError, match="race"):
        counted[(4,)](torch.empty(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), PLAIN=True)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_unwritten_floats_are_nan(dtype):
    x = torch.zeros(3, dtype=dtype)
    assert all(made.isnan().all() for made in (torch.empty(3, dtype=dtype), torch.empty_like(x), x.new_empty(2, 2)))


def test_unwritten_integers_are_no_index():
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
