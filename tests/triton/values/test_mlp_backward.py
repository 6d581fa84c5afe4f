import dataclasses

import pytest
import torch

from fusedonemoe.ops import grouped, mlp, reference
from fusedonemoe.ops.records import ACTIVATIONS, GATE_UP_LAYOUTS, MLP_ARGUMENTS, PLAIN, Activation, ExpertsNeeds, SavedRows
from fusedonemoe.ops.triton import mlp as launches
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.plan import make_plan
from fusedonemoe.ops.triton.rules import Tile, Tiles
from fusedonemoe.ops.triton.up import up_projection
from fusedonemoe.testing import assert_within_budget, exact_float64, make_mlp_inputs

NAMES = MLP_ARGUMENTS.gradients
ALL = MLP_ARGUMENTS.needs([True] * 6)
NO_BIAS = ALL._replace(up_bias=False, down_bias=False)
UNEQUAL = Tiles(
    up=Tile(32, 16, 32, 4, 2, GROUP_M=1),
    down=Tile(32, 16, 32, 4, 2),
    dh=Tile(32, 64, 16, 4, 2, GROUP_M=1),
    dx=Tile(32, 32, 64, 4, 3),
    dup=Tile(64, 16, 32, 4, 3, GROUP_M=2),
    ddown=Tile(16, 64, 64, 8, 3, GROUP_M=1),
)
LAYOUTS_OF = {name: GATE_UP_LAYOUTS if name == "swiglu_oai" else (*GATE_UP_LAYOUTS, PLAIN) for name in ACTIVATIONS}


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))


def activation(name="silu", layout="gate_up"):
    return Activation(name, layout, alpha=1.702, limit=1.0)


def make_inputs(act, *, T=11, D=20, F=23, E=4, K=3, seed=0, **case):
    inputs = make_mlp_inputs(T, D, F, E, K, gated=act.layout != PLAIN, seed=seed, **case)
    dy_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(seed + 7)).to(inputs.x.dtype)
    return inputs, dy_TD


def call_of(inputs, act):
    values = vars(inputs)
    names = ("x", "experts", "weights", "up_proj", "down_proj", "up_bias", "down_bias")
    return MLP_ARGUMENTS.call((*(values[name] for name in names), *act))


def forward_saves(inputs, act):
    """What the forward keeps, by the torch formulation; rows of no expert hold NaN."""
    _, z_NG, order, offsets = mlp.experts_mlp(call_of(inputs, act), 100)
    z_NG = z_NG.clone()
    z_NG[int(offsets[-1]) :] = float("nan")
    return z_NG, order, offsets


def backward(device, inputs, dy_TD, saved, act, *, needs=None, save_percent=100):
    needs = needs or (NO_BIAS if inputs.up_bias is None else ALL)
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in vars(inputs).items()}
    call = call_of(dataclasses.replace(inputs, **moved), act)
    kept = SavedRows(*(tensor.to(device) for tensor in saved))
    out = launches.experts_mlp_backward(dy_TD.to(device), kept, call, save_percent, needs)
    for needed, gradient in zip(needs, out, strict=True):
        assert (gradient is not None and gradient.is_contiguous()) if needed else gradient is None
    return [gradient.cpu() for gradient in MLP_ARGUMENTS.results(out, call.x)]


def check(device, act, *, transposed=False, repeat=False, slack=2.0, **case):
    inputs, dy_TD = make_inputs(act, **case)
    if transposed:
        inputs = dataclasses.replace(
            inputs,
            up_proj=inputs.up_proj.transpose(1, 2).contiguous().transpose(1, 2),
            down_proj=inputs.down_proj.transpose(1, 2).contiguous().transpose(1, 2),
        )
    saved = forward_saves(inputs, act)
    outside = (inputs.experts < 0) | (inputs.experts >= inputs.up_proj.shape[0])
    exact = reference.experts_mlp_backward(
        *exact_float64(
            dy_TD,
            inputs.x,
            inputs.experts,
            inputs.weights,
            inputs.up_proj,
            inputs.down_proj,
        ),
        up_bias=exact_float64(inputs.up_bias),
        down_bias=exact_float64(inputs.down_bias),
        activation=act.name,
        gated=act.layout != PLAIN,
        gate_up_layout="gate_up" if act.layout == PLAIN else act.layout,
        swiglu_alpha=act.alpha,
        swiglu_limit=act.limit,
    )
    needs = NO_BIAS if inputs.up_bias is None else ALL
    z_NG, order, offsets = saved
    plain = mlp.experts_mlp_backward(dy_TD, SavedRows(torch.nan_to_num(z_NG), order, offsets), call_of(inputs, act), 100, needs)
    poisoned = dataclasses.replace(inputs, weights=inputs.weights.masked_fill(outside, float("nan")))
    actual = backward(device, poisoned, dy_TD, saved, act)
    names = [f.name for f in dataclasses.fields(exact)]
    for name, needed, ours, theirs in zip(names, needs[:6], actual, plain[:6], strict=True):
        if needed:
            assert_within_budget(ours, theirs, getattr(exact, name), slack=slack, name=name)
    empty = offsets.diff() == 0
    for name, needed, gradient in list(zip(names, needs[:6], actual, strict=True))[2:]:
        assert not needed or (gradient[empty] == 0).all(), name
    assert (actual[1][outside] == 0).all()
    if repeat:
        again = backward(device, poisoned, dy_TD, saved, act)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in ACTIVATIONS for layout in LAYOUTS_OF[name]])
def test_gradients_of_every_activation_and_layout(device, name, layout):
    check(device, activation(name, layout), T=7, D=13, F=20, E=3, K=2)


