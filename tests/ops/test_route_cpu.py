"""The router's CPU kernels against the same rule in torch's arithmetic: sizes, masks, threads, graphs.

test_route.py compares both with the oracle. test_cpu_build.py runs this file again, for other instruction sets and under
sanitizers.
"""

import itertools

import pytest
import torch
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import library, route
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.rules import NORM_EPS, RouteRule

_REFUSAL = native.refusal(torch.float32, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")

# Whole vectors of 4, 8 and 16 lanes, what is left of them, and K beyond a vector.
SIZES = [(1, 1), (3, 2), (8, 2), (16, 16), (17, 3), (60, 6), (128, 8), (256, 40)]
FORMS = [
    dict(zip(("scoring", "score_first", "norm_topk_prob"), form, strict=True))
    for form in itertools.product(("softmax", "sigmoid"), (True, False), (True, False))
]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rule_of(top_k, scoring="softmax", score_first=True, norm_topk_prob=True, scale=1.0, groups=(1, 1, "max")):
    n_group, topk_group, group_score = groups
    eps = 1e-6 if scoring == "sigmoid" else NORM_EPS
    return RouteRule(top_k, scoring, score_first, norm_topk_prob, scale, n_group, topk_group, group_score, eps)


def draw(T, E, dtype=torch.float32, seed=0):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)


def route_cpu(logits, bias, rule):
    return torch.ops.fusedonemoe.route_cpu(logits, bias, *rule)


def route_backward_cpu(dweights, logits, experts, rule):
    return torch.ops.fusedonemoe.route_cpu_backward(dweights, logits, experts, *rule)


def check(logits, bias, rule):
    """Forward and backward of the kernels against torch's arithmetic."""
    weights, experts = route_cpu(logits, bias, rule)
    plain_weights, plain_experts = route.route(logits, bias, rule)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int64
    assert torch.equal(experts, plain_experts)
    assert_close(weights, plain_weights, rtol=2e-6, atol=1e-30)
    dweights = draw(len(logits), experts.shape[1], seed=3)
    gradient = route_backward_cpu(dweights, logits, experts, rule)
    plain = route.route_backward(dweights, logits, experts, rule)
    assert gradient.dtype == logits.dtype
    # A gradient is a difference of terms of the weights' size.
    unit = torch.finfo(logits.dtype).eps * rule.scale * 4
    assert_close(gradient, plain, rtol=2 * torch.finfo(logits.dtype).eps, atol=unit)


@every_form
@pytest.mark.parametrize(("E", "K"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size(dtype, E, K, form):
    check(draw(9, E, dtype), None, rule_of(K, **form, scale=2.5))


@every_form
def test_all_experts_without_a_selection(form):
    check(draw(5, 21), None, rule_of(0, **form))


@every_form
@pytest.mark.parametrize(
    "groups", [(1, 1, "max"), (6, 2, "top2_sum"), (6, 2, "max"), (24, 9, "top2_sum"), (2, 1, "top2_sum")], ids=str
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_groups_and_bias(groups, with_bias, form):
    bias = draw(1, 24, seed=7)[0] / 2 if with_bias else None
    check(draw(30, 24), bias, rule_of(4, **form, groups=groups))


@every_form
def test_masked_experts_weigh_nothing(form):
    logits = draw(6, 20)
    logits[:, 5:] = -torch.inf  # so that some of them are picked
    weights, experts = route_cpu(logits, None, rule_of(8, **form))
    assert torch.equal(experts, route.route(logits, None, rule_of(8, **form))[1])
    assert (weights[experts >= 5] == 0).all() and (weights[experts < 5] > 0).all()


def test_a_token_that_masks_everything_says_so():
    for norm in (True, False):
        weights, _ = route_cpu(torch.full((2, 6), -torch.inf), None, rule_of(2, norm_topk_prob=norm))
        assert weights.isnan().all()


@every_form
def test_nan_stays_in_its_row(form):
    logits = draw(3, 20)
    logits[1, 4] = torch.nan
    weights, experts = route_cpu(logits, None, rule_of(3, **form))
    assert experts[1, 0] == 4 and weights[1, 0].isnan()
    assert weights[[0, 2]].isfinite().all()


@every_form
def test_a_gradient_skips_ids_of_no_expert(form):
    logits, dweights = draw(4, 20), draw(4, 5, seed=3)
    experts = torch.tensor([[3, -1, 7, 20, 1 << 40]]).expand(4, 5)
    rule, kept = rule_of(5, **form), [0, 2]
    gradient = route_backward_cpu(dweights, logits, experts, rule)
    assert_close(gradient, route.route_backward(dweights[:, kept], logits, experts[:, kept], rule))


def test_closed_groups_and_ties_as_in_torch():
    logits = torch.tensor([[0.0, 1.0, 5.0, -torch.inf], [1.0, 1.0, 1.0, 1.0], [-0.0, 0.0, 0.0, -0.0]])
    for score in (("softmax", False), ("sigmoid", True)):
        _, experts = route_cpu(logits, None, rule_of(2, *score, groups=(2, 1, "max")))
        assert experts.tolist() == [[2, 3], [0, 1], [0, 1]]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_depend_neither_on_threads_nor_on_other_tokens(threads, small_thresholds):
    before = torch.get_num_threads()
    logits, rule, bias = draw(67, 40), rule_of(6, "sigmoid", groups=(8, 3, "top2_sum")), draw(1, 40, seed=2)[0]
    alone = [route_cpu(row[None], bias, rule) for row in logits]
    dweights = draw(67, 6, seed=4)
    torch.set_num_threads(threads)
    try:
        weights, experts = route_cpu(logits, bias, rule)
        gradient = route_backward_cpu(dweights, logits, experts, rule)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(weights, torch.cat([w for w, _ in alone])) and torch.equal(experts, torch.cat([e for _, e in alone]))
    rows = [route_backward_cpu(dweights[t : t + 1], logits[t : t + 1], experts[t : t + 1], rule) for t in range(67)]
    assert torch.equal(gradient, torch.cat(rows))


@pytest.mark.parametrize("T", [0, 1])
def test_few_tokens(T):
    check(draw(T, 12), None, rule_of(3))


def test_arguments_need_not_be_contiguous():
    base = draw(24, 24)
    for logits in (base.t(), base[::2, 1:18], base[:, :1].expand(24, 9)):
        check(logits, base[: logits.shape[1], 0], rule_of(3))


def test_eager_calls_and_the_operator_give_the_same_bits():
    logits = draw(11, 16, torch.bfloat16).requires_grad_()
    rule = (3, "softmax", True, False, 1.5, 1, 1, "top2_sum", NORM_EPS)
    direct = F.route(logits, 3, norm_topk_prob=False, routed_scaling_factor=1.5)
    operator = torch.ops.fusedonemoe.route(logits, None, *rule, library.BUILD)
    gradients = [torch.autograd.grad(weights.square().sum(), logits)[0] for weights, _ in (direct, operator)]
    for first, second in zip((*direct, gradients[0]), (*operator, gradients[1]), strict=True):
        assert torch.equal(first, second)


def test_opcheck():
    logits, rule = draw(5, 9), (2, "sigmoid", True, True, 2.0, 3, 2, "max", 1e-6)
    weights, experts = torch.ops.fusedonemoe.route_cpu.default(logits, draw(1, 9)[0], *rule)
    torch.library.opcheck(torch.ops.fusedonemoe.route_cpu.default, (logits, draw(1, 9)[0], *rule))
    torch.library.opcheck(torch.ops.fusedonemoe.route_cpu_backward.default, (weights, logits, experts, *rule))
