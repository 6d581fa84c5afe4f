"""Cases of the expert layers' functions: plain, adapted, quantised and packed MLPs, merged projections, neurons and values."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedonemoe import functional as F
from tests.fuzz import exact_experts
from tests.fuzz.bounds import PRECISIONS, Array, Bounded, work_dtype
from tests.fuzz.draw import (
    LAYOUTS,
    Draw,
    arranged,
    expert_ids,
    finite_cast,
    floats,
    leading,
    legal_dtypes,
    spoilt,
    token_count,
)
from tests.fuzz.exact_experts import Adapter, Form
from tests.fuzz.trial import Expected, Given, Trial, autocast_of, like

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity")
WIDTHS = (1, 2, 3, 5, 8, 13, 16, 17, 24, 32, 33, 40)
LIKE_X = {"x": 1, "experts": 1, "weights": 1}  # inputs of one row a token


class Sizes:
    """T, K, E, D, F of an expert layer."""

    def __init__(self, draw: Draw) -> None:
        self.T = token_count(draw)
        self.E = draw.pick("E", (1, 2, 3, 4, 8, 8, 12, 64))
        self.K = min(self.E, draw.size(1, 1, 2, 2, 3, 4, self.E, 2 * self.E), 12)
        self.D, self.F = draw.size(*WIDTHS), draw.size(*WIDTHS)
        if self.E * self.D * self.F > 12_000:  # large experts, or many of them
            self.D, self.F = min(self.D, 16), min(self.F, 9)


def tokens_and_routing(draw: Draw, sizes: Sizes, dtype: torch.dtype, *, with_x: bool = True) -> dict[str, Tensor]:
    """``x``, ``experts`` and ``weights`` with common leading dimensions."""
    shape, inputs = leading(draw, sizes.T), {}
    if with_x:
        x = spoilt(draw, "x", floats(draw, "x", (sizes.T, sizes.D), dtype))
        inputs["x"] = arranged(draw, "x", x.reshape(*shape, sizes.D))
    ids = expert_ids(draw, sizes.T, sizes.K, sizes.E).reshape(*shape, sizes.K)
    inputs["experts"] = arranged(draw, "experts", ids, ("contiguous", "contiguous", "transposed", "stepped", "expanded"))
    weights_dtype = draw.pick("dtype of weights", (torch.float32, torch.float32, dtype, torch.bfloat16, torch.float64))
    weights = spoilt(draw, "weights", floats(draw, "weights", (sizes.T, sizes.K), weights_dtype, 0.5))
    inputs["weights"] = arranged(draw, "weights", weights.reshape(*shape, sizes.K))
    if draw.chance(0.3):  # an id of no expert contributes nothing, whatever its weight
        absent = (inputs["experts"].to(torch.int64) < 0) | (inputs["experts"].to(torch.int64) >= sizes.E)
        inputs["weights"] = torch.where(absent, torch.nan, inputs["weights"])
    return inputs


def drawn_form(draw: Draw, stored: torch.dtype) -> Form:
    """Activation, gate and layout."""
    name = draw.pick("activation", (*ACTIVATIONS, "swiglu_oai"))
    gated = True if name == "swiglu_oai" else draw.pick("gated", (True, True, False))
    layout = draw.pick("gate_up_layout", ("gate_up", "up_gate", "interleaved"))
    alpha, limit = draw.pick("swiglu", ((1.702, 7.0), (1.0, 0.5), (3.0, 20.0)))
    return Form(stored, name, gated, layout, alpha, limit)


def form_options(form: Form) -> dict[str, Any]:
    """The form as keywords of the library."""
    return {
        "activation": form.activation,
        "gated": form.gated,
        "gate_up_layout": form.layout,
        "swiglu_alpha": form.alpha,
        "swiglu_limit": form.limit,
    }


def given_biases(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The biases that there are, as keywords of the library."""
    return {"gate_up_bias": inputs.get("up_bias"), "down_bias": inputs.get("down_bias")}


def weight_layouts(impl: str) -> tuple[str, ...]:
    """The CPU kernels take contiguous weights alone."""
    return ("contiguous", "offset") if impl == "cpu" else LAYOUTS


