"""The forward of the MLP experts and its pre-activations, against the oracle in float64."""

import dataclasses
import itertools

import pytest
import torch

from fusedonemoe.ops import mlp, reference
from fusedonemoe.ops.records import MLP_ARGUMENTS, PLAIN, Activation
from fusedonemoe.ops.triton import mlp as launches
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.plan import make_plan
from fusedonemoe.ops.triton.rules import Tile, Tiles
from fusedonemoe.ops.triton.up import up_projection
from fusedonemoe.testing import ROUTINGS, assert_within_budget, exact_float64, make_mlp_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Neither alpha nor limit is the default, and the limit clamps values of order one.
FORMS = [
    *(
        Activation(name, layout, 1.3, 0.8)
        for name, layout in itertools.product(reference.GATED_ACTIVATIONS, reference.GATE_UP_LAYOUTS)
    ),
    *(Activation(name, PLAIN, 1.3, 0.8) for name in reference.ACTIVATIONS),
]
SILU = Activation("silu", "gate_up", 1.0, 0.0)
SMALL = Tile(16, 16, 16, 4, 1, GROUP_M=2)
CUTS = {
    "wide": Tile(16, 64, 32, 4, 2, GROUP_M=1),
    "deep": Tile(32, 16, 64, 4, 2, GROUP_M=3),
    "tall": Tile(64, 32, 16, 4, 2),
}
SIZES = {"wide": [(64, 128), (17, 33)], "deep": [(64, 64), (40, 72)], "tall": [(32, 40), (1, 1)]}


def form_id(act):
    return f"{act.name}-{act.layout}"


def make(*shape, act=SILU, dtype=torch.float32, device="cpu", bias=True, routing="uniform"):
    gated = act.layout != PLAIN
    return make_mlp_inputs(*shape, dtype=dtype, device=device, gated=gated, bias=bias, routing=routing)


def arguments(inputs):
    return (
        inputs.x,
        inputs.experts,
        inputs.weights,
        inputs.up_proj,
        inputs.down_proj,
        inputs.up_bias,
        inputs.down_bias,
    )


def forward(inputs, act, save_percent, steps=launches):
    return steps.experts_mlp(MLP_ARGUMENTS.call((*arguments(inputs), *act)), save_percent)


def oracle(inputs, act):
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()}
    gated = act.layout != PLAIN
    form = {"gated": gated, "gate_up_layout": act.layout if gated else "gate_up"}
    y = reference.experts_mlp(**arrays, activation=act.name, **form, swiglu_alpha=act.alpha, swiglu_limit=act.limit)
    return torch.from_numpy(y)


def check(inputs, act=SILU, save_percent=100):
    y, z, order, offsets = forward(inputs, act, save_percent)
    assert y.shape == inputs.x.shape and y.dtype == inputs.x.dtype
    plain_y, plain_z, plain_order, plain_offsets = forward(inputs, act, save_percent, mlp)
    assert torch.equal(order, plain_order) and torch.equal(offsets, plain_offsets)
    exact = oracle(inputs, act)
    if exact.any():
        assert_within_budget(y.cpu(), plain_y.cpu(), exact, name="y")
    else:
        assert (y == 0).all()
    assert z.shape == plain_z.shape and z.dtype == plain_z.dtype
    kept = min(z.shape[0], int(offsets[-1]))
    if kept:
        wide = (None if v is None else v.double() if v.is_floating_point() else v for v in arguments(inputs))
        exact_z = mlp.experts_mlp(MLP_ARGUMENTS.call((*wide, *act)), save_percent)[1]
        assert_within_budget(z[:kept].cpu(), plain_z[:kept].cpu(), exact_z[:kept].cpu(), name="z")


@pytest.mark.parametrize("act", FORMS, ids=form_id)
def test_every_form_equals_the_oracle(act, device):
    check(make(9, 20, 24, 4, 2, act=act, device=device, routing="out_of_range"), act)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", [form for form in FORMS if form.name in ("silu", "swiglu_oai")], ids=form_id)
def test_half_precision_equals_the_oracle(act, dtype, device):
    check(make(24, 32, 32, 4, 2, act=act, dtype=dtype, device=device), act)


@pytest.mark.parametrize("layout", [*reference.GATE_UP_LAYOUTS, PLAIN])
@pytest.mark.parametrize(("cut", "D", "F"), [(cut, *size) for cut, sizes in SIZES.items() for size in sizes])
def test_tiles_may_be_cut_anywhere(layout, cut, D, F, device, monkeypatch):
    down = CUTS[cut]._replace(BLOCK_N=CUTS[cut].BLOCK_K, BLOCK_K=CUTS[cut].BLOCK_N)
    tiles = Tiles(CUTS[cut], down, SMALL, SMALL, SMALL, SMALL)
    monkeypatch.setattr(rules, "tiles_of", lambda *_, **__: tiles)
    act = SILU._replace(layout=layout)
    check(make(35, D, F, 3, 2, act=act, device=device, routing="skewed"), act)


