"""Routing weights of logits of any size: those of an independent float64 computation, to a few units in the last place."""

import itertools
from typing import Any

import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.balance import load_balancing_loss, router_z_loss
from fusedonemoe.ops import reference

T, E, K = 12, 16, 4
EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("auto", "dense", "portable")
SHIFTS = (30.0, -30.0, 1e4, -1e4, 1e6, 1e30, -1e30)
NOT_NUMBERS = {"inf": torch.inf, "nan": torch.nan}
RULES: list[dict[str, Any]] = [
    *({"score_first": first, "norm_topk_prob": norm} for first, norm in itertools.product((True, False), repeat=2)),
    *({"scoring": "sigmoid", "norm_topk_prob": norm} for norm in (True, False)),
    {"norm_topk_prob": False, "n_group": 4, "topk_group": 2, "group_score": "max", "routed_scaling_factor": 2.5},
    {"norm_topk_prob": True, "n_group": 4, "topk_group": 2, "selection_bias": 1e6},
    {"norm_topk_prob": False, "selection_bias": 1e6},
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: ",".join(f"{k}={v}" for k, v in rule.items()))


def make_logits(dtype, seed=0):
    """Rows around each shift, rows of a shift's size, and rows up to the largest number of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    most = float(torch.finfo(dtype).max)
    small = 3 * torch.randn(T, E, generator=generator, dtype=torch.float64)
    rows = [small + shift for shift in SHIFTS if abs(shift) < most / 2]
    rows += [small * shift for shift in SHIFTS if abs(shift) < most / 20]
    rows.append(most * (2 * torch.rand(T, E, generator=generator, dtype=torch.float64) - 1))
    rows.append(most * small.sign())
    return torch.cat(rows).to(dtype)


def options_of(rule, dtype=torch.float32):
    """The arguments of ``F.route``; a large bias of every second expert, where the rule names one."""
    options = dict(rule)
    if "selection_bias" in rule:
        options["selection_bias"] = rule["selection_bias"] * (torch.arange(E) % 2).to(dtype)
    return options


def softmax(logits):
    powers = torch.exp(logits - logits.amax(-1, keepdim=True).detach())
    return powers / powers.sum(-1, keepdim=True)


def exact_weights(logits, experts, rule):
    """The weights of these experts, from float64 logits."""
    picked = logits.gather(-1, experts)
    norm, scale = rule["norm_topk_prob"], rule.get("routed_scaling_factor", 1.0)
    if rule.get("scoring") == "sigmoid":
        scores = torch.sigmoid(picked)
        return scale * (scores / (scores.sum(-1, keepdim=True) + 1e-20) if norm else scores)
    over_all = rule.get("score_first", True) and not norm
    return scale * (softmax(logits).gather(-1, experts) if over_all else softmax(picked))


def assert_exact(weights, logits, experts, rule, dlogits=None, dweights=None):
    """Weights to 4 ulps and the rounding of ``l - max``, the gradient to 8 of its size; weights below 1e-30 may be 0."""
    leaf = logits.double().detach().requires_grad_()
    exact = exact_weights(leaf, experts, rule)
    assert weights.isfinite().all()
    tolerance = EPS * (4.5 + exact.clamp(min=1e-30).log().abs() / 2)
    assert ((weights.double() - exact).abs() <= tolerance * exact + 1e-30).all()
    if dlogits is None:
        return
    (slope,) = torch.autograd.grad(exact, leaf, dweights.double())
    eps = max(EPS, torch.finfo(dlogits.dtype).eps)
    size = (dweights.abs() * weights).sum(-1, keepdim=True).double() + 1e-30
    tiny = torch.finfo(dlogits.dtype).smallest_normal
    assert ((dlogits.double() - slope).abs() <= eps * (8 * size + slope.abs()) + tiny).all()


def route_with_gradient(logits, options, impl):
    leaf = logits.clone().requires_grad_()
    weights, experts = F.route(leaf, K, **options, impl=impl)
    dweights = torch.linspace(-1, 1, weights.numel(), dtype=weights.dtype).view_as(weights)
    return weights.detach(), experts, torch.autograd.grad(weights, leaf, dweights)[0], dweights


@every_rule
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_gradient_are_exact(dtype, impl, rule):
    logits = make_logits(dtype)
    weights, experts, dlogits, dweights = route_with_gradient(logits, options_of(rule), impl)
    assert_exact(weights, logits, experts, rule, dlogits, dweights)
    if rule["norm_topk_prob"] and rule.get("scoring") != "sigmoid":
        assert ((weights.double().sum(-1) - 1).abs() <= 4 * EPS).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_experts_together_weigh_one(dtype, impl):
    weights, _ = F.route(make_logits(dtype), None, norm_topk_prob=False, impl=impl)
    assert ((weights.double().sum(-1) - 1).abs() <= 4 * EPS).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_variants_are_exact(impl):
    logits, plain = make_logits(torch.float32), {"norm_topk_prob": False}
    weights, experts, _ = F.topk_softmax(logits, K, impl=impl)
    assert_exact(weights, logits, experts, plain)
    for norm in (True, False):
        weights, experts = F.route_with_shared(logits, K, 2, norm_topk_prob=norm, impl=impl)
        assert_exact(weights[:, :2], logits[:, :-2], experts[:, :2], {"norm_topk_prob": norm})
        assert_exact(weights[:, 2:], logits[:, -2:], experts[:, 2:] - (E - 2), plain)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", [True, False])
def test_product_keys_are_exact(norm, impl):
    leaf = torch.stack((make_logits(torch.float32), make_logits(torch.float32, seed=1).flip(0)), 1).requires_grad_()
    weights, experts = F.route_product_key(leaf, K, norm_topk_prob=norm, impl=impl)
    wide = leaf.detach().double().requires_grad_()
    shares = softmax(wide)
    exact = shares[:, 0].gather(1, experts // E) * shares[:, 1].gather(1, experts % E)
    exact = exact / exact.sum(-1, keepdim=True) if norm else exact
    assert ((weights.double() - exact).abs() <= 6 * EPS * exact + 1e-30).all()
    dweights = torch.linspace(-1, 1, weights.numel()).view_as(weights)
    (slope,) = torch.autograd.grad(exact, wide, dweights.double())
    (dlogits,) = torch.autograd.grad(weights, leaf, dweights)
    assert ((dlogits.double() - slope).abs() <= 32 * EPS).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-4])
def test_top_p_keeps_what_exceeds_the_threshold(temperature):
    logits = make_logits(torch.float32)
    _, experts = F.route_top_p(logits, 0.2, temperature=temperature)
    wide = logits.double()
    shares = softmax((wide - wide.amax(-1, keepdim=True)) / temperature)
    decided = (shares - 0.2).abs() > 1e-6
    assert torch.equal((experts >= 0)[decided], (shares > 0.2)[decided])


def test_the_losses_have_exact_gradients():
    logits = torch.cat([torch.randn(T, E, generator=torch.Generator().manual_seed(1)) + shift for shift in (0.0, 30.0, 1e4, 1e6)])
    experts = logits.topk(K).indices
    for loss, scale in ((router_z_loss, 1e6), (lambda x: load_balancing_loss(x, experts, E), 1e-2)):
        leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
        (dlogits,) = torch.autograd.grad(loss(leaf), leaf)
        (slope,) = torch.autograd.grad(loss(wide), wide)
        assert ((dlogits.double() - slope).abs() <= 8 * EPS * (slope.abs() + slope.abs().amax(-1, keepdim=True))).all(), scale


def test_compiled_graphs_agree_to_a_few_ulps():
    rules = ({"norm_topk_prob": False}, {"norm_topk_prob": True}, {"scoring": "sigmoid", "norm_topk_prob": True})

    @torch.compile(fullgraph=True)
    def every_impl(logits):
        return [F.route(logits, K, **rule, impl=impl) for rule in rules for impl in IMPLS]

    logits = make_logits(torch.float32)
    for (rule, _), (weights, experts) in zip(itertools.product(rules, IMPLS), every_impl(logits), strict=True):
        assert_exact(weights, logits, experts, rule)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_softmax_over_a_plus_infinity_or_nan_is_nan(dtype, value, impl):
    # As torch.softmax: all weights of that token, and no other token's.
    logits = torch.randn(3, E, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[1, 5] = value
    for rule in RULES[:4]:
        weights, _, dlogits, _ = route_with_gradient(logits, options_of(rule), impl)
        assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()
        assert dlogits[1].isnan().any() and dlogits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_minus_infinity_weighs_nothing_and_a_row_of_it_is_nan(impl):
    logits = torch.full((3, E), -torch.inf)
    logits[0, :3] = torch.tensor([1e30, 1e30, -1e30])
    logits[1, 3] = -1e30
    for rule in RULES[:4]:
        weights, experts, _, _ = route_with_gradient(logits, options_of(rule), impl)
        assert experts[0].tolist()[:3] == [0, 1, 2] and weights[0].tolist() == [0.5, 0.5, 0.0, 0.0]
        assert weights[1].tolist() == [1.0, 0.0, 0.0, 0.0] and weights[2].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_sigmoids_that_all_underflow_weigh_nothing(impl):
    rule = {"scoring": "sigmoid", "norm_topk_prob": True}
    weights, _, dlogits, _ = route_with_gradient(torch.full((2, E), -1e30), rule, impl)
    assert (weights == 0).all() and (dlogits == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_group_of_two_large_keys_is_the_greater_one(dtype, impl):
    most = torch.finfo(dtype).max
    logits = torch.zeros(1, 9, dtype=dtype)
    logits[0, [0, 1, 3, 4, 6, 7]] = most * torch.tensor([0.8, 0.8, 0.9, 0.9, 0.7, 1.0], dtype=dtype)
    weights, experts = F.route(logits, 2, score_first=False, n_group=3, topk_group=1, impl=impl)
    assert experts.tolist() == [[3, 4]] and weights.tolist() == [[0.5, 0.5]]


def test_the_oracle_orders_logits_whose_scores_are_equal_in_float64():
    logits = torch.tensor([[-1e30, 1e3, -1e4, 1e30, 2e3]])
    for rule in ({"norm_topk_prob": False}, {"scoring": "sigmoid"}):
        assert reference.route(logits, 4, **rule)[1].tolist() == [[3, 4, 1, 2]] == F.route(logits, 4, **rule)[1].tolist()
