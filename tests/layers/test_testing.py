"""The input makers and the error budget that every other test leans on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedonemoe import testing
from fusedonemoe.ops import reference
from tests.strategies import merged_inputs, mlp_inputs, routings, shapes


def fields(inputs):
    return {name: value for name, value in vars(inputs).items() if value is not None}


@pytest.fixture
def products():
    """One matrix product: exact, in bfloat16, and in bfloat16 by another order of summation."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    plain = a @ b
    other = (a[:, :32].float() @ b[:32].float() + a[:, 32:].float() @ b[32:].float()).bfloat16()
    return other, plain, a.double() @ b.double()


def test_budget_accepts_an_honest_result(products):
    actual, plain, exact = products
    testing.assert_within_budget(actual, plain, exact)
    testing.assert_within_budget(actual, plain, exact.numpy())


def test_budget_rejects_zeros_and_wrong_results(products):
    _, plain, exact = products
    scale_off = plain * 1.05
    one_wrong = plain.clone()
    one_wrong[3, 4] += 1.0
    row_missing = plain.clone()
    row_missing[5] = 0
    for wrong in (torch.zeros_like(plain), -plain, scale_off, one_wrong, row_missing, plain.T.contiguous()):
        with pytest.raises(AssertionError, match=r"^y: (max|rms) error .* exceeds .* = 2 \* .* \(plain\) \+ 2 \*"):
            testing.assert_within_budget(wrong, plain, exact, name="y")


def test_budget_sees_a_small_error_spread_everywhere():
    exact = torch.ones(10_000, dtype=torch.float64)
    plain, actual = torch.ones(10_000), torch.full((10_000,), 1 + 1e-4)
    plain[0] += 1e-3  # one outlier opens the max norm; the rms norm still holds
    with pytest.raises(AssertionError, match="rms error"):
        testing.assert_within_budget(actual, plain, exact)


def test_a_tolerance_that_zeros_would_meet_is_refused(products):
    actual, plain, exact = products
    for result in (actual, torch.zeros_like(plain)):
        with pytest.raises(ValueError, match=r"^y: tolerance .* would accept zeros"):
            testing.assert_within_budget(result, plain * 0.4, exact, name="y")
        with pytest.raises(ValueError, match="would accept zeros"):
            testing.assert_within_budget(result, plain, exact, factor=1e4)


def test_factor_and_slack_set_the_bound():
    exact = torch.ones(4, dtype=torch.float64)
    plain = torch.full((4,), 1 + 2**-10)
    bound = 2 * 2**-10 + 2 * torch.finfo(torch.float32).eps
    testing.assert_within_budget(torch.full((4,), 1 + bound), plain, exact)
    with pytest.raises(AssertionError):
        testing.assert_within_budget(torch.full((4,), 1 + bound + 2**-22), plain, exact)
    testing.assert_within_budget(torch.full((4,), 1 + 2.5 * 2**-10), plain, exact, factor=3)
    testing.assert_within_budget(torch.full((4,), 1 + bound + 2**-22), plain, exact, slack=4)


def test_an_exact_zero_must_be_met():
    zero = torch.zeros(3)
    testing.assert_within_budget(zero, zero, zero.double())
    with pytest.raises(AssertionError, match="max error 1e-30 exceeds 0 "):
        testing.assert_within_budget(zero + 1e-30, zero, zero.double())


def test_shape_dtype_and_finiteness_are_checked():
    exact, plain = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3)
    budget = testing.assert_within_budget
    with pytest.raises(AssertionError, match=r"actual: shape \(3, 2\), expected \(2, 3\)"):
        budget(torch.ones(3, 2), plain, exact)
    with pytest.raises(AssertionError, match=r"shape \(1, 3\)"):
        budget(torch.ones(1, 3), plain, exact)  # would broadcast
    with pytest.raises(AssertionError, match=r"dtype torch.bfloat16, expected torch.float32"):
        budget(plain.bfloat16(), plain, exact)
    for value in (torch.nan, torch.inf):
        broken = plain.clone()
        broken[0, 1] = value
        with pytest.raises(AssertionError, match="1 of 6 values are not finite"):
            budget(broken, plain, exact)
        with pytest.raises(ValueError, match="must be finite"):
            budget(plain, broken, exact)
        with pytest.raises(ValueError, match="must be finite"):
            budget(plain, plain, broken.double())
    with pytest.raises(TypeError, match="exact must be float64, got float32"):
        budget(plain, plain, plain)
    with pytest.raises(ValueError, match="plain has shape"):
        budget(plain, plain, exact[0])
    budget(torch.ones(0, 3), torch.ones(0, 3), exact[:0])
    with pytest.raises(AssertionError, match="shape"):
        budget(plain, torch.ones(0, 3), exact[:0])


