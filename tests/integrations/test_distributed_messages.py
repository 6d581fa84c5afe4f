"""What is refused, in words; and a group of one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fusedonemoe import Experts, MoEConfig
from fusedonemoe.integrations.distributed import AllToAll, ExpertParallel, FixedCapacity
from tests.integrations.test_distributed import D, F, compare, make_moe


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_is_the_block_itself(alone):
    moe, reference = make_moe(K=3), make_moe(K=3)
    ExpertParallel().apply(moe)
    compare(moe, reference, [6], 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group": "experts"}, TypeError, "group must be a ProcessGroup or a DeviceMesh, got str"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": 1.5}, TypeError, r"capacity must be an integer, got 1\.5"),
        ({"capacity_factor": 0}, ValueError, "capacity_factor must be above 0, got 0"),
        ({"capacity_factor": math.nan}, ValueError, "capacity_factor must be above 0, got nan"),
        ({"capacity_factor": True}, TypeError, "capacity_factor must be a number, got True"),
        ({"capacity_factor": 1.0, "capacity": 3}, ValueError, r"give capacity_factor or capacity, got both: 1\.0 and 3"),
        ({"gradients": "average"}, ValueError, "gradients must be 'mean' or 'sum', got 'average'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        ExpertParallel(**options)


def test_without_a_group_it_says_so():
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        ExpertParallel().apply(make_moe())


def test_what_cannot_be_parallel(alone):
    with pytest.raises(ValueError, match=r"model has no fusedonemoe\.Experts in it"):
        ExpertParallel().apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        ExpertParallel().apply([])  # type: ignore[type-var]
    moe = ExpertParallel().apply(make_moe())
    with pytest.raises(ValueError, match="experts is parallel already: AllToAll over 1 ranks"):
        ExpertParallel().apply(moe)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 16\], got \(3, 5\)"):
        moe.experts(torch.randn(3, 5), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))


def test_a_shard_without_an_exchange_is_refused(alone):
    moe = make_moe()
    mesh = init_device_mesh("cpu", (1,))
    placed = distribute_tensor(moe.experts.gate_up_proj.detach(), mesh, [Shard(0)])
    moe.experts.gate_up_proj = nn.Parameter(placed)
    x = torch.randn(3, D, dtype=torch.float64)
    for run in (moe, torch.compile(moe, backend="aot_eager")):
        with pytest.raises(RuntimeError, match=r"gate_up_proj is sharded over processes: \(Shard\(dim=0\),\)"):
            run(x)


def test_a_replicated_parameter_is_this_process_s(alone):
    moe, x = make_moe(), torch.randn(3, D, dtype=torch.float64)
    expected = moe(x)
    placed = distribute_tensor(moe.experts.down_proj.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
    moe.experts.down_proj = nn.Parameter(placed)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for run in (moe, torch.compile(moe, backend="aot_eager")):
                torch.testing.assert_close(run(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [AllToAll, FixedCapacity])
def test_dispatchers_check_their_experts(make, alone):
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        make(dist.group.WORLD, 0)


def test_capacity_is_the_fraction_that_is_written(alone):
    dispatcher = FixedCapacity(dist.group.WORLD, 4, capacity_factor=1.1)
    dispatcher.world = 4
    assert [dispatcher._slots(n) for n in (40, 41, 4, 1, 0)] == [11, 12, 2, 1, 0]
    for factor in (1e-7, 1e-300):  # a ceiling of more than 0 is 1
        dispatcher = FixedCapacity(dist.group.WORLD, 4, capacity_factor=factor)
        assert [dispatcher._slots(n) for n in (0, 1, 1000)] == [0, 1, 1]
    assert FixedCapacity(dist.group.WORLD, 4, capacity_factor=1e300)._slots(40) == 40
    assert FixedCapacity(dist.group.WORLD, 4, capacity_factor=9)._slots(40) == 40


def test_plain_experts_are_as_before():
    experts = Experts(MoEConfig(hidden_size=D, intermediate_size=F, num_experts=4, top_k=2))
    assert experts.exchange is None
    assert list(experts.state_dict()) == ["gate_up_proj", "down_proj"]
    assert isinstance(experts.local_weights()[0], Tensor)
