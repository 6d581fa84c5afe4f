"""Training as people do it: checkpointing, DDP, accumulation, torch.func, determinism, frozen experts, a falling loss."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fusedonemoe import FusedOneMoE, MoE

D = 16
KINDS = ("moe", "fused_one_moe")
IMPLS = ("dense", "grouped")
SAVED_OPERATORS = {
    "moe": torch.ops.fusedonemoe.experts_mlp.default,
    "fused_one_moe": torch.ops.fusedonemoe.experts_merged.default,
}

every_layer = pytest.mark.parametrize(("kind", "impl"), [(kind, impl) for kind in KINDS for impl in IMPLS])


def make_layer(kind, impl, **options):
    torch.manual_seed(0)
    if kind == "moe":
        return MoE(hidden_size=D, intermediate_size=8, num_experts=8, top_k=2, bias=True, impl=impl, **options)
    return FusedOneMoE(D, 8, 8, is_sparse=True, topk=2, bias=True, impl=impl, **options)


def gradients(loss, layer, x):
    """By backward(), as reentrant checkpointing wants it."""
    layer.zero_grad()
    x.grad = None
    loss.backward()
    found = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert all(g is not None and g.abs().max() > 0 for g in found.values())
    return found


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


class OperatorLog(TorchDispatchMode):
    """Counts the calls of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedonemoe":
            self.calls.append(func.name().removeprefix("fusedonemoe::"))
        return func(*args, **(kwargs or {}))


# Checkpointing


@every_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_same_bits(kind, impl, use_reentrant):
    layer, x = make_layer(kind, impl), torch.randn(10, D, requires_grad=True)
    plain = gradients(layer(x).square().sum(), layer, x)
    assert_equal(gradients(checkpoint(layer, x, use_reentrant=use_reentrant).square().sum(), layer, x), plain)


@pytest.mark.parametrize("save", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_selective_checkpointing_can_name_the_operator(kind, save):
    layer, x = make_layer(kind, "grouped"), torch.randn(10, D, requires_grad=True)
    plain = gradients(layer(x).square().sum(), layer, x)
    operator = SAVED_OPERATORS[kind]

    def policy(context, function, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if save and function is operator else CheckpointPolicy.PREFER_RECOMPUTE

    with OperatorLog() as log:
        context_fn = partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)
        assert_equal(gradients(y.square().sum(), layer, x), plain)
    name = operator.name().removeprefix("fusedonemoe::")
    assert log.calls.count(name) == (1 if save else 2)
    assert log.calls.count("route") == 2


@pytest.mark.parametrize("save_percent", [0, 50])
def test_saving_less_gives_the_same_gradients(save_percent):
    everything, less = make_layer("moe", "grouped"), make_layer("moe", "grouped", save_percent=save_percent)
    x = torch.randn(10, D, requires_grad=True)
    expected = gradients(everything(x).square().sum(), everything, x)
    # Not bit for bit: fewer rows at once may take another path through the grouped product.
    torch.testing.assert_close(gradients(less(x).square().sum(), less, x), expected)


# Many processes, many steps


TRAIN_ON_A_RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
model, x = torch.load(f"{folder}/task.pt", weights_only=False)
parallel = DistributedDataParallel(model)
parallel(x.chunk(2)[rank]).square().mean().backward()
torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/gradients{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_on_two_processes_averages_to_the_gradient_of_one(tmp_path):
    model = nn.Sequential(*(make_layer(kind, impl, dtype=torch.float64) for kind in KINDS for impl in IMPLS))
    x = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    torch.save((model, x.detach()), tmp_path / "task.pt")
    commands = [[sys.executable, "-c", TRAIN_ON_A_RANK, str(tmp_path), str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    expected = gradients(model(x).square().mean(), model, x)
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"gradients{rank}.pt").items():
            torch.testing.assert_close(gradient, expected[name])


@every_layer
def test_accumulated_gradients_are_those_of_the_whole_batch(kind, impl):
    layer, x = make_layer(kind, impl, dtype=torch.float64), torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    whole = gradients(layer(x).square().sum(), layer, x)
    layer.zero_grad()
    for part in x.detach().split(7):
        layer(part).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name])


@every_layer
def test_thirty_steps_lower_the_loss(kind, impl):
    layer = make_layer(kind, impl)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, D, generator=generator)
    target = torch.tanh(x @ torch.randn(D, D, generator=generator) / D**0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_both_implementations_train_alike():
    layers = {impl: make_layer("moe", impl, dtype=torch.float64) for impl in IMPLS}
    x = torch.randn(64, D, dtype=torch.float64)
    for layer in layers.values():
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(x) - x).square().mean().backward()
            optimizer.step()
    for dense, grouped in zip(layers["dense"].parameters(), layers["grouped"].parameters(), strict=True):
        torch.testing.assert_close(grouped, dense)


# torch.func, determinism, inference, frozen parts


@every_layer
def test_functional_call_uses_the_parameters_given(kind, impl):
    layer, x = make_layer(kind, impl), torch.randn(10, D)
    other = {name: (p.detach() + 0.1).requires_grad_() for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, other, (x,))
    assert not torch.equal(y, layer(x))
    found = torch.autograd.grad(y.square().sum(), list(other.values()))
    assert all(p.grad is None for p in layer.parameters())
    layer.load_state_dict(other)
    assert torch.equal(y, layer(x))
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_layer
def test_deterministic_algorithms_are_all_that_is_used(kind, impl):
    layer, x = make_layer(kind, impl), torch.randn(50, D, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(layer(x).square().sum(), layer, x) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(first, second)
    assert_equal(first, gradients(layer(x).square().sum(), layer, x))


@every_layer
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
def test_without_recording_the_values_are_the_same_bits(kind, impl, mode):
    layer, x = make_layer(kind, impl), torch.randn(10, D)
    with mode():
        y = layer(x)
    assert not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(y, layer(x))


@every_layer
def test_frozen_experts_cost_no_gradient_and_let_the_others_through(kind, impl, monkeypatch):
    layer, x = make_layer(kind, impl), torch.randn(10, D, requires_grad=True)
    plain = {name: g.clone() for name, g in gradients(layer(x).square().sum(), layer, x).items()}
    layer.requires_grad_(False)
    layer.gate.requires_grad_(True)
    layer.zero_grad()
    x.grad = None
    outer_products: list[object] = []
    monkeypatch.setattr("fusedonemoe.ops.grouped.grouped_outer", lambda *args: outer_products.append(args))
    layer(x).square().sum().backward()
    assert not outer_products, "a weight gradient is computed and thrown away"
    torch.testing.assert_close(x.grad, plain["x"])
    torch.testing.assert_close(layer.gate.weight.grad, plain["gate.weight"])
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["gate.weight"]


@every_layer
def test_frozen_router_leaves_the_experts_gradients_alone(kind, impl):
    layer, x = make_layer(kind, impl), torch.randn(10, D, requires_grad=True)
    plain = {name: g.clone() for name, g in gradients(layer(x).square().sum(), layer, x).items()}
    layer.gate.requires_grad_(False)
    layer.zero_grad()
    layer(x.detach()).square().sum().backward()
    assert layer.gate.weight.grad is None
    for name, parameter in layer.named_parameters():
        if not name.startswith("gate."):
            torch.testing.assert_close(parameter.grad, plain[name])
