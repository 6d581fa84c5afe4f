"""Rows of the table of operators: arguments by name, flat and packed, and what registration derives from them."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fusedonemoe.ops import library
from fusedonemoe.ops.library import registration
from fusedonemoe.ops.library.rows import Operator
from fusedonemoe.ops.library.signature import Signature, flags, record

_ops = torch.ops.fusedonemoe


class Rule(NamedTuple):
    k: int
    scale: float


class Needs(NamedTuple):
    x: bool
    w: bool


SIGNATURE = Signature.of(
    "Tensor x, Tensor? w", record(Rule), "int percent", flags(Needs), 'int build, str impl="grouped"', "Tensor? slots=None"
)
FLAT = ("x", None, 2, 0.5, 30, [True, False], 7, "cpu", None)


def test_the_schema_lists_the_fields_of_a_record_and_the_defaults():
    expected = (
        'Tensor x, Tensor? w, {0} k, float scale, {0} percent, bool[] needs, {0} build, str impl="grouped", Tensor? slots=None'
    )
    assert SIGNATURE.schema(symbolic=False) == expected.format("int")
    assert SIGNATURE.schema(symbolic=True) == expected.format("SymInt")
    assert SIGNATURE.leading_tensors == 2


def test_a_function_gets_the_schema_that_torch_infers():
    def body(*flat):
        return flat

    SIGNATURE.annotate(body, 2)
    assert torch.library.infer_schema(body, mutates_args=()) == f"({SIGNATURE.schema(symbolic=True)}) -> (Tensor, Tensor)"


def test_kernels_get_records_and_only_the_arguments_that_they_take():
    taken = Signature.of("Tensor x, Tensor? w", record(Rule), flags(Needs), "Tensor? slots=None")
    assert SIGNATURE.packer(taken)(FLAT) == ["x", None, Rule(2, 0.5), Needs(True, False), None]
    assert SIGNATURE.packer(Signature.of("Tensor? w, int k", "int percent"))(FLAT) == [None, 2, 30]
    assert SIGNATURE.packer(taken)(FLAT[:-1]) == ["x", None, Rule(2, 0.5), Needs(True, False)], "the optional one is missing"
    with pytest.raises(AssertionError, match="must be adjacent"):
        SIGNATURE.packer(Signature.of(record(Rule, "int k, int percent")))


@pytest.mark.parametrize("names", [(), ("impl",), ("percent", "x"), ("x", "y", "build")])
def test_arguments_are_picked_by_name(names):
    values = dict(zip((*SIGNATURE.names, "y"), (*FLAT, "result"), strict=True))
    assert SIGNATURE.picker(names, behind=("y",))((*FLAT, "result")) == tuple(values[name] for name in names)


def test_a_backward_returns_gradients_by_the_names_of_the_arguments():
    row = Operator(name="f_backward", arguments=("Tensor dy, Tensor x",), gradients=("x",), kernels={})
    assert row.results == ("dx",) and row.compiled_name == "f_cpu_backward"


def test_an_operator_has_the_formula_of_its_row():
    setup_context, _ = registration.formulas["experts_merged"]
    kept: list[Tensor] = []

    class Context:
        def mark_non_differentiable(self, *tensors):
            assert tensors == ("order", "offsets")

        def set_materialize_grads(self, value):
            assert value is False

        def save_for_backward(self, *tensors):
            kept.extend(tensors)

    context = Context()
    setup_context(context, ("x", "experts", "weights", "proj", 7, "cpu"), ("h", "order", "offsets"))
    assert kept == ["order", "offsets", "x", "experts", "weights", "proj"]
    assert vars(context) == {"constants": (), "own": (7, "cpu")}


@pytest.mark.parametrize("impl", ["dense", "auto", ""])
def test_an_operator_refuses_an_implementation_that_it_does_not_have(impl):
    tensors = torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.ones(2, 4, 5)
    with pytest.raises(ValueError, match=rf"^impl must be one of \('grouped', 'triton', 'cpu'\), got '{impl}'$"):
        _ops.experts_merged(*tensors, library.BUILD, impl)