@pytest.mark.parametrize("layout", ["gate_up", "interleaved", PLAIN])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(device, dtype, layout):
    check(device, activation("silu", layout), dtype=dtype, bias=layout == "interleaved")


@pytest.mark.parametrize("routing", ["one_expert", "some_empty", "out_of_range", "skewed"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_uneven_experts(device, routing, bias):
    check(device, activation("silu", "up_gate"), routing=routing, bias=bias, repeat=True)


@pytest.mark.parametrize("layout", ["gate_up", "interleaved"])
def test_gradients_of_transposed_weights(device, layout):
    check(device, activation("swiglu_oai", layout), transposed=True, bias=True)


@pytest.mark.parametrize("experts_dtype", [torch.int32, torch.uint8])
def test_gradients_with_narrow_ids_and_weights(device, experts_dtype):
    check(device, activation("gelu"), bias=True, experts_dtype=experts_dtype, weights_dtype=torch.bfloat16, dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", ["gate_up", "interleaved", PLAIN])
@pytest.mark.parametrize("sizes", [{"T": 37, "D": 33, "F": 79, "E": 3}, {"T": 20, "D": 32, "F": 64, "E": 3}])
def test_gradients_under_unequal_tiles(device, monkeypatch, layout, sizes):
    monkeypatch.setattr(rules, "tiles_for", lambda *args, **kwargs: UNEQUAL)
    check(device, activation("silu", layout), bias=True, **sizes)


@pytest.mark.parametrize("K", [1, 5])
def test_gradients_of_one_token(device, K):
    # One routing gradient is too few for the error of plain PyTorch to be a yardstick.
    check(device, activation(), T=1, K=K, bias=True, slack=8.0)


def test_gradients_of_no_tokens_are_zero(device):
    act = activation()
    inputs, dy_TD = make_inputs(act, T=1, bias=True)
    inputs = dataclasses.replace(inputs, x=inputs.x[:0], experts=inputs.experts[:0], weights=inputs.weights[:0])
    out = backward(device, inputs, dy_TD[:0], forward_saves(inputs, act), act)
    assert out[0].shape == (0, 20) and out[1].shape == (0, 3)
    parameters = (inputs.up_proj, inputs.down_proj, inputs.up_bias, inputs.down_bias)
    for gradient, parameter in zip(out[2:], parameters, strict=True):
        assert gradient.shape == parameter.shape and (gradient == 0).all()


def test_an_expanded_gradient_of_the_output_is_read_through_its_strides(device):
    act = activation()
    inputs, dy_TD = make_inputs(act)
    saved = forward_saves(inputs, act)
    expanded = dy_TD[:1].expand_as(dy_TD)
    whole = backward(device, inputs, expanded.contiguous(), saved, act)
    assert all(torch.equal(a, b) for a, b in zip(whole, backward(device, inputs, expanded, saved, act), strict=True))


LAUNCHES = {
    "x": ["hidden_gradient", "grouped_rows", "combine"],
    "weights": ["hidden_gradient", "routing_gradient"],
    "up": ["hidden_gradient", "grouped_outer"],
    "down": ["hidden_gradient", "grouped_outer"],
    "up_bias": ["hidden_gradient", "column_sums"],
    "down_bias": ["column_sums"],
}


@pytest.mark.parametrize("wanted", NAMES)
def test_what_is_frozen_is_neither_launched_nor_allocated(device, monkeypatch, wanted):
    act = activation("swiglu_oai", "interleaved")
    inputs, dy_TD = make_inputs(act, bias=True)
    saved = forward_saves(inputs, act)
    whole = backward(device, inputs, dy_TD, saved, act)
    launched: list[str] = []
    stored: list[str] = []

    def record(name, launch):
        def recorded(*args, **kwargs):
            launched.append(name)
            out = launch(*args, **kwargs)
            if name == "hidden_gradient":
                stored.extend(field for field, tensor in out._asdict().items() if tensor.numel())
            return out

        monkeypatch.setattr(launches, name, recorded)

    for name in ("hidden_gradient", "grouped_rows", "combine", "grouped_outer", "column_sums", "routing_gradient"):
        record(name, getattr(launches, name))
    alone = backward(device, inputs, dy_TD, saved, act, needs=ExpertsNeeds(**{wanted: True}))
    place = NAMES.index(wanted)
    assert torch.equal(alone[place], whole[place])
    assert launched == LAUNCHES[wanted]
    assert stored == {"weights": ["partial"], "down": ["weighted"], "down_bias": []}.get(wanted, ["dz"])


@pytest.mark.parametrize("routing", ["uniform", "out_of_range"])
@pytest.mark.parametrize("layout", ["gate_up", "interleaved"])
def test_saved_and_recomputed_rows_give_the_same_bits(device, layout, routing):
    act = activation("silu", layout)
    inputs, dy_TD = make_inputs(act, bias=True, dtype=torch.bfloat16, routing=routing)
    E, G, D = inputs.up_proj.shape
    K = inputs.experts.shape[1]
    tile = rules.tiles_for(rules.architecture(torch.device(device)), torch.bfloat16, 8.0, D, G // 2, True).up
    plan = make_plan(inputs.experts.to(device), E, tile.BLOCK_M)
    z_NG = torch.empty(plan.order.shape[0], G, dtype=torch.bfloat16, device=device)
    up = (inputs.x.to(device), inputs.up_proj.to(device), inputs.up_bias.to(device))
    up_projection(*up, plan, K, act, tile, z_NG)
    results = []
    for save_percent in (0, 37, 100):
        kept = z_NG[: grouped.saved_rows(z_NG.shape[0], save_percent)]
        saved = (kept, plan.order, plan.offsets)
        results.append(backward(device, inputs, dy_TD, saved, act, save_percent=save_percent))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in results[0])
