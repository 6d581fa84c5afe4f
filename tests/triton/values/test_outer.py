from itertools import pairwise

import pytest
import torch

from fusedonemoe.ops.plan import make_plan as make_torch_plan
from fusedonemoe.ops.triton import plan as triton_plan
from fusedonemoe.ops.triton.outer import grouped_outer
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.ops.triton.sums import column_sums
from fusedonemoe.testing import assert_within_budget, make_experts

SMALL = Tile(16, 16, 16, 4, 1, GROUP_M=2)
UNEQUAL = Tile(32, 16, 64, 4, 3, GROUP_M=3)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def make_operands(device, *, T=23, E=5, K=3, A=37, B=20, dtype=torch.float32, routing="uniform", gather_left, gather_right):
    generator = torch.Generator().manual_seed(0)
    experts_TK = make_experts(T, E, K, routing=routing, seed=1) if T else torch.zeros(0, K, dtype=torch.int64)
    order, offsets = make_torch_plan(experts_TK, E)
    left = torch.randn(T if gather_left else T * K, A, generator=generator).to(dtype)
    right = torch.randn(T if gather_right else T * K, B, generator=generator).to(dtype)
    # Rows of no expert may hold anything.
    for rows, gathered in ((left, gather_left), (right, gather_right)):
        if not gathered:
            rows[int(offsets[-1]) :] = float("nan")
    plan = triton_plan.from_saved(order.to(device), offsets.to(device), 16)
    return left.to(device), right.to(device), plan


def expected(left, right, plan, K, gather_left, gather_right, dtype):
    """The product with ``dtype`` operands and sums, expert by expert."""
    order, offsets = plan.order.cpu().long(), plan.offsets.tolist()
    left_NA = (left.cpu()[order // K] if gather_left else left.cpu()).to(dtype)
    right_NB = (right.cpu()[order // K] if gather_right else right.cpu()).to(dtype)
    return torch.stack([left_NA[a:b].t() @ right_NB[a:b] for a, b in pairwise(offsets)])


def check(device, tile, *, K=3, gather_left=False, gather_right=False, **case):
    left, right, plan = make_operands(device, K=K, gather_left=gather_left, gather_right=gather_right, **case)
    gathers = {"gather_left": K if gather_left else None, "gather_right": K if gather_right else None}
    out = grouped_outer(left, right, plan, tile, **gathers)
    plain = expected(left, right, plan, K, gather_left, gather_right, left.dtype)
    exact = expected(left, right, plan, K, gather_left, gather_right, torch.float64)
    assert out.is_contiguous()
    assert_within_budget(out.cpu(), plain, exact, name="outer")
    empty = plan.offsets.diff() == 0
    assert (out[empty] == 0).all()
    assert torch.equal(out, grouped_outer(left, right, plan, tile, **gathers))


@pytest.mark.parametrize("tile", [SMALL, UNEQUAL])
@pytest.mark.parametrize(("gather_left", "gather_right"), [(False, False), (True, False), (False, True), (True, True)])
def test_outer_reads_sorted_and_gathered_rows(device, tile, gather_left, gather_right):
    check(device, tile, gather_left=gather_left, gather_right=gather_right)


@pytest.mark.parametrize("routing", ["one_expert", "some_empty", "out_of_range", "skewed"])
def test_outer_of_uneven_experts(device, routing):
    check(device, SMALL, routing=routing, gather_right=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outer_in_half_precision(device, dtype):
    check(device, UNEQUAL, dtype=dtype, gather_left=True)


@pytest.mark.parametrize(("A", "B"), [(64, 48), (1, 1), (16, 80)])
def test_outer_of_even_and_tiny_widths(device, A, B):
    check(device, SMALL, A=A, B=B, gather_left=True)


@pytest.mark.parametrize(("T", "K"), [(1, 1), (1, 4), (40, 2)])
def test_outer_of_few_tokens(device, T, K):
    check(device, SMALL, T=T, K=K, gather_right=True)


def test_outer_of_no_tokens_is_zero(device):
    left, right, plan = make_operands(device, T=0, gather_left=False, gather_right=True)
    out = grouped_outer(left, right, plan, SMALL, gather_right=3)
    assert out.shape == (5, 37, 20) and (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["uniform", "one_expert", "out_of_range"])
@pytest.mark.parametrize("weighted", [False, True])
def test_column_sums(device, dtype, routing, weighted):
    T, K, E = 67, 3, 4
    rows, _, plan = make_operands(
        device, T=T, K=K, E=E, A=70, dtype=dtype, routing=routing, gather_left=weighted, gather_right=True
    )
    weights_TK = torch.rand(T, K, generator=torch.Generator().manual_seed(2)).to(device) if weighted else None
    out = column_sums(rows, plan, weights_TK=weights_TK)

    def sums(dtype):
        order, offsets = plan.order.cpu().long(), plan.offsets.tolist()
        rows_NB = rows.cpu().to(dtype)
        if weights_TK is not None:
            rows_NB = rows_NB[order // K] * weights_TK.cpu().to(dtype).reshape(-1)[order][:, None]
        return torch.stack([rows_NB[a:b].sum(0) for a, b in pairwise(offsets)])

    assert_within_budget(out.cpu(), sums(dtype), sums(torch.float64), name="column sums")
    assert (out[plan.offsets.diff() == 0] == 0).all()
    assert torch.equal(out, column_sums(rows, plan, weights_TK=weights_TK))
