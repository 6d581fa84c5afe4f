"""The original FusedOneMoE's class against its formula in float64: three routings, gradients, noise, checkpoints, messages."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.decorators import mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import fusedonemoe
from fusedonemoe.compat.fusedonemoe import FusedOneMoE
from fusedonemoe.testing import assert_within_budget
from tests import exact as in_float64
from tests.exact import EXACT, best, randn

B, S, D, FF, E, K = 2, 7, 10, 6, 8, 3
ROUTINGS: dict[str, dict[str, Any]] = {
    "soft": {"is_sparse": False},
    "top_k": {"is_sparse": True, "topk": K},
    "top_p": {"is_sparse": True, "is_indefinacy": True, "topp": 0.15, "temperature": 0.5},
    "top_p_that_keeps_none": {"is_sparse": True, "is_indefinacy": True, "topp": 0.9, "temperature": 3.0},
}
# Where no expert is kept, parameters have no gradient.
gradients = partial(in_float64.gradients, materialize_grads=True)
each_routing = pytest.mark.parametrize("routing", ROUTINGS)


def make(routing, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = FusedOneMoE(
        hidden_size=D, intermediate_size=FF, groups=E, dtype=dtype, **{"bias": True, **ROUTINGS[routing], **options}
    )
    with torch.no_grad():
        layer.gate.weight.mul_(3)  # probabilities on both sides of topp
    return layer


def plain(layer, x, noise_TE=None):
    """Every expert's product, mixed token by token by the weights of the documented routing; then the rest of the block."""
    logits = x.reshape(-1, D) @ layer.gate.weight.t()
    p = torch.softmax(logits / layer.temperature, -1)
    if noise_TE is not None:
        p = p + layer.noise * layer.topp * noise_TE
    weights = torch.zeros_like(logits)
    for t, row in enumerate(logits):
        if not layer.is_sparse:
            kept = list(range(E))
        elif layer.is_indefinacy:
            kept = [e for e in range(E) if p[t, e] > layer.topp]
        else:
            kept = best(row, K)
        for e in kept:
            weights[t, e] = torch.sigmoid(row[e])
    mixed = [(w_E[:, None] * (x_D @ layer.proj)).sum(0) for x_D, w_E in zip(x.reshape(-1, D), weights, strict=True)]
    h = torch.stack(mixed).to(x.dtype) + (0 if layer.up_bias is None else layer.up_bias)
    y = torch.relu(h).square() @ layer.down
    return (y if layer.down_bias is None else y + layer.down_bias).reshape(x.shape)


