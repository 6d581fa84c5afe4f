"""The grouped projection of rows and the combine, against float64."""

import pytest
import torch

from fusedonemoe.ops.plan import inverse_order
from fusedonemoe.ops.plan import make_plan as sorted_plan
from fusedonemoe.ops.triton.combine import combine
from fusedonemoe.ops.triton.plan import RowPlan, num_blocks
from fusedonemoe.ops.triton.rows import grouped_rows
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.testing import ROUTINGS, assert_within_budget, make_experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Tile(16, 16, 16, 4, 1, GROUP_M=2)
TILES = {
    "small": SMALL,
    "wide": Tile(16, 64, 32, 4, 2, GROUP_M=1),
    "deep": Tile(32, 16, 64, 4, 2, GROUP_M=3),
    "tall": Tile(64, 32, 16, 4, 2),
}


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make_plan(experts_TK, E, block_m):
    """The plan in torch: these tests are about what is done with it, and its kernels have tests of their own."""
    order, offsets = sorted_plan(experts_TK, E)
    bounds = offsets.tolist()
    blocks = [(e, first) for e in range(E) for first in range(bounds[e], bounds[e + 1], block_m)]
    blocks += [(-1, 0)] * (num_blocks(order.shape[0], E, block_m) - len(blocks))
    schedule = torch.tensor(blocks, dtype=torch.int32, device=order.device).view(-1, 2)
    return RowPlan(order, offsets, inverse_order(order), schedule)


def expert_of_position(plan):
    """``[offsets[E]]`` the expert of each sorted row, on the CPU."""
    return torch.repeat_interleave(torch.arange(plan.offsets.shape[0] - 1), plan.offsets.cpu().diff().long())


