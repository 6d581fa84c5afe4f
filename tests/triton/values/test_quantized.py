"""Experts of 8 and 4 bits with impl="triton": values and gradients against float64, every form, the kernel by itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.ops import reference
from fusedonemoe.ops.formats import QUANTIZED
from fusedonemoe.ops.records import Projection
from fusedonemoe.ops.triton.plan import make_plan
from fusedonemoe.ops.triton.quantized_rows import quantized_rows
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.testing import ErrorNorms, assert_within_budget, error_norms, exact_float64, make_experts, make_mlp_inputs
from tests.ops.test_experts_mlp_precision import plain_experts

FORMS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4", "group_size": 32},
    "int4 with zero points": {"dtype": "int4", "group_size": 32, "symmetric": False},
}
every_form = pytest.mark.parametrize("form", FORMS)
NAMES = ("x", "weights", "up_bias", "down_bias")
TIGHT = 4e-6  # as in test_quantized_kernels
E, K = 4, 2


def make(T, form, device, D=32, inner=32, **options):
    """Inputs, and the quantised weights."""
    inputs = make_mlp_inputs(T, D, inner, E, K, device=device, **options)
    how = FORMS[form] if isinstance(form, str) else form
    return inputs, tuple(F.quantize_weight(w, **how) for w in (inputs.up_proj, inputs.down_proj))


def results(inputs, weights, impl="triton", only=NAMES, **options):
    """The output and, by name, the gradients of everything that has one."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in only if getattr(inputs, name) is not None}
    given = replace(inputs, **leaves)
    arguments = (given.x, given.experts, given.weights, *weights)
    y = F.experts_mlp_quantized(*arguments, gate_up_bias=given.up_bias, down_bias=given.down_bias, impl=impl, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return {"output": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def oracle(inputs, weights, **options):
    """As :func:`results` in float64, from the oracle of plain weights."""
    up, down = (exact_float64(F.dequantize_weight(w, torch.float64)) for w in weights)
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()} | {"up_proj": up, "down_proj": down}
    y = reference.experts_mlp(**arrays, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(inputs.x.dtype)
    grads = reference.experts_mlp_backward(exact_float64(dy), **arrays, **options)
    return {"output": y, **{name: getattr(grads, name) for name in NAMES if getattr(inputs, name) is not None}}


def plain_results(inputs, weights):
    """As :func:`results`, by plain PyTorch over the widened weights, every step rounded to the dtype of x."""
    up, down = (F.dequantize_weight(w, inputs.x.dtype) for w in weights)
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in NAMES}
    y = plain_experts(replace(inputs, **leaves, up_proj=up, down_proj=down), "silu", True, "gate_up")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return {"output": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def assert_exact(inputs, weights, **options):
    """float32 within a few roundings of the oracle; half precision within twice the error of impl="grouped".

    Of float16, that of plain PyTorch: grouped computes that in float32.
    """
    actual, exact = results(inputs, weights, **options), oracle(inputs, weights, **options)
    plain = None if inputs.x.dtype == torch.float32 else results(inputs, weights, "grouped", **options)
    if inputs.x.dtype == torch.float16:
        plain = plain_results(inputs, weights, **options)
    assert actual.keys() == exact.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == (inputs.weights.dtype if name == "weights" else inputs.x.dtype)
        if plain is not None:
            assert_within_budget(tensor, plain[name], exact[name], name=name)
            continue
        scale, error = ErrorNorms.of(exact[name]), error_norms(tensor, exact[name])
        assert error.max_abs <= TIGHT * scale.max_abs and error.rms <= TIGHT * scale.rms, f"{name}: {error} of {scale}"


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(dtype, form, device):
    assert_exact(*make(21, form, device, dtype=dtype, bias=True))


@pytest.mark.parametrize(("group_size", "D", "symmetric"), [(64, 128, True), (128, 128, False)])
def test_larger_groups(group_size, D, symmetric, device):
    form = {"dtype": "int4", "group_size": group_size, "symmetric": symmetric}
    assert_exact(*make(3, form, device, D=D, inner=group_size, dtype=torch.bfloat16))


@pytest.mark.parametrize(("D", "inner"), [(19, 13), (1, 1), (48, 17)])
def test_int8_of_any_width(D, inner, device):
    assert_exact(*make(7, "int8", device, D=D, inner=inner, bias=True))


def test_int4_of_widths_that_are_no_power_of_two(device):
    assert_exact(*make(3, "int4 with zero points", device, D=96, inner=32))


@every_form
@pytest.mark.parametrize("routing", ["one_expert", "some_empty", "out_of_range"])
def test_every_routing(routing, form, device):
    assert_exact(*make(11, form, device, routing=routing, bias=True))


@every_form
@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one(T, form, device):
    inputs, weights = make(T, form, device, bias=True)
    ours, theirs = (results(inputs, weights, impl) for impl in ("triton", "grouped"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "gated", "layout"),
    [("swiglu_oai", True, "interleaved"), ("silu", True, "up_gate"), ("gelu", False, "gate_up")],
)
def test_every_layout(activation, gated, layout, device):
    inputs, weights = make(9, "int8", device, gated=gated, bias=True)
    assert_exact(inputs, weights, activation=activation, gated=gated, gate_up_layout=layout)


@every_form
@pytest.mark.parametrize("save_percent", [0, 37])
def test_what_is_computed_again_is_the_same_bits(save_percent, form, device):
    inputs, weights = make(13, form, device, bias=True, routing="out_of_range")
    ours, all_saved = (results(inputs, weights, save_percent=p) for p in (save_percent, 100))
    assert all(torch.equal(ours[name], all_saved[name]) for name in all_saved)


def test_each_gradient_alone(device):
    inputs, weights = make(5, "int4", device, bias=True)
    expected = results(inputs, weights)
    for only in NAMES:
        assert torch.equal(results(inputs, weights, only=[only])[only], expected[only]), only


def test_values_of_any_strides(device):
    inputs, weights = make(5, "int4", device)
    turned = [w._replace(values=w.values.transpose(1, 2).contiguous().transpose(1, 2)) for w in weights]
    ours, expected = results(inputs, turned), results(inputs, weights)
    assert not turned[0].values.is_contiguous()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


# The interpreter's own tile is 16 everywhere: these are narrower and wider than a group, and wider than the widths.
@pytest.mark.parametrize("tile", [Tile(16, 32, 64, 4, 1), Tile(16, 128, 32, 4, 1), Tile(32, 256, 128, 4, 1)], ids=str)
@pytest.mark.parametrize("back", [False, True])
@every_form
def test_the_kernel_in_any_tile_writes_the_rows_from_the_first_on(form, back, tile, device, monkeypatch):
    T, O, I = 13, 64, 96  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    weight = F.quantize_weight(torch.randn(E, O, I, generator=generator).to(device), **FORMS[form])
    wide = F.dequantize_weight(weight, torch.float64)
    experts = make_experts(T, E, K, routing="out_of_range").to(device)
    plan = make_plan(experts, E, tile.BLOCK_M)
    half: dict[str, Any] = {"device": device, "dtype": torch.float16}  # float32 has smaller tiles
    rows = torch.randn(T, O if back else I, generator=generator).to(**half)
    bias = torch.randn(E, O, generator=generator).to(**half)
    projection = Projection.of(QUANTIZED, weight, bias)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: new_empty(*args, **options).fill_(7))
    out = quantized_rows(rows, projection, plan, tile, back=back, top_k=K, first_row=3)
    order, routed = plan.order.long(), int(plan.offsets[-1])
    assert 3 < routed < T * K
    for i in range(T * K):
        if 3 <= i < routed:
            e, row = int(experts.reshape(-1)[order[i]]), rows[order[i] // K].double()
            expected = row @ wide[e] if back else wide[e] @ row + bias[e].double()
            torch.testing.assert_close(out[i].double(), expected, rtol=2e-3, atol=2e-2)
        else:
            assert (out[i] == 7).all()
