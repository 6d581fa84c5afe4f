"""Layers over quantised weights: values and gradients against float64, edges, the promises about bits.

tests/ops/test_cpu_build.py runs this file again, for other instruction sets and under sanitizers.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import reference
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import ROUTINGS, ErrorNorms, assert_within_budget, error_norms, exact_float64, make_mlp_inputs
from tests.ops.test_experts_mlp_precision import plain_experts

_REFUSAL = native.refusal(torch.float32, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")

FORMS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4", "group_size": 32},
    "int4 with zero points": {"dtype": "int4", "group_size": 32, "symmetric": False},
}
every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NAMES = ("x", "weights", "up_bias", "down_bias")
TIGHT, FACTOR = 4e-6, 4.0  # as in test_cpu_kernels
# Tiles are 6 tokens at most on any machine, 4 and fewer go without; chunks are 8 tiles, and 240 rows in the backward.
TOKENS = (0, 1, 2, 3, 4, 5, 6, 7, 13, 49, 97, 241)


def quantized(inputs, form, **changes):
    return tuple(F.quantize_weight(w, **{**FORMS[form], **changes}) for w in (inputs.up_proj, inputs.down_proj))


def results(inputs, weights, impl="cpu", **options):
    """The output and, by name, the gradients of everything that has one."""
    names = [name for name in NAMES if getattr(inputs, name) is not None]
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    given = replace(inputs, **leaves)
    if impl == "plain":  # every step rounded to the dtype of x
        up, down = (F.dequantize_weight(w, inputs.x.dtype) for w in weights)
        form = (options.get("activation", "silu"), options.get("gated", True), options.get("gate_up_layout", "gate_up"))
        y = plain_experts(replace(given, up_proj=up, down_proj=down), *form)
    else:
        arguments = (given.x, given.experts, given.weights, *weights)
        y = F.experts_mlp_quantized(*arguments, gate_up_bias=given.up_bias, down_bias=given.down_bias, impl=impl, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return {"output": y.detach(), **dict(zip(names, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def oracle(inputs, weights, **options):
    """As :func:`results` in float64, from the oracle of plain weights."""
    up, down = (exact_float64(F.dequantize_weight(w, torch.float64)) for w in weights)
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()} | {"up_proj": up, "down_proj": down}
    options.pop("save_percent", None)
    y = reference.experts_mlp(**arrays, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(inputs.x.dtype)
    grads = reference.experts_mlp_backward(exact_float64(dy), **arrays, **options)
    return {"output": y, **{name: getattr(grads, name) for name in NAMES if getattr(inputs, name) is not None}}


def assert_exact(inputs, weights, **options):
    """float32 within a few roundings of the oracle; half precision within a multiple of the error of impl="grouped".

    Of float16, of the error of plain PyTorch: grouped computes that in float32.
    """
    actual, exact = results(inputs, weights, **options), oracle(inputs, weights, **options)
    yardstick = "plain" if inputs.x.dtype == torch.float16 else "grouped"
    plain = None if inputs.x.dtype == torch.float32 else results(inputs, weights, yardstick, **options)
    for name, tensor in actual.items():
        assert tensor.dtype == (inputs.weights.dtype if name == "weights" else inputs.x.dtype)
        if plain is not None:
            assert_within_budget(tensor, plain[name], exact[name], factor=FACTOR, name=name)
            continue
        scale, error = ErrorNorms.of(exact[name]), error_norms(tensor, exact[name])
        assert error.max_abs <= TIGHT * scale.max_abs and error.rms <= TIGHT * scale.rms, f"{name}: {error} of {scale}"


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Values and gradients


@pytest.mark.parametrize("activation", reference.GATED_ACTIVATIONS)
@every_form
def test_every_activation_and_layout_equals_the_oracle(activation, form):
    for layout, bias in zip(reference.GATE_UP_LAYOUTS, (False, True, True), strict=True):
        inputs = make_mlp_inputs(9, 32, 64, 4, 2, bias=bias, routing="out_of_range")
        options = {"activation": activation, "gate_up_layout": layout, "swiglu_alpha": 1.3, "swiglu_limit": 0.8}
        assert_exact(inputs, quantized(inputs, form), **options)
    if activation != "swiglu_oai":
        inputs = make_mlp_inputs(9, 32, 64, 4, 2, bias=True, gated=False)
        assert_exact(inputs, quantized(inputs, form), activation=activation, gated=False)


@pytest.mark.parametrize("T", TOKENS)
@every_form
@every_dtype
def test_every_number_of_tokens_equals_the_oracle(T, form, dtype):
    # Of one or two gradients of routing weights which is further off is chance, unless they are rounded like the rest.
    one = make_mlp_inputs(T, 32, 32, 3, 1, dtype=dtype, weights_dtype=dtype, bias=True, routing="one_expert")
    assert_exact(one, quantized(one, form), gate_up_layout="interleaved")
    several = make_mlp_inputs(T, 64, 32, 5, 2, dtype=dtype, weights_dtype=dtype)
    assert_exact(several, quantized(several, form))


@pytest.mark.parametrize("widths", [(1, 1), (1, 37), (37, 1), (17, 33), (33, 17), (64, 48), (130, 515), (515, 130)], ids=str)
@every_dtype
def test_every_width_of_int8_equals_the_oracle(widths, dtype):
    D, inner = widths
    for T, gated in ((3, True), (9, False)):
        inputs = make_mlp_inputs(T, D, inner, 3, 2, dtype=dtype, gated=gated, bias=True)
        assert_exact(inputs, quantized(inputs, "int8"), gated=gated)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@every_dtype
def test_every_group_size_equals_the_oracle(group_size, symmetric, dtype):
    # A block of columns of the backward is 64 on the widest machine: groups are longer, or end inside.
    for T, multiples in ((3, (1, 3)), (9, (3, 1))):
        D, inner = (group_size * multiple for multiple in multiples)
        inputs = make_mlp_inputs(T, D, inner, 3, 2, dtype=dtype, bias=True)
        assert_exact(inputs, quantized(inputs, "int4", group_size=group_size, symmetric=symmetric))


@pytest.mark.parametrize("routing", ROUTINGS)
@every_form
def test_every_routing_equals_the_oracle(routing, form):
    inputs = make_mlp_inputs(30, 32, 64, 40, 4, bias=True, routing=routing)
    assert_exact(inputs, quantized(inputs, form))


@every_form
def test_weights_of_any_size_equal_the_oracle(form):
    inputs = make_mlp_inputs(7, 64, 32, 3, 2, gated=False)
    sizes = torch.tensor([1e-18, 1.0, 1e18])[:, None, None]
    inputs = replace(inputs, up_proj=inputs.up_proj * sizes, down_proj=inputs.down_proj / sizes)
    inputs.up_proj[:, 3] = 0
    up, down = quantized(inputs, form)
    values, dtype = (torch.arange(-128, 128), torch.int8) if form == "int8" else (torch.arange(256), torch.uint8)
    for weight in (up, down):  # every value there is
        weight.values.copy_(values.to(dtype).repeat(weight.values.numel() // 256).view_as(weight.values))
    assert_exact(inputs, (up, down), activation="identity", gated=False)


def test_an_intermediate_size_of_zero_is_no_accident():
    inputs = make_mlp_inputs(4, 5, 1, 3, 2, bias=True)
    empty = {name: getattr(inputs, name)[:, :0] for name in ("up_proj", "up_bias")}
    inputs = replace(inputs, **empty, down_proj=inputs.down_proj[..., :0].contiguous())
    expected = results(inputs, quantized(inputs, "int8"), "grouped")
    for name, tensor in results(inputs, quantized(inputs, "int8")).items():
        assert_close(tensor, expected[name])


# Ids and weights of routing


@every_form
@every_dtype
def test_what_stands_at_an_id_out_of_range_is_never_read(form, dtype):
    inputs = make_mlp_inputs(20, 32, 32, 4, 3, dtype=dtype, routing="out_of_range", bias=True)
    outside = (inputs.experts < 0) | (inputs.experts >= 4)
    weights = quantized(inputs, form)
    actual = results(replace(inputs, weights=torch.where(outside, torch.nan, inputs.weights)), weights)
    assert_same_bits(actual, results(inputs, weights))
    assert (actual["output"][-1] == 0).all() and (actual["x"][-1] == 0).all() and (actual["weights"][outside] == 0).all()


@pytest.mark.parametrize("id_dtype", [torch.int8, torch.uint8, torch.int32, torch.uint64])
def test_any_integer_dtype_of_ids(id_dtype):
    inputs = make_mlp_inputs(6, 32, 32, 4, 3)
    weights = quantized(inputs, "int8")
    assert_same_bits(results(replace(inputs, experts=inputs.experts.to(id_dtype)), weights), results(inputs, weights))


@every_form
def test_an_expert_whose_scales_are_no_numbers_poisons_nothing_where_it_is_not_routed(form):
    inputs = make_mlp_inputs(6, 32, 32, 4, 2, bias=True)
    experts = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 7], [1, 1], [3, 3]])
    inputs = replace(inputs, experts=experts)
    weights = quantized(inputs, form)
    expected = results(inputs, weights)
    for weight in weights:
        weight.scale[2] = torch.nan
    assert_same_bits(results(inputs, weights), expected)


# What need not be contiguous


@every_form
@every_dtype
def test_what_belongs_to_tokens_need_not_be_contiguous(form, dtype):
    inputs = make_mlp_inputs(7, 32, 64, 4, 2, dtype=dtype, bias=True)
    names = ("x", "experts", "weights", "up_bias", "down_bias")
    strided = {name: getattr(inputs, name).t().contiguous().t() for name in names}
    weights = quantized(inputs, form)
    assert_same_bits(results(replace(inputs, **strided), weights), results(inputs, weights))


def test_quantised_weights_have_to_be_contiguous():
    inputs = make_mlp_inputs(5, 32, 32, 3, 2)
    up, down = quantized(inputs, "int8")
    turned = up._replace(values=up.values.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="impl='cpu' cannot run here: the CPU kernels read contiguous expert weights"):
        results(inputs, (turned, down))
    expected = results(inputs, (up, down), "grouped")
    assert_same_bits(results(inputs, (turned, down), "auto"), expected)


# Bits


@every_form
@every_dtype
def test_a_token_has_the_same_bits_in_any_batch(form, dtype):
    inputs = make_mlp_inputs(300, 64, 96, 3, 2, dtype=dtype, bias=True)
    weights = quantized(inputs, form)
    names = ("output", "x", "weights")
    whole = results(inputs, weights)
    dy = torch.randn(whole["output"].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    for begin, end in ((0, 1), (5, 7), (11, 20), (100, 160)):
        part = {name: getattr(inputs, name)[begin:end] for name in ("x", "experts", "weights")}
        x, w = part["x"].clone().requires_grad_(), part["weights"].clone().requires_grad_()
        arguments = (x, part["experts"], w, *weights)
        y = F.experts_mlp_quantized(*arguments, gate_up_bias=inputs.up_bias, down_bias=inputs.down_bias, impl="cpu")
        parts = (y, *torch.autograd.grad(y, (x, w), dy[begin:end]))
        for name, tensor in zip(names, parts, strict=True):
            assert torch.equal(tensor, whole[name][begin:end]), name


@every_form
@pytest.mark.parametrize("T", [1, 40])
def test_equal_inputs_give_equal_bits_on_any_number_of_threads(form, T, small_thresholds):
    before = torch.get_num_threads()
    inputs = make_mlp_inputs(T, 64, 160, 5, 3, bias=True)
    weights = quantized(inputs, form)
    try:
        torch.set_num_threads(1)
        expected = results(inputs, weights)
        for threads in (2, 2, 3, 5):
            torch.set_num_threads(threads)
            assert_same_bits(results(inputs, weights), expected)
    finally:
        torch.set_num_threads(before)


@every_form
@every_dtype
def test_save_percent_changes_no_bit(form, dtype):
    inputs = make_mlp_inputs(21, 32, 64, 4, 2, dtype=dtype, bias=True, routing="out_of_range")
    weights = quantized(inputs, form)
    expected = results(inputs, weights)
    for save_percent in (0, 1, 37, 99):
        assert_same_bits(results(inputs, weights, save_percent=save_percent), expected)


@every_form
def test_no_gradients_are_recorded_without_need(form):
    inputs = make_mlp_inputs(5, 32, 32, 4, 2)
    weights = quantized(inputs, form)
    y = F.experts_mlp_quantized(inputs.x, inputs.experts, inputs.weights, *weights, impl="cpu")
    assert not y.requires_grad and torch.equal(y, results(inputs, weights)["output"])
