"""The mixture of MLP experts, every implementation against the oracle in float64: values, gradients, shapes and edges."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import reference
from fusedonemoe.testing import ROUTINGS, exact_float64, make_mlp_inputs
from tests.strategies import activations, gate_up_layouts, mlp_inputs

IMPLS = ("dense", "grouped", "portable")
every_impl = pytest.mark.parametrize("impl", IMPLS)
FORMS = [
    *((name, True, layout) for name, layout in itertools.product(reference.GATED_ACTIVATIONS, reference.GATE_UP_LAYOUTS)),
    *((name, False, "gate_up") for name in reference.ACTIVATIONS),
]
TENSORS = ("x", "weights", "up_proj", "down_proj", "up_bias", "down_bias")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = {
    "no_tokens": (0, 6, 4, 3, 2),
    "one_token": (1, 6, 4, 3, 2),
    "one_choice": (9, 6, 4, 3, 1),
    "all_experts": (9, 6, 4, 3, 3),
    "more_choices_than_experts": (9, 6, 4, 2, 4),
    "one_expert": (9, 6, 4, 1, 1),
    "odd_widths": (11, 100, 37, 5, 3),
    "width_one": (5, 1, 1, 3, 2),
    "more_experts_than_rows": (4, 6, 4, 50, 2),
    "many_rows_each": (450, 3, 2, 2, 1),
}


def random_like(tensor, seed=99):
    return torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


def run(inputs, **options):
    """The public function on a set of inputs."""
    transposed = options.get("transposed", False)
    up, down = (v.transpose(1, 2) if transposed else v for v in (inputs.up_proj, inputs.down_proj))
    biases = {"gate_up_bias": inputs.up_bias, "down_bias": inputs.down_bias}
    return F.experts_mlp(inputs.x, inputs.experts, inputs.weights, up, down, **biases, **options)


def assert_equals_oracle(inputs, impl, **options):
    """Values and, where a tensor requires one, gradients. Out-of-range weights may be anything: gradients there are 0."""
    passed_on = ("transposed", "save_percent")
    oracle_options = {name: value for name, value in options.items() if name not in passed_on}
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()}
    y = run(inputs, impl=impl, **options)
    assert y.shape == inputs.x.shape and y.dtype == inputs.x.dtype
    assert_close(y, torch.from_numpy(reference.experts_mlp(**arrays, **oracle_options)), **EXACT)

    wanted = [name for name in TENSORS if getattr(inputs, name) is not None and getattr(inputs, name).requires_grad]
    if not wanted:
        return
    dy = random_like(y)
    grads = torch.autograd.grad(y, [getattr(inputs, name) for name in wanted], dy)
    exact = reference.experts_mlp_backward(exact_float64(dy), **arrays, **oracle_options)
    for name, grad in zip(wanted, grads, strict=True):
        assert_close(grad, torch.from_numpy(getattr(exact, name)), **EXACT, msg=f"gradient of {name}: ".__add__)


def make(*shape, **options):
    return make_mlp_inputs(*shape, dtype=torch.float64, **{"bias": True, "requires_grad": True, **options})


@pytest.mark.parametrize(("activation", "gated", "layout"), FORMS)
@pytest.mark.parametrize("bias", [False, True])
@every_impl
def test_every_form_equals_the_oracle(activation, gated, layout, bias, impl):
    inputs = make(7, 5, 3, 4, 2, gated=gated, bias=bias, routing="out_of_range")
    # Neither alpha nor limit is the default, and the limit clamps values of order one.
    form: dict[str, Any] = {"activation": activation, "gated": gated, "gate_up_layout": layout}
    for transposed in (False, True):
        assert_equals_oracle(inputs, impl, **form, transposed=transposed, swiglu_alpha=1.3, swiglu_limit=0.8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ["uniform", "one_expert", "some_empty", "out_of_range"])
@every_impl
def test_every_shape_equals_the_oracle(shape, routing, impl):
    for bias in (False, True):
        assert_equals_oracle(make(*SHAPES[shape], bias=bias, routing=routing), impl)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("save_percent", [0, 1, 37, 99, 100])
def test_every_routing_equals_the_oracle_whatever_is_saved(routing, save_percent):
    assert_equals_oracle(make(30, 5, 3, 6, 3, routing=routing), "grouped", save_percent=save_percent)


@given(mlp_inputs(dtype=torch.float64, requires_grad=True), st.data())
@settings(max_examples=150)
def test_any_inputs_equal_the_oracle(inputs, data):
    gated = inputs.up_proj.shape[1] == 2 * inputs.down_proj.shape[2]
    options = {
        "activation": data.draw(activations),
        "gated": gated,
        "gate_up_layout": data.draw(gate_up_layouts) if gated else "gate_up",
    }
    assert_equals_oracle(inputs, "dense", **options)
    assert_equals_oracle(inputs, "grouped", **options, save_percent=data.draw(st.integers(0, 100)))


# Expert ids


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("E", [4, 130, 300])
@pytest.mark.parametrize("bias", [False, True])
@every_impl
def test_any_integer_dtype_of_ids(dtype, E, bias, impl):
    inputs = make(4, 5, 3, E, 3, bias=bias)
    top = torch.iinfo(dtype).max  # 127 and 255 are experts where E is larger
    experts = torch.tensor([[0, 3, top], [top, top - 1, 1], [2, 2, 0], [-1 if dtype.is_signed else 200, E % 100, 3]])
    assert_equals_oracle(dataclasses.replace(inputs, experts=experts.to(dtype)), impl)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
@every_impl
def test_a_weight_standing_at_an_id_out_of_range_is_never_read(value, impl):
    inputs = make(8, 5, 3, 4, 3, routing="out_of_range")
    outside = (inputs.experts < 0) | (inputs.experts >= 4)
    assert outside.any() and outside[-1].all()
    weights = torch.where(outside, value, inputs.weights.detach()).requires_grad_()
    inputs = dataclasses.replace(inputs, weights=weights)
    for save_percent in (0, 100):
        assert_equals_oracle(inputs, impl, save_percent=save_percent)
    y = run(inputs, impl=impl)
    dx, dweights = torch.autograd.grad(y.sum(), (inputs.x, weights))
    assert (y[-1] == 0).all() and (dx[-1] == 0).all() and (dweights[outside] == 0).all() and (dweights[~outside] != 0).all()


@every_impl
def test_no_id_in_range_gives_zeros(impl):
    experts = torch.tensor([[-1, 4], [4, 2**40], [-(2**40), 1000]])
    inputs = dataclasses.replace(make(3, 5, 3, 4, 2), experts=experts)
    weights = torch.full((3, 2), torch.nan, dtype=torch.float64, requires_grad=True)
    inputs = dataclasses.replace(inputs, weights=weights)
    y = run(inputs, impl=impl)
    assert (y == 0).all()
    for grad in torch.autograd.grad(y.sum(), [getattr(inputs, name) for name in TENSORS]):
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@every_impl
def test_an_expert_that_would_overflow_poisons_nothing_where_it_is_not_routed(dtype, activation, impl):
    inputs = make_mlp_inputs(6, 8, 4, 4, 2, dtype=dtype, bias=True)
    inputs = dataclasses.replace(inputs, experts=torch.tensor([[0, 1], [1, 3], [3, 0], [0, 7], [1, 1], [3, 3]]))
    expected = gradients(inputs, impl, activation)
    for tensor in (inputs.up_proj, inputs.down_proj, inputs.up_bias, inputs.down_bias):
        assert tensor is not None
        tensor[2] = torch.finfo(dtype).max * tensor[2].sign()  # any product with expert 2 is infinite
    for actual, clean in zip(gradients(inputs, impl, activation), expected, strict=True):
        assert torch.isfinite(actual).all()
        assert_close(actual, clean)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@every_impl
def test_an_expert_that_holds_no_numbers_poisons_nothing_where_it_is_not_routed(value, impl):
    inputs = make_mlp_inputs(6, 8, 4, 4, 2, bias=True)
    inputs = dataclasses.replace(inputs, experts=torch.tensor([[0, 1], [1, 3], [3, 0], [0, 7], [1, 1], [3, 3]]))
    expected = gradients(inputs, impl, "silu")
    for tensor in (inputs.up_proj, inputs.down_proj, inputs.up_bias, inputs.down_bias):
        assert tensor is not None
        tensor[2] = value
    for actual, clean in zip(gradients(inputs, impl, "silu"), expected, strict=True):
        assert torch.isfinite(actual).all()
        assert_close(actual, clean)


def gradients(inputs, impl, activation):
    """The output and the gradient of every tensor."""
    leaves = [getattr(inputs, name).detach().requires_grad_() for name in TENSORS]
    y = run(dataclasses.replace(inputs, **dict(zip(TENSORS, leaves, strict=True))), impl=impl, activation=activation)
    return y, *torch.autograd.grad(y, leaves, random_like(y))


# Strides, leading dimensions, dtypes


@every_impl
def test_no_argument_need_be_contiguous(impl):
    inputs = make(10, 6, 4, 5, 3)
    expected = gradients(inputs, impl, "silu")

    def restride(tensor):
        """The same values: transposed storage, and every second element of a wider tensor."""
        swapped = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.stack((swapped, torch.full_like(swapped, 7)), dim=-1)[..., 0]

    changed = {name: restride(getattr(inputs, name).detach()) for name in (*TENSORS, "experts")}
    assert not any(tensor.is_contiguous() for tensor in changed.values())
    strided = dataclasses.replace(inputs, **changed)
    y = run(strided, impl=impl)
    assert_close(y, expected[0], **EXACT)
    leaves = [changed[name].requires_grad_() for name in TENSORS]
    y = run(strided, impl=impl)
    for dy in (random_like(y), random_like(y).t().contiguous().t()):
        for actual, exact in zip(torch.autograd.grad(y, leaves, dy, retain_graph=True), expected[1:], strict=True):
            assert_close(actual, exact, **EXACT)


@every_impl
def test_an_expanded_gradient_is_read_right(impl):
    inputs = make(6, 5, 3, 4, 2)
    y = run(inputs, impl=impl)
    leaves = [getattr(inputs, name) for name in TENSORS]
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    for actual, exact in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        assert_close(actual, exact, **EXACT)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3), (2, 0), (0, 4)])
@every_impl
def test_leading_dimensions_are_kept(leading, impl):
    T = torch.Size(leading).numel()
    flat = make(T, 5, 3, 4, 2)
    x, experts, weights = (v.detach().reshape(*leading, v.shape[-1]) for v in (flat.x, flat.experts, flat.weights))
    shaped = dataclasses.replace(flat, x=x.requires_grad_(), experts=experts, weights=weights.requires_grad_())
    y, flat_y = run(shaped, impl=impl), run(flat, impl=impl)
    assert y.shape == (*leading, 5) and torch.equal(y.reshape(-1, 5), flat_y)
    dy = random_like(flat_y)
    dx, dweights = torch.autograd.grad(y, (x, weights), dy.reshape(y.shape))
    flat_dx, flat_dweights = torch.autograd.grad(flat_y, (flat.x, flat.weights), dy)
    assert dx.shape == x.shape and torch.equal(dx.reshape(-1, 5), flat_dx)
    assert dweights.shape == weights.shape and torch.equal(dweights.reshape(-1, 2), flat_dweights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_impl
def test_every_gradient_has_the_dtype_of_its_tensor(dtype, weights_dtype, impl):
    inputs = make_mlp_inputs(5, 8, 4, 3, 2, dtype=dtype, weights_dtype=weights_dtype, bias=True)
    y, *grads = gradients(inputs, impl, "silu")
    assert y.dtype == dtype
    assert [grad.dtype for grad in grads] == [weights_dtype if name == "weights" else dtype for name in TENSORS]
    wide = dataclasses.replace(inputs, **{name: getattr(inputs, name).double() for name in TENSORS})
    for actual, exact in zip((y, *grads), gradients(wide, "dense", "silu"), strict=True):
        assert_close(actual.double(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("gated", [True, False])
@every_impl
def test_autocast_casts_all_but_the_routing(gated, impl):
    inputs = make_mlp_inputs(8, 16, 8, 4, 2, gated=gated, bias=True, requires_grad=True)
    low = {name: getattr(inputs, name).bfloat16() for name in TENSORS if name != "weights"}
    expected = run(dataclasses.replace(inputs, **low), gated=gated, impl=impl)
    leaves = [getattr(inputs, name) for name in TENSORS]
    dy = random_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, dy)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(inputs, gated=gated, impl=impl)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    for actual, exact in zip(torch.autograd.grad(y, leaves, dy), expected_grads, strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, exact)
    mixed = dataclasses.replace(inputs, x=inputs.x.detach().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(mixed, gated=gated, impl=impl), expected)


# Determinism, order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_impl
def test_equal_inputs_give_equal_bits(dtype, impl):
    inputs = make_mlp_inputs(65, 32, 24, 8, 3, dtype=dtype, bias=True, routing="skewed")
    for first, second in zip(gradients(inputs, impl, "silu"), gradients(inputs, impl, "silu"), strict=True):
        assert torch.equal(first, second)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_impl
def test_the_number_of_threads_changes_rounding_at_most(impl, set_threads):
    inputs = make_mlp_inputs(130, 64, 48, 8, 3, bias=True, routing="skewed")
    results = []
    for threads in (1, 2):
        set_threads(threads)
        results.append(gradients(inputs, impl, "silu"))
    for one, two in zip(*results, strict=True):
        assert_close(one, two, rtol=1e-4, atol=1e-4)


@every_impl
def test_tokens_do_not_see_each_other(impl):
    inputs = make(20, 5, 3, 6, 3, routing="skewed")
    y, dx, dweights, *parameters = gradients(inputs, impl, "silu")
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    moved = dataclasses.replace(inputs, x=inputs.x[order], experts=inputs.experts[order], weights=inputs.weights[order])
    leaves = [getattr(moved, name).detach().requires_grad_() for name in TENSORS]
    moved_y = run(dataclasses.replace(moved, **dict(zip(TENSORS, leaves, strict=True))), impl=impl)
    assert_close(moved_y, y[order], **EXACT)
    expected = (dx[order], dweights[order], *parameters)
    for actual, exact in zip(torch.autograd.grad(moved_y, leaves, random_like(y)[order]), expected, strict=True):
        assert_close(actual, exact, **EXACT)


@every_impl
def test_the_order_of_a_tokens_choices_does_not_matter(impl):
    inputs = make(20, 5, 3, 6, 3)
    flipped = dataclasses.replace(inputs, experts=inputs.experts.flip(1), weights=inputs.weights.flip(1))
    assert_close(run(flipped, impl=impl), run(inputs, impl=impl), **EXACT)
