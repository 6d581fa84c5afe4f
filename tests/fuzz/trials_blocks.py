"""Cases of the modules around one kind of experts: plain, adapted, quantised, merged, and single neurons behind product keys."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedonemoe import Experts, FusedOneMoE, LoRAExperts, MoEConfig, ProductKeyRouter, QuantizedExperts
from fusedonemoe.layers.fine_grained import FineGrainedMoE
from tests.fuzz import exact_experts
from tests.fuzz.bounds import PRECISIONS, Bounded, contract, work_dtype
from tests.fuzz.draw import DTYPES, Draw
from tests.fuzz.exact_experts import Form
from tests.fuzz.exact_routing import Rule, best_pairs, route_product_key
from tests.fuzz.trial import Expected, Given, Trial, like, routed_like, widened
from tests.fuzz.trials_experts import (
    ACTIVATIONS,
    LIKE_X,
    Sizes,
    drawn_form,
    exact_adapters,
    form_options,
    tokens_and_routing,
    widened_weight,
)
from tests.fuzz.trials_layers import (
    IMPLEMENTATIONS,
    Gradients,
    add_gradients,
    drawn_sizes,
    drawn_tokens,
    exact_router,
    linear,
    linear_gradients,
    module_call,
    module_inputs,
    shared_branch,
)


def _config(draw: Draw, sizes: Sizes, form: Form, impl: str, transposed: bool) -> MoEConfig:
    return MoEConfig(
        hidden_size=sizes.D,
        intermediate_size=sizes.F,
        num_experts=sizes.E,
        top_k=min(sizes.K, sizes.E),
        **form_options(form),
        transposed=transposed,
        bias=draw.pick("bias", (False, True)),
        save_percent=draw.pick("save_percent", (100, 0, 50)),
        impl=impl,
    )


def _exact_module(
    given: Given,
    sizes: Sizes,
    form: Form,
    up: Bounded,
    down: Bounded,
    biases: tuple[str, str],
    adapters: dict[str, Any] | None = None,
) -> tuple[Bounded, Gradients]:
    """The exact experts of a module whose biases have these names."""
    stored, (T, K, D) = form.stored, (sizes.T, sizes.K, sizes.D)
    return exact_experts.experts_mlp(
        given.bounded("x", stored, T, D),
        given.ids("experts", T, K),
        given.bounded("weights", stored, T, K),
        *(up, down, form),
        up_bias=given.optional(biases[0], stored),
        down_bias=given.optional(biases[1], stored),
        dy=given.gradient("y", stored, T, D),
        **(adapters or {}),
    )


def _named(gradients: Gradients, names: dict[str, str], transposed: bool) -> Gradients:
    """Under the names and in the layout of a module's parameters."""
    return {names.get(name, name): g.swap(1, 2) if transposed and name in ("up", "down") else g for name, g in gradients.items()}


def case_experts(draw: Draw) -> Trial:
    """``Experts``."""
    impl = draw.pick("impl", IMPLEMENTATIONS)
    dtype, sizes = draw.dtype_for(impl), drawn_sizes(draw)
    form, transposed = drawn_form(draw, dtype), draw.pick("transposed", (False, True)) if impl != "cpu" else False
    module = Experts(_config(draw, sizes, form, impl, transposed), dtype=dtype)
    up_name = "gate_up_proj" if form.gated else "up_proj"
    biases = (f"{up_name}_bias", "down_proj_bias")
    inputs = module_inputs(draw, module, dtype) | tokens_and_routing(draw, sizes, dtype)

    def exact(given: Given) -> Expected:
        up, down = (given.bounded(name, dtype) for name in (up_name, "down_proj"))
        if transposed:
            up, down = up.swap(1, 2), down.swap(1, 2)
        y, found = _exact_module(given, sizes, form, up, down, biases)
        names = {"up": up_name, "down": "down_proj", "up_bias": biases[0], "down_bias": biases[1]}
        return Expected({"y": y}, _named(found, names, transposed))

    call, differentiable = module_call(module, "x", "experts", "weights"), tuple(name for name in inputs if name != "experts")
    bits: dict[str, Any] = {"tokens": LIKE_X, "batch_invariant": impl == "cpu"}
    return Trial(call, inputs, exact, {"y": like(dtype, inputs["x"].shape)}, differentiable, impl, **bits)