def drawn_projections(draw: Draw, sizes: Sizes, form: Form, dtype: torch.dtype, impl: str, transposed: bool) -> dict[str, Tensor]:
    """``up`` and ``down``, with ``up_bias`` and ``down_bias`` or without."""
    E, D, F_, G = sizes.E, sizes.D, sizes.F, sizes.F * (2 if form.gated else 1)
    up, down = floats(draw, "up", (E, G, D), dtype, D**-0.5), floats(draw, "down", (E, D, F_), dtype, F_**-0.5)
    if dtype == torch.float16 and draw.pick("rows", ("fit", "overflow")) == "overflow":
        # An expert's own output passes what a float16 holds, and the weighted sum over them does not.
        down = finite_cast(1e5 * F_**-0.5 * draw.normal(E, D, F_), dtype)
    inputs = {}
    for name, tensor in (("up", up), ("down", down)):
        tensor = tensor.transpose(1, 2).contiguous() if transposed else tensor
        inputs[name] = arranged(draw, name, tensor, weight_layouts(impl))
    biases = draw.pick("biases", ("none", "none", "both", "up", "down"))
    if biases in ("both", "up"):
        inputs["up_bias"] = arranged(draw, "up_bias", floats(draw, "up_bias", (E, G), dtype, 0.3))
    if biases in ("both", "down"):
        inputs["down_bias"] = arranged(draw, "down_bias", floats(draw, "down_bias", (E, D), dtype, 0.3))
    return inputs


def spoil_an_expert(draw: Draw, inputs: dict[str, Tensor], impl: str, *names: str) -> None:
    """A NaN in the weights of one expert, which reaches the tokens routed to it; ``dense`` multiplies by every expert."""
    if draw.pick("spoilt expert", ("no",) * 8 + ("yes",)) == "yes" and impl not in ("dense", "auto"):
        name = names[int(draw.rng.integers(len(names)))]
        if inputs[name].stride(0) and inputs[name].numel():
            inputs[name][int(draw.rng.integers(inputs[name].shape[0]))] = torch.nan


def exact_projections(given: Given, form: Form, transposed: bool) -> tuple[Bounded, Bounded]:
    """``up`` and ``down`` as ``[E, G, D]`` and ``[E, D, F]``."""
    up, down = (given.bounded(name, form.stored, cast=form.stored) for name in ("up", "down"))
    return (up.swap(1, 2), down.swap(1, 2)) if transposed else (up, down)


def exact_call(
    given: Given, sizes: Sizes, form: Form, up: Bounded, down: Bounded, **adapters: Adapter | None
) -> tuple[Bounded, dict[str, Bounded]]:
    """The exact layer of these projections, and of the tokens and the routing that are given."""
    stored, (T, K, D) = form.stored, (sizes.T, sizes.K, sizes.D)
    return exact_experts.experts_mlp(
        given.bounded("x", stored, T, D, cast=stored),
        given.ids("experts", T, K),
        given.bounded("weights", stored, T, K),
        *(up, down, form),
        up_bias=given.optional("up_bias", stored, cast=stored),
        down_bias=given.optional("down_bias", stored, cast=stored),
        dy=given.gradient("y", stored, T, D),
        **adapters,
    )


def like_inputs(gradients: dict[str, Bounded], transposed: bool) -> dict[str, Bounded]:
    """Gradients of the projections in the layout that these were given in."""
    turned = {name: gradient.swap(1, 2) for name, gradient in gradients.items() if transposed and name in ("up", "down")}
    return gradients | turned


def case_experts_mlp(draw: Draw) -> Trial:
    """``F.experts_mlp``."""
    impl = draw.implementation("auto", "dense", "grouped", "cpu", "portable")
    dtype, sizes = draw.dtype_for(impl), Sizes(draw)
    autocast, stored = autocast_of(draw, dtype)
    form = drawn_form(draw, stored)
    transposed = draw.pick("transposed", (False, True)) if impl != "cpu" else False
    inputs = tokens_and_routing(draw, sizes, dtype) | drawn_projections(draw, sizes, form, dtype, impl, transposed)
    spoil_an_expert(draw, inputs, impl, "up", "down")
    options = form_options(form) | {"save_percent": draw.pick("save_percent", (100, 0, 50, 33)), "transposed": transposed}

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x, experts, weights, up, down = (inputs[name] for name in ("x", "experts", "weights", "up", "down"))
        return (F.experts_mlp(x, experts, weights, up, down, **given_biases(inputs), **options, impl=impl),)

    def exact(given: Given) -> Expected:
        y, gradients = exact_call(given, sizes, form, *exact_projections(given, form, transposed))
        return Expected({"y": y}, like_inputs(gradients, transposed))

    differentiable = tuple(name for name in inputs if name != "experts")
    return Trial(
        *(call, inputs, exact, {"y": like(stored, inputs["x"].shape)}, differentiable, impl, autocast, LIKE_X),
        batch_invariant=impl == "cpu",
    )


