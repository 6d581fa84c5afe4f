"""Numbers at the ends of a dtype, and NaN: the Triton kernels against the same expectations as the other implementations."""

import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.ops.rules import RouteRule
from fusedonemoe.ops.triton import routing
from tests.ops import test_float16_range as float16
from tests.ops import test_large_logits as logits
from tests.ops import test_nan_and_infinity as reach

LAYERS = tuple(dict.fromkeys(layer for layer, _ in float16.CASES))
each_layer = pytest.mark.parametrize("layer", LAYERS)


@each_layer
def test_a_row_may_pass_the_largest_float16(device, layer):
    float16.assert_fits(float16.run(layer, "triton", 2e5, 0.05, torch.float32, 1e-4, device))


@each_layer
def test_a_gradient_of_a_row_may_pass_it(device, layer):
    float16.assert_fits(float16.run(layer, "triton", 200.0, 1e-3, torch.float32, 2000.0, device))


@pytest.mark.parametrize("rows", [1, 40])
def test_rows_beyond_it_may_cancel_where_nothing_is_recorded(device, rows):
    x, experts = torch.ones(rows, 2, device=device).half(), torch.tensor([[0, 1]], device=device).repeat(rows, 1)
    down = torch.tensor([60000.0, -30000.0], device=device).half()[:, None, None].expand(2, 2, 2).contiguous()
    weights, up = torch.full((rows, 2), 0.5, device=device), torch.ones(2, 2, 2, device=device).half()
    with torch.no_grad():
        y = F.experts_mlp(x, experts, weights, up, down, activation="identity", gated=False, impl="triton")
    assert (y == 60000.0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_layer
def test_a_token_reaches_its_own_experts(device, layer, value):
    leaves = {name: leaf.to(device) for name, leaf in reach.make_leaves(layer).items()}
    bad = {name: leaf.clone() for name, leaf in leaves.items()}
    bad["weights" if layer == "experts_values" else "x"][reach.BAD, 1] = value
    nowhere = reach.EXPERTS.clone()
    nowhere[reach.BAD] = -1
    found, clean = reach.run(layer, "triton", bad), reach.run(layer, "triton", leaves, nowhere)
    reach.assert_equal_outside(found, clean, [reach.BAD], reach.EXPERTS[reach.BAD].tolist())
    assert not found["y"][reach.BAD].isfinite().all()


@each_layer
def test_a_token_without_experts_reaches_nothing(device, layer):
    leaves = {name: leaf.to(device) for name, leaf in reach.make_leaves(layer).items()}
    experts = reach.EXPERTS.clone()
    experts[reach.BAD] = torch.tensor([-1, reach.E])
    bad = {name: leaf.clone() for name, leaf in leaves.items()}
    for name in ("x", "weights"):
        bad[name][reach.BAD] = torch.nan
    found, clean = reach.run(layer, "triton", bad, experts), reach.run(layer, "triton", leaves, experts)
    for name, expected in clean.items():
        reach.assert_as_clean(name, found[name], expected)


@pytest.mark.parametrize(
    "rule", [rule for rule in logits.RULES if "n_group" not in rule and "selection_bias" not in rule], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_logits_have_exact_weights(device, dtype, rule):
    rows = logits.make_logits(dtype)
    score = rule.get("scoring", "softmax"), rule.get("score_first", True), rule["norm_topk_prob"]
    full = RouteRule(logits.K, *score, 1.0, 1, 1, "max")
    weights, experts = routing.route(rows.to(device), None, full)
    dweights = torch.linspace(-1, 1, weights.numel()).view_as(weights)
    dlogits = routing.route_backward(dweights.to(device), rows.to(device), experts, full).cpu()
    logits.assert_exact(weights.cpu(), rows, experts.cpu(), rule, dlogits, dweights)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("rule", [("softmax", True, False), ("softmax", True, True), ("softmax", False, False)], ids=str)
def test_a_softmax_over_a_plus_infinity_or_nan_is_nan(device, rule, value):
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).to(device)
    rows[1, 5] = value
    weights, _ = routing.route(rows, None, RouteRule(3, *rule, 1.0, 1, 1, "max"))
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()


def test_a_group_of_two_large_keys_is_the_greater_one(device):
    most = torch.finfo(torch.float32).max
    rows = torch.zeros(1, 9, device=device)
    rows[0, [0, 1, 3, 4, 6, 7]] = most * torch.tensor([0.8, 0.8, 0.9, 0.9, 0.7, 1.0], device=device)
    rule = RouteRule(2, "softmax", False, True, 1.0, 3, 1, "top2_sum")
    assert routing.route(rows, None, rule)[1].tolist() == [[3, 4]]