def loop_rows(rows, weights_EAB, plan, bias_EB, top_k):
    """The formula, one matrix product per expert, in the dtype of the rows. Only the rows of experts."""
    expert = expert_of_position(plan).to(rows.device)
    order = plan.order.long()
    sorted_rows = (rows if top_k is None else rows[order // top_k])[: expert.shape[0]]
    out = sorted_rows.new_zeros(expert.shape[0], weights_EAB.shape[2])
    for e in range(weights_EAB.shape[0]):
        out[expert == e] = sorted_rows[expert == e] @ weights_EAB[e]
    return out if bias_EB is None else out + bias_EB[expert]


def check_rows(experts_TK, E, A, B, dtype, device, *, tile=SMALL, bias=False, gathered=False, strides=(0, 1, 2)):
    T, K = experts_TK.shape
    plan = make_plan(experts_TK.to(device), E, tile.BLOCK_M)
    rows = normal(T if gathered else T * K, A, dtype=dtype, device=device, seed=1)
    weights_EAB = normal(E, A, B, dtype=dtype, device=device, seed=2)
    weights_EAB = weights_EAB.permute(strides).contiguous().permute(torch.tensor(strides).argsort().tolist())
    bias_EB = normal(E, B, dtype=dtype, device=device, seed=3) if bias else None
    top_k = K if gathered else None
    if not gathered:
        rows[int(plan.offsets[-1]) :] = torch.nan
    out = grouped_rows(rows, weights_EAB, plan, tile, bias_EB=bias_EB, top_k=top_k)
    assert out.shape == (T * K, B) and out.dtype == dtype
    again = grouped_rows(rows, weights_EAB, plan, tile, bias_EB=bias_EB, top_k=top_k)
    num_rows = int(plan.offsets[-1])
    assert torch.equal(out[:num_rows], again[:num_rows])
    plain = loop_rows(rows, weights_EAB, plan, bias_EB, top_k)
    exact_bias = None if bias_EB is None else bias_EB.double()
    exact = loop_rows(rows.double(), weights_EAB.double(), plan, exact_bias, top_k)
    if num_rows:
        assert_within_budget(out[:num_rows].cpu(), plain.cpu(), exact.cpu(), name="out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_equal_float64(dtype, gathered, bias, device):
    check_rows(make_experts(23, 5, 3), 5, 32, 48, dtype, device, gathered=gathered, bias=bias)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("A", "B"), [(64, 64), (72, 40), (17, 33), (1, 1)])
@pytest.mark.parametrize("gathered", [False, True])
def test_tiles_may_be_cut_anywhere(tile, A, B, gathered, device):
    experts_TK = make_experts(35, 3, 2, routing="skewed")
    check_rows(experts_TK, 3, A, B, torch.float32, device, tile=TILES[tile], gathered=gathered, bias=True)


@pytest.mark.parametrize("strides", [(0, 2, 1), (2, 1, 0), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_may_have_any_strides(strides, dtype, device):
    check_rows(make_experts(20, 4, 2), 4, 40, 24, dtype, device, strides=strides)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K"), [(30, 6, 3), (1, 3, 2), (0, 4, 2), (9, 50, 1), (35, 1, 1)])
def test_any_routing(routing, T, E, K, device):
    check_rows(make_experts(T, E, K, routing=routing), E, 20, 24, torch.float32, device, gathered=True, bias=True)


def test_no_id_in_range_writes_nothing(device):
    check_rows(torch.full((9, 2), -1), 4, 16, 16, torch.float32, device)


# Combine


def loop_combine(rows_NB, weights_TK, plan, top_k):
    """The formula, choice by choice, in the dtype of the rows."""
    position_TK = plan.position.long().view(-1, top_k)
    routed_TK = position_TK < plan.offsets[-1]
    out_TB = rows_NB.new_zeros(position_TK.shape[0], rows_NB.shape[1])
    for j in range(top_k):
        routed = routed_TK[:, j]
        rows = rows_NB[position_TK[routed, j]]
        out_TB[routed] += rows if weights_TK is None else rows * weights_TK[routed, j, None].to(rows.dtype)
    return out_TB


def check_combine(experts_TK, E, B, dtype, device, *, weighted=True, weight_dtype=torch.float32):
    T, K = experts_TK.shape
    plan = make_plan(experts_TK.to(device), E, 16)
    rows_NB = normal(T * K, B, dtype=dtype, device=device, seed=1)
    weights_TK = normal(T, K, dtype=weight_dtype, device=device, seed=2) if weighted else None
    rows_NB[int(plan.offsets[-1]) :] = torch.nan  # what stands there was never written
    if weights_TK is not None:
        weights_TK[plan.position.view(T, K) >= plan.offsets[-1]] = torch.nan
    out_TB = combine(rows_NB, weights_TK, plan, dtype, top_k=K)
    assert out_TB.shape == (T, B) and out_TB.dtype == dtype
    assert torch.equal(out_TB, combine(rows_NB, weights_TK, plan, dtype, top_k=K))
    exact_weights = None if weights_TK is None else weights_TK.double()
    exact_TB = loop_combine(rows_NB.double(), exact_weights, plan, K)
    if not int(plan.offsets[-1]):
        assert (out_TB == 0).all()
    else:
        assert_within_budget(out_TB.cpu(), loop_combine(rows_NB, weights_TK, plan, K).cpu(), exact_TB.cpu(), name="out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("routing", ["uniform", "out_of_range", "one_expert"])
def test_combine_equals_float64(dtype, weighted, routing, device):
    check_combine(make_experts(19, 6, 4, routing=routing), 6, 72, dtype, device, weighted=weighted)


@pytest.mark.parametrize("K", [1, 2, 3, 10, 19])
@pytest.mark.parametrize("B", [1, 33, 1300])
def test_combine_takes_any_number_of_choices_and_columns(K, B, device):
    check_combine(make_experts(5, 50, K, routing="out_of_range"), 50, B, torch.float32, device)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_combine_takes_weights_of_another_dtype(weight_dtype, device):
    check_combine(make_experts(8, 4, 2), 4, 32, torch.bfloat16, device, weight_dtype=weight_dtype)


@pytest.mark.parametrize("T", [0, 1])
def test_combine_of_few_tokens(T, device):
    if T == 0:
        plan = make_plan(torch.zeros(0, 2, dtype=torch.int64, device=device), 4, 16)
        assert combine(torch.zeros(0, 8, device=device), None, plan, torch.float32, top_k=2).shape == (0, 8)
    else:
        check_combine(make_experts(T, 4, 2), 4, 8, torch.float32, device)


def test_combine_of_no_id_in_range_is_zero(device):
    check_combine(torch.full((9, 2), 4), 4, 16, torch.bfloat16, device)


def test_combine_sums_in_the_order_of_the_choices(device):
    # 2^24 + 1 is 2^24 in float32: only in this order, and only in float32, is the sum 1.
    plan = make_plan(torch.tensor([[3, 0, 2, 1]], device=device), 4, 16)
    value_of_choice = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0], device=device)
    rows_NB = torch.empty(4, 1, device=device)
    rows_NB[plan.position.long(), 0] = value_of_choice
    assert combine(rows_NB, None, plan, torch.float32, top_k=4).item() == 1.0
