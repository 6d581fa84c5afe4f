"""Top-p routing, shared experts in the tensor, and candle-moe's top-k softmax, against the oracle."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import reference
from fusedonemoe.ops.reference import balance as reference_balance
from fusedonemoe.testing import assert_within_budget, exact_float64, make_logits, make_mlp_inputs

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BIAS = [0.3, -0.2, 0.05, 0.0, -0.4, 0.25, 0.1, -0.1, 0.0, 0.15, -0.3, 0.2]
# Thresholds that no probability of make_logits comes near: at 0 all experts are kept, at 0.9 none.
TOP_P = [(0.0, 1.0), (0.05, 1.0), (0.05, 0.5), (0.15, 1.0), (0.11, 2.0), (0.9, 1.0)]
SHARED = [(4, 2), (4, 1), (4, 0), (4, 4), (12, 3), (1, 0), (1, 1), (12, 12), (12, 0)]

every_threshold = pytest.mark.parametrize(("top_p", "temperature"), TOP_P)
every_split = pytest.mark.parametrize(("top_k", "shared"), SHARED)
every_impl = pytest.mark.parametrize("impl", ["auto", "dense"])


def random_like(tensor, seed=1):
    return torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


# Top-p


@every_threshold
def test_top_p_equals_the_oracle_in_values_and_gradient(top_p, temperature):
    logits = make_logits(9, 12, dtype=torch.float64, requires_grad=True)
    weights, experts = F.route_top_p(logits, top_p, temperature=temperature)
    exact_weights, exact_experts = reference_balance.route_top_p(exact_float64(logits), top_p, temperature=temperature)
    np.testing.assert_array_equal(experts, exact_experts)
    assert experts.dtype == torch.int64
    assert_close(weights, torch.from_numpy(exact_weights), rtol=1e-12, atol=0)
    kept = int((experts >= 0).sum())
    assert {0.0: kept == 108, 0.9: kept == 0}.get(top_p, 0 < kept < 108)

    dweights = random_like(weights)
    (dlogits,) = torch.autograd.grad(weights, logits, dweights)
    exact = reference_balance.route_top_p_backward(*exact_float64(dweights, logits, experts))
    assert_close(dlogits, torch.from_numpy(exact), rtol=1e-10, atol=1e-15)


def test_top_p_keeps_what_exceeds_the_threshold_only():
    # Four equal probabilities of exactly one quarter: the comparison is strict.
    assert (F.route_top_p(torch.zeros(2, 4), 0.25)[1] == -1).all()
    assert (F.route_top_p(torch.zeros(2, 4), 0.2499)[1] == torch.arange(4)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_p_in_low_precision_is_as_good_as_plain_pytorch(dtype):
    logits = make_logits(40, 12, dtype=dtype, requires_grad=True)
    weights, experts = F.route_top_p(logits, 0.05)
    exact, exact_experts = reference_balance.route_top_p(exact_float64(logits), 0.05)
    np.testing.assert_array_equal(experts, exact_experts)
    wide = logits.float()
    plain = wide.sigmoid() * (wide.softmax(-1) > 0.05)
    assert_within_budget(weights, plain, exact)
    dweights = random_like(plain)
    (grad,) = torch.autograd.grad(weights, logits, dweights)
    (plain_grad,) = torch.autograd.grad(plain, logits, dweights)
    exact_grad = reference_balance.route_top_p_backward(*exact_float64(dweights, logits, experts))
    assert grad.dtype == dtype
    assert_within_budget(grad, plain_grad, exact_grad)


def test_noise_is_added_in_training_only_and_scaled_by_the_threshold():
    logits = make_logits(50, 12, dtype=torch.float64)
    quiet = F.route_top_p(logits, 0.05, noise=0.5)
    assert torch.equal(quiet[1], F.route_top_p(logits, 0.05)[1])
    loud = F.route_top_p(logits, 0.05, noise=0.5, training=True, generator=torch.Generator().manual_seed(3))
    draw = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).numpy()
    exact_weights, exact_experts = reference_balance.route_top_p(exact_float64(logits), 0.05, noise=0.5 * 0.05 * draw)
    np.testing.assert_array_equal(loud[1], exact_experts)
    assert_close(loud[0], torch.from_numpy(exact_weights), rtol=1e-12, atol=0)
    assert not torch.equal(loud[1], quiet[1])


def test_noise_without_a_generator_follows_the_seed():
    logits = make_logits(50, 12)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(F.route_top_p(logits, 0.05, noise=1.0, training=True)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_dropped_experts_are_skipped_by_the_experts():
    inputs = make_mlp_inputs(7, 6, 3, 5, 5, dtype=torch.float64)
    logits = make_logits(7, 5, dtype=torch.float64, requires_grad=True)
    weights, experts = F.route_top_p(logits, 0.2)
    assert 0 < int((experts < 0).sum()) < experts.numel()
    y = F.experts_mlp(inputs.x, experts, weights, inputs.up_proj, inputs.down_proj)
    exact_routing = reference_balance.route_top_p(exact_float64(logits), 0.2)[::-1]
    exact = reference.experts_mlp(exact_float64(inputs.x), *exact_routing, *exact_float64(inputs.up_proj, inputs.down_proj))
    assert_close(y, torch.from_numpy(exact), rtol=1e-10, atol=1e-12)
    y.square().sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, experts >= 0)


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (6,), (2, 3, 6), (2, 0, 6), (5, 1)])
def test_top_p_keeps_leading_dimensions(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, experts = F.route_top_p(logits, 0.1, noise=0.1, training=True)
    assert weights.shape == experts.shape == shape
    flat = F.route_top_p(logits.detach().reshape(-1, shape[-1]), 0.1)
    again = F.route_top_p(logits, 0.1)
    assert torch.equal(again[0].reshape(flat[0].shape), flat[0]) and torch.equal(again[1].reshape(flat[1].shape), flat[1])
    weights.sum().backward()
    assert logits.grad is not None and logits.grad.shape == shape


def test_masked_logits_are_never_kept():
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf] * 3], requires_grad=True)
    weights, experts = F.route_top_p(logits, 0.0)
    np.testing.assert_array_equal(experts, [[0, -1, 2], [-1, -1, -1]])
    weights.sum().backward()
    assert torch.isfinite(weights).all() and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_top_p_gradcheck():
    logits = make_logits(3, 12, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: F.route_top_p(v, 0.05)[0], logits)
    assert gradgradcheck(lambda v: F.route_top_p(v, 0.05)[0], logits)


# Shared experts


@every_split
@every_impl
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no_bias", "bias"])
@pytest.mark.parametrize("norm", [True, False])
def test_shared_equals_the_oracle_in_values_and_gradient(top_k, shared, impl, bias, norm):
    logits = make_logits(9, 12, dtype=torch.float64, requires_grad=True)
    bias_E = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    weights, experts = F.route_with_shared(logits, top_k, shared, selection_bias=bias_E, norm_topk_prob=norm, impl=impl)
    exact_weights, exact_experts = reference_balance.route_with_shared(
        exact_float64(logits), top_k, shared, selection_bias=bias, norm_topk_prob=norm
    )
    np.testing.assert_array_equal(experts, exact_experts)
    assert experts.dtype == torch.int64
    assert_close(weights, torch.from_numpy(exact_weights), rtol=1e-12, atol=0)
    if norm:
        assert_close(weights.sum(-1), torch.full((9,), float((shared > 0) + (top_k > shared)), dtype=torch.float64))

    dweights = random_like(weights)
    (dlogits,) = torch.autograd.grad(weights, logits, dweights)
    exact = reference_balance.route_with_shared_backward(
        exact_float64(dweights), exact_float64(logits), exact_experts, shared, norm_topk_prob=norm
    )
    assert_close(dlogits, torch.from_numpy(exact), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shared_in_low_precision_is_as_good_as_plain_pytorch(dtype):
    logits = make_logits(40, 12, dtype=dtype, requires_grad=True)
    weights, experts = F.route_with_shared(logits, 5, 2)
    exact, exact_experts = reference_balance.route_with_shared(exact_float64(logits), 5, 2)
    np.testing.assert_array_equal(experts, exact_experts)
    wide = logits.float()
    picked = wide[:, :10].softmax(-1).topk(3).values
    plain = torch.cat((picked / picked.sum(-1, keepdim=True), wide[:, 10:].softmax(-1)), -1)
    assert_within_budget(weights, plain, exact)
    dweights = random_like(plain)
    (grad,) = torch.autograd.grad(weights, logits, dweights)
    (plain_grad,) = torch.autograd.grad(plain, logits, dweights)
    exact_grad = reference_balance.route_with_shared_backward(exact_float64(dweights), exact_float64(logits), exact_experts, 2)
    assert grad.dtype == dtype
    assert_within_budget(grad, plain_grad, exact_grad, slack=4.0)


def test_a_bias_of_minus_infinity_on_the_shared_experts_changes_nothing():
    # MoMoE keeps its biases so.
    logits = make_logits(9, 12)
    bias = torch.tensor([*BIAS[:10], -torch.inf, -torch.inf])
    for a, b in zip(
        F.route_with_shared(logits, 4, 2, selection_bias=bias),
        F.route_with_shared(logits, 4, 2, selection_bias=torch.tensor(BIAS)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_ties_among_routed_experts_go_to_the_lower_id():
    _, experts = F.route_with_shared(torch.zeros(2, 6), 4, 2)
    np.testing.assert_array_equal(experts, [[0, 1, 4, 5]] * 2)


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (6,), (2, 3, 6), (2, 0, 6)])
def test_shared_keeps_leading_dimensions(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, experts = F.route_with_shared(logits, 3, 1)
    assert weights.shape == experts.shape == (*shape[:-1], 3)
    flat_weights, flat_experts = reference_balance.route_with_shared(exact_float64(logits).reshape(-1, 6), 3, 1)
    np.testing.assert_array_equal(experts.reshape(-1, 3), flat_experts)
    np.testing.assert_allclose(weights.detach().reshape(-1, 3), flat_weights, rtol=1e-6)
    weights.sum().backward()
    assert logits.grad is not None and logits.grad.shape == shape


@pytest.mark.parametrize("norm", [True, False])
def test_shared_gradcheck(norm):
    logits = make_logits(3, 12, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: F.route_with_shared(v, 5, 2, norm_topk_prob=norm)[0], logits)


# candle-moe's


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "K"), [(9, 3), (1, 1), (5, 12), (0, 2)])
@every_impl
def test_topk_softmax_equals_the_oracle(dtype, T, K, impl):
    logits = make_logits(T, 12, dtype=dtype, requires_grad=True)
    found = F.topk_softmax(logits, K, impl=impl)
    exact_weights, exact_experts, exact_rows = reference_balance.topk_softmax(exact_float64(logits), K)
    np.testing.assert_array_equal(found.experts, exact_experts)
    np.testing.assert_array_equal(found.token_expert_indices, exact_rows)
    np.testing.assert_allclose(found.weights.detach(), exact_weights, rtol=1e-5)
    assert found.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (dlogits,) = torch.autograd.grad(found.weights.square().sum(), logits)
    exact = reference.route_backward(2 * exact_weights, exact_float64(logits), K, norm_topk_prob=False)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 4e-3)
    np.testing.assert_allclose(dlogits.double(), exact, rtol=tolerance, atol=tolerance)


def test_source_rows_count_tokens_over_all_leading_dimensions():
    found = F.topk_softmax(make_logits(6, 4).reshape(2, 3, 4), 2)
    np.testing.assert_array_equal(found.token_expert_indices, np.arange(12).reshape(2, 2, 3).transpose(1, 2, 0))


# All of them


def variants(logits):
    weights, experts = F.route_top_p(logits, 0.1, noise=0.0, training=True)
    shared_weights, shared_experts = F.route_with_shared(logits, 3, 1, selection_bias=torch.zeros(6, device=logits.device))
    return weights, experts, shared_weights, shared_experts, *F.topk_softmax(logits, 2)


def test_compiled_with_a_dynamic_number_of_tokens():
    torch._dynamo.reset()
    compiled = torch.compile(variants, fullgraph=True, dynamic=True)
    for T in (7, 12, 3):
        logits = make_logits(T, 6, requires_grad=True)
        for found, expected in zip(compiled(logits), variants(logits), strict=True):
            assert_close(found, expected)
        (grad,) = torch.autograd.grad(sum(v.square().sum() for v in compiled(logits) if v.is_floating_point()), logits)
        (expected,) = torch.autograd.grad(sum(v.square().sum() for v in variants(logits) if v.is_floating_point()), logits)
        assert_close(grad, expected)


def test_noise_is_drawn_in_a_compiled_graph():
    torch._dynamo.reset()
    logits = make_logits(100, 6)
    noisy = torch.compile(lambda v: F.route_top_p(v, 0.1, noise=1.0, training=True)[1], fullgraph=True)
    first, second = noisy(logits), noisy(logits)
    assert not torch.equal(first, second)
    assert 0 < int((first >= 0).sum()) < 600


def test_logits_need_not_be_contiguous():
    base = make_logits(12, 8)
    for logits in (base.t()[:, :6], base[::2, 1:7], base[:, :1].expand(12, 6), base.flip(0)[:, :6]):
        contiguous = variants(logits.clone(memory_format=torch.contiguous_format))
        for strided, expected in zip(variants(logits), contiguous, strict=True):
            assert_close(strided, expected)  # ids exactly; torch's softmax rounds by the layout


def test_equal_inputs_give_equal_bits():
    logits = make_logits(50, 6, requires_grad=True)
    runs = []
    for _ in range(2):
        found = variants(logits)
        runs.append((*found, *torch.autograd.grad(sum(v.square().sum() for v in found if v.is_floating_point()), logits)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_leaves_routing_in_float32():
    logits = make_logits(5, 6)
    expected = variants(logits)
    with torch.autocast("cpu", torch.bfloat16):
        for found, wanted in zip(variants(logits), expected, strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        ("top_p", {"logits": [1.0]}, TypeError, r"^logits must be a torch.Tensor, got list$"),
        ("top_p", {"logits": torch.zeros(2, 6).long()}, TypeError, r"^logits must be float64, .* got torch.int64$"),
        ("top_p", {"logits": torch.zeros(3, 0)}, ValueError, r"^logits must have shape \[..., E\] with E >= 1, got \(3, 0\)$"),
        ("top_p", {"top_p": 1.0}, ValueError, r"^top_p must be from 0 to below 1, got 1.0$"),
        ("top_p", {"top_p": -0.1}, ValueError, r"^top_p must be from 0 to below 1, got -0.1$"),
        ("top_p", {"top_p": float("nan")}, ValueError, r"^top_p must be from 0 to below 1, got nan$"),
        ("top_p", {"top_p": "0.1"}, TypeError, r"^top_p must be a number, got '0.1'$"),
        ("top_p", {"temperature": 0}, ValueError, r"^temperature must be above 0 and finite, got 0$"),
        ("top_p", {"temperature": True}, TypeError, r"^temperature must be a number, got True$"),
        ("top_p", {"noise": -1.0}, ValueError, r"^noise must be at least 0 and finite, got -1.0$"),
        ("top_p", {"noise": float("inf")}, ValueError, r"^noise must be at least 0 and finite, got inf$"),
        ("shared", {"logits": torch.zeros(())}, ValueError, r"^logits must have shape \[..., E\] with E >= 1, got \(\)$"),
        ("shared", {"top_k": 7}, ValueError, r"^top_k must be from 1 to the number of experts \(6\), got 7$"),
        ("shared", {"top_k": 0}, ValueError, r"^top_k must be from 1 to the number of experts \(6\), got 0$"),
        ("shared", {"top_k": 2.0}, TypeError, r"^top_k must be an integer, got 2.0$"),
        ("shared", {"num_shared_experts": 4}, ValueError, r"^num_shared_experts must be from 0 to top_k \(3\), got 4$"),
        ("shared", {"num_shared_experts": -1}, ValueError, r"^num_shared_experts must be from 0 to top_k \(3\), got -1$"),
        ("shared", {"num_shared_experts": None}, TypeError, r"^num_shared_experts must be an integer, got None$"),
        ("shared", {"selection_bias": torch.zeros(5)}, ValueError, r"^selection_bias must have shape \(6,\), got \(5,\)$"),
        ("shared", {"selection_bias": [0.0] * 6}, TypeError, r"^selection_bias must be a torch.Tensor, got list$"),
        (
            "shared",
            {"selection_bias": torch.zeros(6, device="meta")},
            ValueError,
            r"^selection_bias must be on the device of logits \(cpu\), got meta$",
        ),
        ("shared", {"impl": "grouped"}, ValueError, r"^impl must be one of \('auto', 'dense', 'portable'\), got 'grouped'$"),
        ("topk", {"top_k": 7}, ValueError, r"^top_k must be from 1 to 6, .* got 7$"),
        ("topk", {"top_k": None}, TypeError, r"^top_k must be an integer, got None$"),
        ("topk", {"logits": [1.0]}, TypeError, r"^logits must be a torch.Tensor, got list$"),
    ],
)
def test_bad_arguments_are_named(function, changes, error, message):
    functions: dict[str, tuple[Any, dict[str, Any]]] = {
        "top_p": (F.route_top_p, {"top_p": 0.1}),
        "shared": (F.route_with_shared, {"top_k": 3, "num_shared_experts": 1}),
        "topk": (F.topk_softmax, {"top_k": 2}),
    }
    call, arguments = functions[function]
    with pytest.raises(error, match=message):
        call(**{"logits": torch.zeros(2, 6), **arguments, **changes})
