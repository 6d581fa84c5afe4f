"""What expert parallelism costs: which bytes travel, what the host reads, how many graphs are compiled, and half precision."""

import math

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from fusedonemoe.integrations.distributed import ExpertParallel
from fusedonemoe.testing import assert_within_budget
from tests.integrations.test_distributed import D, batch, finder, gradients, make_moe, whole
from tests.integrations.traffic import Reads, Traffic
from tests.processes import run_in_processes

# In each process


def half_precision_is_within_the_budget(rank, world, folder):
    sizes = [9] * world
    exact = make_moe(K=4)
    for dtype in (torch.bfloat16, torch.float16):
        plain, moe = make_moe(K=4, dtype=dtype, impl="dense"), make_moe(K=4, dtype=dtype)
        # The same routing for all three: it is not what is tested here.
        ExpertParallel(gradients="sum").apply(moe)
        x, _ = batch(sizes, dtype)
        _, weights, ids = plain.gate(x)
        for experts in (exact.experts, plain.experts):
            experts.load_state_dict(make_moe(K=4, dtype=dtype).experts.state_dict())
        expected = exact.experts(x.double(), ids, weights.double())
        torch_run = plain.experts(x, ids, weights)
        y = moe.experts(*(t.chunk(world)[rank] for t in (x, ids, weights)))
        assert y.dtype == dtype
        mine = slice(rank * 9, rank * 9 + 9)
        assert_within_budget(y, torch_run[mine], expected[mine])
    # Under autocast rows travel as what the operator casts them to.
    moe = make_moe(dtype=torch.float32)
    ExpertParallel().apply(moe)
    with Traffic(rank, D) as traffic, torch.autocast("cpu", torch.bfloat16):
        y = moe(torch.randn(5, D))
    assert y.dtype == make_autocast_dtype() and torch.bfloat16 in traffic.dtypes and D in traffic.widths[torch.bfloat16]


def make_autocast_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        return make_moe(dtype=torch.float32)(torch.randn(5, D)).dtype


def only_rows_that_leave_are_sent(rank, world, folder):
    T, K, E = 40, 3, 8
    moe = make_moe(E, K, dtype=torch.float32, impl="dense")  # grouped reads offsets, on CPUs
    ExpertParallel().apply(moe)
    x = torch.randn(T, D, requires_grad=True)
    _, _, ids = moe.gate(x)
    owners = ids // (E // world)
    leave = sum(int((owners == other).any(1).sum()) for other in range(world) if other != rank)
    arrive = torch.tensor([int((owners == other).any(1).sum()) for other in range(world)])
    dist.all_to_all_single(arrive, arrive.clone())
    come = int(arrive.sum() - arrive[rank])
    assert 0 < leave < T * K
    with Traffic(rank, D) as traffic, Reads() as reads:
        y = moe(x)
    row, routing = D * 4, K * (4 + 4)  # a float32 row; its ids and weights, four bytes each
    assert traffic.own == 0
    assert traffic.rows == leave + come  # there, and the results of the others' rows back
    assert traffic.bytes == leave * (row + routing) + come * row
    assert reads.count == 1, reads.count
    with Traffic(rank, D) as traffic, Reads() as reads:
        y.sum().backward()
    assert traffic.own == 0 and reads.count == 0
    # The gradient of a returned row goes the way of the row; those of x and of the weights come back.
    assert traffic.bytes == leave * row + come * (row + K * 4)


def fixed_capacity_reads_nothing_on_the_host(rank, world, folder):
    T, S = 12, 5
    moe = make_moe(8, 2, dtype=torch.float32, impl="dense")
    ExpertParallel(capacity=S).apply(moe)
    x = torch.randn(T, D, requires_grad=True)
    with Traffic(rank, D) as traffic, Reads() as reads:
        y = moe(x)
        y.sum().backward()
    assert reads.count == 0, reads.count
    assert traffic.own == 0, traffic.own  # the compiled graph of it, which can hold no reads, is tested below
    sent = (world - 1) * S
    assert traffic.bytes == sent * (4 * D + 4 + 4) + sent * 4 * D + sent * 4 * D + sent * (4 * D + 4)


def one_graph_for_every_routing(rank, world, folder):
    for options, lengths in (({"capacity_factor": math.inf}, (7, 12)), ({}, (7, 12, 1, 0, 9))):
        torch._dynamo.reset()
        # A size that depends on the routing needs this; a fixed one does not.
        with torch._dynamo.config.patch(capture_scalar_outputs=not options):
            moe = make_moe(6, 2, dtype=torch.float32, impl="auto")
            ExpertParallel(**options).apply(moe)
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(moe, fullgraph=True, backend=counter)
            for T in lengths:
                x, dy = torch.randn(2, T, D)
                y, dx, dw = gradients(compiled, x, dy)
                expected_y, expected_dx, expected_dw = gradients(moe, x, dy)
                assert torch.equal(y, expected_y) and torch.equal(dx, expected_dx)
                for name, expected in expected_dw.items():
                    assert torch.equal(whole(dw[f"_orig_mod.{name}"]), whole(expected)), name
            assert counter.frame_count <= 4  # a first length, any length, and lengths 0 and 1, which torch sets apart
            for _ in range(3):  # other routings, and another number of rows for this rank
                compiled((torch.randn(9, D) * 5).requires_grad_())
            assert counter.frame_count <= 4


def inductor_compiles_it_whole(rank, world, folder):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        moe = make_moe(6, 2, dtype=torch.float32, impl="auto")
        ExpertParallel().apply(moe)
        compiled = torch.compile(moe, fullgraph=True, dynamic=True)
        for T in (8, 5):
            x, dy = torch.randn(2, T, D)
            y, dx, dw = gradients(compiled, x, dy)
            expected_y, expected_dx, expected_dw = gradients(moe, x, dy)
            torch.testing.assert_close(y, expected_y)
            torch.testing.assert_close(dx, expected_dx)
            for name, expected in expected_dw.items():
                torch.testing.assert_close(whole(dw[f"_orig_mod.{name}"]), whole(expected))


AT_TWO = [
    "only_rows_that_leave_are_sent",
    "one_graph_for_every_routing",
]
AT_FOUR = [
    "half_precision_is_within_the_budget",
    "only_rows_that_leave_are_sent",
    "fixed_capacity_reads_nothing_on_the_host",
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return finder("tests.integrations.test_distributed_traffic", {2: AT_TWO, 4: AT_FOUR}, tmp_path_factory)


@pytest.mark.parametrize(("world", "name"), [(2, name) for name in AT_TWO] + [(4, name) for name in AT_FOUR])
def test_in_processes(failures, world, name):
    assert not failures(world, name), failures(world, name)


@pytest.mark.slow
def test_inductor(tmp_path):
    (failure,) = run_in_processes(
        "tests.integrations.test_distributed_traffic", ["inductor_compiles_it_whole"], 2, tmp_path, 400
    ).values()
    assert not failure, failure
