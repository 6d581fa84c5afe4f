"""Capacity: which rows stay, what is dropped and counted, gradients, edges and refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops.reference import balance as reference_balance
from fusedonemoe.testing import ROUTINGS, exact_float64, make_experts

SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)


def make_weights(experts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(experts.shape, generator=generator) + 0.5).to(dtype).requires_grad_()


def check(experts, weights, num_experts, factor, capacity):
    """Values, the dropped count and the gradient against the oracle at the capacity that the test worked out."""
    kept_experts, kept_weights, dropped = F.apply_capacity(experts, weights, num_experts, factor)
    ids, values = exact_float64(experts, weights)
    exact_experts, exact_weights, exact_dropped = reference_balance.apply_capacity(ids, values, num_experts, capacity)
    np.testing.assert_array_equal(kept_experts, exact_experts)
    np.testing.assert_array_equal(exact_float64(kept_weights), exact_weights)
    assert int(dropped) == exact_dropped and dropped.shape == () and dropped.dtype == torch.int64
    assert kept_weights.dtype == weights.dtype
    dweights = torch.arange(1.0, weights.numel() + 1).reshape(weights.shape).to(weights.dtype)
    (grad,) = torch.autograd.grad(kept_weights, weights, dweights)
    assert torch.equal(grad, torch.where(torch.from_numpy(exact_weights) == 0, 0, dweights))
    return exact_dropped


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("factor", "capacity"), [(0.5, 5), (1.0, 9), (1.25, 11), (2, 18), (100.0, 858)])
def test_the_oracle_agrees(routing, factor, capacity):
    experts = make_experts(20, 7, 3, routing=routing)  # 60 rows, 8.57 for each expert at balance
    dropped = check(experts, make_weights(experts), 7, factor, capacity)
    if factor in (0.5, 100.0):
        assert (dropped > 0) == (factor == 0.5)


def test_the_factor_means_its_decimals():
    # 1.1 * 110 is 121.00000000000001 in floating point.
    assert 1.1 * 110 > 121
    experts = torch.zeros(110, 1, dtype=torch.int64)
    assert int(F.apply_capacity(experts, make_weights(experts), 1, 1.1)[2]) == 0
    experts = torch.cat((torch.zeros(125, 1), torch.ones(95, 1))).long()  # 220 rows: 121 for each of two experts
    assert int(F.apply_capacity(experts, make_weights(experts), 2, 1.1)[2]) == 4


def test_rows_are_taken_in_token_order():
    experts = torch.tensor([[1, 0], [1, 1], [0, 1]])
    weights = torch.arange(1.0, 7.0).reshape(3, 2)
    kept, kept_weights, dropped = F.apply_capacity(experts, weights, 2, 2 / 3)  # 2 rows for each
    assert kept.tolist() == [[1, 0], [1, -1], [0, -1]]
    assert kept_weights.tolist() == [[1, 2], [3, 0], [5, 0]]
    assert dropped == 2


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**16))
@settings(max_examples=60)
def test_any_routing(T, K, E, quarters, seed):
    experts = torch.randint(-2, E + 2, (T, K), generator=torch.Generator().manual_seed(seed))
    check(experts, make_weights(experts), E, quarters / 4, -(-quarters * T * K // (4 * E)))


@pytest.mark.parametrize("dtype", SIGNED)
def test_signed_ids_keep_their_dtype(dtype):
    experts = make_experts(20, 5, 2, routing="skewed").to(dtype)
    check(experts, make_weights(experts), 5, 0.5, 4)
    assert F.apply_capacity(experts, make_weights(experts), 5, 0.5)[0].dtype == dtype


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_unsigned_ids_become_int64_since_they_have_no_minus_one(dtype):
    experts = make_experts(20, 5, 2, routing="skewed").to(dtype)
    kept, _, dropped = F.apply_capacity(experts, make_weights(experts), 5, 0.5)
    assert kept.dtype == torch.int64 and dropped > 0
    np.testing.assert_array_equal(kept, F.apply_capacity(experts.long(), make_weights(experts), 5, 0.5)[0])


def test_a_narrow_dtype_may_not_hold_the_number_of_experts():
    experts = torch.full((6, 1), 127, dtype=torch.int8)
    kept, _, dropped = F.apply_capacity(experts, make_weights(experts), 300, 1.0)
    assert kept.flatten().tolist() == [127, -1, -1, -1, -1, -1] and dropped == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype_and_their_values(dtype):
    experts = make_experts(20, 5, 2, routing="skewed")
    check(experts, make_weights(experts, dtype), 5, 0.5, 4)


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (3,), (2, 3, 2), (2, 0, 2)])
def test_leading_dimensions_are_kept(shape):
    experts, E = torch.zeros(shape, dtype=torch.int64), 3
    kept, weights, dropped = F.apply_capacity(experts, torch.ones(shape), E, 1.0)
    assert kept.shape == weights.shape == shape
    N = math.prod(shape)
    assert dropped == N - math.ceil(N / E)


def test_ids_need_not_be_contiguous():
    experts, weights = make_experts(20, 5, 2).t(), torch.rand(20, 2).t()
    strided = F.apply_capacity(experts, weights, 5, 0.5)
    contiguous = F.apply_capacity(experts.contiguous(), weights.contiguous(), 5, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


def test_gradcheck():
    experts = make_experts(6, 3, 2, routing="skewed")
    weights = make_weights(experts, torch.float64)
    assert gradcheck(lambda w: F.apply_capacity(experts, w, 3, 0.5)[1], weights)


def test_what_is_dropped_is_skipped_by_the_experts_and_gets_no_gradient():
    x, logits = torch.randn(8, 4), torch.randn(8, 2, requires_grad=True)
    weights, experts = F.route(logits, 1, norm_topk_prob=False)
    kept, kept_weights, dropped = F.apply_capacity(torch.zeros_like(experts), weights, 2, 0.5)
    assert dropped == 6
    y = F.experts_mlp(x, kept, kept_weights, torch.randn(2, 6, 4), torch.randn(2, 4, 3))
    y.square().sum().backward()
    assert logits.grad is not None
    assert (y[:2] != 0).any(1).all() and (y[2:] == 0).all()
    assert (logits.grad[:2] != 0).all() and (logits.grad[2:] == 0).all()


def test_compiled_with_a_dynamic_number_of_tokens():
    torch._dynamo.reset()
    compiled = torch.compile(F.apply_capacity, fullgraph=True, dynamic=True)
    for T in (20, 7, 33):
        experts = make_experts(T, 5, 2, routing="skewed")
        weights = make_weights(experts)
        found, expected = (f(experts, weights, 5, 1.1) for f in (compiled, F.apply_capacity))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
        assert found[2] > 0
        grads = [torch.autograd.grad(out[1].square().sum(), weights)[0] for out in (found, expected)]
        assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"experts": [[0]]}, TypeError, r"^experts must be a torch.Tensor, got list$"),
        ({"experts": torch.zeros(2, 2)}, TypeError, r"^experts must have an integer dtype, got torch.float32$"),
        ({"experts": torch.tensor(0)}, ValueError, r"^experts must have shape \[..., K\] with K >= 1, got \(\)$"),
        ({"weights": torch.zeros(2, 2).long()}, TypeError, r"^weights must be float64, .* got torch.int64$"),
        ({"weights": torch.zeros(2, 1)}, ValueError, r"^weights must have shape \(2, 2\), got \(2, 1\)$"),
        (
            {"weights": torch.zeros(2, 2, device="meta")},
            ValueError,
            r"^weights must be on the device of experts \(cpu\), got meta$",
        ),
        ({"num_experts": 0}, ValueError, r"^num_experts must be at least 1, got 0$"),
        ({"num_experts": 2.0}, TypeError, r"^num_experts must be an integer, got 2.0$"),
        ({"capacity_factor": 0.0}, ValueError, r"^capacity_factor must be above 0 and finite, got 0.0$"),
        ({"capacity_factor": float("inf")}, ValueError, r"^capacity_factor must be above 0 and finite, got inf$"),
        ({"capacity_factor": "1"}, TypeError, r"^capacity_factor must be a number, got '1'$"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    experts = torch.zeros(2, 2, dtype=torch.int64)
    arguments: dict[str, Any] = {"experts": experts, "weights": torch.ones(2, 2), "num_experts": 2, "capacity_factor": 1.0}
    with pytest.raises(error, match=message):
        F.apply_capacity(**{**arguments, **changes})
