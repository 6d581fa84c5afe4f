"""The doctor's probes: every operator on fixed inputs, the oracle's answers, and the error that is allowed."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedonemoe import functional
from fusedonemoe.ops import IMPLEMENTATIONS, reference
from fusedonemoe.ops.reference import FloatArray, neurons, product_keys
from fusedonemoe.testing import exact_float64, make_logits, make_merged_inputs, make_mlp_inputs

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The kernels that are written for one kind of device; the formulations run on any.
HOME = {"cpu": "cpu", "triton": "cuda"}
# Rows of 16 bytes in every dtype, so that no width keeps an implementation from running.
T, D, F, E, K = 12, 32, 16, 8, 2
G = 5  # keys of a half, of product keys
R = 3  # rank of adapters

BUDGET_TEXT = """\
error = |result - exact| / |exact|, 2-norms over one tensor; exact is NumPy in
float64 on the same inputs; backward shows the worst gradient.
budget = r eps(dtype) + n eps(accumulator). On the longest path to a result, r
values are rounded to the dtype, each by up to eps/2, and twice that leaves the
products in between room to magnify it; n counts the terms of its sums and its
other steps in the accumulator, which is float32 for half precision.
Zeros have error 1, so they always fail."""


class Budget(NamedTuple):
    """``r`` roundings and ``n`` steps, as :data:`BUDGET_TEXT` tells."""

    roundings: int
    steps: int

    def of(self, dtype: torch.dtype) -> float:
        """The greatest relative error that is ok in ``dtype``."""
        accumulator = torch.promote_types(dtype, torch.float32)
        return self.roundings * torch.finfo(dtype).eps + self.steps * torch.finfo(accumulator).eps


BUDGETS: dict[str, tuple[Budget, ...]] = {  # of the forward and of the backward
    # All in the accumulator: a sum over E or K, and max, exp, divide, scale. The gradient is rounded once.
    "route": (Budget(0, E + 8), Budget(1, 2 * (E + 8))),
    # Product, bias, activation, gate, product, bias, weight, sum over choices. Backward, the first four of these once
    # more, then product, weight, the activation's derivative (3), product, sum over choices or over an expert's rows.
    "experts_mlp": (Budget(8, D + F + K), Budget(11, 2 * D + T * K + K)),
    # Weighted token, product, sum over choices, either way.
    "experts_merged": (Budget(3, D + K), Budget(3, F + T * K + K)),
}
# Two of the first, their sum, exp.
BUDGETS["route_product_key"] = (Budget(0, 2 * (G + 8) + 2), Budget(1, 4 * (G + 8) + 4))
# Product, activation, weight, sum over choices. Backward, the first three once more, then the two products of either side, the
# activation's derivative (3), weight, sum over an expert's rows.
BUDGETS["experts_neurons"] = (Budget(4, D + K), Budget(10, 2 * D + T * K + K))
# Weight, sum over choices; product or sum over an expert's rows, weight.
BUDGETS["experts_values"] = (Budget(2, K), Budget(2, D + T * K))
# The MLP's, and beside each product, of which there are two and, backward, as many again: two products, scale, sum.
BUDGETS["experts_mlp_lora"] = tuple(
    Budget(mlp.roundings + 4 * pairs, mlp.steps + 2 * pairs * (D + F + R))
    for mlp, pairs in zip(BUDGETS["experts_mlp"], (2, 4), strict=True)
)
# The MLP's with other widths, and every weight is rounded where it is widened.
BUDGETS["experts_mlp_quantized"] = tuple(Budget(mlp.roundings + 3, mlp.steps + 2 * D) for mlp in BUDGETS["experts_mlp"])
# Two runs beside each other, each with the router's product (D terms), its route and its experts_mlp.
BUDGETS["MoE"] = tuple(
    Budget(2 * (1 + route.roundings + mlp.roundings), 2 * (D + route.steps + mlp.steps))
    for route, mlp in zip(BUDGETS["route"], BUDGETS["experts_mlp"], strict=True)
)


@dataclass(frozen=True)
class Probe:
    """An operator on fixed inputs, with the oracle's answer."""

    operator: str
    widths: tuple[int, ...] | None  # row lengths of its grouped products, None for routing, which runs anywhere
    forward: Callable[[str], Tensor]
    leaves: Mapping[str, Tensor]
    seed: Tensor  # the gradient of its output
    exact: Mapping[str, FloatArray]  # the oracle's ``output`` and, under the name of each leaf, its gradient


