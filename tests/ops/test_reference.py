"""The oracle against numbers worked out by hand, closed forms, PyTorch's own functions and finite differences."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedonemoe.ops import reference
from tests.strategies import routings, shapes

SCORES = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]


def finite_difference(value, array, step=1e-6):
    """Central differences of the scalar ``value()`` in every element of ``array``, which it must read."""
    grad = np.zeros_like(array)
    for index in np.ndindex(*array.shape):
        kept = array[index]
        array[index] = kept + step
        above = value()
        array[index] = kept - step
        grad[index] = (above - value()) / (2 * step)
        array[index] = kept
    return grad


def assert_gradient(actual, value, array):
    expected = finite_difference(value, array)
    scale = np.abs(expected).max()
    assert scale > 1e-3, "a gradient of zeros would show nothing"
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7 * scale)


# Routing


def test_route_softmax_by_hand():
    logits = np.log([[1.0, 4.0, 2.0, 3.0]])  # softmax = [.1, .4, .2, .3]
    weights, experts = reference.route(logits, 2, norm_topk_prob=False)
    np.testing.assert_array_equal(experts, [[1, 3]])
    np.testing.assert_allclose(weights, [[0.4, 0.3]], rtol=1e-14)
    weights, _ = reference.route(logits, 2, routed_scaling_factor=2.5)
    np.testing.assert_allclose(weights, [[2.5 * 4 / 7, 2.5 * 3 / 7]], rtol=1e-14)


def test_route_sigmoid_by_hand():
    logits = np.log([[1.0, 4.0, 1 / 3, 3.0]])  # sigmoid(log r) = r / (1 + r)
    weights, experts = reference.route(logits, 3, scoring="sigmoid", norm_topk_prob=False)
    np.testing.assert_array_equal(experts, [[1, 3, 0]])
    np.testing.assert_allclose(weights, [[0.8, 0.75, 0.5]], rtol=1e-14)
    weights, _ = reference.route(logits, 2, scoring="sigmoid")
    np.testing.assert_allclose(weights, [[0.8 / 1.55, 0.75 / 1.55]], rtol=1e-14)


def test_selection_bias_decides_who_is_picked_and_enters_no_weight():
    logits = np.log([[1.0, 4.0, 2.0, 3.0]])
    bias = [0.35, 0.0, 0.0, 0.0]  # keys .45, .4, .2, .3
    weights, experts = reference.route(logits, 2, norm_topk_prob=False, selection_bias=bias)
    np.testing.assert_array_equal(experts, [[0, 1]])
    np.testing.assert_allclose(weights, [[0.1, 0.4]], rtol=1e-14)
    # On logits the same bias adds to log 1 = 0 and changes nothing.
    weights, experts = reference.route(logits, 2, score_first=False, selection_bias=bias)
    np.testing.assert_array_equal(experts, [[1, 3]])
    np.testing.assert_allclose(weights, [[4 / 7, 3 / 7]], rtol=1e-14)


def test_ties_go_to_the_lower_expert_and_the_lower_group():
    _, experts = reference.route([[0.0, 1.0, 1.0, 0.0, 1.0]], 4)
    np.testing.assert_array_equal(experts, [[1, 2, 4, 0]])
    _, experts = reference.route([[1.0, 0.0, 0.0, 1.0, 0.5, 0.5]], 2, score_first=False, n_group=3, topk_group=1)
    np.testing.assert_array_equal(experts, [[0, 1]])  # every group is worth 1


def test_groups_by_hand():
    # Groups (5, -9), (3, 3), (4, 1): sums -4, 6, 5; maxima 5, 3, 4.
    logits = [[5.0, -9.0, 3.0, 3.0, 4.0, 1.0]]
    options: dict[str, Any] = {"score_first": False, "n_group": 3}
    _, experts = reference.route(logits, 3, topk_group=2, **options)
    np.testing.assert_array_equal(experts, [[4, 2, 3]])
    _, experts = reference.route(logits, 3, topk_group=2, group_score="max", **options)
    np.testing.assert_array_equal(experts, [[0, 4, 5]])
    # A group of one is worth its only key, so the groups change nothing.
    _, experts = reference.route(logits, 3, score_first=False, n_group=6, topk_group=3)
    np.testing.assert_array_equal(experts, [[0, 4, 2]])
    # Only the best two count: 3 + 2 beats 2 + 2 + 2, and a poor third does no harm.
    _, experts = reference.route([[2.0, 2.0, 2.0, 3.0, 2.0, -9.0]], 2, score_first=False, n_group=2)
    np.testing.assert_array_equal(experts, [[3, 4]])


def test_dense_routing_takes_every_expert_in_id_order():
    logits = np.log([[1.0, 4.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0]])
    weights, experts = reference.route(logits, None)
    np.testing.assert_array_equal(experts, [[0, 1, 2, 3]] * 2)
    np.testing.assert_allclose(weights, [[0.1, 0.4, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]], rtol=1e-14)
    weights, _ = reference.route(logits[:1], None, scoring="sigmoid", norm_topk_prob=False)
    np.testing.assert_allclose(weights, [[1 / 2, 4 / 5, 2 / 3, 3 / 4]], rtol=1e-14)


def test_normalised_softmax_equals_softmax_over_the_picked_logits():
    logits = np.random.default_rng(0).normal(size=(50, 9))
    weights, experts = reference.route(logits, 3)
    weights_picked, experts_picked = reference.route(logits, 3, score_first=False, norm_topk_prob=False)
    np.testing.assert_array_equal(experts, experts_picked)
    np.testing.assert_allclose(weights, weights_picked, rtol=1e-13)


def test_route_agrees_with_torch_topk():
    logits = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_weights, expected_experts = logits.softmax(dim=1).topk(5, dim=1)
    weights, experts = reference.route(logits.numpy(), 5, norm_topk_prob=False)
    np.testing.assert_array_equal(experts, expected_experts.numpy())
    np.testing.assert_allclose(weights, expected_weights.numpy(), rtol=1e-13)


def test_huge_logits_stay_finite():
    weights, _ = reference.route([[1e4, -1e4, 0.0]], 2)
    np.testing.assert_array_equal(weights, [[1.0, 0.0]])
    weights, _ = reference.route([[1e4, -1e4]], None, scoring="sigmoid", norm_topk_prob=False)
    np.testing.assert_array_equal(weights, [[1.0, 0.0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 5}, "top_k must be in"),
        ({"top_k": 0}, "top_k must be in"),
        ({"top_k": 1, "n_group": 3}, "equal groups"),
        ({"top_k": 3, "n_group": 2, "topk_group": 1}, "top_k must be in"),
        ({"top_k": 1, "scoring": "tanh"}, "scoring must be"),
        ({"top_k": 1, "group_score": "mean"}, "group_score must be"),
    ],
)
def test_route_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        reference.route(np.zeros((1, 4)), **arguments)


@pytest.mark.parametrize(("scoring", "score_first"), SCORES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("selection", ["top_k", "dense", "bias", "groups"])
def test_route_backward_against_finite_differences(scoring, score_first, norm, selection):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4, 6))
    top_k = None if selection == "dense" else 3
    options: dict[str, Any] = {
        "scoring": scoring,
        "score_first": score_first,
        "norm_topk_prob": norm,
        "routed_scaling_factor": 2.5,
        **({"selection_bias": rng.normal(size=6)} if selection == "bias" else {}),
        **({"n_group": 3, "topk_group": 2} if selection == "groups" else {}),
    }
    dweights = rng.normal(size=(4, top_k or 6))
    dlogits = reference.route_backward(dweights, logits, top_k, **options)
    assert_gradient(dlogits, lambda: (dweights * reference.route(logits, top_k, **options)[0]).sum(), logits)


def test_unpicked_logits_receive_gradient_through_the_denominator_only():
    logits, dweights = np.array([[2.0, 1.0, 0.0]]), np.array([[1.0, 0.0]])
    full = reference.route_backward(dweights, logits, 2, norm_topk_prob=False)
    assert full[0, 2] < -0.01
    assert abs(full.sum()) < 1e-15  # a softmax does not feel a shift
    assert abs(reference.route_backward(dweights, logits, 2)[0, 2]) < 1e-15
    assert reference.route_backward(dweights, logits, 2, score_first=False)[0, 2] == 0


# Plan


def test_plan_by_hand():
    order, offsets = reference.plan([[2, 0], [-1, 2], [0, 4], [2, 3]], 4)
    np.testing.assert_array_equal(order, [1, 4, 0, 3, 6, 7, 2, 5])
    np.testing.assert_array_equal(offsets, [0, 2, 2, 5, 6])


@given(shapes().flatmap(lambda shape: st.tuples(st.just(shape), routings(shape.T, shape.E, shape.K))))
@settings(max_examples=60)
def test_plan_is_a_stable_sort(shape_and_experts):
    shape, experts = shape_and_experts
    order, offsets = reference.plan(experts, shape.E)
    flat = experts.flatten().numpy()
    key = np.where((flat >= 0) & (flat < shape.E), flat, shape.E)
    np.testing.assert_array_equal(order, np.argsort(key, kind="stable"))
    np.testing.assert_array_equal(np.diff(offsets), np.bincount(key, minlength=shape.E + 1)[: shape.E])
    assert offsets[0] == 0 and offsets[-1] == (key < shape.E).sum()


# Activations


def torch_activations():
    functional = torch.nn.functional
    return {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda z: functional.relu(z) ** 2,
        "sigmoid": torch.sigmoid,
        "identity": lambda z: z.clone(),
    }


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_agree_with_torch(name):
    z = torch.linspace(-6, 6, 49, dtype=torch.float64, requires_grad=True)  # holds 0, where relu has a kink
    a = torch_activations()[name](z)
    (slope,) = torch.autograd.grad(a.sum(), z)
    np.testing.assert_allclose(reference.activate(name, z.detach()), a.detach().numpy(), rtol=1e-12, atol=1e-14)
    da, nothing = reference.activate_backward(name, np.ones(49), z.detach())
    np.testing.assert_allclose(da, slope.numpy(), rtol=1e-12, atol=1e-14)
    assert nothing is None


def test_clamped_swiglu_by_hand():
    gate, up = np.array([9.0, 1.0, 7.0, -9.0]), np.array([-9.0, 9.0, 7.0, -7.0])
    actual = reference.activate("swiglu_oai", gate, up)
    clamped = [(7.0, -7.0), (1.0, 7.0), (7.0, 7.0), (-9.0, -7.0)]  # a gate has no lower clamp
    expected = [(u + 1) * g / (1 + math.exp(-1.702 * g)) for g, u in clamped]
    np.testing.assert_allclose(actual, expected, rtol=1e-13)
    dgate, dup = reference.activate_backward("swiglu_oai", np.ones(4), gate, up)
    # Zero outside, passing on the boundary itself.
    np.testing.assert_array_equal(dgate != 0, [False, True, True, True])
    np.testing.assert_array_equal(dup != 0, [False, False, True, True])


def test_unknown_names_are_refused():
    for call in (reference.activate, lambda name, z: reference.activate_backward(name, z, z)):
        with pytest.raises(ValueError, match="activation must be one of"):
            call("swish", np.zeros(2))
        with pytest.raises(ValueError, match="no plain form"):
            call("swiglu_oai", np.zeros(2))
    with pytest.raises(ValueError, match="gate_up_layout must be one of"):
        reference.split_gate_up(np.zeros(4), "up")


# Experts


def test_gated_mlp_by_hand():
    x, up_proj = [[1.0, 2.0]], [[[1.0, 1.0], [2.0, 0.0]], [[0.0, -1.0], [1.0, 1.0]]]
    down_proj = [[[1.0], [-1.0]], [[5.0], [5.0]]]
    # Expert 0: gate 3 + 1, up 2 - 5; relu(4) * -3 = -12; down (-12, 12) + (1, 0), weight 1/2.
    # Expert 1: gate -2 + 0 is cut off; its bias (0, 10) remains, weight 2. Expert 7 is elsewhere.
    y = reference.experts_mlp(
        x,
        [[1, 7, 0]],
        [[2.0, 100.0, 0.5]],
        up_proj,
        down_proj,
        up_bias=[[1.0, -5.0], [0.0, 0.0]],
        down_bias=[[1.0, 0.0], [0.0, 10.0]],
        activation="relu",
    )
    np.testing.assert_array_equal(y, [[-5.5, 26.0]])


def test_plain_mlp_by_hand():
    y = reference.experts_mlp([[1.0, 2.0]], [[0]], [[0.5]], [[[1.0, 1.0]]], [[[1.0], [-1.0]]], activation="relu2", gated=False)
    np.testing.assert_array_equal(y, [[4.5, -4.5]])


def mlp_arguments(seed: int, gated: bool, bias: bool) -> tuple[Any, dict[str, Any], Any]:
    """Six tokens on four experts: expert 2 is empty, token 1 names one twice, token 3 has none here."""
    rng = np.random.default_rng(seed)
    T, D, F, E, K = 6, 4, 3, 4, 2
    rows = 2 * F if gated else F
    experts = np.array([[0, 1], [3, 3], [1, -1], [4, -1], [0, 3], [3, 1]])
    arrays: dict[str, Any] = {
        "x": rng.normal(size=(T, D)),
        "weights": rng.normal(size=(T, K)),
        "up_proj": rng.normal(size=(E, rows, D)),
        "down_proj": rng.normal(size=(E, D, F)),
    }
    if bias:
        arrays |= {"up_bias": rng.normal(size=(E, rows)), "down_bias": rng.normal(size=(E, D))}
    return experts, arrays, rng.normal(size=(T, D))


def test_layouts_are_permutations_of_one_layer():
    experts, arrays, _ = mlp_arguments(0, gated=True, bias=True)
    expected = reference.experts_mlp(experts=experts, **arrays)
    halves = {name: np.split(arrays.pop(name), 2, axis=1) for name in ("up_proj", "up_bias")}
    swapped: dict[str, Any] = {name: np.concatenate([up, gate], axis=1) for name, (gate, up) in halves.items()}
    woven: dict[str, Any] = {
        name: np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:]) for name, (gate, up) in halves.items()
    }
    for layout, rows in (("up_gate", swapped), ("interleaved", woven)):
        y = reference.experts_mlp(experts=experts, gate_up_layout=layout, **arrays, **rows)
        np.testing.assert_allclose(y, expected, rtol=1e-13)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(reference.experts_mlp(experts=experts, **arrays, **rows), expected, rtol=0.1)


def test_every_expert_with_identity_is_one_linear_map():
    rng = np.random.default_rng(3)
    x, up_proj, down_proj = rng.normal(size=(7, 4)), rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 4, 5))
    weights = [0.2, 0.3, 0.5]
    y = reference.experts_mlp(x, [[0, 1, 2]] * 7, [weights] * 7, up_proj, down_proj, activation="identity", gated=False)
    matrix = sum(w * down_proj[e] @ up_proj[e] for e, w in enumerate(weights))
    np.testing.assert_allclose(y, x @ matrix.T, rtol=1e-12)


MLP_CASES = [
    *((name, True, layout) for name, layout in itertools.product(reference.GATED_ACTIVATIONS, reference.GATE_UP_LAYOUTS)),
    *((name, False, "gate_up") for name in reference.ACTIVATIONS),
]


@pytest.mark.parametrize(("activation", "gated", "layout"), MLP_CASES)
def test_mlp_backward_against_finite_differences(activation, gated, layout):
    experts, arrays, dy = mlp_arguments(4, gated, bias=True)
    # The narrow limit makes the clamps of swiglu_oai act on values of order one.
    options: dict[str, Any] = {"activation": activation, "gated": gated, "gate_up_layout": layout, "swiglu_limit": 1.5}
    grads = reference.experts_mlp_backward(dy, experts=experts, **arrays, **options)

    def loss():
        return (dy * reference.experts_mlp(experts=experts, **arrays, **options)).sum()

    for name, array in arrays.items():
        assert_gradient(getattr(grads, name), loss, array)


def test_mlp_backward_without_biases():
    experts, arrays, dy = mlp_arguments(5, gated=True, bias=False)
    grads = reference.experts_mlp_backward(dy, experts=experts, **arrays)
    assert grads.up_bias is None and grads.down_bias is None
    for name, array in arrays.items():
        assert_gradient(getattr(grads, name), lambda: (dy * reference.experts_mlp(experts=experts, **arrays)).sum(), array)


def test_ids_out_of_range_contribute_nothing_and_receive_nothing():
    experts, arrays, dy = mlp_arguments(6, gated=True, bias=True)
    outside = (experts < 0) | (experts >= 4)
    arrays["weights"][outside] = np.nan  # never read
    y = reference.experts_mlp(experts=experts, **arrays)
    grads = reference.experts_mlp_backward(dy, experts=experts, **arrays)
    assert np.isfinite(y).all() and (y[3] == 0).all() and (y[[0, 1, 2, 4, 5]] != 0).all()
    assert (grads.weights[outside] == 0).all() and (grads.weights[~outside] != 0).all()
    assert (grads.x[3] == 0).all()
    for name in ("up_proj", "down_proj", "up_bias", "down_bias"):
        grad = getattr(grads, name)
        assert (grad[2] == 0).all() and (grad[[0, 1, 3]] != 0).any()


def test_merged_by_hand():
    proj = [[[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    h = reference.experts_merged([[1.0, 2.0]], [[1, 0, -1]], [[10.0, 0.5, 9.0]], proj)
    np.testing.assert_array_equal(h, [[30.5, 31.0, 31.0]])


def test_merged_mixes_matrices():
    rng = np.random.default_rng(7)
    x, weights, proj = rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), rng.normal(size=(3, 4, 5))
    h = reference.experts_merged(x, [[0, 1, 2]] * 6, weights, proj)
    np.testing.assert_allclose(h, np.einsum("td,te,edf->tf", x, weights, proj), rtol=1e-12)


def test_merged_backward_against_finite_differences():
    rng = np.random.default_rng(8)
    experts = np.array([[0, 1], [3, 3], [1, -1], [4, -1], [0, 3]])
    arrays = {"x": rng.normal(size=(5, 4)), "weights": rng.normal(size=(5, 2)), "proj": rng.normal(size=(4, 4, 3))}
    dh = rng.normal(size=(5, 3))
    grads = reference.experts_merged_backward(dh, experts=experts, **arrays)
    for name, array in arrays.items():
        assert_gradient(getattr(grads, name), lambda: (dh * reference.experts_merged(experts=experts, **arrays)).sum(), array)


def test_no_tokens():
    empty: dict[str, Any] = {"experts": np.zeros((0, 2), int), "weights": np.zeros((0, 2)), "x": np.zeros((0, 4))}
    up_proj, down_proj = np.ones((3, 6, 4)), np.ones((3, 4, 3))
    assert reference.route(np.zeros((0, 3)), 2)[0].shape == (0, 2)
    assert reference.experts_mlp(**empty, up_proj=up_proj, down_proj=down_proj).shape == (0, 4)
    grads = reference.experts_mlp_backward(np.zeros((0, 4)), **empty, up_proj=up_proj, down_proj=down_proj)
    assert grads.x.shape == (0, 4) and grads.up_proj.shape == (3, 6, 4) and not grads.up_proj.any()
    assert reference.experts_merged(**empty, proj=np.ones((3, 4, 5))).shape == (0, 5)
