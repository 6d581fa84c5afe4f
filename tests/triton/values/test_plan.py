"""The plan of the Triton kernels: equal bits with the plan in torch, and a schedule that covers every row once."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fusedonemoe.ops import plan as torch_plan
from fusedonemoe.ops.triton import plan
from fusedonemoe.testing import ROUTINGS, make_experts

ID_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@pytest.fixture
def small_tiles(monkeypatch):
    # Few enough that a few rows need several tiles, several chunks of tiles and of experts in the scan, several programs of
    # either kind in the restoring kernel, and several chunks of experts in its search.
    for name, size in [
        ("TILE", 16), ("SCAN_TILES", 4), ("SCAN_EXPERTS", 4), ("RESTORE_ROWS", 16), ("RESTORE_BLOCKS", 16), ("MIN_BINS", 16),
    ]:  # fmt: skip
        monkeypatch.setattr(plan, name, size)


def naive_blocks(offsets, num_rows, block_m):
    bounds = offsets.tolist()
    blocks = []
    for expert, (first, last) in enumerate(pairwise(bounds)):
        blocks += [[expert, row] for row in range(first, last, block_m)]
    size = plan.num_blocks(num_rows, len(bounds) - 1, block_m)
    assert len(blocks) <= size
    return torch.tensor(blocks + [[-1, 0]] * (size - len(blocks)), dtype=torch.int32).reshape(-1, 2)


def assert_plan(got, experts, num_experts, block_m):
    order, offsets = torch_plan.make_plan(experts.cpu(), num_experts)
    expected = plan.RowPlan(order, offsets, torch_plan.inverse_order(order), naive_blocks(offsets, order.shape[0], block_m))
    for name, one, other in zip(got._fields, got, expected, strict=True):
        assert one.dtype == torch.int32, name
        assert torch.equal(one.cpu(), other), name


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K", "block_m"), [(1, 1, 1, 16), (1, 6, 6, 64), (50, 5, 3, 16), (20, 300, 8, 128)])
def test_one_tile_holds_all_rows(device, routing, T, E, K, block_m):
    experts = make_experts(T, E, K, routing=routing).to(device)
    assert_plan(plan.make_plan(experts, E, block_m), experts, E, block_m)


STRIDES = {
    "every second column": lambda ids: ids.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda ids: ids.repeat_interleave(2, 0)[::2],
    "transposed": lambda ids: ids.t().contiguous().t(),
    "expanded": lambda ids: ids[:1].expand(ids.shape),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_ids_in_any_strides(device, small_tiles, strides):
    for T, E, K in ((5, 4, 3), (31, 5, 3)):  # one tile, and several
        experts = STRIDES[strides](make_experts(T, E, K).to(device))
        assert_plan(plan.make_plan(experts, E, 16), experts, E, 16)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K", "block_m"), [(31, 5, 3, 16), (64, 6, 2, 64), (12, 100, 7, 16)])
def test_many_tiles(device, small_tiles, routing, T, E, K, block_m):
    experts = make_experts(T, E, K, routing=routing).to(device)
    assert_plan(plan.make_plan(experts, E, block_m), experts, E, block_m)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K", "block_m"), [(1, 1, 1, 16), (31, 5, 3, 16), (64, 6, 2, 64), (12, 100, 7, 16)])
def test_position_and_schedule_come_back_from_order_and_offsets(device, small_tiles, monkeypatch, routing, T, E, K, block_m):
    monkeypatch.setattr(plan, "MAX_EXPERTS", 32)  # 100 experts are searched in chunks
    experts = make_experts(T, E, K, routing=routing).to(device)
    order, offsets = torch_plan.make_plan(experts, E)
    assert_plan(plan.from_saved(order, offsets, block_m), experts, E, block_m)


@pytest.mark.parametrize("E", [8, 2000, 5000])  # one launch, three launches, torch's sort
@pytest.mark.parametrize(("T", "K"), [(0, 2), (5, 3)])
def test_few_rows_of_any_number_of_experts(device, monkeypatch, T, E, K):
    monkeypatch.setattr(plan, "TILE", 16)
    experts = make_experts(T, E, K, routing="out_of_range").to(device)
    got = plan.make_plan(experts, E, 16)
    assert_plan(got, experts, E, 16)
    assert_plan(plan.from_saved(got.order, got.offsets, 128), experts, E, 128)


def test_thousands_of_rows_in_the_shipped_tiles(device):
    T, E, K, block_m = 1025, 12, 2, 128
    assert T * K > 2 * plan.TILE
    experts = make_experts(T, E, K, routing="out_of_range").to(device)
    got = plan.make_plan(experts, E, block_m)
    assert_plan(got, experts, E, block_m)
    assert_plan(plan.from_saved(got.order, got.offsets, 16), experts, E, 16)


@pytest.mark.parametrize("tiles", ["one_tile", "many_tiles"])
@pytest.mark.parametrize("num_experts", [4, 300])
@pytest.mark.parametrize("name", ID_DTYPES)
def test_any_integer_dtype(device, request, name, num_experts, tiles):
    if tiles == "many_tiles":
        request.getfixturevalue("small_tiles")
    top, bottom = np.iinfo(name).max, np.iinfo(name).min
    values = np.array([0, 3, top, 1, 3, 2, top - 1, 0, bottom, 2, 3, 127] * 2, dtype=name).reshape(8, 3)
    exact = torch.tensor([min(int(v), 2**62) for v in values.ravel()]).reshape(8, 3)  # torch's own plan reads no uint64 past 2^63
    assert_plan(plan.make_plan(torch.from_numpy(values).to(device), num_experts, 16), exact, num_experts, 16)


@pytest.mark.parametrize("tiles", ["one_tile", "many_tiles"])
def test_ids_with_strides(device, request, tiles):
    if tiles == "many_tiles":
        request.getfixturevalue("small_tiles")
    experts = make_experts(5, 7, 40).to(device).t()
    assert not experts.is_contiguous()
    assert_plan(plan.make_plan(experts, 7, 16), experts, 7, 16)


def test_runs_repeat_bit_for_bit(device, small_tiles):
    experts = make_experts(40, 6, 3, routing="skewed").to(device)
    first, second = (plan.make_plan(experts, 6, 16) for _ in range(2))
    for name, one, other in zip(first._fields, first, second, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("E", [2, 128])
def test_bound_of_the_blocks_makes_no_guard(E, block_m):
    env = ShapeEnv()
    source = ConstantSource("N")
    N = env.create_symintnode(env.create_symbol(300, source, DimDynamic.DYNAMIC), hint=300, source=source)
    bound = plan.num_blocks(N, E, block_m)
    assert isinstance(bound, torch.SymInt)
    assert not env.guards
    assert bound.node.hint == plan.num_blocks(300, E, block_m) == min(300, E + 300 // block_m)
