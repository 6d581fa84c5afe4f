"""Quantised weights, and the operators over them: implementations, registration, compilation, autocast."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.ops import library
from fusedonemoe.ops.cpu import build, native
from fusedonemoe.testing import make_mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
IMPLS = ["dense", "grouped", pytest.param("cpu", marks=needs_kernels)]
ACT = ("silu", "gate_up", 1.702, 7.0)
FORMS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4", "group_size": 32},
    "int4 with zero points": {"dtype": "int4", "group_size": 32, "symmetric": False},
}
every_form = pytest.mark.parametrize("form", FORMS)
_ops = torch.ops.fusedonemoe


def quantized(inputs, form="int8"):
    return tuple(F.quantize_weight(w, **FORMS[form]) for w in (inputs.up_proj, inputs.down_proj))


def run(inputs, weights, impl="auto", **options):
    arguments = (inputs.x, inputs.experts, inputs.weights, *weights)
    return F.experts_mlp_quantized(*arguments, gate_up_bias=inputs.up_bias, down_bias=inputs.down_bias, impl=impl, **options)


def relative_rms(difference, of):
    return float(difference.double().norm() / of.double().norm())


# Weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_is_off_by_half_a_step_at_most(dtype):
    weight = torch.randn(3, 5, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = F.quantize_weight(weight)
    assert made.values.dtype == torch.int8 and made.scale.dtype == torch.float32 and made.zero_point is None
    assert made.values.abs().amax(-1).eq(127).all() and made.shape == (3, 5, 37) and (made.bits, made.group_size) == (8, 37)
    off = (F.dequantize_weight(made, torch.float64) - weight.double()).abs()
    assert (off <= made.scale.double()[..., None] * 0.500001).all() and off.max() > 0


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_off_by_a_step_at_most_where_the_middle_is_8(group_size):
    weight = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    made = F.quantize_weight(weight, "int4", group_size=group_size)
    assert made.values.shape == (3, 5, 128) and made.values.dtype == torch.uint8 and made.zero_point is None
    assert made.scale.shape == (3, 5, 256 // group_size) and (made.bits, made.group_size) == (4, group_size)
    groups, exact = (
        F.dequantize_weight(made, torch.float64).unflatten(-1, (-1, group_size)),
        weight.unflatten(-1, (-1, group_size)),
    )
    step = made.scale.double().abs()[..., None]
    assert ((groups - exact).abs() <= step * 1.000001).all()
    largest = exact.abs().argmax(-1, keepdim=True)
    assert torch.allclose(groups.gather(-1, largest), exact.gather(-1, largest).double(), rtol=1e-6)


def test_int4_with_zero_points_is_off_by_a_step_at_most_and_reaches_from_end_to_end():
    weight = torch.rand(3, 5, 64, generator=torch.Generator().manual_seed(0)) + 0.25  # all of one sign: from 0 to the largest
    made = F.quantize_weight(weight, "int4", group_size=32, symmetric=False)
    assert made.zero_point is not None and made.zero_point.dtype == torch.uint8 and not made.zero_point.any()
    groups, exact = F.dequantize_weight(made).unflatten(-1, (-1, 32)), weight.unflatten(-1, (-1, 32))
    assert ((groups - exact).abs() <= made.scale[..., None] * 0.50001).all()
    mixed = weight - 0.75
    off = F.dequantize_weight(F.quantize_weight(mixed, "int4", group_size=32, symmetric=False)) - mixed
    assert relative_rms(off, mixed) < relative_rms(
        F.dequantize_weight(F.quantize_weight(mixed, "int4", group_size=32)) - mixed, mixed
    )


@every_form
def test_the_even_input_stands_in_the_lower_half_and_zeros_stay_zeros(form):
    weight = torch.zeros(1, 2, 32)
    weight[0, 0, 6], weight[0, 0, 7] = -8.0, 4.0
    made = F.quantize_weight(weight, **FORMS[form])
    assert torch.equal(F.dequantize_weight(made)[0, 1], weight[0, 1]) and made.scale.isfinite().all()
    if form == "int4":
        assert made.scale[0, 0, 0] == 1.0 and made.values[0, 0, 3] == (12 << 4) + 0 and made.values[0, 0, 0] == 0x88


def test_smallest_numbers_are_quantised_to_something_finite():
    for form in FORMS:
        made = F.quantize_weight(torch.full((1, 1, 32), 1e-45), **FORMS[form])
        assert F.dequantize_weight(made).isfinite().all()


@needs_kernels
def test_large_values_stand_in_the_kernels_large_pages():
    made = F.quantize_weight(torch.ones(2, 1024, 1024))
    assert native.pooled_size(made.values) == made.values.nbytes and made.values.data_ptr() % build.HUGE_PAGE == 0


# The layer


@pytest.mark.parametrize("impl", IMPLS)
@every_form
def test_every_implementation_is_the_plain_layer_of_the_widened_weights(impl, form):
    for T in (0, 1, 9):
        inputs = make_mlp_inputs(T, 32, 64, 6, 2, bias=True, routing="out_of_range", requires_grad=True)
        weights = quantized(inputs, form)
        wide = replace(inputs, up_proj=F.dequantize_weight(weights[0]), down_proj=F.dequantize_weight(weights[1]))
        expected = F.experts_mlp(
            *(wide.x, wide.experts, wide.weights, wide.up_proj, wide.down_proj),
            gate_up_bias=wide.up_bias,
            down_bias=wide.down_bias,
        )
        actual = run(inputs, weights, impl)
        leaves = (inputs.x, inputs.weights, inputs.up_bias, inputs.down_bias)
        for got, wanted in zip(
            (actual, *torch.autograd.grad(actual.square().sum(), leaves)),
            (expected, *torch.autograd.grad(expected.square().sum(), leaves)),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["dense", "grouped"])
@every_form
def test_gradients_in_float64(impl, form):
    inputs = make_mlp_inputs(5, 32, 32, 4, 2, dtype=torch.float64, bias=True, requires_grad=True)
    weights = quantized(inputs, form)
    leaves = (inputs.x, inputs.weights, inputs.up_bias, inputs.down_bias)

    def call(x, routing, up_bias, down_bias):
        given = replace(inputs, x=x, weights=routing, up_bias=up_bias, down_bias=down_bias)
        return run(given, weights, impl, activation="gelu", save_percent=40)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("impl", "requires_grad", "form"),
    [
        ("grouped", True, "int4 with zero points"),
        pytest.param("cpu", True, "int8", marks=needs_kernels),
        pytest.param("cpu", False, "int4", marks=needs_kernels),
    ],
)
def test_opcheck(impl, requires_grad, form):
    inputs = make_mlp_inputs(6, 32, 32, 3, 2, bias=True, requires_grad=requires_grad)
    up, down = quantized(inputs, form)
    parameters = (*up, *down, inputs.up_bias, inputs.down_bias)
    arguments = (inputs.x, inputs.experts, inputs.weights, *parameters, *ACT)
    torch.library.opcheck(_ops.experts_mlp_quantized.default, (*arguments, 37, library.BUILD, impl))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_kernels(dtype):
    inputs = make_mlp_inputs(6, 9, 7, 3, 2, dtype=dtype, bias=True)
    up, down = quantized(inputs)
    arguments = (inputs.x, inputs.experts, inputs.weights, *up, *down, inputs.up_bias, inputs.down_bias, *ACT)
    for save_percent in (0, 100):
        torch.library.opcheck(_ops.experts_mlp_quantized_cpu.default, (*arguments, save_percent))
        y, *saved = _ops.experts_mlp_quantized_cpu(*arguments, save_percent)
        for needs in ([True] * 4, [True, False, False, False], [False, True, False, True]):
            grads = _ops.experts_mlp_quantized_cpu_backward(torch.ones_like(y), *saved, *arguments, needs)
            assert [grad.numel() > 0 for grad in grads] == needs
            torch.library.opcheck(
                _ops.experts_mlp_quantized_cpu_backward.default, (torch.ones_like(y), *saved, *arguments, needs)
            )


@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_serves_several_numbers_of_tokens(impl):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    all_inputs = [make_mlp_inputs(T, 32, 32, 4, 2, requires_grad=True) for T in (7, 12, 30)]
    weights = quantized(all_inputs[0], "int4")
    compiled = torch.compile(lambda inputs: run(inputs, weights, impl), fullgraph=True, dynamic=True, backend=backend)
    for inputs in all_inputs:
        expected, actual = run(inputs, weights, impl), compiled(inputs)
        assert torch.equal(actual, expected)
        for first, second in zip(
            *(torch.autograd.grad(y.sum(), (inputs.x, inputs.weights)) for y in (actual, expected)), strict=True
        ):
            assert torch.equal(first, second)
    assert len(graphs) == 1


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_compiled_by_inductor_gradients_are_the_same(impl):
    torch._dynamo.reset()
    inputs = make_mlp_inputs(6, 32, 32, 4, 2, requires_grad=True)
    weights = quantized(inputs, "int4")
    actual = torch.compile(lambda inputs: run(inputs, weights, impl), fullgraph=True)(inputs)
    expected = run(inputs, weights, impl)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), inputs.x) for y in (actual, expected)))


def test_a_compiled_training_step_keeps_no_widened_weights():
    torch._dynamo.reset()
    inputs = make_mlp_inputs(4, 64, 64, 16, 2, requires_grad=True)
    weights = quantized(inputs, "int8")
    held = []

    def pack(tensor):
        held.append(tensor.numel() * tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.compile(lambda inputs: run(inputs, weights, "grouped"), fullgraph=True)(inputs)
    assert held and max(held) <= weights[0].values.nbytes


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_tokens_and_biases_only(impl):
    inputs = make_mlp_inputs(6, 32, 32, 4, 2, bias=True, requires_grad=True)
    weights = quantized(inputs, "int4")
    cast = {name: getattr(inputs, name).bfloat16() for name in ("x", "up_bias", "down_bias")}
    expected = run(replace(inputs, **cast), weights, impl)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(inputs, weights, impl)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    torch.autograd.grad(actual.sum(), (inputs.x, inputs.weights))


def test_scales_have_no_gradient():
    inputs = make_mlp_inputs(4, 8, 8, 3, 2, requires_grad=True)
    up, down = quantized(inputs)
    up = up._replace(scale=up.scale.requires_grad_())
    y = run(inputs, (up, down), "grouped")
    with pytest.raises(RuntimeError, match="quantised weights have no gradient"):
        y.sum().backward()