def normal(width: int, dtype: torch.dtype, device: str, *, seed: int = 7) -> Tensor:
    """``[T, width]`` of unit variance."""
    return make_merged_inputs(T, width, 1, 1, 1, dtype=dtype, device=device, seed=seed).x


def _route_probe(name: str, oracle: ModuleType, logits: Tensor) -> Probe:
    """``route`` and ``route_product_key``."""
    exact_weights, exact_experts = getattr(oracle, name)(exact_float64(logits), K)

    def forward(impl: str) -> Tensor:
        weights, experts = getattr(functional, name)(logits, K, impl=impl)
        if not np.array_equal(exact_float64(experts), exact_experts):
            raise ValueError("other experts than the oracle's")
        return weights

    seed = normal(K, torch.promote_types(logits.dtype, torch.float32), logits.device.type)
    # The gradient of product keys is of a selection, which its oracle takes as an argument.
    last = exact_experts if name == "route_product_key" else K
    gradient = getattr(oracle, f"{name}_backward")(exact_float64(seed), exact_float64(logits), last)
    return Probe(name, None, forward, {"logits": logits}, seed, {"output": exact_weights, "logits": gradient})


def _with_foreign_ids(inputs: Any) -> dict[str, Tensor]:
    """The arguments by name. Every even expert is empty already; now one id lies below the experts and one beyond them."""
    tensors: dict[str, Tensor] = dict(vars(inputs))
    tensors["experts"][0, 0], tensors["experts"][-1, -1] = -1, E
    return tensors


def _exact(operator: str, oracle: ModuleType, arrays: Mapping[str, FloatArray], seed: Tensor) -> dict[str, FloatArray]:
    """The oracle's output and gradients."""
    gradients = getattr(oracle, f"{operator}_backward")(exact_float64(seed), **arrays)
    return {"output": getattr(oracle, operator)(**arrays), **vars(gradients)}


def _experts_probe(operator: str, tensors: Mapping[str, Tensor], widths: tuple[int, ...], oracle: ModuleType) -> Probe:
    arrays = {name: exact_float64(tensor) for name, tensor in tensors.items()}
    like = next(tensor for name, tensor in tensors.items() if name not in ("experts", "weights"))
    seed = normal(F if operator == "experts_merged" else D, like.dtype, like.device.type)
    leaves, arguments = {n: tensor for n, tensor in tensors.items() if tensor.requires_grad}, _public(tensors)
    forward = lambda impl: getattr(functional, operator)(**arguments, impl=impl)  # noqa: E731
    return Probe(operator, widths, forward, leaves, seed, _exact(operator, oracle, arrays, seed))