@each_routing
@pytest.mark.parametrize("impl", ["auto", "dense"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_equals_the_formula(routing, impl, bias):
    layer = make(routing, impl=impl, bias=bias)
    if bias:
        torch.nn.init.constant_(layer.up_bias, 0.3)  # so that a token without an expert has an output
    x = randn(B, S, D, seed=1).requires_grad_()
    y, exact = layer(x), plain(layer, x)
    assert_close(y, exact, **EXACT)
    assert exact.abs().max() > 1e-3 or (routing == "top_p_that_keeps_none" and not bias)
    leaves = (x, *layer.parameters())
    for grad, exact_grad in zip(gradients(y, leaves), gradients(exact + 0 * x, leaves), strict=True):
        assert_close(grad, exact_grad, **EXACT)


def test_top_p_keeps_a_different_number_of_experts_for_each_token():
    layer, x = make("top_p"), randn(B, S, D, seed=1)
    kept = (layer._route(x)[0] > 0).sum(-1)
    assert kept.unique().numel() > 1 and kept.max() < E


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ["soft", "top_k"])
def test_low_precision_is_as_good_as_plain_pytorch(routing, dtype):
    layer, x = make(routing, dtype), randn(B, S, D, seed=1, dtype=dtype)
    exact = plain(make(routing, dtype).double(), x.double())
    assert_within_budget(layer(x).detach(), plain(layer, x).detach(), exact.detach(), factor=4)


def test_noise_is_for_training_only():
    layer, x = make("top_p", noise=2.0), randn(B, S, D, seed=1)
    assert not layer.training  # as in the original, whose constructor says so
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(5)
    noisy = layer(x)
    torch.manual_seed(5)
    assert_close(noisy, plain(layer, x, torch.randn(B, S, E, dtype=x.dtype).reshape(-1, E)), **EXACT)
    assert not torch.allclose(noisy, layer.eval()(x))
    assert FusedOneMoE(D, FF, E, training=True).training


@pytest.mark.parametrize("shape", [(0, 3, D), (1, 1, D), (5, D)])
@each_routing
def test_any_leading_dimensions(shape, routing):
    layer = make(routing)
    assert layer(torch.zeros(shape, dtype=torch.float64)).shape == shape
    x = randn(3, D)
    assert torch.equal(layer(x[None])[0], layer(x))


def test_the_original_example():
    x = torch.randn(2, 10, 128)
    layer = FusedOneMoE(hidden_size=128, intermediate_size=512, groups=32, is_sparse=True, topk=8)
    same = fusedonemoe.FusedOneMoE(hidden_size=128, intermediate_size=512, groups=32, is_sparse=True, topk=8)
    same.load_state_dict(layer.state_dict())
    assert isinstance(layer, fusedonemoe.FusedOneMoE) and torch.equal(layer(x), same(x))


def test_a_checkpoint_of_the_original_loads():
    original = {"WG": randn(D, E, seed=1), "Wi": randn(E, D, FF, seed=2), "down": randn(FF, D, seed=3)}
    original |= {"up_bias": randn(FF, seed=4), "down_bias": randn(D, seed=5)}
    layer, x = make("top_k"), randn(B, S, D)
    model = torch.nn.Sequential(layer)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in original.items()})
    logits = x @ original["WG"]
    weights = torch.zeros_like(logits).scatter(-1, logits.topk(K).indices, 1) * torch.sigmoid(logits)
    h = torch.einsum("bse, bsg, geo -> bso", x, weights, original["Wi"]) + original["up_bias"]
    assert_close(model(x), torch.relu(h).square() @ original["down"] + original["down_bias"], rtol=1e-9, atol=1e-9)


@each_routing
def test_compiled_with_an_open_number_of_tokens(routing):
    counter = CompileCounterWithBackend("aot_eager")
    layer = make(routing)
    fast = torch.compile(layer, fullgraph=True, backend=counter)
    leaves = tuple(layer.parameters())
    for T in (7, 12, 23):
        x = randn(2, T, D, seed=T)
        mark_dynamic(x, 1)
        y, expected = fast(x), layer(x)
        assert_close(y, expected, **EXACT)
        for grad, exact in zip(gradients(y, leaves, False), gradients(expected, leaves), strict=True):
            assert_close(grad, exact, **EXACT)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "^hidden_size must be at least 1, got 0$"),
        ({"intermediate_size": 2.5}, TypeError, "^intermediate_size must be an integer"),
        ({"groups": 0}, ValueError, "^groups must be at least 1, got 0$"),
        ({"topk": 9}, ValueError, r"^topk must be from 1 to groups \(8\), got 9$"),
        ({"is_sparse": 1}, TypeError, "^is_sparse must be True or False, got 1$"),
        ({"is_indefinacy": "yes"}, TypeError, "^is_indefinacy must be True or False, got 'yes'$"),
        ({"training": None}, TypeError, "^training must be True or False, got None$"),
        ({"bias": 0}, TypeError, "^bias must be True or False, got 0$"),
        ({"topp": 1.0}, ValueError, "^topp must be below 1, where no expert can be kept, got 1.0$"),
        ({"topp": -0.1}, ValueError, "^topp must be at least 0, got -0.1$"),
        ({"topp": "0.3"}, TypeError, "^topp must be a number, got '0.3'$"),
        ({"temperature": 0.0}, ValueError, "^temperature must be greater than 0, got 0.0$"),
        ({"noise": float("nan")}, ValueError, "^noise must be at least 0, got nan$"),
        ({"impl": "fast"}, ValueError, "^impl must be one of"),
    ],
)
def test_constructor_says_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        FusedOneMoE(**{"hidden_size": D, "intermediate_size": FF, "groups": E, "is_sparse": True, "topk": K, **changes})


def test_forward_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"^x must have shape \[..., 10\], got \(2, 7\)$"):
        make("top_k")(torch.zeros(2, 7))
