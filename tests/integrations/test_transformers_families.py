"""Every family of the installed transformers that asks its registry: tiny random models against transformers' own experts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedonemoe.integrations.transformers import apply, enable, routers, unapply
from fusedonemoe.testing import assert_within_budget, make_experts
from tests.integrations.transformers_families import VOCABULARY, build, experts_of, families

# Families that cannot be built tiny, with the reason. None so far; a new one has to be looked at before it stands here.
NOT_BUILT: dict[str, str] = {}
# Families whose experts run unfused: their gates are none of the operators' activations, or a norm stands behind them.
UNFUSED = {"deepseek_v4", "glm5_next", "hy_v4", "inkling2", "muse_spark"}
# Families whose routers keep their own forward, and what the report says of it.
OWN_ROUTERS = {
    "axk2": "none of this library's rules",  # closed groups score 0, which a biased score can fall below
    "deepseek_v4": "more than hidden states",
    "diffusion_gemma": "no router found",
    "ernie4_5_moe": "none of this library's rules",
    "ernie4_5_vl_moe": "none of this library's rules",
    "gemma4": "no router found",
    "inkling": "4 values",
    "muse_spark": "no plain product",
    "phimoe": "none of this library's rules",
    "zaya": "no router found",
}


@pytest.fixture(autouse=True)
def routers_at_every_size(monkeypatch):
    # These models have few tokens, for which a router's own forward is the faster on CPU.
    monkeypatch.setattr(routers, "FEWEST_LOGITS", 0)


each_family = pytest.mark.parametrize("family", families())


def use_eager(model: nn.Module) -> None:
    experts: Any
    for experts in experts_of(model).values():
        experts.config._experts_implementation_internal = "eager"


def forward_and_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    y = model(ids.clone())[0]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (y * weights).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_walk_finds_the_families():
    # A walk that finds nothing would leave every test below without a case.
    assert {"qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"} <= set(families())
    assert len(families()) > 20


def test_families_that_cannot_be_built_are_known():
    failed = {}
    for family in families():
        try:
            build(family)
        except RuntimeError as error:
            failed[family] = str(error)
    assert failed.keys() == NOT_BUILT.keys(), failed


@each_family
def test_float32_equals_eager(family):
    model, ids = build(family), torch.arange(22).view(2, 11) + 3
    assert ids.max() < VOCABULARY
    use_eager(model)
    y, gradients = forward_and_gradients(model, ids)
    names, count = list(model.state_dict()), len(experts_of(model))

    report = apply(model)
    assert (report.used, report.total) == (count, count), report
    assert all(("unfused" in layer.experts) == (family in UNFUSED) for layer in report.layers), report
    why = OWN_ROUTERS.get(family)
    assert all(why in layer.router if why else layer.router_fused for layer in report.layers), report
    assert list(model.state_dict()) == names
    ours, our_gradients = forward_and_gradients(model, ids)
    assert (ours - y).abs().max() <= 1e-5 * y.abs().max()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (our_gradients[name] - gradient).abs().max()
        # A gradient that is the rest of a cancellation has the error of what cancelled.
        assert error <= 3e-4 * gradient.abs().max() + 1e-7 * largest, name

    unapply(model)
    again, _ = forward_and_gradients(model, ids)
    assert torch.equal(again, y)


def experts_call(experts: Any, x: Tensor, ids: Tensor, weights: Tensor, implementation: str) -> dict[str, Tensor]:
    experts.config._experts_implementation_internal = implementation
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    wanted = {"x": x, "weights": weights} | dict(experts.named_parameters())
    y = experts(x, ids, weights)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    gradients = torch.autograd.grad(y, list(wanted.values()), upstream)
    return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))


@each_family
def test_bfloat16_experts_are_within_the_budget(family):
    # On the experts alone: through a model, one id that rounding flips is a larger difference than all the rest.
    enable()
    experts: Any = next(iter(experts_of(build(family)).values()))
    down = experts.down_proj
    D, E = down.shape[2 if getattr(experts, "is_transposed", False) else 1], down.shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, D, generator=generator).bfloat16()
    weights = (torch.rand(40, 3, generator=generator) + 0.1).bfloat16()
    ids = make_experts(40, E, 3, routing="distinct")
    half = copy.deepcopy(experts).bfloat16()
    exact = experts_call(copy.deepcopy(half).double(), x.double(), ids, weights.double(), "eager")
    plain = experts_call(half, x, ids, weights, "eager")
    ours = experts_call(half, x, ids, weights, "fusedonemoe")
    for name, value in exact.items():
        assert_within_budget(ours[name], plain[name], value, name=name)
