"""The path for few rows against the oracle."""

import itertools

import pytest
import torch

from fusedonemoe.ops import mlp, reference
from fusedonemoe.ops.records import ACTIVATIONS, GATE_UP_LAYOUTS, MLP_ARGUMENTS, PLAIN, Activation
from fusedonemoe.ops.triton import decode, rules
from fusedonemoe.testing import assert_within_budget, exact_float64, make_mlp_inputs

LAYOUTS = (*GATE_UP_LAYOUTS, PLAIN)
SWIGLU = Activation("silu", "gate_up", 1.7, 2.0)
FORMS = [(name, layout) for name, layout in itertools.product(ACTIVATIONS, LAYOUTS) if (name, layout) != ("swiglu_oai", PLAIN)]


@pytest.fixture(autouse=True)
def wide_programs(device, monkeypatch):
    """Fewer programs, which the interpreter runs one after the other; one test keeps the narrow ones."""
    if device == "cpu":
        monkeypatch.setattr(decode, "BYTES_IN_FLIGHT", 0)


def problem(*shape, layout="gate_up", transposed=False, **options):
    """Arguments of the operator up to the activation; transposed as GPT-OSS stores them."""
    made = make_mlp_inputs(*shape, gated=layout != PLAIN, **options)
    up, down = made.up_proj, made.down_proj
    if transposed:
        up, down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (up, down))
    return made.x, made.experts, made.weights, up, down, made.up_bias, made.down_bias


def decoded(*arguments):
    *tensors, act = arguments
    return decode.experts_mlp(MLP_ARGUMENTS.call((*tensors, *act)))


def assert_right(arguments, act=SWIGLU):
    x, experts, weights, up, down, up_bias, down_bias = arguments
    exact = reference.experts_mlp(
        *exact_float64(x, experts, weights, up, down),
        up_bias=exact_float64(up_bias),
        down_bias=exact_float64(down_bias),
        activation=act.name,
        gated=act.layout != PLAIN,
        gate_up_layout="gate_up" if act.layout == PLAIN else act.layout,
        swiglu_alpha=act.alpha,
        swiglu_limit=act.limit,
    )
    plain = mlp.experts_mlp(MLP_ARGUMENTS.call((*(a if a is None else a.cpu() for a in arguments), *act)), 0)[0]
    y = decoded(*arguments, act)
    assert_within_budget(y.cpu(), plain, exact)
    return y


@pytest.mark.parametrize(("name", "layout"), FORMS)
def test_every_activation_and_layout(name, layout, device):
    arguments = problem(2, 24, 12, 5, 2, layout=layout, bias=True, device=device)
    assert_right(arguments, Activation(name, layout, 1.7, 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision(dtype, layout, transposed, device):
    arguments = problem(3, 40, 24, 6, 2, layout=layout, bias=True, transposed=transposed, dtype=dtype, device=device)
    assert_right(arguments, Activation("silu", layout, 1.7, 2.0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 16, 16, 4, 1), (3, 37, 29, 4, 3), (1, 80, 33, 12, 8), (1, 19, 70, 16, 11)], ids=str)
def test_every_shape(shape, layout, transposed, device):
    arguments = problem(*shape, layout=layout, transposed=transposed, device=device)
    assert_right(arguments, Activation("silu", layout, 1.7, 2.0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1100, 20, 2, 1), (1, 20, 1100, 2, 1)], ids=str)
def test_sums_longer_than_a_block(shape, transposed, device, monkeypatch):
    monkeypatch.setattr(decode, "TILE_BYTES", 4096)
    assert_right(problem(*shape, transposed=transposed, device=device))


@pytest.mark.parametrize("transposed", [False, True])
def test_narrow_programs(transposed, device, monkeypatch):
    monkeypatch.setattr(decode, "BYTES_IN_FLIGHT", 1 << 40)
    assert_right(problem(1, 24, 40, 4, 2, transposed=transposed, device=device))


@pytest.mark.parametrize("transposed", [False, True])
def test_ids_out_of_range_read_and_add_nothing(transposed, device):
    arguments = problem(4, 24, 20, 4, 3, routing="out_of_range", bias=True, transposed=transposed, device=device)
    experts, weights = arguments[1:3]
    outside = (experts < 0) | (experts >= 4)
    weights = weights.masked_fill(outside, float("nan"))
    y = decoded(arguments[0], experts, weights, *arguments[3:], SWIGLU)
    assert torch.equal(y, assert_right(arguments))
    assert outside[-1].all() and not y[-1].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
def test_every_dtype_of_ids(dtype, device):
    assert_right(problem(3, 16, 16, 4, 2, experts_dtype=dtype, device=device))


def test_one_expert_takes_every_row(device):
    assert_right(problem(5, 24, 20, 4, 2, routing="one_expert", device=device))


def test_no_token(device):
    y = decoded(*problem(0, 16, 16, 4, 2, device=device), SWIGLU)
    assert y.shape == (0, 16)


def test_strided_inputs_and_half_precision_weights(device):
    x, experts, weights, *rest = problem(4, 24, 20, 4, 2, dtype=torch.bfloat16, weights_dtype=torch.bfloat16, device=device)
    wide = x.new_full((4, 48), float("nan"))
    wide[:, ::2] = x
    assert_right((wide[:, ::2], experts.t().contiguous().t(), weights.t().contiguous().t(), *rest))


def test_equal_calls_give_equal_bits(device):
    arguments = problem(3, 48, 24, 6, 3, dtype=torch.bfloat16, bias=True, device=device)
    act = Activation("swiglu_oai", "interleaved", 1.702, 7.0)
    assert torch.equal(decoded(*arguments, act), decoded(*arguments, act))


def test_a_token_alone_gets_what_it_gets_in_company(device):
    x, experts, weights, *rest = problem(3, 48, 24, 6, 3, dtype=torch.bfloat16, device=device)
    alone = decoded(x[2:3], experts[2:3], weights[2:3], *rest, SWIGLU)
    assert_within_budget(alone.cpu(), decoded(x, experts, weights, *rest, SWIGLU)[2:3].cpu(), exact_float64(alone))


def test_which_row_counts_need_no_plan():
    assert rules.few_rows(8, 128) and rules.few_rows(32, 128) and rules.few_rows(2, 8)
    assert not rules.few_rows(33, 128) and not rules.few_rows(9, 8)
    assert rules.few_rows(64, 256) and not rules.few_rows(65, 256)
