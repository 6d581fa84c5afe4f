"""The grouped GEMMs on CPU, each of their paths against a loop over experts."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fusedonemoe.ops.cpu import grouped_gemm
from fusedonemoe.testing import assert_within_budget, exact_float64

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FEW_ULP = {"rtol": 1e-12, "atol": 1e-12}
# Rows per expert, and what they lead to: padded batches of up to 32 experts, or a GEMM each. "tail" rows belong to no expert.
COUNTS = {
    "few_each": [3, 2, 0, 4, 1],
    "more_experts_than_a_batch": [2, 0, 3, 1] * 9 + [3],
    "one_expert_has_most": [0, 40, 0, 1, 0, 0, 0, 1],
    "one_batch_is_lopsided": [2] * 32 + [60] + [0] * 31,
    "an_empty_batch": [1] * 32 + [0] * 32 + [2, 1],
    "many_each": [380, 0, 200, 195],
    "one_expert": [7],
    "all_empty": [0, 0, 0],
}
PATHS = {
    "few_each": {"batch"},
    "more_experts_than_a_batch": {"batch"},
    "one_expert_has_most": {"single"},
    "one_batch_is_lopsided": {"batch", "single"},
    "an_empty_batch": {"batch"},
    "many_each": {"single"},
    "one_expert": {"batch"},
    "all_empty": set(),
}
every_count = pytest.mark.parametrize("counts", COUNTS)


def normal(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_problem(counts, dtype=torch.float64, A=7, B=5, tail=3):
    """Rows, weights, a second set of rows, and offsets."""
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    N = int(offsets[-1]) + tail
    rows = normal(N, A, dtype=dtype, seed=0)
    return rows, normal(len(counts), A, B, dtype=dtype, seed=1), normal(N, B, dtype=dtype, seed=2), offsets


def loop_mm(rows, weights, offsets):
    bounds = offsets.tolist()
    out = torch.zeros(rows.shape[0], weights.shape[2], dtype=rows.dtype)
    for e, (first, last) in enumerate(itertools.pairwise(bounds)):
        out[first:last] = rows[first:last] @ weights[e]
    return out


def loop_outer(left, right, offsets):
    bounds = offsets.tolist()
    return torch.stack([left[a:b].t() @ right[a:b] for a, b in itertools.pairwise(bounds)])


def in_float64(function, left, right, offsets):
    return exact_float64(function(left.double(), right.double(), offsets))


def pollute_memory():
    """Freed memory full of NaN, which the next allocations of these sizes are likely to receive."""
    for size in (64, 256, 1024, 4096, 16384):
        torch.full((size,), torch.nan, dtype=torch.float64)


@every_count
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_path_equals_the_loop(counts, dtype):
    rows, weights, right, offsets = make_problem(COUNTS[counts], dtype)
    for function, loop, operands in (
        (grouped_gemm.grouped_mm, loop_mm, (rows, weights)),
        (grouped_gemm.grouped_outer, loop_outer, (rows, right)),
    ):
        pollute_memory()
        actual, plain = function(*operands, offsets), loop(*operands, offsets)
        if counts == "all_empty":
            assert actual.shape == plain.shape and not actual.any()
        elif dtype == torch.float64:
            assert_close(actual, plain, **FEW_ULP)
        else:
            assert_within_budget(actual, plain, in_float64(loop, *operands, offsets), name=function.__name__)


@every_count
def test_the_counts_above_reach_the_paths_they_are_named_for(counts, monkeypatch):
    seen = set()

    def note(path, real):
        def noted(*arguments, **options):
            seen.add(path)
            return real(*arguments, **options)

        return noted

    monkeypatch.setattr(grouped_gemm, "_padded_index", note("batch", grouped_gemm._padded_index))
    rows, weights, _, offsets = make_problem(COUNTS[counts])
    monkeypatch.setattr(torch, "mm", note("single", torch.mm))
    grouped_gemm.grouped_mm(rows, weights, offsets)
    assert seen == PATHS[counts]


@every_count
def test_rows_past_the_last_offset_are_zero_and_never_read(counts):
    for dtype in (torch.float64, torch.float32):
        rows, weights, right, offsets = make_problem(COUNTS[counts], dtype)
        end = int(offsets[-1])
        expected_mm = grouped_gemm.grouped_mm(rows, weights, offsets)
        expected_outer = grouped_gemm.grouped_outer(rows, right, offsets)
        rows[end:] = torch.nan
        right[end:] = torch.inf
        pollute_memory()
        out = grouped_gemm.grouped_mm(rows, weights, offsets)
        assert (out[end:] == 0).all() and torch.equal(out, expected_mm)
        assert torch.equal(grouped_gemm.grouped_outer(rows, right, offsets), expected_outer)


def test_an_expert_without_rows_poisons_nothing():
    for counts in COUNTS.values():
        rows, weights, right, offsets = make_problem(counts)
        expected = loop_mm(rows, weights, offsets)
        weights[torch.tensor(counts) == 0] = torch.inf
        assert_close(grouped_gemm.grouped_mm(rows, weights, offsets), expected, **FEW_ULP)
        empty = grouped_gemm.grouped_outer(rows, right, offsets)[torch.tensor(counts) == 0]
        assert (empty == 0).all()


def test_an_overflow_stays_in_its_expert():
    # The rows of expert 1 overflow; the batch pads the other experts with them.
    rows, weights, _, offsets = make_problem([1, 3, 2], torch.float32)
    rows[1:4] *= 1e30
    weights[1] *= 1e30
    out = grouped_gemm.grouped_mm(rows, weights, offsets)
    assert torch.isfinite(out[[0, 4, 5]]).all() and not torch.isfinite(out[1:4]).any()


@every_count
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_strides(counts, dtype):
    rows, weights, right, offsets = make_problem(COUNTS[counts], dtype, A=6, B=8)
    expected_mm, expected_outer = (f(rows, v, offsets) for f, v in ((loop_mm, weights), (loop_outer, right)))
    stored_transposed = weights.transpose(1, 2).contiguous().transpose(1, 2)
    every_second = torch.stack((weights, -weights), dim=3).flatten(2)[:, :, ::2]
    column_major = rows.t().contiguous().t()
    padded_rows = torch.cat((rows, rows), dim=1)[:, :6]
    for r in (rows, column_major, padded_rows):
        for w in (weights, stored_transposed, every_second):
            assert_close(grouped_gemm.grouped_mm(r, w, offsets), expected_mm, rtol=1e-5, atol=1e-5)
        for v in (right, right.t().contiguous().t()):
            assert_close(grouped_gemm.grouped_outer(r, v, offsets), expected_outer, rtol=1e-5, atol=2e-5)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60)
def test_any_counts(counts, tail, A, B):
    rows, weights, right, offsets = make_problem(counts, A=A, B=B, tail=tail)
    assert_close(grouped_gemm.grouped_mm(rows, weights, offsets), loop_mm(rows, weights, offsets), **FEW_ULP)
    outer = grouped_gemm.grouped_outer(rows, right, offsets)
    assert_close(outer, loop_outer(rows, right, offsets), **FEW_ULP)


def test_no_rows():
    offsets = torch.zeros(4, dtype=torch.int32)
    assert grouped_gemm.grouped_mm(torch.zeros(0, 5), torch.zeros(3, 5, 2), offsets).shape == (0, 2)
    np.testing.assert_array_equal(grouped_gemm.grouped_outer(torch.zeros(0, 5), torch.zeros(0, 2), offsets), np.zeros((3, 5, 2)))


def test_equal_inputs_give_equal_bits():
    for counts in COUNTS.values():
        rows, weights, right, offsets = make_problem(counts, torch.float32)
        for function, other in ((grouped_gemm.grouped_mm, weights), (grouped_gemm.grouped_outer, right)):
            assert torch.equal(function(rows, other, offsets), function(rows, other, offsets))


@pytest.mark.parametrize("op", ["grouped_mm", "grouped_outer"])
@pytest.mark.parametrize("counts", ["few_each", "many_each"])
def test_opcheck(op, counts):
    rows, weights, right, offsets = make_problem(COUNTS[counts], torch.float32)
    other = weights if op == "grouped_mm" else right
    torch.library.opcheck(getattr(torch.ops.fusedonemoe, op).default, (rows, other, offsets))


@pytest.mark.parametrize("op", ["grouped_mm", "grouped_outer"])
@every_count
def test_the_bare_operators_refuse_to_be_differentiated(op, counts):
    rows, weights, right, offsets = make_problem(COUNTS[counts], torch.float32)
    other = weights if op == "grouped_mm" else right
    with pytest.raises(RuntimeError):
        getattr(torch.ops.fusedonemoe, op)(rows.requires_grad_(), other.requires_grad_(), offsets).sum().backward()
