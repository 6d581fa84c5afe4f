"""The routing kernels against the same function in tensor arithmetic: ids exactly, weights and gradients within a budget."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from fusedonemoe.ops import route as tensors
from fusedonemoe.ops.rules import RouteRule
from fusedonemoe.ops.triton import routing
from fusedonemoe.testing import assert_within_budget, make_logits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCORES = list(itertools.product(("softmax", "sigmoid"), (True, False), (True, False)))
every_score = pytest.mark.parametrize("score", SCORES, ids=lambda score: "-".join(map(str, score)))

# E, K, n_group, topk_group, group_score
PLAIN = [(E, K, 1, 1, "max") for E in (1, 5, 8, 60, 64) for K in sorted({0, 1, 3, 6, min(E, 20)}) if E >= K]
GROUPED = [
    (160, 6, 8, 3, "top2_sum"),
    (160, 1, 8, 1, "max"),
    (60, 3, 5, 2, "top2_sum"),
    (60, 8, 5, 5, "max"),
    (64, 6, 8, 4, "top2_sum"),
    (8, 3, 8, 5, "top2_sum"),
    (5, 5, 1, 1, "max"),
]


def rule_of(shape, score, scale=1.0):
    _, K, n_group, topk_group, group_score = shape
    return RouteRule(K, *score, scale, n_group, topk_group, group_score)


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(T, E, dtype=torch.float32):
    """Logits far enough apart for no order of scores or of sums of two to be in doubt."""
    return (make_logits(T, E) ** 3 / 16).to(dtype)


def check(logits, bias, rule, device, ids_in_doubt=False):
    """Route and differentiate in both formulations, compare with float64."""
    on = None if bias is None else bias.to(device)
    weights, experts = (v.cpu() for v in routing.route(logits.to(device), on, rule))
    plain, plain_experts = tensors.route(logits, bias, rule)
    assert experts.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(experts, plain_experts)
    wide_bias = None if bias is None else bias.double()
    exact, exact_experts = tensors.route(logits.double(), wide_bias, rule)
    assert ids_in_doubt or torch.equal(experts, exact_experts)
    if torch.equal(experts, exact_experts):
        assert_within_budget(weights, plain, exact, name="weights")

    dweights = random(*weights.shape)
    dlogits = routing.route_backward(dweights.to(device), logits.to(device), experts.to(device), rule).cpu()
    exact = tensors.route_backward(dweights.double(), logits.double(), experts, rule)
    if exact.numel() == 0 or exact.abs().max() > 1e-6:
        plain = tensors.route_backward(dweights, logits, experts, rule)
        assert_within_budget(dlogits, plain, exact, slack=4.0, name="dlogits")
    else:  # one normalised expert: the weight is constant
        assert dlogits.dtype == logits.dtype and dlogits.shape == logits.shape and dlogits.abs().max() < 1e-6


@every_score
@pytest.mark.parametrize("shape", PLAIN, ids=lambda shape: f"E{shape[0]}-K{shape[1]}")
def test_every_rule_of_every_shape(device, shape, score):
    check(spread(37, shape[0]), None, rule_of(shape, score), device)


@every_score
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", GROUPED, ids=lambda shape: "-".join(map(str, shape)))
def test_groups_and_bias(device, shape, score, biased):
    bias = 0.1 * random(shape[0]) if biased else None
    check(spread(11, shape[0]), bias, rule_of(shape, score, 2.5), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [0, 1, 37])
@pytest.mark.parametrize("shape", [(8, 3, 1, 1, "max"), (60, 6, 5, 2, "top2_sum"), (5, 0, 1, 1, "max")], ids=str)
@pytest.mark.parametrize("score", [("softmax", True, False), ("sigmoid", True, True)], ids=str)
def test_every_dtype_and_number_of_tokens(device, dtype, T, shape, score):
    # Logits that rounding has made equal have equal scores; only sums of two may then differ by rounding alone.
    check(spread(T, shape[0], dtype), None, rule_of(shape, score, 0.5), device, ids_in_doubt=shape[2] > 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bias_of_another_dtype_and_stride(device, dtype):
    bias = torch.empty(8, 3, dtype=dtype).copy_(random(8, 3))[:, 1]
    rule = RouteRule(3, "sigmoid", True, True, 1.0, 1, 1, "max")
    logits = spread(9, 8)
    _, experts = routing.route(logits.to(device), bias.to(device), rule)
    assert torch.equal(experts.cpu(), tensors.route(logits, bias, rule)[1])


# Order


def choices(E):
    """Every way to choose among E experts whose keys are exact: the logits themselves, or those with a bias of integers."""
    bias = torch.arange(E).remainder(3).float()
    for K in sorted({1, 3, E}):
        yield None, RouteRule(K, "softmax", True, True, 1.0, 1, 1, "max")
        yield bias, RouteRule(K, "softmax", False, True, 1.0, 1, 1, "max")
    for group_score in ("max", "top2_sum"):
        yield None, RouteRule(E // 4 + 2, "softmax", False, True, 1.0, 4, 3, group_score)
        yield bias, RouteRule(2, "softmax", False, True, 1.0, E, 4, group_score)
        yield bias, RouteRule(E // 4, "sigmoid", False, True, 1.0, 4, 1, group_score)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("E", [8, 20])
def test_ties_go_to_the_lower_id(device, dtype, E):
    logits = make_logits(24, E, dtype=dtype, ties=True)
    logits[::2] *= -1.0  # -0.0 beside 0.0
    logits[3, ::2] = -torch.inf
    logits[4] = -torch.inf
    for bias, rule in choices(E):
        _, experts = routing.route(logits.to(device), None if bias is None else bias.to(device), rule)
        assert torch.equal(experts.cpu(), tensors.route(logits, bias, rule)[1]), rule


@every_score
def test_equal_scores_tie_too(device, score):
    logits = make_logits(16, 12, ties=True)
    for n_group, topk_group, group_score in ((1, 1, "max"), (3, 2, "top2_sum"), (4, 1, "max")):
        rule = RouteRule(3, *score, 1.0, n_group, topk_group, group_score)
        assert torch.equal(routing.route(logits.to(device), None, rule)[1].cpu(), tensors.route(logits, None, rule)[1])


def test_every_float_has_its_place(device):
    info = torch.finfo(torch.float32)
    values = [info.max, info.tiny, 1e-45, 0.0, 1.0, 1.0 + info.eps, 3e38, torch.inf]
    logits = torch.tensor([values + [-v for v in values]])
    logits = logits[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    rule = RouteRule(16, "sigmoid", False, False, 1.0, 1, 1, "max")
    weights, experts = routing.route(logits.to(device), None, rule)
    expected_weights, expected = tensors.route(logits, None, rule)
    assert torch.equal(experts.cpu(), expected)
    assert_close(weights.cpu(), expected_weights)


def test_a_closed_group_is_never_picked_even_beside_masked_experts(device):
    logits = torch.tensor([[0.0, 1.0, 5.0, -torch.inf]], device=device)
    _, experts = routing.route(logits, None, RouteRule(2, "softmax", False, True, 1.0, 2, 1, "max"))
    assert experts.tolist() == [[2, 3]]


@pytest.mark.parametrize(("E", "K"), [(40, 33), (33, 33), (64, 64)])
def test_many_choices_are_sorted(device, E, K):
    logits = make_logits(3, E, ties=True) + (torch.arange(E) % 7 == 0)
    rule = RouteRule(K, "softmax", True, True, 1.0, 1, 1, "max")
    assert K > routing.MAX_ROUNDS
    assert torch.equal(routing.route(logits.to(device), None, rule)[1].cpu(), tensors.route(logits, None, rule)[1])


@pytest.mark.parametrize(("E", "K", "n_group"), [(12, 5, 3), (8, 8, 1), (6, 1, 1)])
def test_rounds_and_sort_are_one_selection(device, E, K, n_group, monkeypatch):
    logits = make_logits(5, E, ties=True)
    logits[1, ::2] = -torch.inf
    rule = RouteRule(K, "softmax", False, False, 1.0, n_group, min(n_group, 2), "top2_sum")
    rounds = routing.route(logits.to(device), None, rule)
    monkeypatch.setattr(routing, "MAX_ROUNDS", 0)
    by_sort = routing.route(logits.to(device), None, rule)
    assert torch.equal(rounds[1], by_sort[1]) and torch.equal(rounds[0].isnan(), by_sort[0].isnan())
    assert torch.equal(by_sort[1].cpu(), tensors.route(logits, None, rule)[1])


# Edges


@every_score
@pytest.mark.parametrize("K", [0, 2])
def test_infinities_and_huge_logits_are_as_in_tensor_arithmetic(device, score, K):
    inf = torch.inf
    logits = torch.tensor(
        [
            [1e4, -1e4, 0.0, 9e3, 1.0],
            [-1e4, -1e4, -1e4, -1e4, -1e4],
            [0.0, -inf, 1.0, -inf, 2.0],
            [-inf, -inf, 3.0, -inf, -inf],
            [inf, 0.0, 1.0, 2.0, -inf],
            [-inf, -inf, -inf, -inf, -inf],
        ]
    )
    rule = RouteRule(K, *score, 1.5, 1, 1, "max")
    weights, experts = routing.route(logits.to(device), None, rule)
    expected, expected_experts = tensors.route(logits.double(), None, rule)
    assert torch.equal(experts.cpu(), expected_experts)
    assert_close(weights.cpu(), expected.float(), equal_nan=True)
    dweights = random(*weights.shape)
    dlogits = routing.route_backward(dweights.to(device), logits.to(device), experts, rule)
    expected = tensors.route_backward(dweights.double(), logits.double(), expected_experts, rule)
    assert_close(dlogits.cpu(), expected.float(), equal_nan=True)


@pytest.mark.parametrize("K", [0, 3])
def test_nothing_need_be_contiguous(device, K):
    base = make_logits(12, 8).to(device)
    rule = RouteRule(K, "softmax", True, False, 1.0, 1, 1, "max")
    for logits in (base.t(), base[::2, 1:6], base[:, :1].expand(12, 5)):
        weights, experts = routing.route(logits, None, rule)
        packed = logits.clone(memory_format=torch.contiguous_format)
        packed_weights, packed_experts = routing.route(packed, None, rule)
        assert torch.equal(weights, packed_weights) and torch.equal(experts, packed_experts)
        dweights = random(1, weights.shape[1]).to(device).expand_as(weights)
        dlogits = routing.route_backward(dweights, logits, experts.t().contiguous().t(), rule)
        assert dlogits.is_contiguous()
        assert torch.equal(dlogits, routing.route_backward(dweights.contiguous(), packed, experts, rule))


def test_equal_inputs_give_equal_bits(device):
    logits = make_logits(50, 60).to(device)
    dweights = random(50, 6).to(device)
    rule = RouteRule(6, "softmax", True, False, 1.0, 5, 3, "top2_sum")

    def run():
        weights, experts = routing.route(logits, None, rule)
        return weights, experts, routing.route_backward(dweights, logits, experts, rule)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("score_first", [True, False])
def test_the_sum_of_sigmoids_gets_its_eps(device, score_first):
    rule = RouteRule(3, "sigmoid", score_first, True, 1.5, 1, 1, "max", norm_eps=0.3)
    check(spread(9, 12), None, rule, device)
    without = routing.route(spread(9, 12).to(device), None, rule._replace(norm_eps=1e-20))[0]
    assert (without > 1.02 * routing.route(spread(9, 12).to(device), None, rule)[0]).all()


@pytest.mark.parametrize("score", [("softmax", True, False), ("softmax", False, True), ("sigmoid", True, True)], ids=str)
def test_the_gradient_is_the_slope_of_the_weights(device, score):
    logits, dweights, step = spread(2, 6), random(2, 3), 1e-2
    rule = RouteRule(3, *score, 2.5, 1, 1, "max")
    experts = routing.route(logits.to(device), None, rule)[1]
    dlogits = routing.route_backward(dweights.to(device), logits.to(device), experts, rule).cpu()
    slope = torch.zeros_like(logits)
    for e in range(6):
        ends = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[:, e] += sign * step
            weights, moved_experts = routing.route(moved.to(device), None, rule)
            assert torch.equal(moved_experts, experts)
            ends.append((weights.cpu() * dweights).sum(1))
        slope[:, e] = (ends[0] - ends[1]) / (2 * step)
    assert slope.abs().max() > 0.1
    assert_close(dlogits, slope, rtol=1e-3, atol=1e-4)


def test_what_the_kernels_cannot_take_is_named():
    assert all(routing.refusal(dtype, routing.MAX_EXPERTS) is None for dtype in FLOATS)
    assert "float64" in (routing.refusal(torch.float64, 8) or "")
    assert "16385" in (routing.refusal(torch.float32, 16385) or "")
    assert routing.refusal(torch.float32, 9000, 9) is None
    assert "9 groups" in (routing.refusal(torch.float32, 10000 // 9 * 9, 9) or "")
