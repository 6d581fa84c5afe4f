"""The MLP experts in float32, bfloat16 and float16: at most about twice the error of plain PyTorch in the same dtype."""

import itertools
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import reference
from fusedonemoe.testing import assert_within_budget, exact_float64, make_mlp_inputs

IMPLS = ("dense", "grouped", "portable")
LOW = (torch.float32, torch.bfloat16, torch.float16)
ALPHA, LIMIT = 1.3, 0.8
# Plain rounds z once, with its bias, and dw = <dy, y_e> once, from y_e. We round z again after adding the bias, and
# dw = <dy Wd, a> in two factors; which error is larger in one draw is chance.
FACTOR = 4.0
TENSORS = ("x", "weights", "up_proj", "down_proj", "up_bias", "down_bias")
FORMS = [
    *((name, True, layout) for name, layout in itertools.product(reference.GATED_ACTIVATIONS, reference.GATE_UP_LAYOUTS)),
    *((name, False, "gate_up") for name in reference.ACTIVATIONS),
]
every_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)


def plain_act(name, z):
    functional = torch.nn.functional
    if name == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    if name == "relu2":
        return functional.relu(z).square()
    return z if name == "identity" else {**vars(functional), "sigmoid": torch.sigmoid}[name](z)


def plain_experts(inputs, activation, gated, layout):
    """As transformers writes it: one expert after the other, a Linear each, every step rounded to the dtype of x."""
    y = torch.zeros_like(inputs.x)
    linear = torch.nn.functional.linear
    for e in range(len(inputs.up_proj)):
        token, choice = (inputs.experts == e).nonzero(as_tuple=True)
        z = linear(inputs.x[token], inputs.up_proj[e], None if inputs.up_bias is None else inputs.up_bias[e])
        if not gated:
            h = plain_act(activation, z)
        else:
            first, second = (z[:, 0::2], z[:, 1::2]) if layout == "interleaved" else z.chunk(2, dim=1)
            gate, up = (second, first) if layout == "up_gate" else (first, second)
            if activation == "swiglu_oai":
                gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
                h = (up + 1) * (gate * torch.sigmoid(gate * ALPHA))
            else:
                h = plain_act(activation, gate) * up
        out = linear(h, inputs.down_proj[e], None if inputs.down_bias is None else inputs.down_bias[e])
        y = y.index_add(0, token, (out * inputs.weights[token, choice, None]).to(y.dtype))
    return y


def assert_as_good_as_plain(inputs, activation, gated, layout, save_percent=100):
    form: dict[str, Any] = {"activation": activation, "gated": gated, "gate_up_layout": layout}
    form |= {"swiglu_alpha": ALPHA, "swiglu_limit": LIMIT}
    names = [name for name in TENSORS if getattr(inputs, name) is not None]
    leaves = [getattr(inputs, name) for name in names]
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()}
    plain = plain_experts(inputs, activation, gated, layout)
    dy = torch.randn(plain.shape, generator=torch.Generator().manual_seed(9)).to(plain.dtype)
    plain_grads = torch.autograd.grad(plain, leaves, dy)
    exact = reference.experts_mlp(**arrays, **form)
    exact_grads = reference.experts_mlp_backward(exact_float64(dy), **arrays, **form)
    for impl in IMPLS:
        arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
        options: dict[str, Any] = {**form, "gate_up_bias": inputs.up_bias, "down_bias": inputs.down_bias, "impl": impl}
        y = F.experts_mlp(*arguments, **options, save_percent=save_percent)
        assert_within_budget(y, plain, exact, factor=FACTOR, name=f"{impl} y")
        for name, grad, plain_grad in zip(names, torch.autograd.grad(y, leaves, dy), plain_grads, strict=True):
            assert_within_budget(grad, plain_grad, getattr(exact_grads, name), factor=FACTOR, name=f"{impl} d{name}")


@pytest.mark.parametrize(("activation", "gated", "layout"), FORMS)
@every_dtype
def test_every_form(activation, gated, layout, dtype):
    # relu's slope jumps at 0: where z is rounded to either side of it, no two results agree.
    bias = activation != "relu"
    inputs = make_mlp_inputs(24, 32, 16, 4, 2, dtype=dtype, gated=gated, bias=bias, requires_grad=True)
    assert_as_good_as_plain(inputs, activation, gated, layout)


@pytest.mark.parametrize("routing", ["distinct", "skewed", "one_expert", "some_empty", "out_of_range"])
@pytest.mark.parametrize("bias", [False, True])
@every_dtype
def test_every_routing(routing, bias, dtype):
    inputs = make_mlp_inputs(40, 24, 17, 6, 3, dtype=dtype, bias=bias, routing=routing, requires_grad=True)
    assert_as_good_as_plain(inputs, "silu", True, "gate_up")


@pytest.mark.parametrize("weights_dtype", LOW, ids=str)
@every_dtype
def test_every_pair_of_dtypes(dtype, weights_dtype):
    inputs = make_mlp_inputs(30, 24, 16, 5, 3, dtype=dtype, weights_dtype=weights_dtype, bias=True, requires_grad=True)
    assert_as_good_as_plain(inputs, "silu", True, "gate_up")


@pytest.mark.parametrize(
    "shape", [(1, 8, 4, 3, 2), (12, 100, 37, 5, 3), (10, 16, 8, 3, 3), (150, 8, 8, 2, 1), (12, 16, 8, 40, 4)]
)
@every_dtype
def test_every_shape(shape, dtype):
    assert_as_good_as_plain(make_mlp_inputs(*shape, dtype=dtype, requires_grad=True), "silu", True, "gate_up")


@pytest.mark.parametrize("save_percent", [0, 50])
@every_dtype
def test_what_is_computed_again_is_computed_as_well(save_percent, dtype):
    inputs = make_mlp_inputs(40, 24, 16, 4, 2, dtype=dtype, bias=True, requires_grad=True)
    assert_as_good_as_plain(inputs, "silu", True, "gate_up", save_percent=save_percent)


@every_dtype
def test_sums_over_many_choices_are_rounded_once(dtype):
    # 64 choices of one expert at weight 1/64 each: a sum rounded after every choice would drift.
    inputs = make_mlp_inputs(6, 16, 8, 1, 64, dtype=dtype)
    inputs.weights.fill_(1 / 64)
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
    once = F.experts_mlp(inputs.x, inputs.experts[:, :1], torch.ones(6, 1), inputs.up_proj, inputs.down_proj, impl="grouped")
    y = F.experts_mlp(*arguments, impl="grouped")
    in_float32 = 64 * torch.finfo(torch.float32).eps
    assert_close(y, once, rtol=2 * torch.finfo(dtype).eps + in_float32, atol=0)