def test_exact_float64_copies_and_loses_nothing():
    x = torch.tensor([1.0, 2**-7, 3e38], dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([-1, 2], dtype=torch.int16)
    x_exact, nothing, ids_exact = testing.exact_float64(x, None, ids)
    assert nothing is None and testing.exact_float64(None) is None
    assert x_exact.dtype == np.float64 and ids_exact.dtype == np.int64
    np.testing.assert_array_equal(x_exact, x.tolist())
    source = torch.ones(2, dtype=torch.float64)
    testing.exact_float64(source)[0] = 5.0
    assert source.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("routing", testing.ROUTINGS)
def test_mlp_inputs_lead_to_outputs_of_order_one(gated, routing):
    inputs = testing.make_mlp_inputs(64, 48, 32, 6, 3, gated=gated, bias=True, routing=routing)
    names = list(fields(inputs))
    y = reference.experts_mlp(**dict(zip(names, testing.exact_float64(*fields(inputs).values()), strict=True)), gated=gated)
    assert 0.1 < testing.ErrorNorms.of(y).rms < 3
    assert all(value.is_contiguous() for value in fields(inputs).values())


def test_merged_inputs_lead_to_outputs_of_order_one():
    inputs = testing.make_merged_inputs(64, 48, 32, 6, 3)
    h = reference.experts_merged(*testing.exact_float64(inputs.x, inputs.experts, inputs.weights, inputs.proj))
    assert h.shape == (64, 32) and 0.3 < testing.ErrorNorms.of(h).rms < 3


def test_a_seed_means_the_same_values_in_every_setting():
    shape = (9, 8, 5, 4, 2)
    state = torch.get_rng_state()
    base = testing.make_mlp_inputs(*shape)
    again = fields(testing.make_mlp_inputs(*shape, bias=True, routing="out_of_range"))
    for name in ("x", "weights", "up_proj", "down_proj"):
        assert torch.equal(getattr(base, name), again[name])
    low = testing.make_mlp_inputs(*shape, dtype=torch.bfloat16)
    assert torch.equal(low.x, base.x.bfloat16()) and low.weights.dtype == torch.float32
    assert not torch.equal(testing.make_mlp_inputs(*shape, seed=1).x, base.x)
    wide = testing.make_merged_inputs(*shape, dtype=torch.float64, experts_dtype=torch.int32, requires_grad=True)
    assert wide.weights.dtype == torch.float64 and wide.experts.dtype == torch.int32
    assert all(value.is_leaf and value.requires_grad for value in (wide.x, wide.weights, wide.proj))
    assert not base.x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_routings_do_what_their_names_say():
    T, E, K = 200, 6, 3
    ids = {routing: testing.make_experts(T, E, K, routing=routing) for routing in testing.ROUTINGS}
    for routing, experts in ids.items():
        assert experts.shape == (T, K) and experts.dtype == torch.int64
        if routing != "out_of_range":
            assert experts.min() >= 0 and experts.max() < E

    def counts(routing):
        return torch.bincount(ids[routing].flatten(), minlength=E)

    def repeats(routing):
        return (ids[routing].sort(dim=1).values.diff(dim=1) == 0).any(dim=1).sum()

    assert repeats("uniform") > 0 and repeats("distinct") == 0 and repeats("skewed") == 0
    assert counts("distinct").max() < 1.4 * counts("distinct").min()
    assert counts("skewed").max() > 2 * counts("skewed").min()
    assert counts("one_expert").tolist() == [0, 0, 0, T * K, 0, 0]
    assert (counts("some_empty") == 0).tolist() == [True, False] * 3
    outside = (ids["out_of_range"] < 0) | (ids["out_of_range"] >= E)
    assert 0.2 < outside.float().mean() < 0.5 and outside[-1].all()
    assert set(ids["out_of_range"].unique().tolist()) >= {-1, 0, E - 1, E}
    with pytest.raises(ValueError, match="needs K <= E, got K=3 and E=2"):
        testing.make_experts(1, 2, 3, routing="distinct")
    with pytest.raises(ValueError, match="routing must be one of"):
        testing.make_experts(1, 2, 1, routing="random")


def test_logits_are_well_separated_or_tied():
    logits = testing.make_logits(50, 128)
    gaps = logits.sort(dim=1).values.diff(dim=1)
    assert gaps.min() > 0.04 and logits.abs().max() <= 4
    assert logits.argmax(dim=1).unique().numel() > 20
    for scoring in ("softmax", "sigmoid"):
        score = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
        _, experts = reference.route(testing.exact_float64(logits), 8, scoring=scoring)
        np.testing.assert_array_equal(experts, score.topk(8, dim=1).indices.numpy())
    tied = testing.make_logits(50, 4, ties=True, dtype=torch.bfloat16)
    assert tied.dtype == torch.bfloat16
    assert (tied.sort(dim=1).values.diff(dim=1) == 0).any(dim=1).all()


@given(st.data())
@settings(max_examples=40)
def test_strategies_keep_their_word(data):
    shape = data.draw(shapes())
    experts = data.draw(routings(shape.T, shape.E, shape.K))
    assert experts.shape == (shape.T, shape.K) and 1 <= shape.K <= min(shape.E, 4)
    mlp = data.draw(mlp_inputs())
    rows, (E, D, F) = mlp.up_proj.shape[1], mlp.down_proj.shape
    assert rows in (F, 2 * F) and mlp.x.shape[1] == D and mlp.experts.shape == mlp.weights.shape
    assert mlp.up_bias is None or mlp.up_bias.shape == (E, rows)
    assert (mlp.up_bias is None) == (mlp.down_bias is None)
    merged = data.draw(merged_inputs(kinds=("any",)))
    assert merged.x.shape[1] == merged.proj.shape[1]
    assert ((merged.experts >= 0) & (merged.experts < len(merged.proj))).all()
