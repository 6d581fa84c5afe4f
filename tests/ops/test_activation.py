"""The activations between the projections: values, the hand-written derivative, and how gate and up are laid out."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fusedonemoe.ops import reference
from fusedonemoe.ops.activation import activate, activate_backward
from fusedonemoe.ops.records import ACTIVATIONS, GATE_UP_LAYOUTS, PLAIN, Activation
from fusedonemoe.testing import assert_within_budget, exact_float64

ALPHA, LIMIT = 1.3, 1.5  # not the defaults; the limit clamps values of order one
CASES = [
    *itertools.product(ACTIVATIONS, GATE_UP_LAYOUTS),
    *((name, PLAIN) for name in ACTIVATIONS if name != "swiglu_oai"),
]
every_case = pytest.mark.parametrize(("name", "layout"), CASES)


def normal(*shape, dtype=torch.float64, seed=0):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def exact_activate(z, name, layout):
    if layout == PLAIN:
        return reference.activate(name, z)
    return reference.activate(name, *reference.split_gate_up(z, layout), alpha=ALPHA, limit=LIMIT)


def exact_backward(dh, z, name, layout):
    if layout == PLAIN:
        return reference.activate_backward(name, dh, z)[0]
    dz = np.zeros_like(z)
    halves = reference.activate_backward(name, dh, *reference.split_gate_up(z, layout), alpha=ALPHA, limit=LIMIT)
    for half, dhalf in zip(reference.split_gate_up(dz, layout), halves, strict=True):
        half[:] = dhalf
    return dz


@every_case
def test_values_and_derivative_equal_the_oracle(name, layout):
    act = Activation(name, layout, ALPHA, LIMIT)
    z, dh = normal(7, 10), normal(7, 10 if layout == PLAIN else 5, seed=1)
    kept = z.clone()
    expected = torch.from_numpy(exact_activate(exact_float64(z), name, layout))
    for reuse in (False, True):
        assert_close(activate(z, act, reuse=reuse), expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(z, kept), "the pre-activations are read again by the backward"
    dz = activate_backward(dh, z, act)
    assert_close(dz, torch.from_numpy(exact_backward(exact_float64(dh), exact_float64(z), name, layout)), rtol=1e-11, atol=1e-13)
    assert torch.equal(z, kept)


@every_case
def test_hand_written_derivative_equals_autograd(name, layout):
    act = Activation(name, layout, ALPHA, LIMIT)
    z, dh = normal(7, 10).requires_grad_(), normal(7, 10 if layout == PLAIN else 5, seed=1)
    (expected,) = torch.autograd.grad(activate(z, act), z, dh)
    assert_close(activate_backward(dh, z.detach(), act), expected, rtol=1e-11, atol=1e-13)
    assert gradcheck(lambda v: activate(v, act), z)
    assert gradgradcheck(lambda v: activate(v, act), z)


def plain_activate(z, name, layout):
    """The formulas from plain operations, every step rounded to the dtype of z."""
    functional = torch.nn.functional
    acts = {
        "silu": lambda v: v * torch.sigmoid(v),
        "gelu": functional.gelu,
        "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda v: functional.relu(v) ** 2,
        "sigmoid": torch.sigmoid,
        "identity": lambda v: v * 1,
    }
    if layout == PLAIN:
        return acts[name](z)
    half = z.shape[-1] // 2
    gate, up = (z[..., 0::2], z[..., 1::2]) if layout == "interleaved" else (z[..., :half], z[..., half:])
    if layout == "up_gate":
        gate, up = up, gate
    if name == "swiglu_oai":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))
    return acts[name](gate) * up


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain_pytorch(name, layout, dtype):
    act = Activation(name, layout, ALPHA, LIMIT)
    z = normal(200, 8, dtype=dtype).requires_grad_()
    plain = plain_activate(z, name, layout)
    dh = normal(*plain.shape, dtype=dtype, seed=1)
    (plain_dz,) = torch.autograd.grad(plain, z, dh)
    assert_within_budget(activate(z.detach(), act), plain, exact_activate(exact_float64(z), name, layout), name="h")
    exact_dz = exact_backward(exact_float64(dh), exact_float64(z), name, layout)
    assert_within_budget(activate_backward(dh, z.detach(), act), plain_dz, exact_dz, name="dz")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_out_values_stay_finite(name):
    z = torch.tensor([[-1e4, 1e4, 100.0, -100.0]], dtype=torch.float32)
    act = Activation(name, "gate_up", 1.702, 7.0)
    assert torch.isfinite(activate(z, act)).all()
    assert torch.isfinite(activate_backward(torch.ones(1, 2), z, act)).all()


def test_the_clamp_passes_gradients_on_its_boundary_and_stops_them_outside():
    act = Activation("swiglu_oai", "gate_up", 1.702, 7.0)
    gate, up = [7.0, 7.5, -9.0, 1.0, 1.0], [1.0, 1.0, 7.0, -7.0, -7.5]
    dgate, dup = activate_backward(torch.ones(5), torch.tensor(gate + up), act).chunk(2)
    assert (dgate != 0).tolist() == [True, False, True, True, True]
    assert (dup != 0).tolist() == [True, True, True, True, False]


def test_relu_and_its_square_have_no_slope_at_zero():
    for name in ("relu", "relu2"):
        assert activate_backward(torch.ones(2), torch.tensor([0.0, -0.0]), Activation(name, PLAIN, 0.0, 0.0)).tolist() == [0, 0]


def test_unknown_names_are_refused():
    act = Activation("swish", PLAIN, 1.0, 1.0)
    with pytest.raises(AssertionError, match="unknown activation 'swish'"):
        activate(torch.zeros(2), act)
    with pytest.raises(AssertionError, match="unknown activation 'swish'"):
        activate_backward(torch.zeros(2), torch.zeros(2), act)
