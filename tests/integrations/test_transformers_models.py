"""Whole models: one static graph, generation, checkpointing, autocast, router logits and the auxiliary loss."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fusedonemoe.integrations.transformers import apply, disable, enable, routers
from tests.integrations.transformers_families import VOCABULARY, build

LENGTHS = (9, 14, 5)


@pytest.fixture(autouse=True)
def left_as_found(monkeypatch):
    monkeypatch.setattr(routers, "FEWEST_LOGITS", 0)  # route here at every size
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    disable()


def ids(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def gradients(model: Any, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# A fused gate and router, biases and transposed weights, a gate that runs unfused, and one set by name without apply.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "muse_spark", "mixtral by name"])
def test_one_graph_for_all_lengths(family):
    family, _, by_name = family.partition(" by ")
    model = build(family, num_hidden_layers=1)
    if by_name:
        enable()
        model.set_experts_implementation("fusedonemoe")
    else:
        apply(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for length in LENGTHS:
            torch.testing.assert_close(compiled(ids(length))[0], model(ids(length))[0], rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= 2  # static, then dynamic
        compiled(ids(1))
    assert counter.frame_count <= 3
    for length in LENGTHS[:2]:
        ours, expected = gradients(model, compiled(ids(length))[0]), gradients(model, model(ids(length))[0])
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4)
    assert counter.frame_count <= 4  # with gradients, dynamic from the first


def test_layers_of_one_class_share_a_graph():
    # Compiled layer by layer, as large models are: nothing may be guarded on one layer's identity.
    model: Any = build("gpt_oss", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    apply(model)
    counter = CompileCounterWithBackend("eager")
    expected = model(ids(9))[0]
    for layer in model.model.layers:
        layer.mlp.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(ids(9))[0], expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_generation_gives_the_same_tokens(family, cache):
    model: Any = build(family)
    model.set_experts_implementation("eager")
    options = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids(6), **options)
    apply(model)
    assert torch.equal(model.generate(ids(6), **options), expected)
    assert expected.shape == (2, 30)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4"])
def test_gradient_checkpointing(family, reentrant):
    model: Any = build(family).train()
    apply(model)
    expected = gradients(model, model(ids(9))[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients(model, model(ids(9), use_cache=False)[0]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "ernie4_5_moe", "gpt_oss", "deepseek_v3"])
def test_autocast(family):
    model: Any = build(family)
    model.set_experts_implementation("eager")
    exact = model(ids(9))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(ids(9))[0]
        apply(model)
        ours = model(ids(9))[0]
    assert ours.dtype == plain.dtype
    # Through two layers an id can flip, in either run: a bound on the mean, not on the largest.
    assert (ours - exact).square().mean().sqrt() <= 3 * (plain - exact).square().mean().sqrt() + 1e-3
    for value in gradients(model, ours).values():
        assert value.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_router_logits_and_the_auxiliary_loss(family, compiled):
    model: Any = build(family)
    model.set_experts_implementation("eager")
    tokens = ids(9)
    expected = model(tokens, labels=tokens, output_router_logits=True)
    model.zero_grad()
    expected.loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    report = apply(model)
    assert report.routers_fused == 2
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    ours = run(tokens, labels=tokens, output_router_logits=True)
    assert len(ours.router_logits) == len(expected.router_logits) == 2
    for a, b in zip(ours.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert expected.aux_loss > 0
    torch.testing.assert_close(ours.aux_loss, expected.aux_loss)
    torch.testing.assert_close(ours.loss, expected.loss)
    model.zero_grad()
    ours.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name], rtol=1e-3, atol=1e-5)


def test_hooks_on_a_router_see_its_outputs():
    model: Any = build("qwen3_moe")
    apply(model)
    seen: list[Any] = []
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids(5))
    logits, weights, experts = seen[0]
    assert (logits.shape, weights.shape, experts.shape) == ((10, 8), (10, 3), (10, 3))
