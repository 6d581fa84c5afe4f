"""Adapted experts with impl="triton": values and every gradient, any rank, and the low-rank kernel by itself."""

import dataclasses

import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.ops.triton.plan import make_plan
from fusedonemoe.ops.triton.rows import grouped_rows
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.testing import make_experts, make_mlp_inputs

D, INNER, E, K = 40, 24, 6, 2
SCALES = {"gate_up_scale": 0.5, "down_scale": 1.75}


def make(T, ranks, device, *, dtype=torch.float32, **options):
    """Inputs and factors, and all that has a gradient."""
    inputs = make_mlp_inputs(T, D, INNER, E, K, dtype=dtype, requires_grad=True, device=device, **options)
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for name, rank, like in zip(("gate_up", "down"), ranks, (inputs.up_proj, inputs.down_proj), strict=True):
        if rank:
            for letter, shape in (("A", (E, rank, like.shape[2])), ("B", (E, like.shape[1], rank))):
                values = torch.randn(shape, generator=generator) * shape[2] ** -0.5
                factors[f"{name}_{letter}"] = values.to(device, dtype).requires_grad_()
    return inputs, factors


def call(inputs, factors, impl, **options):
    named = {"gate_up_bias": inputs.up_bias, "down_bias": inputs.down_bias, **factors, **SCALES, **options}
    return F.experts_mlp_lora(inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj, **named, impl=impl)


def results(inputs, factors, impl, **options):
    named = {name: value for name, value in vars(inputs).items() if value is not None and value.requires_grad} | factors
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    y = call(inputs, factors, impl, **options)
    seed = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)
    return {"y": y} | {f"d{n}": g for n, g in zip(wanted, torch.autograd.grad(y, list(wanted.values()), seed), strict=True)}


def assert_close(ours, theirs, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        a = ours[name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() and b.norm() > 0, name


@pytest.mark.parametrize(
    ("dtype", "ranks"),
    [
        (torch.float32, (8, 8)),
        (torch.bfloat16, (8, 8)),
        (torch.float16, (8, 8)),
        (torch.float32, (1, 3)),
        (torch.bfloat16, (20, 0)),
        (torch.bfloat16, (0, 16)),
    ],
    ids=str,
)
def test_values_and_all_gradients(dtype, ranks, device):
    inputs, factors = make(21, ranks, device, dtype=dtype, bias=True)
    assert_close(results(inputs, factors, "triton"), results(inputs, factors, "dense"), dtype)


@pytest.mark.parametrize("routing", ["skewed", "one_expert", "some_empty", "out_of_range"])
def test_every_routing(routing, device):
    inputs, factors = make(11, (3, 5), device, routing=routing)
    assert_close(results(inputs, factors, "triton"), results(inputs, factors, "dense"))


@pytest.mark.parametrize(
    ("activation", "gated", "layout"),
    [("swiglu_oai", True, "interleaved"), ("silu", True, "up_gate"), ("gelu", False, "gate_up")],
)
def test_every_form(activation, gated, layout, device):
    inputs, factors = make(9, (3, 5), device, gated=gated, bias=True)
    form = {"activation": activation, "gated": gated, "gate_up_layout": layout}
    assert_close(results(inputs, factors, "triton", **form), results(inputs, factors, "dense", **form))


@pytest.mark.parametrize("save_percent", [0, 37])
def test_what_is_computed_again_is_the_same_bits(save_percent, device):
    inputs, factors = make(13, (3, 5), device, bias=True)
    ours, all_saved = (results(inputs, factors, "triton", save_percent=p) for p in (save_percent, 100))
    assert all(torch.equal(ours[name], all_saved[name]) for name in all_saved)


def test_a_frozen_base_and_each_gradient_alone(device):
    inputs, factors = make(5, (3, 5), device, bias=True)
    expected = results(inputs, factors, "triton")
    named = {name: value for name, value in vars(inputs).items() if value is not None and value.requires_grad} | factors
    for only in (*named, None):
        for name, tensor in named.items():
            tensor.requires_grad_(name == only if only else name in ("x", "weights", *factors))
        for name, value in results(inputs, factors, "triton").items():
            assert torch.equal(value, expected[name]), (only, name)


@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one(T, device):
    inputs, factors = make(T, (3, 5), device)
    ours, theirs = (results(inputs, factors, impl) for impl in ("triton", "dense"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_transposed_projections(device):
    inputs, factors = make(11, (3, 5), device)
    turned = {name: getattr(inputs, name).detach().transpose(1, 2).contiguous() for name in ("up_proj", "down_proj")}
    y = call(dataclasses.replace(inputs, **turned), factors, "triton", transposed=True)
    torch.testing.assert_close(y, call(inputs, factors, "triton"), rtol=0, atol=0)


@pytest.mark.parametrize("first_row", [0, 1, 16, 19])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_the_kernel_writes_the_rows_from_the_first_on(rank, first_row, device, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    T, A, B = 13, 24, 40
    experts = make_experts(T, E, K, routing="out_of_range").to(device)
    plan = make_plan(experts, E, 16)
    rows, weights, narrow, factor, bias = draw(T, A), draw(E, A, B), draw(T * K, rank), draw(E, rank, B), draw(E, B)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: new_empty(*args, **options).fill_(7))
    tile = Tile(16, 16, 16, 4, 1, GROUP_M=2)
    adapted = {"low_rank": (narrow, factor), "first_row": first_row}
    out = grouped_rows(rows, weights, plan, tile, bias_EB=bias, top_k=K, **adapted)
    order, routed = plan.order.long(), int(plan.offsets[-1])
    expert = experts.reshape(-1)[order]
    for i in range(T * K):
        if first_row <= i < routed:
            e = int(expert[i])
            expected = rows[order[i] // K] @ weights[e] + narrow[i] @ factor[e] + bias[e]
            torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)
        else:
            assert (out[i] == 7).all()
