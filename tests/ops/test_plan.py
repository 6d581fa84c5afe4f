"""The plan of a routing: a stable sort by expert with everything out of range at the end."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedonemoe import functional as F
from fusedonemoe.ops import reference
from fusedonemoe.ops.plan import in_range, inverse_order
from fusedonemoe.testing import ROUTINGS, make_experts
from tests.strategies import id_dtypes, routings, shapes

SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def assert_plan(plan, experts, num_experts):
    order, offsets = reference.plan(experts, num_experts)
    np.testing.assert_array_equal(plan.order, order)
    np.testing.assert_array_equal(plan.offsets, offsets)
    assert plan.order.dtype == plan.offsets.dtype == torch.int32


@given(shapes().flatmap(lambda shape: st.tuples(st.just(shape), routings(shape.T, shape.E, shape.K), id_dtypes)))
@settings(max_examples=80)
def test_plan_equals_the_oracle(drawn):
    shape, experts, dtype = drawn
    assert_plan(F.plan(experts.to(dtype), shape.E), experts, shape.E)
    counts = F.tokens_per_expert(experts.to(dtype), shape.E)
    np.testing.assert_array_equal(counts, np.diff(reference.plan(experts, shape.E)[1]))
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (1, 6, 6), (300, 5, 3), (64, 300, 8)])
def test_plan_of_every_routing(routing, T, E, K):
    experts = make_experts(T, E, K, routing=routing)
    assert_plan(F.plan(experts, E), experts, E)


def test_rows_of_one_expert_stay_in_token_order():
    T, E = 5000, 3  # long enough that an unstable sort shows
    experts = make_experts(T, E, 2)
    order, offsets = F.plan(experts, E)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert (order[first:last].diff() > 0).all()


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED, ids=str)
@pytest.mark.parametrize("num_experts", [4, 100, 300])
def test_any_integer_dtype(dtype, num_experts):
    top = torch.iinfo(dtype).max
    values = [0, 3, top, 1, 3, 2, top - 1, 0]
    if dtype.is_signed:
        values[5] = -1
    # uint64's maximum does not fit the oracle's int64; both read it as out of range.
    exact = torch.tensor([min(v, 2**62) for v in values]).reshape(4, 2)
    experts = torch.from_numpy(np.array(values, dtype=str(dtype).removeprefix("torch."))).reshape(4, 2)
    assert_plan(F.plan(experts, num_experts), exact, num_experts)
    counted = exact[(exact >= 0) & (exact < num_experts)]
    assert torch.equal(F.tokens_per_expert(experts, num_experts), torch.bincount(counted, minlength=num_experts))
    assert torch.equal(in_range(experts, num_experts), (exact >= 0) & (exact < num_experts))


def test_any_shape_and_stride():
    experts = make_experts(12, 5, 4)
    expected = F.plan(experts, 5)
    for same in (experts.reshape(3, 4, 4), experts.flatten(), experts.t().contiguous().t()):
        assert all(map(torch.equal, F.plan(same, 5), expected))
        assert torch.equal(F.tokens_per_expert(same, 5), expected.offsets.diff().long())
    assert_plan(F.plan(experts[::2, 1:3], 5), experts[::2, 1:3].contiguous(), 5)


def test_all_out_of_range_and_none():
    order, offsets = F.plan(torch.tensor([[-1, 7], [3, 4]]), 3)
    assert order.tolist() == [0, 1, 2, 3] and offsets.tolist() == [0, 0, 0, 0]
    order, offsets = F.plan(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert order.shape == (0,) and offsets.tolist() == [0, 0, 0, 0]
    assert F.tokens_per_expert(torch.tensor([[-1, 7], [3, 4]]), 3).tolist() == [0, 0, 0]


def test_inverse_order_undoes_the_order():
    order = F.plan(make_experts(40, 6, 3, routing="out_of_range"), 6).order
    position = inverse_order(order)
    rows = torch.arange(120, dtype=torch.int32)
    assert torch.equal(order[position.long()], rows) and torch.equal(position[order.long()], rows)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0, 1]], 2), TypeError, "^experts must be a torch.Tensor, got list$"),
        ((torch.zeros(2, 2), 2), TypeError, "^experts must have an integer dtype, got torch.float32$"),
        ((torch.zeros(2, 2, dtype=torch.bool), 2), TypeError, "^experts must have an integer dtype, got torch.bool$"),
        ((torch.zeros(2, 2, dtype=torch.complex64), 2), TypeError, "^experts must have an integer dtype, got torch.complex64$"),
        ((torch.zeros(2, 2).long(), 0), ValueError, "^num_experts must be at least 1, got 0$"),
        ((torch.zeros(2, 2).long(), -3), ValueError, "^num_experts must be at least 1, got -3$"),
        ((torch.zeros(2, 2).long(), 2.5), TypeError, "^num_experts must be an integer, got 2.5$"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    for function in (F.plan, F.tokens_per_expert):
        with pytest.raises(error, match=message):
            function(*arguments)
