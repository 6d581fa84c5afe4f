"""Hypothesis strategies: shapes, routings and the inputs they lead to.

Shape legend: T tokens, D hidden size, F intermediate size, E experts, K experts per token.
"""

import dataclasses
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fusedonemoe.testing import MergedInputs, MLPInputs, make_merged_inputs, make_mlp_inputs

activations = st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity"])
gate_up_layouts = st.sampled_from(["gate_up", "up_gate", "interleaved"])
id_dtypes = st.sampled_from([torch.int64, torch.int32, torch.int16])
routings_by_kind = ("any", "distinct", "skewed", "one_expert", "out_of_range", "none_here")


class Shape(NamedTuple):
    """The five dimensions of an expert layer."""

    T: int
    D: int
    F: int
    E: int
    K: int


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Small shapes, degenerate ones included: T = 0, K = 1, K = E, E = 1, widths no tile divides."""
    E = draw(st.integers(1, 9), label="E")
    return Shape(
        T=draw(st.integers(0, 17), label="T"),
        D=draw(st.integers(1, 40), label="D"),
        F=draw(st.integers(1, 24), label="F"),
        E=E,
        K=draw(st.integers(1, min(E, 4)), label="K"),
    )


@st.composite
def routings(draw: st.DrawFn, T: int, E: int, K: int, *, kinds: tuple[str, ...] = routings_by_kind) -> Tensor:
    """Expert ids ``[T, K]``, int64.

    Kinds: "any" in range, duplicates within a token allowed; "distinct" within a token; "skewed" towards expert 0;
    "one_expert", all on one; "out_of_range", some ids below 0 or beyond E - 1; "none_here", all of them.
    """
    kind = draw(st.sampled_from(kinds), label="routing")
    if kind == "distinct":
        rows = st.permutations(range(E)).map(lambda ids: ids[:K])
        ids = [e for row in draw(st.lists(rows, min_size=T, max_size=T)) for e in row]
    else:
        id_strategy = {
            "any": st.integers(0, E - 1),
            "skewed": st.sampled_from([0] * 3 * E + list(range(E))),
            "one_expert": st.just(draw(st.integers(0, E - 1))),
            "out_of_range": st.integers(-2, E + 1),
            "none_here": st.sampled_from([-1, E, E + 100]),
        }[kind]
        ids = draw(st.lists(id_strategy, min_size=T * K, max_size=T * K))
    return torch.tensor(ids, dtype=torch.int64).reshape(T, K)


@st.composite
def mlp_inputs(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float32,
    gated: bool | None = None,
    bias: bool | None = None,
    kinds: tuple[str, ...] = routings_by_kind,
    requires_grad: bool = False,
) -> MLPInputs:
    """Arguments of a mixture of MLP experts over ``shapes`` and ``routings``; None draws either choice."""
    shape = draw(shapes())
    inputs = make_mlp_inputs(
        *shape,
        dtype=dtype,
        gated=draw(st.booleans(), label="gated") if gated is None else gated,
        bias=draw(st.booleans(), label="bias") if bias is None else bias,
        seed=draw(st.integers(0, 2**16), label="seed"),
        requires_grad=requires_grad,
    )
    experts = draw(routings(shape.T, shape.E, shape.K, kinds=kinds)).to(draw(id_dtypes))
    return dataclasses.replace(inputs, experts=experts)


@st.composite
def merged_inputs(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float32,
    kinds: tuple[str, ...] = routings_by_kind,
    requires_grad: bool = False,
) -> MergedInputs:
    """Arguments of the merged up-projection over ``shapes`` and ``routings``."""
    shape = draw(shapes())
    seed = draw(st.integers(0, 2**16), label="seed")
    inputs = make_merged_inputs(*shape, dtype=dtype, seed=seed, requires_grad=requires_grad)
    experts = draw(routings(shape.T, shape.E, shape.K, kinds=kinds)).to(draw(id_dtypes))
    return dataclasses.replace(inputs, experts=experts)
