"""The balance without a loss: what is counted when, in every way a model can run, on one process and on two."""

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedonemoe import MoE, TopKRouter, balance
from fusedonemoe.balance import LossFreeBalance
from fusedonemoe.ops.reference import balance as reference_balance

D, E, K = 16, 8, 2


# The operator


def test_opcheck_counting():
    counts = torch.zeros(4, dtype=torch.int64)
    torch.library.opcheck(torch.ops.fusedonemoe.count_tokens_.default, (counts, torch.tensor([[0, 3], [1, 9]])))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_counting_adds_and_skips_ids_out_of_range(dtype):
    counts = torch.tensor([10, 0, 0])
    torch.ops.fusedonemoe.count_tokens_(counts, torch.tensor([[0, 2], [2, 100]], dtype=dtype))
    assert counts.tolist() == [11, 0, 2]


def make_model(depth=2, **options):
    torch.manual_seed(0)
    fields = {"hidden_size": D, "intermediate_size": 8, "num_experts": E, "top_k": K, "selection_bias": True, **options}
    return nn.Sequential(*(MoE(**fields) for _ in range(depth)))


def biases(model):
    return [block.gate.e_score_correction_bias.clone() for block in model]


def expected_biases(model, batches, rate):
    """By a copy without hooks: the routing of every batch, counted and handed to the oracle."""
    model = copy.deepcopy(model)
    for block in model:
        block.gate._forward_hooks.clear()
    totals = [torch.zeros(E, dtype=torch.int64) for _ in model]
    with torch.no_grad():
        for x in batches:
            for total, block in zip(totals, model, strict=True):
                out = block(x, return_routing=True)
                total += out.tokens_per_expert
                x = out.output
    before = biases(model)
    return [
        torch.from_numpy(reference_balance.update_selection_bias(b, c, rate)).float() for b, c in zip(before, totals, strict=True)
    ]


def assert_biases(model, expected):
    for found, exact in zip(biases(model), expected, strict=True):
        assert exact.abs().max() > 0
        assert_close(found, exact)


def checkpointed(model, use_reentrant):
    def run(x):
        for block in model:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    return run


def compile_blocks(model, **options):
    blocks: list[Any] = [torch.compile(block, fullgraph=True, **options) for block in model]
    return nn.Sequential(*blocks)


RUNS = {
    "eager": lambda model: model,
    "checkpoint": lambda model: checkpointed(model, False),
    "checkpoint_reentrant": lambda model: checkpointed(model, True),
    "compile": lambda model: torch.compile(model, fullgraph=True),
    "compile_dynamic": lambda model: torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"),
    "compiled_checkpoint": lambda model: torch.compile(checkpointed(model, False), fullgraph=True),
    "compiled_checkpoint_reentrant": lambda model: torch.compile(checkpointed(model, True), fullgraph=True, backend="aot_eager"),
    "checkpoint_of_compiled": lambda model: checkpointed(compile_blocks(model), False),
    "checkpoint_of_compiled_reentrant": lambda model: checkpointed(compile_blocks(model, backend="aot_eager"), True),
}


