"""Expert parallelism in other libraries' forms: torchtitan's experts, transformers' expert-parallel implementations."""

import importlib.util
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fusedonemoe import functional as F
from fusedonemoe.integrations.distributed.torchtitan import GroupedExperts
from fusedonemoe.integrations.distributed.transformers import register_expert_parallel
from tests.processes import run_in_processes

has_transformers = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not has_transformers, reason="transformers is not installed")

D, E = 16, 5


def make_grouped(dtype=torch.float64, **options):
    torch.manual_seed(0)
    experts = GroupedExperts(D, 6, E, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.mul_(20)
    return experts


def loop(experts, x, counts):
    """torchtitan's formula, expert by expert."""
    w1, w2, w3 = experts.w1_EFD, experts.w2_EDF, experts.w3_EFD
    parts = x.split([*counts, x.shape[0] - sum(counts)])
    rows = [(nn.functional.silu(part @ w1[e].T) * (part @ w3[e].T)) @ w2[e].T for e, part in enumerate(parts[:-1])]
    return torch.cat([*rows, torch.zeros_like(parts[-1])])


@pytest.mark.parametrize("counts", [[2, 0, 3, 1, 4], [0, 0, 0, 0, 9], [0] * 5, [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("padding", [0, 3])
def test_sorted_rows_go_through_their_experts(counts, padding):
    experts = make_grouped()
    x = torch.randn(sum(counts) + padding, D, dtype=torch.float64, requires_grad=True)
    for dtype in (torch.int32, torch.int64):
        y = experts(x, torch.tensor(counts, dtype=dtype))
        expected = loop(experts, x, counts)
        torch.testing.assert_close(y, expected)
        leaves = [x, *experts.parameters()]
        found, wanted = (torch.autograd.grad(out.square().sum(), leaves, allow_unused=True) for out in (y, expected))
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


def test_state_dict_has_torchtitans_names_and_layouts():
    experts, other = make_grouped(), GroupedExperts(D, 6, E, dtype=torch.float64)
    state = experts.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "w1_EFD": (E, 6, D),
        "w2_EDF": (E, D, 6),
        "w3_EFD": (E, 6, D),
    }
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    for mine, theirs in zip(experts.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    missing, unexpected = other.load_state_dict({"w1_EFD": state["w1_EFD"]}, strict=False)
    assert "w2_EDF" in missing and unexpected == ["w1_EFD"]
    nested = nn.ModuleDict({"experts": experts})
    assert sorted(nested.state_dict()) == ["experts.w1_EFD", "experts.w2_EDF", "experts.w3_EFD"]


def test_one_graph_for_all_counts():
    torch._dynamo.reset()
    experts = make_grouped(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, fullgraph=True, backend=counter, dynamic=True)
    seen = set()
    for counts in ([2, 0, 3, 1, 4], [9, 9, 0, 0, 0], [0, 0, 0, 0, 20]):
        x = torch.randn(sum(counts), D, requires_grad=True)
        y = compiled(x, torch.tensor(counts))
        torch.testing.assert_close(y, experts(x, torch.tensor(counts)))
        y.sum().backward()
        seen.add(counter.frame_count)
    assert len(seen) == 1  # the first call compiles, and none after it


def test_sizes_are_checked():
    experts = make_grouped()
    with pytest.raises(ValueError, match=r"num_tokens_per_expert_E must have shape \(5,\), got \(4,\)"):
        experts(torch.randn(3, D, dtype=torch.float64), torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 16\]"):
        experts(torch.randn(3, 2, dtype=torch.float64), torch.ones(5, dtype=torch.int64))


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fusedonemoe\[hf\]'"):
        register_expert_parallel()


# In each process


def torchtitans_experts_are_placed(rank, world, folder):
    """Over the experts, or along F, where a plain shard has gate and up rows in pairs; and stored under torchtitan's names."""
    reference = make_grouped()
    mesh = init_device_mesh("cpu", (world,))
    counts = torch.tensor([2, 0, 3, 1, 4])
    x = torch.randn(10, D, dtype=torch.float64)
    cut = make_grouped()
    for name, placement in (("w13_EF2D", Shard(1)), ("w2_EDF", Shard(2))):
        parameter = distribute_tensor(getattr(cut, name).detach(), mesh, [placement])
        setattr(cut, name, nn.Parameter(parameter))
    y = cut(x, counts)
    dist.all_reduce(y)
    torch.testing.assert_close(y, reference(x, counts))
    save_shards(cut.state_dict(), checkpoint_id=folder / "cut")
    loaded = GroupedExperts(D, 6, E, dtype=torch.float64)
    state = loaded.state_dict()
    load_shards(state, checkpoint_id=folder / "cut")
    loaded.load_state_dict(state)
    assert torch.equal(loaded(x, counts), reference(x, counts))


def fused(self, hidden_states, top_k_index, top_k_weights):
    return F.experts_mlp(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


def make_transformers_block(implementation):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, num_hidden_layers=1
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


def transformers_blocks_are_parallel(rank, world, folder):
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("fused_in_a_test", fused)
    plan = {"experts.gate_up_proj": "grouped_gemm", "experts.down_proj": "grouped_gemm", "experts": "ep_dispatch_experts"}
    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("everyone",))
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("batches", "copies"))
    alone = init_device_mesh("cpu", (world, 1), mesh_dim_names=("everyone", "one"))["one"]
    name = register_expert_parallel()
    # Tokens of each rank's own; of a half of the ranks; of all ranks: as transformers' own meshes say it.
    for tp_mesh, copies in ((alone, 1), (grid["copies"], 2), (everyone, world)):
        for implementation in ("fused_in_a_test", "grouped_mm", "eager"):
            reference, block = make_transformers_block(implementation), make_transformers_block(implementation)
            apply_expert_parallelism(block, everyone, tp_mesh, plan, name)
            for T in (5, 1):
                x = torch.randn(world, T, D).repeat_interleave(copies, 0)[:world].requires_grad_()
                y, expected = block(x[rank : rank + 1]), reference(x)
                torch.testing.assert_close(y[0], expected[rank])
                # What is computed once for several ranks that hold the same tokens counts once.
                (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
                (expected_dx,) = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)
                torch.testing.assert_close(dx[rank], expected_dx[rank])
                block.zero_grad()
                reference.zero_grad()
                y.square().sum().backward()
                expected[::copies].square().sum().backward()
                router = block.gate.weight.grad.clone()
                dist.all_reduce(router)
                torch.testing.assert_close(router / copies, reference.gate.weight.grad, rtol=1e-4, atol=1e-5)
                for weight in ("gate_up_proj", "down_proj"):
                    actual = getattr(block.experts, weight).grad.full_tensor()
                    torch.testing.assert_close(actual, getattr(reference.experts, weight).grad, rtol=1e-4, atol=1e-5)


def transformers_blocks_compile(rank, world, folder):
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("fused_in_a_test", fused)
    plan = {"experts.gate_up_proj": "grouped_gemm", "experts.down_proj": "grouped_gemm", "experts": "ep_dispatch_experts"}
    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("everyone",))
    alone = init_device_mesh("cpu", (world, 1), mesh_dim_names=("everyone", "one"))["one"]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        reference, block = (make_transformers_block("fused_in_a_test") for _ in range(2))
        apply_expert_parallelism(block, everyone, alone, plan, register_expert_parallel())
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(block, fullgraph=True, backend=counter)
        for T in (7, 12, 30, 9):
            x = torch.randn(1, T, D, requires_grad=True)
            y, expected = compiled(x), reference(x)
            torch.testing.assert_close(y, expected)
            found, wanted = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
            torch.testing.assert_close(found, wanted)
        assert counter.frame_count <= 2


NAMES = ["torchtitans_experts_are_placed"]
if has_transformers:
    NAMES += ["transformers_blocks_are_parallel", "transformers_blocks_compile"]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_in_processes("tests.integrations.test_distributed_plugs", NAMES, 2, tmp_path_factory.mktemp("world2"))


@pytest.mark.parametrize("name", NAMES)
def test_in_processes(failures, name):
    assert not failures[name], failures[name]


@needs_transformers
def test_registering_twice_is_registering_once():
    from transformers.distributed.expert_parallel import EPImplementationInterface

    name = register_expert_parallel()
    first = EPImplementationInterface()[name]
    assert register_expert_parallel() == name
    assert EPImplementationInterface()[name] is first
