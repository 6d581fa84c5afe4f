"""The plan of the Triton kernels: equal bits with the plan in torch, and a schedule that covers every row once."""

import pytest
import torch

from fusedonemoe.ops import plan as torch_plan
from fusedonemoe.ops.triton import plan
from fusedonemoe.testing import ROUTINGS, make_experts


def naive_blocks(offsets, num_rows, block_m):
    bounds = offsets.tolist()
    blocks = []
    for expert, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        blocks += [[expert, row] for row in range(first, last, block_m)]
    size = plan.num_blocks(num_rows, len(bounds) - 1, block_m)
    assert len(blocks) <= size
    return torch.tensor(blocks + [[-1, 0]] * (size - len(blocks)), dtype=torch.int32).reshape(-1, 2)


def assert_plan(got, experts, num_experts, block_m):
    order, offsets = torch_plan.make_plan(experts, num_experts)
    expected = plan.RowPlan(order, offsets, torch_plan.inverse_order(order), naive_blocks(offsets, order.shape[0], block_m))
    for name, one, other in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (1, 6, 6), (50, 5, 3), (20, 300, 8)])
@pytest.mark.parametrize("block_m", [16, 128])
def test_plan_of_one_tile(device, routing, T, E, K, block_m):
    experts = make_experts(T, E, K, routing=routing).to(device)
    assert_plan(plan.make_plan(experts, E, block_m), experts, E, block_m)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K"), [(31, 5, 3), (64, 6, 2), (20, 300, 8)])
@pytest.mark.parametrize("block_m", [16, 64])
def test_plan_of_many_tiles(device, monkeypatch, routing, T, E, K, block_m):
    monkeypatch.setattr(plan, "TILE", 16)
    monkeypatch.setattr(plan, "SCAN_TILES", 4)  # several chunks of tiles and several of experts
    monkeypatch.setattr(plan, "SCAN_EXPERTS", 4)
    experts = make_experts(T, E, K, routing=routing).to(device)
    assert_plan(plan.make_plan(experts, E, block_m), experts, E, block_m)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (31, 5, 3), (20, 300, 8)])
@pytest.mark.parametrize("block_m", [16, 64])
def test_plan_from_what_the_forward_saved(device, monkeypatch, routing, T, E, K, block_m):
    monkeypatch.setattr(plan, "RESTORE_ROWS", 16)
    monkeypatch.setattr(plan, "RESTORE_BLOCKS", 16)
    monkeypatch.setattr(plan, "MIN_BINS", 16)
    monkeypatch.setattr(plan, "MAX_EXPERTS", 64)  # 300 experts are searched in several chunks
    experts = make_experts(T, E, K, routing=routing).to(device)
    assert_plan(plan.from_saved(*torch_plan.make_plan(experts, E), block_m), experts, E, block_m)
