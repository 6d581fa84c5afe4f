"""Gradients that some ranks need and others do not: of rows, routing weights and experts; and their averages and norms."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fusedonemoe.integrations.distributed import ExpertParallel, TensorParallel, average_gradients, clip_grad_norm_
from tests.integrations.test_distributed import EXACT, D, make_moe
from tests.integrations.test_distributed_agreement import refused
from tests.processes import run_in_processes

WORLD = 2
GROUP_TIMEOUT = 60
STYLES = (
    lambda: ExpertParallel(gradients="sum"),
    lambda: ExpertParallel(gradients="sum", capacity=12),
    lambda: ExpertParallel(gradients="sum", capacity_factor=2.0),
    TensorParallel,
)


def arguments(T, *, x_grad, weights_grad, seed):
    """The tokens of rank 0 all stay on it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64, requires_grad=x_grad)
    weights = torch.rand(T, 2, generator=generator, dtype=torch.float64, requires_grad=weights_grad)
    return x, torch.randint(0, 4 if seed == 0 else 8, (T, 2), generator=generator), weights


def gradients(experts, x, ids, weights):
    y = experts(x, ids, weights)
    assert y.requires_grad  # so that every rank has a backward
    y.square().sum().backward()
    return [x.grad, weights.grad]


def gradients_that_one_rank_needs(rank, world, folder):
    """A tensor that requires a gradient on one rank only gets the right one, and the others take part in the exchange."""
    for style in STYLES:
        for needs in ({"x_grad": True}, {"weights_grad": True}, {"x_grad": True, "weights_grad": True}, {}):
            for chosen in range(world):
                moe = style().apply(make_moe())
                tensor_parallel = style is TensorParallel
                asked = {name: rank == chosen and name in needs for name in ("x_grad", "weights_grad")}
                given = arguments(6, **asked, seed=0 if tensor_parallel else rank)
                actual = gradients(moe.experts, *given)
                x, ids, weights = given
                again = x.detach().requires_grad_(), ids, weights.detach().requires_grad_()
                expected = gradients(make_moe().experts, *again)
                for name, found, right in zip(asked, actual, expected, strict=True):
                    assert (found is not None) == asked[name]
                    if found is not None:
                        torch.testing.assert_close(found, right, **EXACT)


def experts_that_one_rank_has_frozen(rank, world, folder):
    """A rank whose own part of the call requires no gradient joins the backward of the others."""
    for style in STYLES:
        moe = style().apply(make_moe())
        moe.experts.requires_grad_(rank == 0)
        x, ids, weights = arguments(6, x_grad=False, weights_grad=False, seed=0)
        if style is TensorParallel:  # of its parameters, the bias alone is exchanged
            moe.experts.gate_up_proj.requires_grad_(True)
        gradients(moe.experts, x, ids, weights)
        assert (moe.experts.down_proj.grad is not None) == (rank == 0)


def a_rank_without_tokens_needs_no_flag(rank, world, folder):
    for options in ({}, {"capacity": 12}):
        moe = ExpertParallel(**options).apply(make_moe())
        x = torch.zeros(0, D, dtype=torch.float64) if rank else torch.randn(6, D, dtype=torch.float64, requires_grad=True)
        moe(x).sum().backward()
        assert rank or (x.grad is not None and x.grad.abs().min() > 0)


def a_rank_without_a_backward_is_named(rank, world, folder):
    for style in STYLES:
        moe = style().apply(make_moe())
        x = torch.ones(6, D, dtype=torch.float64)
        with torch.set_grad_enabled(rank == 0):
            text = "gradients = on for weights and parameters on rank 0, off (torch.no_grad) on rank 1"
            refused(lambda: moe(x), ValueError, "needs gradients on every rank or on none", text)  # noqa: B023
        moe.requires_grad_(False)
        with torch.set_grad_enabled(rank == 0):  # none needs a gradient
            assert not moe(x).requires_grad


def averages_compare_each_call(rank, world, folder):
    """A later step, another group and an equal number of values hide no difference."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    def step(names, group=None):
        model.zero_grad(set_to_none=True)
        torch.stack([model[name](torch.full((2, 4), rank + 1.0)).sum() for name in names]).sum().backward()
        average_gradients(model, group)

    step("ab")
    text = "gradient of a.weight = float32 (4, 4) on cpu, trained on rank 0, absent on rank 1"
    refused(lambda: step("ab"[rank]), ValueError, "average_gradients needs the same settings", text)
    refused(lambda: step(["ab", "b"][rank]), ValueError, text)
    refused(lambda: step("ab"[rank], dist.new_group([0, 1])), ValueError, text)
    step("b")
    expected = torch.full((4, 4), 3.0)
    assert model["a"].weight.grad is None and torch.equal(model["b"].get_parameter("weight").grad, expected)
    other = nn.Linear(4, 4)  # of this rank's own
    refused(lambda: step("a") if rank else average_gradients(other), ValueError, "a.weight = absent on rank 0, float32")


def a_norm_has_the_shards_of_all_ranks(rank, world, folder):
    """A rank without gradients of its experts, or without any, takes part."""
    for without in ("experts.", ""):
        moe = ExpertParallel().apply(make_moe(dtype=torch.float32))
        for name, parameter in moe.named_parameters():
            if not rank or not name.startswith(without):
                parameter.grad = torch.ones_like(parameter)
        norm = clip_grad_norm_((p for p in moe.parameters()), 1.0)
        experts = sum(p.to_local().numel() for p in moe.experts.parameters())
        whole = moe.gate.weight.numel() if not rank or without else 0
        assert norm.item() == pytest.approx((experts + whole) ** 0.5)


NAMES = [
    "averages_compare_each_call",
    "a_norm_has_the_shards_of_all_ranks",
    "gradients_that_one_rank_needs",
    "experts_that_one_rank_has_frozen",
    "a_rank_without_tokens_needs_no_flag",
    "a_rank_without_a_backward_is_named",
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_in_processes("tests.integrations.test_distributed_gradients", NAMES, WORLD, tmp_path_factory.mktemp("world2"))


@pytest.mark.parametrize("name", NAMES)
def test_in_processes(failures, name):
    assert not failures[name], failures[name]