def case_lora_experts(draw: Draw) -> Trial:
    """``LoRAExperts``, over a frozen base."""
    impl = draw.pick("impl", ("auto", "dense", "grouped"))
    dtype, sizes = draw.dtype_for(impl), drawn_sizes(draw)
    form, transposed = drawn_form(draw, dtype), draw.pick("transposed", (False, True))
    targets = draw.pick("targets", (("gate_up", "down"), ("gate_up",), ("down",)))
    base = Experts(_config(draw, sizes, form, impl, transposed), dtype=dtype)
    module = LoRAExperts(
        base, r=draw.size(1, 2, 4), alpha=draw.size(1, 4), targets=targets, use_rslora=draw.pick("use_rslora", (False, True))
    )
    scale = {"up": module.scale.get("gate_up", 1.0), "down": module.scale.get("down", 1.0)}
    up_name = "gate_up_proj" if form.gated else "up_proj"
    biases = (f"base.{up_name}_bias", "base.down_proj_bias")
    inputs = module_inputs(draw, module, dtype) | tokens_and_routing(draw, sizes, dtype)
    factors = {"up_A": "gate_up_lora_A", "up_B": "gate_up_lora_B", "down_A": "down_lora_A", "down_B": "down_lora_B"}

    def exact(given: Given) -> Expected:
        up, down = (given.bounded(f"base.{name}", dtype) for name in (up_name, "down_proj"))
        if transposed:
            up, down = up.swap(1, 2), down.swap(1, 2)
        short = {name: given.inputs[full] for name, full in factors.items() if full in given.inputs}
        adapters = exact_adapters(Given(short, {}, {}), dtype, scale)
        y, found = _exact_module(given, sizes, form, up, down, biases, adapters)
        return Expected({"y": y}, _named(found, factors, transposed))

    names = tuple(name for name in inputs if name != "experts" and not name.startswith("base."))
    call = module_call(module, "x", "experts", "weights")
    return Trial(call, inputs, exact, {"y": like(dtype, inputs["x"].shape)}, names, impl)


def case_quantized_experts(draw: Draw) -> Trial:
    """``QuantizedExperts.from_experts``."""
    impl, kind = (
        draw.pick("impl", ("auto", "dense", "grouped", "cpu")),
        draw.pick("format", ("int8", "int4", "int4 with zeros")),
    )
    dtype, sizes = draw.dtype_for(impl), drawn_sizes(draw)
    options: dict[str, Any] = {}
    if kind != "int8":
        sizes.D = sizes.F = 32
        options = {"group_size": 32, "symmetric": kind == "int4"}
    form = drawn_form(draw, dtype)
    plain = Experts(_config(draw, sizes, form, impl, False), dtype=dtype)
    for name, values in module_inputs(draw, plain, dtype).items():
        plain.get_parameter(name).data.copy_(values)
    module = QuantizedExperts.from_experts(plain, kind[:4], **options)
    up_name = "gate_up_proj" if form.gated else "up_proj"
    biases = (f"{up_name}_bias", "down_proj_bias")
    inputs = {name: tensor.detach() for name, tensor in module.named_parameters()} | tokens_and_routing(draw, sizes, dtype)

    def exact(given: Given) -> Expected:
        work = PRECISIONS[work_dtype(dtype)]
        wide = (widened_weight(weight) for weight in module.quantized_weights())
        up, down = (Bounded(weight, work.unit * np.abs(weight), work).written(dtype) for weight in wide)
        y, found = _exact_module(given, sizes, form, up, down, biases)
        return Expected({"y": y}, _named(found, {"up_bias": biases[0], "down_bias": biases[1]}, False))

    call, names = module_call(module, "x", "experts", "weights"), tuple(name for name in inputs if name != "experts")
    bits: dict[str, Any] = {"tokens": LIKE_X, "batch_invariant": impl == "cpu", "compiles": False}
    return Trial(call, inputs, exact, {"y": like(dtype, inputs["x"].shape)}, names, impl, **bits)


