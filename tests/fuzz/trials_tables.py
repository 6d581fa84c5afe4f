"""Cases of the layers without a second projection of their own: merged projections, single neurons, values."""

from typing import Any

import torch
from torch import Tensor

from fusedonemoe import functional as F
from tests.fuzz import exact_experts
from tests.fuzz.draw import Draw, arranged, finite_cast, floats
from tests.fuzz.trial import Expected, Given, Trial, autocast_of, like
from tests.fuzz.trials_experts import ACTIVATIONS, LIKE_X, Sizes, spoil_an_expert, tokens_and_routing, weight_layouts


def case_experts_merged(draw: Draw) -> Trial:
    """``F.experts_merged``."""
    impl = draw.implementation("auto", "dense", "grouped", "cpu", "portable")
    dtype, sizes = draw.dtype_for(impl), Sizes(draw)
    autocast, stored = autocast_of(draw, dtype)
    inputs = tokens_and_routing(draw, sizes, dtype)
    proj = floats(draw, "proj", (sizes.E, sizes.D, sizes.F), dtype, sizes.D**-0.5)
    if dtype == torch.float16 and draw.pick("rows", ("fit", "overflow")) == "overflow":
        proj = finite_cast(5e4 * sizes.D**-0.5 * draw.normal(*proj.shape), dtype)
    inputs["proj"] = arranged(draw, "proj", proj, weight_layouts(impl))
    # With as many choices as experts this is the dense formulation in `portable` too.
    spoil_an_expert(draw, inputs, "dense" if sizes.E <= sizes.K else impl, "proj")
    T, K, D, F_ = sizes.T, sizes.K, sizes.D, sizes.F

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (F.experts_merged(*(inputs[name] for name in ("x", "experts", "weights", "proj")), impl=impl),)

    def exact(given: Given) -> Expected:
        x, weights = given.bounded("x", stored, T, D, cast=stored), given.bounded("weights", stored, T, K)
        proj, ids = given.bounded("proj", stored, cast=stored), given.ids("experts", T, K)
        h, gradients = exact_experts.experts_merged(x, ids, weights, proj, stored, given.gradient("h", stored, T, F_))
        return Expected({"h": h}, gradients)

    names = ("x", "weights", "proj")
    bits: dict[str, Any] = {"tokens": LIKE_X, "batch_invariant": impl == "cpu"}
    return Trial(call, inputs, exact, {"h": like(stored, inputs["x"].shape[:-1], F_)}, names, impl, autocast, **bits)


def case_experts_neurons(draw: Draw) -> Trial:
    """``F.experts_neurons``."""
    impl = draw.implementation("auto", "dense", "grouped", "cpu", "portable")
    dtype, sizes = draw.dtype_for(impl), Sizes(draw)
    autocast, stored = autocast_of(draw, dtype)
    name, inputs = draw.pick("activation", ACTIVATIONS), tokens_and_routing(draw, sizes, dtype)
    T, K, D, E = sizes.T, sizes.K, sizes.D, sizes.E
    for table in ("down", "up"):
        inputs[table] = arranged(draw, table, floats(draw, table, (E, D), dtype, D**-0.5), weight_layouts(impl))
    spoil_an_expert(draw, inputs, impl, "down", "up")
    sparse = draw.pick("sparse", (False, True)) if impl not in ("dense", "portable") else False

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        arguments = (inputs[key] for key in ("x", "experts", "weights", "down", "up"))
        return (F.experts_neurons(*arguments, activation=name, sparse=sparse, impl=impl),)

    def exact(given: Given) -> Expected:
        down, up = (given.bounded(table, stored, cast=stored) for table in ("down", "up"))
        x, weights = given.bounded("x", stored, T, D, cast=stored), given.bounded("weights", stored, T, K)
        ids, dy = given.ids("experts", T, K), given.gradient("y", stored, T, D)
        y, gradients = exact_experts.experts_neurons(x, ids, weights, down, up, name, stored, dy)
        return Expected({"y": y}, gradients)

    names = ("x", "weights", "down", "up")
    bits: dict[str, Any] = {"tokens": LIKE_X, "batch_invariant": impl == "cpu", "compiles": not sparse}
    return Trial(call, inputs, exact, {"y": like(stored, inputs["x"].shape)}, names, impl, autocast, **bits)


def case_experts_values(draw: Draw) -> Trial:
    """``F.experts_values``."""
    impl = draw.implementation("auto", "dense", "grouped", "cpu", "portable")
    dtype, sizes = draw.dtype_for(impl), Sizes(draw)
    autocast, stored = autocast_of(draw, dtype)
    inputs = tokens_and_routing(draw, sizes, dtype, with_x=False)
    T, K, D, E = sizes.T, sizes.K, sizes.D, sizes.E
    inputs["table"] = arranged(draw, "table", floats(draw, "table", (E, D), dtype), weight_layouts(impl))
    spoil_an_expert(draw, inputs, impl, "table")
    sparse = draw.pick("sparse", (False, True)) if impl not in ("dense", "portable") else False

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (F.experts_values(*(inputs[name] for name in ("experts", "weights", "table")), sparse=sparse, impl=impl),)

    def exact(given: Given) -> Expected:
        table, weights = given.bounded("table", stored, cast=stored), given.bounded("weights", stored, T, K)
        ids, dy = given.ids("experts", T, K), given.gradient("y", stored, T, D)
        y, gradients = exact_experts.experts_values(ids, weights, table, stored, dy)
        return Expected({"y": y}, gradients)

    tokens = {"experts": 1, "weights": 1}
    bits: dict[str, Any] = {"tokens": tokens, "batch_invariant": impl == "cpu", "compiles": not sparse}
    return Trial(
        call, inputs, exact, {"y": like(stored, inputs["weights"].shape[:-1], D)}, ("weights", "table"), impl, autocast, **bits
    )


CASES = {
    "experts_merged": (case_experts_merged, 2),
    "experts_neurons": (case_experts_neurons, 2),
    "experts_values": (case_experts_values, 1),
}
