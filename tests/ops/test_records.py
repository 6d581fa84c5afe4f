"""The argument list of the operators of experts: from arguments to the record of a call and back, and the schema text."""

import pytest
import torch
from torch import Tensor

from fusedonemoe.ops import dense, mlp
from fusedonemoe.ops import library as library
from fusedonemoe.ops.formats import INT4, INT8, PANELS, PLAIN, TRANSPOSED, Format
from fusedonemoe.ops.records import (
    LORA_ARGUMENTS,
    MLP_ARGUMENTS,
    PACKED_ARGUMENTS,
    QUANTIZED_ARGUMENTS,
    ExpertsArguments,
    ExpertsNeeds,
    SavedRows,
)

T, K, E, D, F, R = 5, 2, 3, 64, 32, 4
ACT = ("silu", "gate_up", 1.0, 7.0)
ROUTING = (torch.randn(T, D), torch.zeros(T, K, dtype=torch.int64), torch.ones(T, K))
UP, DOWN, BIASES = torch.randn(E, 2 * F, D), torch.randn(E, D, F), (torch.randn(E, 2 * F), None)
FACTORS = (torch.randn(E, R, D), torch.randn(E, 2 * F, R), torch.randn(E, 0, F), torch.randn(E, D, 0))
GROUPS = {"group_size": 32, "symmetric": False}
CASES = {
    "plain": (MLP_ARGUMENTS, PLAIN, (UP, DOWN, *BIASES, *ACT)),
    "transposed": (MLP_ARGUMENTS, TRANSPOSED, (*TRANSPOSED.make(UP), *TRANSPOSED.make(DOWN), *BIASES, *ACT)),
    "adapted": (LORA_ARGUMENTS, PLAIN, (UP, DOWN, *BIASES, *FACTORS, 2.0, 1.0, *ACT)),
    "int8": (QUANTIZED_ARGUMENTS, INT8, (*INT8.make(UP), *INT8.make(DOWN), *BIASES, *ACT)),
    "int4": (QUANTIZED_ARGUMENTS, INT4, (*INT4.make(UP, **GROUPS), *INT4.make(DOWN, **GROUPS), *BIASES, *ACT)),
    "panels": (PACKED_ARGUMENTS, PANELS, (torch.randn(E, 8, D, 16, 1), torch.randn(E, 4, F, 16, 1), *BIASES, F, *ACT)),
}


def is_same(left, right) -> bool:
    return left is right or (isinstance(left, Tensor) and left.numel() == 0 and left.shape == right.shape) or left == right


@pytest.mark.parametrize("name", CASES)
def test_arguments_become_a_call_and_come_back(name: str):
    arguments, form, flat = CASES[name]
    flat = (*ROUTING, *flat)
    call = arguments.call((*flat, 100, "grouped"))
    assert call.form.up.format is call.form.down.format is form
    assert (call.form.up.shape, call.form.down.shape) == ((E, 2 * F, D), (E, D, F))
    back = arguments.flatten(call)
    assert len(back) == len(flat) == len(arguments.arguments)
    assert all(map(is_same, back, flat))
    if form is not PANELS:
        assert call.read(views=True)[1].form.up.format is form


def test_an_absent_adapter_has_rank_zero():
    arguments, _, flat = CASES["adapted"]
    form = arguments.call((*ROUTING, *flat)).form
    assert form.up.adapter == (*FACTORS[:2], 2.0)
    assert form.down.adapter is None


OPERATORS = {
    "experts_mlp": MLP_ARGUMENTS,
    "experts_mlp_backward": MLP_ARGUMENTS,
    "experts_mlp_lora": LORA_ARGUMENTS,
    "experts_mlp_lora_backward": LORA_ARGUMENTS,
    "experts_mlp_quantized": QUANTIZED_ARGUMENTS,
    "experts_mlp_quantized_backward": QUANTIZED_ARGUMENTS,
    "experts_mlp_packed": PACKED_ARGUMENTS,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_the_arguments_of_the_record(name: str):
    schema = str(getattr(torch.ops.fusedonemoe, name).default._schema)
    arguments = OPERATORS[name]
    assert arguments.schema in schema
    if name.endswith("_backward"):
        assert schema.partition("->")[2].count("Tensor") == len(arguments.gradients)


def test_formats_that_autograd_and_autocast_leave_alone():
    assert [a.name for a in QUANTIZED_ARGUMENTS.arguments if a.casts] == ["x", "up_bias", "down_bias"]
    assert QUANTIZED_ARGUMENTS.gradients == ("x", "weights", "up_bias", "down_bias")
    assert MLP_ARGUMENTS.gradients == ("x", "weights", "up", "down", "up_bias", "down_bias")


def test_an_adapter_of_quantised_weights_has_names_of_its_own():
    names = [a.name for a in ExpertsArguments((INT8, INT4), adapted=True).arguments]
    assert len(set(names)) == len(names)
    assert names[names.index("down_B") + 1 :][:2] == ["up_adapter_scale", "down_adapter_scale"]


def test_values_of_no_format_are_refused():
    arguments, _, flat = CASES["int8"]
    with pytest.raises(TypeError, match=r"up must have a dtype of the format int8 or int4, got torch.float32"):
        arguments.call((*ROUTING, UP, *flat[1:]))


@pytest.mark.parametrize("made", [PLAIN, TRANSPOSED, INT8, INT4], ids=lambda made: made.name)
def test_formats_read_back_what_they_made(made: Format):
    tensors = made.make(UP, **GROUPS)
    assert made.shape(tensors) == UP.shape
    assert (made.widen(tensors, torch.float32) - UP).abs().max() <= {"int8": 0.05, "int4": 0.4}.get(made.name, 0)


@pytest.mark.parametrize("made", [INT8, INT4], ids=lambda made: made.name)
@pytest.mark.parametrize("save_percent", [100, 40])
def test_adapters_of_quantised_weights_are_those_of_the_widened_ones(made: Format, save_percent: int):
    # No operator has this argument list yet: the steps of the MLP take any projection.
    quantised = ExpertsArguments((INT8, INT4), adapted=True)
    experts = torch.arange(T * K).reshape(T, K) % (E + 1)
    x, weights = ROUTING[0].double(), ROUTING[2].double()
    biases, factors = [None if b is None else b.double() for b in BIASES], [factor.double() for factor in FACTORS]
    stored = [made.make(weight, **GROUPS) for weight in (UP, DOWN)]
    wide = [made.widen(tensors, torch.float64) for tensors in stored]
    rest = (*biases, *factors, 2.0, 1.0, *ACT)
    call = quantised.call((x, experts, weights, *stored[0], *stored[1], *rest))
    expected = LORA_ARGUMENTS.call((x, experts, weights, *wide, *rest))
    dy = torch.ones(T, D, dtype=torch.float64)
    needs = ExpertsNeeds(x=True, weights=True, up_bias=True, up_A=True, up_B=True)
    found = []
    for each in (call, expected):
        y, *saved = mlp.experts_mlp(each, save_percent)
        torch.testing.assert_close(y, dense.experts_mlp_dense(each))
        gradients = mlp.experts_mlp_backward(dy, SavedRows(*saved), each, save_percent, needs)
        found.append([y, *(gradient for gradient in gradients if gradient is not None)])
    assert len(found[0]) == 6 and all(map(torch.equal, *found))
    assert found[0][4].any()