@pytest.mark.parametrize("kind", RUNS)
def test_every_forward_counts_once_and_every_step_updates_once(kind):
    torch._dynamo.reset()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    balancer = LossFreeBalance(model, optimizer)
    run = RUNS[kind](model)
    for step, rate in enumerate((0.125, 0.25)):  # unequal, so that no bias comes back to zero
        balancer.rate = rate
        batches = [torch.randn(10, D, requires_grad=True) for _ in range(3)]
        expected = expected_biases(model, batches, rate)
        for x in batches:
            run(x).square().sum().backward()
        counted = balancer.tokens_per_expert()
        assert list(counted) == ["0.gate", "1.gate"]
        assert [int(c.sum()) for c in counted.values()] == [3 * 10 * K] * 2, step
        optimizer.step()
        optimizer.zero_grad()
        assert_biases(model, expected)
        assert all(int(c.sum()) == 0 for c in balancer.tokens_per_expert().values())
    optimizer.step()  # nothing was counted since: nothing moves
    assert_biases(model, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_counted_in_eval(compiled):
    torch._dynamo.reset()
    model = make_model()
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.randn(10, D)
    for mode, counted in (("eval", 0), ("train", 20), ("eval", 20), ("train", 40)):
        getattr(model, mode)()
        run(x)
        assert [int(c.sum()) for c in balancer.tokens_per_expert().values()] == [counted] * 2


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_training_mode_counts_without_recording_too(grad_mode):
    model = make_model(1)
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with grad_mode():
        model(torch.randn(10, D))
    assert int(balancer.tokens_per_expert()["0.gate"].sum()) == 20


def test_a_step_that_the_gradient_scaler_skips_leaves_its_counts_to_the_next():
    model, x = make_model(1), torch.randn(10, D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    balancer = LossFreeBalance(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    (scaler.scale(model(x).square().sum()) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert int(balancer.tokens_per_expert()["0.gate"].sum()) == 20
    assert biases(model)[0].abs().max() == 0
    optimizer.zero_grad()
    scaler.scale(model(x).square().sum()).backward()
    assert int(balancer.tokens_per_expert()["0.gate"].sum()) == 40
    scaler.step(optimizer)
    assert biases(model)[0].abs().max() > 0


def test_only_routers_with_a_selection_bias_are_hooked():
    model = nn.ModuleDict({"with": TopKRouter(D, E, K, selection_bias=True), "without": TopKRouter(D, E, K)})
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert list(balancer.tokens_per_expert()) == ["with"]
    assert not model["without"]._forward_hooks


def test_routers_of_different_sizes_are_told_apart():
    routers = [TopKRouter(D, n, 1, selection_bias=True) for n in (3, 5)]
    model = nn.ModuleList(routers)
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01), rate=1.0)
    for router in routers:
        with torch.no_grad():
            router.weight.zero_()  # all logits tie: every token goes to expert 0
        router(torch.randn(4, D))
    balancer.update()
    found = [b.tolist() for b in model.buffers()]
    assert found == [[-1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0, 1.0]]


def test_the_rate_can_be_scheduled():
    model, optimizer = make_model(1), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    balancer = LossFreeBalance(model, optimizer)
    for rate in (0.25, 0.0):
        balancer.rate = rate
        before = biases(model)[0]
        model(torch.randn(10, D))
        optimizer.step()
        assert (biases(model)[0] - before).abs().max() == rate


def test_remove_takes_off_every_hook():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    balancer = LossFreeBalance(model, optimizer)
    balancer.remove()
    model(torch.randn(10, D)).sum().backward()
    assert all(int(c.sum()) == 0 for c in balancer.tokens_per_expert().values())
    optimizer.step()
    assert all(b.abs().max() == 0 for b in biases(model))
    assert not any(module._forward_hooks for module in model.modules()) and not optimizer._optimizer_step_post_hooks


def test_a_copy_of_the_model_counts_for_itself():
    model = make_model(1)
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    copy.deepcopy(model)(torch.randn(10, D))
    assert int(balancer.tokens_per_expert()["0.gate"].sum()) == 0


def test_the_counts_are_not_in_the_state_dict():
    model = make_model(1)
    names = list(model.state_dict())
    LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert list(model.state_dict()) == names and len(list(model.buffers())) == 1


def test_hooks_that_come_after_compilation_are_reported():
    torch._dynamo.reset()
    model, x = make_model(1), torch.randn(10, D)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    balancer = LossFreeBalance(model, optimizer)
    run(x).sum().backward()
    if counted := int(balancer.tokens_per_expert()["0.gate"].sum()):  # torch 2.14 sees the hook, and compiles again
        assert counted == 20
        return
    with pytest.warns(UserWarning, match="counted nothing before the first step"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # said once


class ReadsOfTheDevice(TorchDispatchMode):
    """Notes what makes the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        ):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_only_the_first_update_reads_a_value():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    LossFreeBalance(model, optimizer)
    reads = []
    for _ in range(3):
        with ReadsOfTheDevice() as log:
            model(torch.randn(10, D)).sum().backward()
            optimizer.step()
        reads.append(len(log.found))
    assert reads == [1, 0, 0]


def test_the_bias_balances_a_skewed_router():
    model, x = make_model(1, top_k=1), torch.randn(256, D) + 1.0  # a common part, which favours some experts
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    LossFreeBalance(model, optimizer, rate=0.01)

    def entropy():
        return balance.Usage(model[0](x, return_routing=True).tokens_per_expert).entropy

    model.eval()
    before = entropy()
    model.train()
    for _ in range(100):
        model(x).sum().backward()
        optimizer.step()
    model.eval()
    assert before < 0.9 and entropy() > 0.97


# Two processes


TRAIN_ON_A_RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fusedonemoe.balance import LossFreeBalance
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
model, batches = torch.load(f"{folder}/task.pt", weights_only=False)
parallel = DistributedDataParallel(model)  # broadcasts buffers before each forward
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
balancer = LossFreeBalance(parallel, optimizer, rate=0.125)
for x in batches:
    parallel(x.chunk(2)[rank]).square().mean().backward()
counted = balancer.tokens_per_expert()
optimizer.step()
found = [block.gate.e_score_correction_bias for block in model]
torch.save((counted, found), f"{folder}/found{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_update_as_one_would(tmp_path):
    model, batches = make_model(), [torch.randn(20, D) for _ in range(2)]
    torch.save((model, batches), tmp_path / "task.pt")
    commands = [[sys.executable, "-c", TRAIN_ON_A_RANK, str(tmp_path), str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    expected = expected_biases(model, batches, 0.125)
    ranks = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    for counted, found in ranks:
        assert [int(c.sum()) for c in counted.values()] == [2 * 10 * K] * 2
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    # Neither rank alone would have moved every bias that way.
    for counted, _ in ranks:
        alone = [torch.from_numpy(reference_balance.update_selection_bias(torch.zeros(E), c, 0.125)) for c in counted.values()]
        assert any(not torch.equal(a.float(), b) for a, b in zip(alone, expected, strict=True))


# Refusals


def test_bad_arguments_of_the_balancer_are_named():
    model = make_model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got list$"):
        LossFreeBalance([], optimizer)
    with pytest.raises(TypeError, match=r"^optimizer must be a torch.optim.Optimizer, got Sequential$"):
        LossFreeBalance(model, model)
    with pytest.raises(ValueError, match=r"^rate must be at least 0 and finite, got -0.1$"):
        LossFreeBalance(model, optimizer, rate=-0.1)
    with pytest.raises(ValueError, match=r"^model has no TopKRouter with selection_bias=True$"):
        LossFreeBalance(make_model(1, selection_bias=False), optimizer)