def _public(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The oracle's up_proj and up_bias are gate_up_proj and gate_up_bias in the public function."""
    return {re.sub("^up_(?!table)", "gate_up_", name): tensor for name, tensor in tensors.items()}


def _lora_probe(tensors: Mapping[str, Tensor]) -> Probe:
    """Beside the oracle of an MLP with the adapters' products in its weights: ``W + s B A``, so ``dA = s B' dW``."""
    x, leaves, scale = tensors["x"], {n: t for n, t in tensors.items() if t.requires_grad}, 0.5
    arrays = {name: exact_float64(tensor) for name, tensor in tensors.items()}
    factors: dict[str, Tensor] = {}
    for name, rows, width in (("up", 2 * F, D), ("down", D, F)):
        for factor, (height, length) in {"A": (R, width), "B": (rows, R)}.items():
            draw = make_merged_inputs(E * height, length, 1, 1, 1, dtype=x.dtype, device=x.device, seed=20 + len(factors)).x
            factors[f"{name}_{factor}"] = (draw.view(E, height, length) * length**-0.5).requires_grad_()
    exact_factors = {name: exact_float64(factor) for name, factor in factors.items()}
    for name in ("up", "down"):
        arrays[f"{name}_proj"] = arrays[f"{name}_proj"] + scale * exact_factors[f"{name}_B"] @ exact_factors[f"{name}_A"]
    seed_TD = normal(D, x.dtype, x.device.type)
    exact = _exact("experts_mlp", reference, arrays, seed_TD)
    for name in ("up", "down"):
        A, B, gradient = exact_factors[f"{name}_A"], exact_factors[f"{name}_B"], exact[f"{name}_proj"]
        exact[f"{name}_A"] = scale * B.transpose(0, 2, 1) @ gradient
        exact[f"{name}_B"] = scale * gradient @ A.transpose(0, 2, 1)
    arguments: dict[str, Any] = {**_public({**tensors, **factors}), "gate_up_scale": scale, "down_scale": scale}
    forward = lambda impl: functional.experts_mlp_lora(**arguments, impl=impl)  # noqa: E731
    return Probe("experts_mlp_lora", (D, 2 * F, F), forward, {**leaves, **factors}, seed_TD, exact)


def _quantized_probe(tensors: Mapping[str, Tensor]) -> Probe:
    """Both formats, one below the other: ``2 T`` rows of output, and gradients that are sums of two."""
    names = ("up_proj", "down_proj")
    rest = {name: tensor for name, tensor in tensors.items() if name not in names}
    weights = [
        {name: functional.quantize_weight(tensors[name], dtype, group_size=32) for name in names} for dtype in ("int8", "int4")
    ]
    arrays = {name: exact_float64(tensor) for name, tensor in rest.items()}
    seed = torch.cat([normal(D, rest["x"].dtype, rest["x"].device.type, seed=seed) for seed in (7, 8)])
    exact: dict[str, FloatArray] = {}
    for part, quantized in zip(seed.split(T), weights, strict=True):
        widened = {n: exact_float64(functional.dequantize_weight(w, torch.float64)) for n, w in quantized.items()}
        for name, array in _exact("experts_mlp", reference, {**arrays, **widened}, part).items():
            if name not in exact:
                exact[name] = array
            else:
                exact[name] = np.concatenate([exact[name], array]) if name == "output" else exact[name] + array
    public = functional.experts_mlp_quantized
    forward = lambda impl: torch.cat([public(**_public({**rest, **w}), impl=impl) for w in weights])  # noqa: E731
    leaves = {name: tensor for name, tensor in rest.items() if tensor.requires_grad}
    return Probe("experts_mlp_quantized", (D, 2 * D, D), forward, leaves, seed, exact)


def make_probes(dtype: torch.dtype, device: str) -> list[tuple[Probe, Sequence[str]]]:
    """Every operator, with the implementations of it that are written for the device."""
    options: dict[str, Any] = {"dtype": dtype, "device": device, "routing": "some_empty", "requires_grad": True}
    mlp = _with_foreign_ids(make_mlp_inputs(T, D, F, E, K, bias=True, **options))
    square = _with_foreign_ids(make_mlp_inputs(T, D, D, E, K, bias=True, **options))  # rows of whole groups of 4-bit weights
    merged = _with_foreign_ids(make_merged_inputs(T, D, F, E, K, **options))
    down, up = (make_merged_inputs(E, D, 1, 1, 1, dtype=dtype, device=device, seed=seed).x for seed in (30, 31))
    tables = {"down_table": (down * D**-0.5).requires_grad_(), "up_table": up.requires_grad_()}
    token = {name: merged[name] for name in ("x", "experts", "weights")}
    routing = {name: merged[name] for name in ("experts", "weights")}
    pairs = make_logits(2 * T, G, dtype=dtype, device=device).view(T, 2, G).requires_grad_()
    # Routing has one operator beside its composite, and calls it auto.
    routes = (
        _route_probe("route", reference, make_logits(T, E, dtype=dtype, device=device, requires_grad=True)),
        _route_probe("route_product_key", product_keys, pairs),
    )
    probes = (
        _experts_probe("experts_mlp", mlp, (D, 2 * F, F), reference),
        _lora_probe(mlp),
        _quantized_probe(square),
        _experts_probe("experts_merged", merged, (D, F), reference),
        _experts_probe("experts_neurons", {**token, **tables}, (), neurons),
        _experts_probe("experts_values", {**routing, "table": tables["up_table"]}, (), neurons),
    )
    at_home = [impl for impl in IMPLEMENTATIONS if HOME.get(impl, device) == device]
    return [*itertools.product(routes, (("dense", "auto"),)), *itertools.product(probes, (at_home,))]