@pytest.mark.parametrize("layout", [*reference.GATE_UP_LAYOUTS, PLAIN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_may_be_transposed_views(layout, dtype, device):
    act = SILU._replace(layout=layout)
    inputs = make(20, 24, 40, 4, 2, act=act, dtype=dtype, device=device)
    transposed = {name: getattr(inputs, name).mT.contiguous().mT for name in ("up_proj", "down_proj")}
    y = forward(inputs, act, 0)[0]
    assert torch.equal(forward(dataclasses.replace(inputs, **transposed), act, 0)[0], y)


def test_no_argument_need_be_contiguous(device):
    def restride(tensor):
        """The same values in every second element of a wider tensor, dimensions in the reverse order."""
        wide = torch.stack((tensor, torch.full_like(tensor, 77)), dim=-1)
        return wide.permute(*range(wide.ndim)[::-1]).contiguous().permute(*range(wide.ndim)[::-1])[..., 0]

    inputs = make(20, 24, 40, 4, 3, device=device)
    y, z, _, _ = forward(inputs, SILU, 100)
    strided = dataclasses.replace(inputs, **{name: restride(value) for name, value in vars(inputs).items()})
    assert not strided.x.is_contiguous() and not strided.experts.is_contiguous() and strided.up_proj.stride(2) != 1
    again_y, again_z, _, _ = forward(strided, SILU, 100)
    assert torch.equal(again_y, y) and torch.equal(again_z, z)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "shape", [(30, 20, 24, 6, 3), (1, 8, 8, 4, 2), (0, 8, 8, 4, 2), (40, 8, 8, 1, 1), (6, 8, 8, 50, 4)], ids=str
)
def test_any_routing_equals_the_oracle(routing, shape, device):
    check(make(*shape, device=device, routing=routing, bias=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_id_in_range_gives_zeros(dtype, device):
    inputs = make(9, 16, 16, 4, 2, dtype=dtype, device=device)
    inputs = dataclasses.replace(inputs, experts=torch.full((9, 2), -3, device=device), weights=inputs.weights * torch.nan)
    check(inputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_standing_at_an_id_out_of_range_is_never_read(value, device):
    inputs = make(12, 16, 16, 4, 3, device=device, routing="out_of_range")
    outside = (inputs.experts < 0) | (inputs.experts >= 4)
    assert outside.any() and not outside.all()
    y = forward(inputs, SILU, 100)[0]
    poisoned = dataclasses.replace(inputs, weights=torch.where(outside, value, inputs.weights))
    assert torch.equal(forward(poisoned, SILU, 100)[0], y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_expert_that_no_token_names_is_never_read(value, device):
    inputs = make(12, 16, 16, 4, 2, device=device)
    inputs = dataclasses.replace(inputs, experts=torch.where(inputs.experts == 2, 3, inputs.experts))
    y = forward(inputs, SILU, 100)[0]
    for tensor in (inputs.up_proj, inputs.down_proj, inputs.up_bias, inputs.down_bias):
        tensor[2] = value
    assert torch.equal(forward(inputs, SILU, 100)[0], y)


def test_a_token_of_infinities_poisons_no_other_token(device):
    inputs = make(12, 16, 16, 4, 2, device=device)
    y = forward(inputs, SILU, 0)[0]
    inputs.x[5] = torch.inf
    poisoned = forward(inputs, SILU, 0)[0]
    others = torch.arange(12, device=device) != 5
    assert torch.equal(poisoned[others], y[others]) and not poisoned[5].isfinite().all()


# What is saved, and what is computed once more


@pytest.mark.parametrize("layout", [*reference.GATE_UP_LAYOUTS, PLAIN])
@pytest.mark.parametrize("routing", ["uniform", "out_of_range"])
def test_saving_less_changes_no_bit(layout, routing, device):
    act = SILU._replace(layout=layout)
    inputs = make(23, 24, 20, 4, 2, act=act, dtype=torch.bfloat16, device=device, routing=routing)
    y, z, _, offsets = forward(inputs, act, 100)
    for save_percent in (0, 37):
        less_y, less_z, _, _ = forward(inputs, act, save_percent)
        assert less_z.shape[0] == 46 * save_percent // 100
        kept = min(less_z.shape[0], int(offsets[-1]))
        assert torch.equal(less_y, y) and torch.equal(less_z[:kept], z[:kept]) and z.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", reference.GATE_UP_LAYOUTS)
def test_h_comes_from_the_pre_activations_as_they_are_saved(layout, dtype, device):
    act = Activation("identity", layout, 1.0, 0.0)
    inputs = make(23, 24, 20, 4, 2, act=act, dtype=dtype, device=device)
    plan = make_plan(inputs.experts, 4, SMALL.BLOCK_M)
    z = inputs.x.new_empty(46, 40)
    h = inputs.x.new_empty(46, 20)
    up_projection(inputs.x, inputs.up_proj, inputs.up_bias, plan, 2, act, SMALL, z, h)
    gate, up = (z[:, 0::2], z[:, 1::2]) if layout == "interleaved" else z.chunk(2, dim=1)
    assert torch.equal(h, gate * up) and h.any()  # a product of two halves is exact in float32, so it rounds once in both


@pytest.mark.parametrize("layout", [*reference.GATE_UP_LAYOUTS, PLAIN])
def test_pre_activations_computed_once_more_are_the_same_bits(layout, device):
    act = SILU._replace(layout=layout)
    inputs = make(23, 24, 20, 4, 2, act=act, dtype=torch.bfloat16, device=device, routing="out_of_range")
    plan = make_plan(inputs.experts, 4, SMALL.BLOCK_M)
    num_rows = int(plan.offsets[-1])
    expected = inputs.x.new_empty(46, inputs.up_proj.shape[1])
    h = inputs.x.new_empty(46, 20)
    up_projection(inputs.x, inputs.up_proj, inputs.up_bias, plan, 2, act, SMALL, expected, h)
    for first_row in (0, 1, 17, num_rows - 1, 46):
        z = torch.full_like(expected, 77)
        up_projection(inputs.x, inputs.up_proj, inputs.up_bias, plan, 2, act, SMALL, z, first_row=first_row)
        assert torch.equal(z[first_row:num_rows], expected[first_row:num_rows]) and expected[:num_rows].any()
        assert (z[:first_row] == 77).all() and (z[num_rows:] == 77).all()