def case_fused_one_moe(draw: Draw) -> Trial:
    """``FusedOneMoE``."""
    impl = draw.pick("impl", IMPLEMENTATIONS)
    dtype, sizes = draw.dtype_for(impl), drawn_sizes(draw)
    is_sparse, bias = draw.pick("is_sparse", (True, True, False)), draw.pick("bias", (False, True))
    sizes.K = sizes.K if is_sparse else sizes.E
    module = FusedOneMoE(sizes.D, sizes.F, sizes.E, is_sparse, sizes.K, bias, impl=impl, dtype=dtype)
    rule = Rule(sizes.K if is_sparse else None, "sigmoid", norm_topk_prob=False)
    inputs = module_inputs(draw, module, dtype) | {"x": drawn_tokens(draw, sizes, dtype)}
    T, D, K, F = sizes.T, sizes.D, sizes.K, sizes.F

    def exact(given: Given) -> Expected:
        dy, x = given.gradient("y", dtype, T, D), given.bounded("x", dtype, T, D)
        _, weights, _, wrong = exact_router(given, module.gate, rule, dtype, sizes, "gate.", None, None)
        if wrong:
            return Expected({}, wrong=wrong)
        ids, proj, down = given.ids("experts", T, K), given.bounded("proj", dtype), given.bounded("down", dtype)
        h, _ = exact_experts.experts_merged(x, ids, weights, proj, dtype)
        if bias:
            h = (h + given.bounded("up_bias", dtype)).written(dtype)
        relu = h.apply(lambda v: np.maximum(v, 0))
        a = (relu * relu).written(dtype)
        y = contract("tf,fd->td", a, down, F).rounded(dtype)
        if bias:
            y = y + given.bounded("down_bias", dtype)
        if dy is None:
            return Expected({"y": y.written(dtype)})
        da = contract("td,fd->tf", dy, down, D).rounded(dtype)
        dh = (da * (relu * 2).rounded(dtype)).written(dtype)
        _, found = exact_experts.experts_merged(x, ids, weights, proj, dtype, dh)
        *_, more, _ = exact_router(given, module.gate, rule, dtype, sizes, "gate.", found["weights"], None)
        gradients = {"x": found["x"], "proj": found["proj"], "down": contract("tf,td->fd", a, dy, T)}
        gradients |= {"up_bias": dh.sum(0), "down_bias": dy.sum(0)}
        return Expected({"y": y.written(dtype)}, add_gradients(gradients, {name: g.rounded(dtype) for name, g in more.items()}))

    outputs = {"y": like(dtype, inputs["x"].shape), "experts": like(torch.int64, inputs["x"].shape[:-1], K)}
    return Trial(_WithIds(module), inputs, exact, outputs, tuple(inputs), impl, compiles=False)


class _WithIds:
    """A block's outputs and the ids that its router picked, which it does not return."""

    def __init__(self, module: FusedOneMoE | FineGrainedMoE) -> None:
        self.module, self.ids = module, torch.empty(0)
        module.gate.register_forward_hook(lambda gate, inputs, output: setattr(self, "ids", output.experts))

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (*module_call(self.module, "x")(inputs), self.ids)


def _exact_product_keys(
    given: Given,
    prefix: str,
    dtype: torch.dtype,
    sizes: Sizes,
    heads: int,
    keys: int,
    norm: bool,
    upstream: tuple[Bounded | None, Bounded | None],
) -> tuple[Bounded, Bounded, Gradients, list[str]]:
    """Logits ``[T, H * 2 * G]``, weights ``[T, H * K]``, gradients by name, and what is wrong with the ids."""
    T, D, K, work = sizes.T, sizes.D, sizes.K, PRECISIONS[work_dtype(dtype)]
    x, weight = given.bounded("x", dtype, T, D), given.bounded(f"{prefix}weight", dtype)
    normed, scale, rms = x, None, None
    if f"{prefix}norm.weight" in given.inputs:
        scale = given.bounded(f"{prefix}norm.weight", dtype)
        mean = (x * x).sum(1, keepdims=True) / float(D) + 1e-6
        rms = mean.apply(np.sqrt)
        unscaled = x / rms
        normed = unscaled * scale
    logits = linear(normed, weight, given.optional(f"{prefix}bias", dtype))
    ids, got = given.ids("experts", T * heads, K), widened(given.outputs["logits"]).reshape(T * heads, 2, keys)
    # The choice follows from the logits that the module gave, exactly; these are within their bound, or the case fails.
    wrong = []
    for row in range(T * heads):
        best = best_pairs(got[row], K) if np.isfinite(got[row]).all() else None
        if best is not None and best != ids[row].tolist():
            wrong.append(f"row {row}: ids {ids[row].tolist()}, the best are {best}")
    if wrong:
        return logits, logits, {}, wrong
    pairs = Bounded(logits.value.reshape(T * heads, 2, keys), logits.error.reshape(T * heads, 2, keys), work)
    dweights, dlogits = upstream
    rows = None if dweights is None else dweights.reshape(T * heads, K)
    weights, dpairs = route_product_key(pairs, ids, norm, rows)
    weights = weights.reshape(T, heads * K)
    total = dlogits
    if dpairs is not None:
        flat = dpairs.reshape(T, heads * 2 * keys)
        total = flat if dlogits is None else flat + dlogits
    if total is None:
        return logits, weights, {}, []
    dnormed, dweight, dbias = linear_gradients(total, normed, weight)
    gradients = {"x": dnormed, f"{prefix}weight": dweight, f"{prefix}bias": dbias}
    if scale is not None and rms is not None:
        gradients[f"{prefix}norm.weight"] = (dnormed * unscaled).sum(0)
        inner = dnormed * scale
        gradients["x"] = (inner - unscaled * ((inner * unscaled).sum(1, keepdims=True) / float(D))) / rms
    return logits, weights, gradients, []