def packed_call(arguments: list[Tensor], packing: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """``F.experts_mlp`` with weights that are packed here: the one place that knows how packed weights are passed."""
    x, experts, weights, up, down = arguments
    packed = F.pack_experts(up, down, **packing)
    return F.experts_mlp(x, experts, weights, packed=packed, **options, **packing)


def case_packed(draw: Draw) -> Trial:
    """``F.pack_experts`` and the layer over what it makes."""
    impl = draw.pick("impl", ("auto", "cpu"))
    dtype, sizes = draw.pick("dtype", legal_dtypes("cpu")), Sizes(draw)
    form = drawn_form(draw, dtype)
    inputs = tokens_and_routing(draw, sizes, dtype) | drawn_projections(draw, sizes, form, dtype, "cpu", False)
    spoil_an_expert(draw, inputs, impl, "up", "down")
    packing = {"gated": form.gated, "gate_up_layout": form.layout}
    options = {name: value for name, value in form_options(form).items() if name not in packing}

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        arguments = [inputs[name] for name in ("x", "experts", "weights", "up", "down")]
        return (packed_call(arguments, packing, options | given_biases(inputs) | {"impl": impl}),)

    def exact(given: Given) -> Expected:
        return Expected({"y": exact_call(given, sizes, form, *exact_projections(given, form, False))[0]})

    return Trial(
        call, inputs, exact, {"y": like(dtype, inputs["x"].shape)}, (), impl, tokens=LIKE_X, batch_invariant=True, compiles=False
    )


def drawn_adapters(draw: Draw, sizes: Sizes, form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors of one adapter or of two."""
    E, D, F_, G = sizes.E, sizes.D, sizes.F, sizes.F * (2 if form.gated else 1)
    which, factor_dtype = draw.pick("adapters", ("both", "up", "down")), draw.pick("dtype of factors", (dtype, torch.float32))
    shapes: dict[str, tuple[int, ...]] = {}
    if which != "down":
        r = draw.size(1, 2, 3, 8)
        shapes |= {"up_A": (E, r, D), "up_B": (E, G, r)}
    if which != "up":
        r = draw.size(1, 2, 3, 8)
        shapes |= {"down_A": (E, r, F_), "down_B": (E, D, r)}
    return {name: arranged(draw, name, floats(draw, name, shape, factor_dtype, 0.3)) for name, shape in shapes.items()}


def exact_adapters(given: Given, stored: torch.dtype, scale: dict[str, float]) -> dict[str, Adapter | None]:
    """The factors, rounded to the dtype that is computed in."""
    adapters: dict[str, Adapter | None] = {}
    for name in ("up", "down"):
        if f"{name}_A" in given.inputs:
            A, B = (given.bounded(f"{name}_{factor}", stored, cast=stored) for factor in "AB")
            adapters[f"{name}_adapter"] = Adapter(A, B, scale[name])
    return adapters


def case_experts_mlp_lora(draw: Draw) -> Trial:
    """``F.experts_mlp_lora``."""
    impl = draw.implementation("auto", "dense", "grouped")
    dtype, sizes = draw.dtype_for(impl), Sizes(draw)
    form, transposed = drawn_form(draw, dtype), draw.pick("transposed", (False, True))
    inputs = tokens_and_routing(draw, sizes, dtype) | drawn_projections(draw, sizes, form, dtype, impl, transposed)
    inputs |= drawn_adapters(draw, sizes, form, dtype)
    scale = {"up": draw.pick("scale of up", (1.0, 2.0, 0.25)), "down": draw.pick("scale of down", (1.0, 0.5))}
    options = form_options(form) | {"save_percent": draw.pick("save_percent", (100, 0, 50, 33)), "transposed": transposed}

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x, experts, weights, up, down = (inputs[name] for name in ("x", "experts", "weights", "up", "down"))
        named: dict[str, Any] = {f"gate_{name}" if name.startswith("up") else name: inputs.get(name) for name in ADDITIONS}
        scales = {"gate_up_scale": scale["up"], "down_scale": scale["down"]}
        return (F.experts_mlp_lora(x, experts, weights, up, down, **named, **scales, **options, impl=impl),)

    def exact(given: Given) -> Expected:
        projections = exact_projections(given, form, transposed)
        y, gradients = exact_call(given, sizes, form, *projections, **exact_adapters(given, dtype, scale))
        return Expected({"y": y}, like_inputs(gradients, transposed))

    differentiable = tuple(name for name in inputs if name != "experts")
    return Trial(*(call, inputs, exact, {"y": like(dtype, inputs["x"].shape)}, differentiable, impl))


ADDITIONS = ("up_bias", "down_bias", "up_A", "up_B", "down_A", "down_B")


def widened_weight(weight: F.QuantizedWeight) -> Array:
    """``scale * (values - zero_point)`` in float64."""
    values, scale = weight.values.numpy(), weight.scale.double().numpy()
    if weight.values.dtype == torch.int8:
        return values * scale[..., None]
    E, rows, half = values.shape
    wide = np.zeros((E, rows, 2 * half))
    wide[..., 0::2], wide[..., 1::2] = values & 15, values >> 4
    zero = 8.0 if weight.zero_point is None else np.repeat(weight.zero_point.double().numpy(), 2 * half // scale.shape[2], -1)
    return (wide - zero) * np.repeat(scale, 2 * half // scale.shape[2], -1)


def wrong_quantization(name: str, weight: Array, quantized: F.QuantizedWeight) -> list[str]:
    """A value that is off by more than half a step, or by a whole one where it is the end of the range of 4 bits."""
    steps = 0.5 if quantized.bits == 8 else 1.0
    scale = np.abs(quantized.scale.double().numpy())
    scale = scale[..., None] if quantized.bits == 8 else np.repeat(scale, weight.shape[2] // scale.shape[2], -1)
    off = np.abs(widened_weight(quantized) - weight) - 1.001 * steps * scale
    return [f"{name} was quantised {off.max()} too far off"] if off.size and off.max() > 1e-37 else []


def case_experts_mlp_quantized(draw: Draw) -> Trial:
    """``F.quantize_weight`` and ``F.experts_mlp_quantized``."""
    impl, kind = (
        draw.implementation("auto", "dense", "grouped", "cpu"),
        draw.pick("format", ("int8", "int4", "int4 with zeros")),
    )
    dtype, sizes = draw.dtype_for(impl), Sizes(draw)
    autocast, stored = autocast_of(draw, dtype)
    quantizing: dict[str, Any] = {"dtype": kind[:4]}
    if kind != "int8":
        group = draw.pick("group_size", (32, 64))
        sizes.D, sizes.F, sizes.E = group * draw.size(1, 2), group, min(sizes.E, 4)
        sizes.K = min(sizes.K, sizes.E)
        quantizing |= {"group_size": group, "symmetric": kind == "int4"}
    form = drawn_form(draw, stored)
    # Numbers that the dtype of x holds: some implementations widen the weights to it.
    plain = {name: tensor.float() for name, tensor in drawn_projections(draw, sizes, form, stored, "cpu", False).items()}
    biases = {name: plain[name].to(dtype) for name in ("up_bias", "down_bias") if name in plain}
    quantized = {name: F.quantize_weight(plain[name], **quantizing) for name in ("up", "down")}
    wrong = [found for name in quantized for found in wrong_quantization(name, plain[name].double().numpy(), quantized[name])]
    inputs = tokens_and_routing(draw, sizes, dtype) | biases
    options = form_options(form) | {"save_percent": draw.pick("save_percent", (100, 0, 50, 33))}

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x, experts, weights = (inputs[name] for name in ("x", "experts", "weights"))
        up, down = quantized["up"], quantized["down"]
        return (F.experts_mlp_quantized(x, experts, weights, up, down, **given_biases(inputs), **options, impl=impl),)

    def exact(given: Given) -> Expected:
        projections = []
        for name in ("up", "down"):  # some implementations round the widened weights to the dtype of x
            wide, work = widened_weight(quantized[name]), PRECISIONS[work_dtype(stored)]
            projections.append(Bounded(wide, work.unit * np.abs(wide), work).written(stored))
        y, gradients = exact_call(given, sizes, form, *projections)
        return Expected({"y": y}, gradients, wrong)

    differentiable = tuple(name for name in inputs if name != "experts")
    bits: dict[str, Any] = {"tokens": LIKE_X, "batch_invariant": impl == "cpu", "compiles": False}
    return Trial(call, inputs, exact, {"y": like(stored, inputs["x"].shape)}, differentiable, impl, autocast, **bits)


CASES = {
    "experts_mlp": (case_experts_mlp, 6),
    "experts_mlp_lora": (case_experts_mlp_lora, 2),
    "experts_mlp_quantized": (case_experts_mlp_quantized, 2),
    "pack_experts": (case_packed, 1),
}
