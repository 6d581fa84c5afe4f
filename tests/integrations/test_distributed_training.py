"""FSDP2, tensor parallelism and DDP against one process; checkpoints at another size; clipping, optimizers, counts."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from fusedonemoe import MoE
from fusedonemoe.balance import LossFreeBalance, UsageMeter
from fusedonemoe.integrations.distributed import (
    ExpertParallel,
    TensorParallel,
    average_gradients,
    checkpointable,
    clip_grad_norm_,
    data_parallel,
    expert_placement,
    parameter_groups,
)
from fusedonemoe.integrations.distributed.training import PairedShard
from tests.integrations.test_distributed import EXACT, D, F, batch, make_moe, whole
from tests.processes import run_in_processes

E = 6


def make_model(**options):
    """Two blocks with something plain between them."""
    torch.manual_seed(0)
    options = {"hidden_size": D, "intermediate_size": F, "num_experts": E, "top_k": 2, "impl": "grouped", **options}
    layers = [MoE(**options), nn.Linear(D, D), MoE(bias=True, **options)]
    return nn.Sequential(*layers).double()


def make_optimizer(model):
    return torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=0.01, fused=True)


def train(model, x, steps, *, optimizer=None, clip=0.5, synchronise=lambda: None, forward=None):
    """Losses and norms of a few steps on the same batch; the gradients of a mean over the batch."""
    optimizer = optimizer or make_optimizer(model)
    said = []
    for _ in range(steps):
        loss = ((forward or model)(x) - x).square().mean()
        loss.backward()
        synchronise()
        norm = clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        said.append((loss.detach(), norm))
    return said, optimizer


def assert_same_training(model, said, x, steps):
    """As one process trains on the batch of all."""
    reference = make_model()
    expected, _ = train(reference, x, steps)
    for (loss, norm), (expected_loss, expected_norm) in zip(said, expected, strict=True):
        loss = loss.clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / dist.get_world_size(), expected_loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)  # the norm is float32
    for (name, actual), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        # AdamW divides by the square root of what may be a tiny gradient, and the norm is float32.
        torch.testing.assert_close(whole(actual), wanted, rtol=1e-6, atol=1e-7, msg=name)


def tokens(world, each=6):
    return batch([each] * world)[0]


# In each process


def fully_sharded_blocks(rank, world, folder):
    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("everyone",))
    x = tokens(world)
    # Without expert parallelism: more ranks than experts would leave some without any along dimension 0.
    model = make_model()
    for layer in model:
        place = expert_placement(layer, everyone) if isinstance(layer, MoE) else None
        fully_shard(layer, mesh=everyone, shard_placement_fn=place)
    fully_shard(model, mesh=everyone)
    assert model[0].experts.gate_up_proj.to_local().shape == (E, 2 * F // world, D)
    assert model[0].gate.weight.to_local().shape[0] < E
    said, _ = train(model, x.chunk(world)[rank], 3)
    assert_same_training(model, said, x, 3)


def fully_sharded_with_experts_on_their_own_dimension(rank, world, folder):
    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("everyone",))
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "experts"))
    x = tokens(world)
    for compiled in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = make_model()
        ExpertParallel(grid["experts"]).apply(model)
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            for layer in model:
                if compiled and isinstance(layer, MoE):
                    layer.compile(fullgraph=True, backend=counter)
                place = expert_placement(layer, grid["copies"]) if isinstance(layer, MoE) else None
                fully_shard(layer, mesh=everyone, shard_placement_fn=place)
            fully_shard(model, mesh=everyone)
            weight = model[0].experts.gate_up_proj
            assert weight.shape == (E, 2 * F, D) and weight.to_local().shape == (E // 2, 2 * F // (world // 2), D)
            said, _ = train(model, x.chunk(world)[rank], 3)
        assert_same_training(model, said, x, 3)
        assert (counter.frame_count > 0) == compiled


def experts_parallel_and_the_rest_replicated(rank, world, folder):
    x = tokens(world)
    model = ExpertParallel().apply(make_model())
    wrapped = data_parallel(model)
    said, _ = train(model, x.chunk(world)[rank], 3, forward=wrapped)
    assert_same_training(model, said, x, 3)
    model = ExpertParallel().apply(make_model())
    said, _ = train(model, x.chunk(world)[rank], 3, synchronise=lambda: average_gradients(model))
    assert_same_training(model, said, x, 3)
    with pytest.raises(ValueError, match="sums its gradients, and DistributedDataParallel averages"):
        data_parallel(ExpertParallel(gradients="sum").apply(make_model()))
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "experts"))
    if world > 2:
        with pytest.raises(ValueError, match=r"0\.experts is parallel over ranks .* and the model over \[0, 1, 2, 3\]"):
            data_parallel(ExpertParallel(grid["experts"]).apply(make_model()))


def assert_stored_in_place(moe, reference):
    """What torch.distributed.checkpoint is told of slices of gate and up rows is where they are."""
    for parameter, whole_one in zip(moe.parameters(), reference.parameters(), strict=True):
        stored = checkpointable([parameter])[0]
        assert not isinstance(stored, PairedShard) or len(stored.pieces) == 2
        for view, chunk in stored.pieces if isinstance(stored, PairedShard) else ():
            box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            assert torch.equal(whole_one[box], view)
        if isinstance(stored, PairedShard):
            with pytest.raises(NotImplementedError, match=r"checkpoint\.save and load alone, not for aten\.add"):
                _ = stored + 1


def cut_along_the_intermediate_width(rank, world, folder):
    kinds: list[dict[str, Any]] = [
        {},
        {"gate_up_layout": "up_gate", "bias": False},
        {"gate_up_layout": "interleaved", "activation": "swiglu_oai"},
        {"transposed": True},
        {"gated": False, "activation": "relu2"},
        {"shared_intermediate_size": 6, "save_percent": 50, "scoring": "sigmoid"},
    ]
    x, dy = batch([9])
    for kind in kinds:
        reference, moe = make_moe(**kind), TensorParallel().apply(make_moe(**kind))
        assert moe.state_dict().keys() == reference.state_dict().keys()
        assert moe.experts.down_proj.to_local().shape == ((8, F // world, D) if "transposed" in kind else (8, D, F // world))
        assert_stored_in_place(moe, reference)
        for block in (reference, moe):
            block.zero_grad()
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = moe(mine), reference(theirs)
        torch.testing.assert_close(y, expected, **EXACT)
        (y * dy).sum().backward()
        (expected * dy).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, **EXACT)
        for (name, actual), wanted in zip(moe.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(whole(actual.grad), wanted.grad, **EXACT, msg=f"{kind}: {name}")
    # Along a plain shard of the same axis a rank would have gate rows alone.
    reference, moe = make_moe(), TensorParallel().apply(make_moe())
    gate, up = reference.experts.gate_up_proj.chunk(2, dim=1)
    local = torch.cat((gate.chunk(world, 1)[rank], up.chunk(world, 1)[rank]), 1)
    assert torch.equal(moe.experts.gate_up_proj.to_local(), local)
    assert torch.equal(whole(moe.experts.gate_up_proj), reference.experts.gate_up_proj)
    # One graph, and the same through parallelize_module.
    mesh = init_device_mesh("cpu", (world,))
    moe = parallelize_module(make_moe(), mesh, {"experts": TensorParallel()})
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(moe, fullgraph=True, backend="aot_eager")(x), reference(x), **EXACT)
    with pytest.raises(ValueError, match=rf"must divide the intermediate size \(13\), got {world} ranks"):
        TensorParallel().apply(MoE(hidden_size=D, intermediate_size=13, num_experts=4, top_k=2))


def tensor_parallel_training(rank, world, folder):
    x = batch([12])[0]
    model = TensorParallel().apply(make_model())
    said, _ = train(model, x, 3)
    assert_same_training(model, said, x, 3)


def save(model, optimizer, path):
    state, optimizer_state = get_state_dict(model, optimizer)
    save_shards(checkpointable({"model": state, "optimizer": optimizer_state}), checkpoint_id=path)


def load(model, optimizer, path):
    state, optimizer_state = get_state_dict(model, optimizer)
    load_shards(checkpointable({"model": state, "optimizer": optimizer_state}), checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)


def fully_sharded(model, world):
    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("everyone",))
    grid = init_device_mesh("cpu", (max(world // 2, 1), min(world, 2)), mesh_dim_names=("copies", "experts"))
    ExpertParallel(grid["experts"]).apply(model)
    for layer in model:
        place = expert_placement(layer, grid["copies"]) if isinstance(layer, MoE) else None
        fully_shard(layer, mesh=everyone, shard_placement_fn=place)
    return fully_shard(model, mesh=everyone)


# E = 6 over 4 ranks is 2, 2, 2, 0.
WAYS = {
    "experts": lambda model, world: ExpertParallel().apply(model),
    "width": lambda model, world: TensorParallel().apply(model),
    "fsdp": fully_sharded,
}


def checkpoints_are_saved(rank, world, folder):
    for way, make_parallel in WAYS.items():
        model = make_parallel(make_model(), world)
        x = tokens(world) if way != "width" else batch([12])[0]
        mine = x if way == "width" else x.chunk(world)[rank]
        synchronise = (partial(average_gradients, model)) if way == "experts" else lambda: None
        _, optimizer = train(model, mine, 2, synchronise=synchronise)
        save(model, optimizer, folder / way)
        # What the whole model is, for the readers.
        parameters = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
        moments = {name: whole(optimizer.state[p]["exp_avg"]).clone() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save((parameters, moments), folder / f"{way}.pt")


def checkpoints_are_loaded(rank, world, folder):
    """In another number of processes, and in another way of being parallel."""
    written = folder / "saved"
    for saved_by in WAYS:
        expected, expected_moments = torch.load(written / f"{saved_by}.pt")
        for way, make_parallel in {**WAYS, "whole": lambda model, world: model}.items():
            torch.manual_seed(1)
            model = make_model()
            for part in model:
                part.reset_parameters()
            model = make_parallel(model, world)
            optimizer = make_optimizer(model)
            load(model, optimizer, written / saved_by)
            for name, parameter in model.named_parameters():
                assert torch.equal(whole(parameter), expected[name]), (saved_by, way, name)
                assert torch.equal(whole(optimizer.state[parameter]["exp_avg"]), expected_moments[name]), (saved_by, way, name)


def counts_are_summed_over_the_ranks(rank, world, folder):
    def make(**options):
        torch.manual_seed(0)
        return MoE(hidden_size=D, intermediate_size=F, num_experts=E, top_k=2, selection_bias=True, dtype=torch.float64)

    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("everyone",))
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "experts"))
    x = tokens(world, 10)
    reference = make()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.0)
    meter, balance = UsageMeter(reference), LossFreeBalance(reference, optimizer, rate=0.1)
    reference(x).sum().backward()
    expected_counts = balance.tokens_per_expert()["gate"]
    balance.update()  # in one process, so without a sum
    for group in (None, everyone, everyone.get_group()):
        moe = ExpertParallel(grid["experts"]).apply(make())
        fully_shard(moe, mesh=everyone, shard_placement_fn=expert_placement(moe, grid["copies"]))
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
        meter, balance = UsageMeter(moe, group=everyone), LossFreeBalance(moe, optimizer, rate=0.1, group=group)
        moe(x.chunk(world)[rank]).sum().backward()
        assert balance.tokens_per_expert()["gate"].sum() == 20  # this rank's
        assert torch.equal(torch.tensor(meter.usage()["gate"].counts), expected_counts)
        optimizer.step()
        assert moe.gate.e_score_correction_bias.abs().max() > 0
        # The reference summed its counts of the whole batch over world equal ranks, which moves the bias alike.
        assert torch.equal(moe.gate.e_score_correction_bias, reference.gate.e_score_correction_bias)


AT_TWO = [
    "cut_along_the_intermediate_width",
    "tensor_parallel_training",
    "experts_parallel_and_the_rest_replicated",
    "fully_sharded_blocks",
]
AT_FOUR = [
    "fully_sharded_blocks",
    "fully_sharded_with_experts_on_their_own_dimension",
    "experts_parallel_and_the_rest_replicated",
    "cut_along_the_intermediate_width",
    "counts_are_summed_over_the_ranks",
    "checkpoints_are_saved",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What failed in the processes; two of them read what four wrote, and so does one."""
    four = tmp_path_factory.mktemp("four")
    failures = {4: run_in_processes("tests.integrations.test_distributed_training", AT_FOUR, 4, four)}
    for world in (2, 1):
        folder = tmp_path_factory.mktemp(f"world{world}")
        (folder / "saved").symlink_to(four)
        names = ["checkpoints_are_loaded", *(AT_TWO if world == 2 else ())]
        failures[world] = run_in_processes("tests.integrations.test_distributed_training", names, world, folder)
    return failures


EVERYTHING = [(4, name) for name in AT_FOUR] + [(2, name) for name in AT_TWO]


@pytest.mark.parametrize(("world", "name"), [*EVERYTHING, (2, "checkpoints_are_loaded"), (1, "checkpoints_are_loaded")])
def test_in_processes(runs, world, name):
    assert not runs[world][name], runs[world][name]
