"""Single values through the compiled CPU kernels: activations to a few units in the last place, half precision to the bit."""

import numpy as np
import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.ops import reference
from fusedonemoe.ops.cpu import native

_REFUSAL = native.refusal(torch.float32, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")

EPS = torch.finfo(torch.float32).eps
# Below this value only the absolute error counts: 1 + erf cancels, and gelu_tanh takes the exponential of a cube.
TAIL = {"gelu": 0.3, "gelu_tanh": 0.1}
half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_are_right_to_a_few_units_in_the_last_place(activation):
    x = torch.cat((torch.linspace(-30, 30, 4001), torch.linspace(-1, 1, 1001)))[:, None].requires_grad_()
    ids, ones = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
    y = F.experts_mlp(x, ids, ones, torch.ones(1, 1, 1), torch.ones(1, 1, 1), activation=activation, gated=False, impl="cpu")
    (slope,) = torch.autograd.grad(y.sum(), x)
    z = x.detach().double().numpy()
    exact_slope, _ = reference.activate_backward(activation, np.ones_like(z), z)
    for name, actual, exact in (("value", y, reference.activate(activation, z)), ("slope", slope, exact_slope)):
        error = np.abs(actual.detach().double().numpy() - exact)
        # A slope is a sum of terms of up to |z| that may cancel; torch's are as well.
        scale = np.maximum(np.abs(exact), TAIL.get(activation, 1e-6)) if name == "value" else 1 + np.abs(z)
        assert (error / scale).max() <= 4 * EPS, f"{name}: {(error / scale).max() / EPS:.1f} eps at {z[(error / scale).argmax()]}"


@half_precision
def test_half_precision_is_rounded_once_where_a_tensor_is_written_and_to_the_nearest(dtype):
    # One token and one expert each, all widths 1: every product of two such numbers is exact in float32.
    E = 4096
    draw = torch.Generator().manual_seed(0)
    x, up, down, dy = (torch.randn(E, 1, generator=draw).to(dtype) for _ in range(4))
    w = torch.rand(E, 1, generator=draw) + 0.5
    leaves = [t.requires_grad_() for t in (x, w, up.clone().view(E, 1, 1), down.clone().view(E, 1, 1))]
    options = {"activation": "identity", "gated": False, "impl": "cpu"}
    y = F.experts_mlp(leaves[0], torch.arange(E)[:, None], *leaves[1:], **options)
    actual = [y, *torch.autograd.grad(y, leaves, dy)]
    with torch.no_grad():
        h, q = (x.float() * up.float()).to(dtype), dy.float() * down.float()
        dz = (q * w).to(dtype)
        expected = [(w * (h.float() * down.float())).to(dtype), (dz.float() * up.float()).to(dtype), q * h.float()]
        expected += [(dz.float() * x.float()).to(dtype), (dy.float() * (h.float() * w).to(dtype).float()).to(dtype)]
    for name, a, b in zip(("y", "dx", "dw", "dup", "ddown"), actual, expected, strict=True):
        assert torch.equal(a.detach().view(E, 1), b), name


def test_float32_products_of_single_values_are_exact():
    E = 512
    draw = torch.Generator().manual_seed(0)
    x, w, proj, dh = (torch.randn(E, 1, generator=draw) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (x, w, proj.view(E, 1, 1))]
    h = F.experts_merged(leaves[0], torch.arange(E)[:, None], *leaves[1:], impl="cpu")
    q = dh * proj
    expected = [w * (x * proj), w * q, q * x, (w * x) * dh]
    for actual, exact in zip((h, *torch.autograd.grad(h, leaves, dh)), expected, strict=True):
        assert torch.equal(actual.detach().view(E, 1), exact)


@half_precision
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.3e38, 65504.0, 65519.0, 2.0**-126])
def test_special_values_pass_into_half_precision(value, dtype):
    x, one = torch.tensor([[value]]).to(dtype), torch.ones(1, 1, 1, dtype=dtype)
    ids, w = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    y = F.experts_mlp(x, ids, w, one, one, activation="identity", gated=False, impl="cpu")
    assert torch.equal(y, x) or (y.isnan().all() and x.isnan().all())
    assert torch.equal(F.experts_merged(x, ids, w, one, impl="cpu").nan_to_num(7), x.nan_to_num(7))


def test_every_float16_survives_the_way_through():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    ids, w, one = torch.zeros(2**16, 1, dtype=torch.int64), torch.ones(2**16, 1), torch.ones(1, 1, 1, dtype=torch.float16)
    y = F.experts_mlp(x, ids, w, one, one, activation="identity", gated=False, impl="cpu")
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])


def test_float32_is_rounded_to_the_nearest_float16():
    # x w is exact in float32 and any float32 of its size: half-way cases, subnormal and overflowing results among them.
    x = torch.ones(1 << 14, 1, dtype=torch.float16)
    ids, one = torch.zeros(1 << 14, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.float16)
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(0x33000000 - (1 << 23), 0x47800000, (1 << 14, 1), generator=draw, dtype=torch.int32)
    bits[::2] &= ~0xFFF  # half of them with so few bits that many stand half-way
    w = bits.view(torch.float32)
    y = F.experts_mlp(x, ids, w, one, one, activation="identity", gated=False, impl="cpu")
    assert torch.equal(y, w.half())