def case_product_key_router(draw: Draw) -> Trial:
    """``ProductKeyRouter``."""
    impl, dtype, sizes = draw.pick("impl", ("auto", "dense", "portable")), draw.pick("dtype", DTYPES), drawn_sizes(draw)
    keys, heads, norm = draw.size(1, 2, 3, 5), draw.size(1, 2), draw.pick("norm_topk_prob", (True, False))
    sizes.K = min(keys * keys, draw.size(1, 2, 5))
    input_norm, bias = draw.pick("input_norm", (None, "rms")), draw.pick("bias", (False, True))
    options: dict[str, Any] = {"norm_topk_prob": norm, "input_norm": input_norm, "bias": bias, "impl": impl, "dtype": dtype}
    module = ProductKeyRouter(sizes.D, keys, sizes.K, num_heads=heads, **options)
    inputs = module_inputs(draw, module, dtype) | {"x": drawn_tokens(draw, sizes, dtype)}

    def exact(given: Given) -> Expected:
        upstream = (
            given.gradient("weights", dtype, sizes.T, heads * sizes.K),
            given.gradient("logits", dtype, sizes.T, heads * 2 * keys),
        )
        logits, weights, gradients, wrong = _exact_product_keys(given, "", dtype, sizes, heads, keys, norm, upstream)
        return Expected({} if wrong else {"logits": logits, "weights": weights}, gradients, wrong)

    x = inputs["x"]
    outputs = {"logits": like(work_dtype(dtype), x.shape[:-1], heads, 2, keys)} | routed_like(x, heads * sizes.K)
    return Trial(module_call(module, "x"), inputs, exact, outputs, tuple(inputs), impl)


def case_fine_grained_moe(draw: Draw) -> Trial:
    """``FineGrainedMoE``."""
    impl = draw.pick("impl", IMPLEMENTATIONS)
    dtype, sizes = draw.dtype_for(impl), drawn_sizes(draw)
    keys, heads, norm = draw.size(1, 2, 3, 5), draw.size(1, 2), draw.pick("norm_topk_prob", (True, False))
    sizes.K, name = min(keys * keys, draw.size(1, 2, 5)), draw.pick("activation", ACTIVATIONS)
    branch = draw.pick("dense branch", (None, 3))
    options: dict[str, Any] = {"norm_topk_prob": norm, "input_norm": draw.pick("input_norm", (None, "rms")), "dtype": dtype}
    module = FineGrainedMoE(
        *(sizes.D, keys * keys, sizes.K), intermediate_size=branch, activation=name, num_heads=heads, **options, impl=impl
    )
    inputs = module_inputs(draw, module, dtype) | {"x": drawn_tokens(draw, sizes, dtype)}
    T, D, HK = sizes.T, sizes.D, heads * sizes.K

    def exact(given: Given) -> Expected:
        dy, dlogits = given.gradient("y", dtype, T, D), given.gradient("logits", dtype, T, heads * 2 * keys)
        arguments = (given, "gate.", dtype, sizes, heads, keys, norm)
        logits, weights, _, wrong = _exact_product_keys(*arguments, (None, None))
        if wrong:
            return Expected({}, wrong=wrong)
        x, ids = given.bounded("x", dtype, T, D), given.ids("experts", T, HK)
        down, up = (given.bounded(table, dtype) for table in ("down_embed", "up_embed"))
        y, found = exact_experts.experts_neurons(x, ids, weights, down, up, name, dtype, dy)
        gradients: Gradients = {}
        if dy is not None:
            *_, more, _ = _exact_product_keys(*arguments, (found["weights"], dlogits))
            gradients = {"x": found["x"], "down_embed": found["down"], "up_embed": found["up"]}
            gradients = add_gradients(gradients, {key: g.rounded(dtype) for key, g in more.items()})
        if branch is not None:
            gate, up, down = (given.bounded(f"{part}_proj.weight", dtype) for part in ("gate", "up", "down"))
            out, more = shared_branch(x, gate, up, down, Form(dtype, name), dy)
            y = (y.rounded(dtype) + out.rounded(dtype)).written(dtype)
            gradients = add_gradients(gradients, {key: g.rounded(dtype) for key, g in more.items()})
        return Expected({"y": y, "logits": logits}, gradients)

    x = inputs["x"]
    outputs = {"y": like(dtype, x.shape), "logits": like(work_dtype(dtype), x.shape[:-1], heads, 2, keys)}
    outputs["experts"] = like(torch.int64, x.shape[:-1], HK)
    return Trial(_WithIds(module), inputs, exact, outputs, tuple(inputs), impl, compiles=False)


CASES = {
    "Experts": (case_experts, 1),
    "LoRAExperts": (case_lora_experts, 1),
    "QuantizedExperts": (case_quantized_experts, 1),
    "FusedOneMoE": (case_fused_one_moe, 1),
    "ProductKeyRouter": (case_product_key_router, 1),
    "FineGrainedMoE": (case_fine_grained_moe, 1),
}
