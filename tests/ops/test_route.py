"""Routing: the operator and its dense composite against the oracle, in values, ids, gradients and refusals."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import library, reference
from fusedonemoe.testing import assert_within_budget, exact_float64, make_logits

IMPLS = ("auto", "dense", "portable")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BIAS = [0.3, -0.2, 0.05, 0.0, -0.4, 0.25, 0.1, -0.1, 0.0, 0.15, -0.3, 0.2]

SCORES = [
    {"scoring": scoring, "score_first": score_first, "norm_topk_prob": norm}
    for scoring, score_first, norm in itertools.product(("softmax", "sigmoid"), (True, False), (True, False))
]
SELECTIONS: dict[str, dict[str, Any]] = {
    "top_3": {"top_k": 3},
    "top_1": {"top_k": 1},
    "all_sorted": {"top_k": 12},
    "no_selection": {"top_k": None},
    "scaled": {"top_k": 3, "routed_scaling_factor": 2.5},
    "bias": {"top_k": 3, "selection_bias": BIAS},
    "groups": {"top_k": 3, "n_group": 4, "topk_group": 2},
    "groups_by_max": {"top_k": 3, "n_group": 4, "topk_group": 2, "group_score": "max"},
    "groups_of_one": {"top_k": 2, "n_group": 12, "topk_group": 5},
    "eps": {"top_k": 3, "norm_eps": 0.3},  # of a size that shows; only sigmoids take one
    "groups_and_bias": {"top_k": 4, "n_group": 3, "topk_group": 2, "selection_bias": BIAS, "routed_scaling_factor": 0.5},
}


def parametrize_options(*selections):
    cases = [(s, name) for s in SCORES for name in selections if name != "eps" or s["scoring"] == "sigmoid"]
    return pytest.mark.parametrize(
        "options",
        [{**score, **SELECTIONS[name]} for score, name in cases],
        ids=["-".join(map(str, score.values())) + "-" + name for score, name in cases],
    )


every_option = parametrize_options(*SELECTIONS)
option_classes = parametrize_options("scaled", "no_selection", "groups_and_bias")
every_impl = pytest.mark.parametrize("impl", IMPLS)


def with_bias(options, dtype):
    """The options as the operator takes them: the selection bias a tensor."""
    bias = options.get("selection_bias")
    return options if bias is None else {**options, "selection_bias": torch.tensor(bias, dtype=dtype)}


def random_like(tensor, seed=1):
    return torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


@every_option
@every_impl
def test_values_and_gradient_equal_the_oracle(options, impl):
    logits = make_logits(9, 12, dtype=torch.float64, requires_grad=True)
    weights, experts = F.route(logits, **with_bias(options, torch.float64), impl=impl)
    exact_weights, exact_experts = reference.route(exact_float64(logits), **options)
    np.testing.assert_array_equal(experts, exact_experts)
    assert experts.dtype == torch.int64
    assert_close(weights, torch.from_numpy(exact_weights), rtol=1e-12, atol=0)

    dweights = random_like(weights)
    (dlogits,) = torch.autograd.grad(weights, logits, dweights)
    exact = reference.route_backward(exact_float64(dweights), exact_float64(logits), **options)
    assert np.abs(exact).max() > 1e-3 or options["top_k"] == 1
    assert_close(dlogits, torch.from_numpy(exact), rtol=1e-10, atol=1e-13)


def plain_route(
    logits, top_k, scoring, score_first, norm_topk_prob, routed_scaling_factor=1.0, selection_bias=None, norm_eps=0.0, **groups
):
    """The formula in PyTorch, arithmetic in float32; the logits are far enough apart that no order is in doubt."""

    def score(values):
        return values.softmax(-1) if scoring == "softmax" else values.sigmoid()

    wide = logits.float()
    keys = score(wide) if score_first else wide
    keys = keys if selection_bias is None else keys + selection_bias
    if groups:
        by_group = keys.unflatten(-1, (groups["n_group"], -1))
        best = 1 if groups.get("group_score") == "max" else min(2, by_group.shape[-1])
        kept = by_group.sort(descending=True).values[..., :best].sum(-1).topk(groups["topk_group"]).indices
        closed = torch.ones(by_group.shape[:2], dtype=torch.bool).scatter(1, kept, False)
        keys = by_group.masked_fill(closed[..., None], -torch.inf).flatten(1)
    picked = torch.arange(12).expand(len(wide), 12) if top_k is None else keys.topk(top_k).indices
    weights = score(wide).gather(1, picked) if score_first else score(wide.gather(1, picked))
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + norm_eps)
    return weights * routed_scaling_factor


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain_pytorch(options, dtype):
    # Cubes: of evenly spaced logits, sums over groups would tie.
    logits = (make_logits(40, 12) ** 3 / 27).to(dtype).requires_grad_()
    if "selection_bias" in options:
        options = {**options, "selection_bias": torch.tensor(options["selection_bias"]).to(dtype)}
    exact_options = {k: exact_float64(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    plain = plain_route(logits, **options)
    exact, exact_experts = reference.route(exact_float64(logits), **exact_options)
    dweights = random_like(plain)
    (plain_grad,) = torch.autograd.grad(plain, logits, dweights)
    exact_grad = reference.route_backward(exact_float64(dweights), exact_float64(logits), **exact_options)
    for impl in IMPLS:
        weights, experts = F.route(logits, **options, impl=impl)
        np.testing.assert_array_equal(experts, exact_experts)
        assert_within_budget(weights, plain, exact, name=f"{impl} weights")
        (grad,) = torch.autograd.grad(weights, logits, dweights)
        if np.abs(exact_grad).max() > 1e-12:
            assert_within_budget(grad, plain_grad, exact_grad, slack=4.0, name=f"{impl} gradient")
        else:  # one normalised expert: the weight is constant
            assert grad.abs().max() < 1e-6


# Order


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize(("E", "K"), [(4, 3), (5, 5), (300, 7), (300, 300)])
def test_ties_go_to_the_lower_id(dtype, score, E, K):
    logits = make_logits(12, E, dtype=dtype, ties=True)
    # A stable sort keeps equal keys in id order; -1, 0 and 1 are exact in every dtype.
    expected = np.argsort(-logits.double().numpy(), axis=1, kind="stable")[:, :K]
    for impl in IMPLS:
        np.testing.assert_array_equal(F.route(logits, K, **score, impl=impl)[1], expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_between_groups_and_through_the_bias_go_to_the_lower_id(dtype):
    logits = torch.tensor([[1.0, 0.0, 0.0, 1.0, 2.0, -1.0], [3.0, 1.0, 2.0, 2.0, 0.0, 4.0]], dtype=dtype)
    _, experts = F.route(logits, 2, score_first=False, n_group=3, topk_group=2)  # groups worth 1, 1, 1 and 4, 4, 4
    np.testing.assert_array_equal(experts, [[0, 3], [0, 2]])
    bias = torch.tensor([0.0, 2.0, 1.0, 1.0, 3.0, -1.0], dtype=dtype)  # keys 1 2 1 2 5 -2 and 3 3 3 3 3 3
    _, experts = F.route(logits, 4, score_first=False, selection_bias=bias)
    np.testing.assert_array_equal(experts, [[4, 1, 3, 0], [0, 1, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@every_impl
def test_equal_logits_have_equal_scores_wherever_they_lie(dtype, scoring, impl):
    # torch's sigmoid gives some numbers, such as -3.984375, another last bit where they do not fill a vector.
    for E in (3, 6, 17, 40):
        for value in [*torch.arange(-4, 4, 0.171875).tolist(), -3.984375]:
            logits = torch.full((13, E), value, dtype=dtype)
            for layout in (logits, logits.T.contiguous().T):
                _, experts = F.route(layout, E, scoring=scoring, selection_bias=torch.zeros(E), impl=impl)
                np.testing.assert_array_equal(experts, np.tile(np.arange(E), (13, 1)))


@pytest.mark.parametrize("dtype", FLOATS)
@every_impl
def test_the_two_zeros_are_equal(dtype, impl):
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0], [-0.0, -1.0, 0.0, 1.0]], dtype=dtype)
    _, experts = F.route(logits, 4, score_first=False, impl=impl)
    np.testing.assert_array_equal(experts, [[0, 1, 2, 3], [0, 1, 2, 3], [3, 0, 2, 1]])


@given(
    st.integers(1, 20).flatmap(
        lambda E: st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=E, max_size=E), min_size=1, max_size=4)
    ),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=80)
def test_every_float_is_ordered(rows, dtype):
    logits = torch.tensor(rows, dtype=dtype)
    expected = np.argsort(-np.asarray(rows, dtype=np.float64), axis=1, kind="stable")
    _, experts = F.route(logits, len(rows[0]), score_first=False, scoring="sigmoid")
    np.testing.assert_array_equal(experts, expected)


@every_impl
def test_a_closed_group_is_never_picked_even_beside_masked_experts(impl):
    # Group 1 wins; the experts of group 0 must stay out although expert 3 is masked by minus infinity.
    logits = torch.tensor([[0.0, 1.0, 5.0, -torch.inf]])
    _, experts = F.route(logits, 2, score_first=False, n_group=2, group_score="max", impl=impl)
    np.testing.assert_array_equal(experts, [[2, 3]])


# Shapes, dtypes, edges


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (6,), (2, 3, 6), (2, 0, 6), (5, 1)])
@pytest.mark.parametrize("top_k", [1, None])
@every_impl
def test_leading_dimensions_are_kept(shape, top_k, impl):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, experts = F.route(logits, top_k, scoring="sigmoid", norm_topk_prob=False, impl=impl)
    K = top_k or shape[-1]
    assert weights.shape == experts.shape == (*shape[:-1], K)
    flat_weights, flat_experts = reference.route(
        exact_float64(logits).reshape(-1, shape[-1]), top_k, scoring="sigmoid", norm_topk_prob=False
    )
    np.testing.assert_array_equal(experts.reshape(-1, K), flat_experts)
    np.testing.assert_allclose(weights.detach().reshape(-1, K), flat_weights, rtol=1e-6)
    weights.sum().backward()
    assert logits.grad is not None and logits.grad.shape == shape and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", FLOATS)
@every_impl
def test_weights_are_float32_and_the_gradient_has_the_dtype_of_the_logits(dtype, impl):
    logits = make_logits(3, 5, dtype=dtype, requires_grad=True)
    weights, _ = F.route(logits, 2, impl=impl)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weights.square().sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


@every_impl
def test_logits_need_not_be_contiguous(impl):
    base = make_logits(12, 8, dtype=torch.float64)
    for logits in (base.t(), base[::2, 1:6], base[:, :1].expand(12, 5), base.flip(0)):
        leaf = logits.clone(memory_format=torch.contiguous_format)
        strided, contiguous = (F.route(v.detach().requires_grad_(), 3, norm_topk_prob=False, impl=impl) for v in (logits, leaf))
        assert torch.equal(strided[0], contiguous[0]) and torch.equal(strided[1], contiguous[1])


def test_huge_logits_give_finite_weights_and_gradients():
    logits = torch.tensor([[1e4, -1e4, 0.0, 9e3], [-1e4, -1e4, -1e4, -1e4]], requires_grad=True)
    for score in SCORES:
        weights, _ = F.route(logits, 2, **score)
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        assert torch.isfinite(weights).all() and torch.isfinite(grad).all(), score


def test_autocast_leaves_routing_in_float32():
    logits = make_logits(5, 6, requires_grad=True)
    expected = F.route(logits, 2, norm_topk_prob=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for impl in IMPLS:
            weights, _ = F.route(logits, 2, norm_topk_prob=False, impl=impl)
            assert weights.dtype == torch.float32
            assert_close(weights, expected, rtol=1e-6, atol=0)


def test_equal_inputs_give_equal_bits():
    logits = make_logits(50, 64, requires_grad=True)

    def run():
        weights, experts = F.route(logits, 8, norm_topk_prob=False)
        return weights, experts, torch.autograd.grad(weights.square().sum(), logits)[0]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# Derivatives


@option_classes
def test_gradcheck(options):
    logits = make_logits(3, 12, dtype=torch.float64, requires_grad=True)
    options = with_bias(options, torch.float64)
    for impl in IMPLS:
        assert gradcheck(lambda v, impl=impl: F.route(v, **options, impl=impl)[0], logits)


@option_classes
def test_dense_has_second_derivatives(options):
    logits = make_logits(2, 12, dtype=torch.float64, requires_grad=True)
    options = with_bias(options, torch.float64)
    assert gradgradcheck(lambda v: F.route(v, **options, impl="dense")[0], logits)


def test_the_operator_refuses_a_second_derivative():
    logits = make_logits(3, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(F.route(logits, 2)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only; impl='dense' has derivatives of every order"):
        grad.square().sum().backward()


def test_the_operator_refuses_forward_mode_rather_than_dropping_the_tangent():
    logits = make_logits(3, 5)
    with pytest.raises(RuntimeError, match=r"forward-mode derivatives and torch\.func need impl='dense'"):
        torch.func.jvp(lambda v: F.route(v, 2)[0], (logits,), (torch.ones_like(logits),))


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_dense_under_torch_func(score):
    logits = make_logits(4, 6, dtype=torch.float64)

    def weights(v):
        return F.route(v, 3, **score, impl="dense")[0]

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(weights(leaf).square().sum(), leaf)
    assert_close(torch.func.grad(lambda v: weights(v).square().sum())(logits), expected)
    assert_close(torch.func.jacrev(weights)(logits), torch.func.jacfwd(weights)(logits))
    batch = torch.stack((logits, logits.flip(0), 2 * logits))
    assert_close(torch.func.vmap(weights)(batch), torch.stack([weights(v) for v in batch]))


def test_the_selection_bias_has_no_gradient():
    logits, bias = make_logits(3, 5, requires_grad=True), torch.zeros(5, requires_grad=True)
    for impl in IMPLS:
        weights, _ = F.route(logits, 2, selection_bias=bias, impl=impl)
        assert torch.autograd.grad(weights.square().sum(), (logits, bias), allow_unused=True)[1] is None


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("op", ["route", "route_dense"])
def test_opcheck(op, requires_grad):
    logits = make_logits(3, 6, requires_grad=requires_grad)
    arguments = (logits, torch.zeros(6), 2, "softmax", True, False, 2.5, 2, 1, "top2_sum", 1e-20, library.BUILD)
    torch.library.opcheck(getattr(torch.ops.fusedonemoe, op).default, arguments)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_opcheck_backward(scoring):
    logits = make_logits(3, 6)
    rule = (2, scoring, True, scoring == "sigmoid", 2.5, 1, 1, "max", 1e-6)
    _, experts = torch.ops.fusedonemoe.route(logits, None, *rule, library.BUILD)
    op = torch.ops.fusedonemoe.route_backward.default
    torch.library.opcheck(op, (torch.randn(3, 2), logits, experts, *rule, library.BUILD))


# Refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [1.0, 2.0]}, TypeError, r"^logits must be a torch.Tensor, got list$"),
        ({"logits": torch.zeros(2, 6).long()}, TypeError, r"^logits must be float64, .* or float16, got torch.int64$"),
        ({"logits": torch.zeros(())}, ValueError, r"^logits must have shape \[..., E\] with E >= 1, got \(\)$"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"^logits must have shape \[..., E\] with E >= 1, got \(3, 0\)$"),
        ({"scoring": "tanh"}, ValueError, r"^scoring must be one of \('softmax', 'sigmoid'\), got 'tanh'$"),
        ({"group_score": "mean"}, ValueError, r"^group_score must be one of \('top2_sum', 'max'\), got 'mean'$"),
        ({"norm_eps": "1e-6"}, TypeError, r"^norm_eps must be a number, got '1e-6'$"),
        ({"scoring": "sigmoid", "norm_eps": 0.0}, ValueError, r"^norm_eps must be positive and finite, got 0.0$"),
        ({"norm_eps": 1e-6}, ValueError, r"^norm_eps applies only to scoring='sigmoid', got 1e-06 with scoring='softmax'$"),
        ({"impl": "grouped"}, ValueError, r"^impl must be one of \('auto', 'dense', 'portable'\), got 'grouped'$"),
        ({"n_group": 4}, ValueError, r"^n_group must divide the number of experts \(6\), got 4$"),
        ({"n_group": 0}, ValueError, r"^n_group must divide the number of experts \(6\), got 0$"),
        ({"n_group": 2, "topk_group": 3}, ValueError, r"^topk_group must be from 1 to n_group \(2\), got 3$"),
        ({"n_group": 2, "topk_group": 0}, ValueError, r"^topk_group must be from 1 to n_group \(2\), got 0$"),
        ({"top_k": 0}, ValueError, r"^top_k must be from 1 to 6, the experts that can be picked, or None, got 0$"),
        ({"top_k": 7}, ValueError, r"^top_k must be from 1 to 6, .* got 7$"),
        ({"top_k": 3, "n_group": 3}, ValueError, r"^top_k must be from 1 to 2, .* got 3$"),
        ({"top_k": 2.0}, TypeError, r"^top_k must be an integer.*got 2.0$"),
        ({"top_k": True}, TypeError, r"^top_k must be an integer.*got True$"),
        ({"top_k": "2"}, TypeError, r"^top_k must be an integer.*got '2'$"),
        ({"n_group": 2.0}, TypeError, r"^n_group must be an integer, got 2.0$"),
        ({"topk_group": 1.0}, TypeError, r"^topk_group must be an integer, got 1.0$"),
        ({"top_k": None, "n_group": 2}, ValueError, "^top_k=None selects every expert: n_group must be 1"),
        ({"top_k": None, "selection_bias": torch.zeros(6)}, ValueError, "^top_k=None .* there can be no selection bias$"),
        ({"selection_bias": torch.zeros(5)}, ValueError, r"^selection_bias must have shape \(6,\), got \(5,\)$"),
        ({"selection_bias": torch.zeros(6).int()}, TypeError, "^selection_bias must be float64, .* got torch.int32$"),
        ({"selection_bias": [0.0] * 6}, TypeError, "^selection_bias must be a torch.Tensor, got list$"),
        (
            {"selection_bias": torch.zeros(6, device="meta")},
            ValueError,
            r"^selection_bias must be on the device of logits \(cpu\), got meta$",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 6), "top_k": 2, **changes}
    with pytest.raises(error, match=message):
        F.route(**arguments)
