"""Cases of the modules: routers, blocks, adapted and quantised experts, over the exact sides of the functions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusedonemoe import MoE, TopKRouter
from tests.fuzz import exact_experts, exact_routing
from tests.fuzz.bounds import Bounded, contract, join, work_dtype
from tests.fuzz.draw import DTYPES, Draw, arranged, finite_cast, leading, spoilt
from tests.fuzz.exact_experts import Form, activation
from tests.fuzz.exact_routing import Rule
from tests.fuzz.trial import Expected, Given, Trial, like, routed_like, widened
from tests.fuzz.trials_experts import Sizes, drawn_form, form_options
from tests.fuzz.trials_routing import drawn_rule, drawn_selection_bias

IMPLEMENTATIONS = ("auto", "dense", "grouped", "cpu", "portable")
Gradients = dict[str, Bounded]


def module_inputs(draw: Draw, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters in drawn numbers, by name, small enough for float16."""
    inputs = {}
    for name, parameter in module.named_parameters():
        scale = 0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        kind = draw.pick("values of parameters", ("normal", "normal", "normal", "zeros", "wide"))
        values = scale * draw.normal(*parameter.shape)
        if kind == "zeros":
            values = np.where(draw.rng.random(parameter.shape) < 0.5, 0, values)
        elif kind == "wide":
            values = values * 2.0 ** draw.rng.integers(-4, 3, (*parameter.shape[:-1], 1))
        inputs[name] = finite_cast(values, parameter.dtype)
    return inputs


def module_call(module: nn.Module, *names: str) -> Any:
    """The module over the given parameters and tensors."""

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        parameters = {name: tensor for name, tensor in inputs.items() if name not in names}
        out = functional_call(module, parameters, tuple(inputs[name] for name in names))
        return tuple(out) if isinstance(out, tuple) else (out,)

    return call


def drawn_tokens(draw: Draw, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """``x``, of moderate size: what it is multiplied with is drawn, too."""
    scale = draw.pick("size of x", (1.0, 1.0, 1.0, 20.0, 1e-3, 0.0))
    x = finite_cast(scale * draw.normal(sizes.T, sizes.D), dtype)
    return arranged(draw, "x", spoilt(draw, "x", x).reshape(*leading(draw, sizes.T), sizes.D))


def linear(x: Bounded, weight: Bounded, bias: Bounded | None = None) -> Bounded:
    """``x W^T + b``."""
    width = x.value.shape[1]
    y = contract("td,od->to", x, weight, width)
    if bias is None:
        return y
    total = y + bias
    started = width * total.work.unit * np.abs(bias.value)  # a sum that begins with the bias is rounded at its size each time
    return Bounded(total.value, total.error + started, total.work)


def linear_gradients(dy: Bounded, x: Bounded, weight: Bounded) -> tuple[Bounded, Bounded, Bounded]:
    """Gradients of x, the weight and the bias."""
    T, width = dy.value.shape
    dx, dweight = contract("to,od->td", dy, weight, width), contract("to,td->od", dy, x, T)
    return dx, dweight, dy.sum(0)


def drawn_sizes(draw: Draw) -> Sizes:
    """Sizes of a block."""
    sizes = Sizes(draw)
    sizes.E = min(sizes.E, 8)
    sizes.K = min(sizes.K, sizes.E)
    return sizes


def router_module(draw: Draw, sizes: Sizes, dtype: torch.dtype) -> tuple[Rule, dict[str, Any]]:
    """A rule, and the options of a router or a block that has it."""
    rule, has_bias = drawn_rule(draw, sizes.E)
    sizes.K = rule.top_k or sizes.E
    options = rule._asdict() | {"selection_bias": has_bias}
    return rule, options


def set_selection_bias(draw: Draw, router: TopKRouter) -> None:
    """Drawn numbers in the buffer, if there is one."""
    bias = router.e_score_correction_bias
    if bias is not None:
        bias.copy_(drawn_selection_bias(draw, bias.shape[0], torch.float32))


def exact_router(
    given: Given,
    module: TopKRouter,
    rule: Rule,
    dtype: torch.dtype,
    sizes: Sizes,
    prefix: str,
    dweights: Bounded | None,
    dlogits: Bounded | None,
) -> tuple[Bounded, Bounded, Gradients, list[str]]:
    """Logits, weights, gradients by name, and what is wrong with the ids that the module gave."""
    T, D, K = sizes.T, sizes.D, sizes.K
    x, weight = given.bounded("x", dtype, T, D), given.bounded(f"{prefix}weight", dtype)
    logits = linear(x, weight, given.optional(f"{prefix}bias", dtype))
    ids = given.ids("experts", T, K)
    buffer = module.e_score_correction_bias
    bias = None if buffer is None else Bounded(widened(buffer), None, x.work)
    wrong = exact_routing.wrong_choices(logits, bias, ids, rule)
    if wrong:
        return logits, logits, {}, wrong
    weights, dl = exact_routing.route(logits, ids, rule, dweights)
    if dl is None and dlogits is None:
        return logits, weights, {}, []
    total = dlogits if dl is None else dl if dlogits is None else dl + dlogits
    assert total is not None
    dx, dweight, dbias = linear_gradients(total, x, weight)
    return logits, weights, {"x": dx, f"{prefix}weight": dweight, f"{prefix}bias": dbias}, []


def case_topk_router(draw: Draw) -> Trial:
    """``TopKRouter``."""
    impl, dtype, sizes = draw.pick("impl", ("auto", "dense", "portable")), draw.pick("dtype", DTYPES), drawn_sizes(draw)
    rule, options = router_module(draw, sizes, dtype)
    router = TopKRouter(
        sizes.D, sizes.E, options.pop("top_k"), bias=draw.pick("bias", (False, True)), **options, impl=impl, dtype=dtype
    )
    set_selection_bias(draw, router)
    inputs = module_inputs(draw, router, dtype) | {"x": drawn_tokens(draw, sizes, dtype)}

    def exact(given: Given) -> Expected:
        dweights = given.gradient("weights", dtype, sizes.T, sizes.K)
        dlogits = given.gradient("logits", dtype, sizes.T, sizes.E)
        logits, weights, gradients, wrong = exact_router(given, router, rule, dtype, sizes, "", dweights, dlogits)
        return Expected({} if wrong else {"logits": logits, "weights": weights}, gradients, wrong)

    x = inputs["x"]
    outputs = {"logits": like(work_dtype(dtype), x.shape[:-1], sizes.E)} | routed_like(x, sizes.K)
    return Trial(module_call(router, "x"), inputs, exact, outputs, tuple(inputs), impl)


def shared_branch(
    x: Bounded, gate: Bounded | None, up: Bounded, down: Bounded, form: Form, dy: Bounded | None
) -> tuple[Bounded, Gradients]:
    """A dense MLP: an expert that every token takes with weight 1."""
    T = x.value.shape[0]
    stacked = up if gate is None else join([gate, up], 0)
    one = Bounded(np.ones((T, 1)), None, x.work)
    whole = form._replace(layout="gate_up")
    ids = np.zeros((T, 1), dtype=np.int64)
    y, found = exact_experts.experts_mlp(x, ids, one, stacked[None], down[None], whole, dy=dy)
    if not found:
        return y, {}
    F = up.value.shape[0]
    dup = found["up"][0]
    gradients = {"x": found["x"], "down_proj.weight": found["down"][0], "up_proj.weight": dup if gate is None else dup[F:]}
    return y, gradients if gate is None else gradients | {"gate_proj.weight": dup[:F]}


def add_gradients(first: Gradients, second: Gradients) -> Gradients:
    """Sums by name."""
    return first | {name: first[name] + gradient if name in first else gradient for name, gradient in second.items()}


def case_moe(draw: Draw) -> Trial:
    """``MoE``, with everything that a block may have."""
    impl = draw.pick("impl", IMPLEMENTATIONS)
    dtype, sizes = draw.dtype_for(impl), drawn_sizes(draw)
    rule, options = router_module(draw, sizes, dtype)
    form, shared = drawn_form(draw, dtype), draw.pick("shared branch", ("none", "plain", "with a gate"))
    transposed = draw.pick("transposed", (False, True)) if impl != "cpu" else False
    block = MoE(
        hidden_size=sizes.D,
        intermediate_size=sizes.F,
        num_experts=sizes.E,
        **(options | form_options(form)),
        transposed=transposed,
        bias=draw.pick("bias", (False, True)),
        output_bias=draw.pick("output_bias", (False, True)),
        router_bias=draw.pick("router_bias", (False, True)),
        shared_intermediate_size=None if shared == "none" else draw.size(1, 5, 8),
        shared_gate=shared == "with a gate",
        save_percent=draw.pick("save_percent", (100, 0, 50)),
        impl=impl,
        dtype=dtype,
    )
    set_selection_bias(draw, block.gate)
    inputs = module_inputs(draw, block, dtype) | {"x": drawn_tokens(draw, sizes, dtype)}
    up_name = "gate_up_proj" if form.gated else "up_proj"

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        parameters = {name: tensor for name, tensor in inputs.items() if name != "x"}
        return tuple(functional_call(block, parameters, (inputs["x"],), {"return_routing": True}))

    def exact(given: Given) -> Expected:
        T, D, E, K = sizes.T, sizes.D, sizes.E, sizes.K
        dy = given.gradient("y", dtype, T, D)
        dlogits, direct = given.gradient("logits", dtype, T, E), given.gradient("weights", dtype, T, K)
        logits, weights, _, wrong = exact_router(given, block.gate, rule, dtype, sizes, "gate.", None, None)
        if wrong:
            return Expected({}, wrong=wrong)
        x, ids = given.bounded("x", dtype, T, D), given.ids("experts", T, K)
        up, down = (given.bounded(f"experts.{name}", dtype) for name in (up_name, "down_proj"))
        if transposed:
            up, down = up.swap(1, 2), down.swap(1, 2)
        biases = {
            "up_bias": given.optional(f"experts.{up_name}_bias", dtype),
            "down_bias": given.optional("experts.down_proj_bias", dtype),
        }
        y, found = exact_experts.experts_mlp(x, ids, weights, up, down, form, **biases, dy=dy)
        y = y.rounded(dtype)
        gradients: Gradients = {}
        if dy is not None:
            turned = {name: g.swap(1, 2) if transposed and name in ("up", "down") else g for name, g in found.items()}
            names = {"up": up_name, "down": "down_proj", "up_bias": f"{up_name}_bias", "down_bias": "down_proj_bias"}
            gradients = {"x": found["x"].rounded(dtype)} | {f"experts.{full}": turned[name] for name, full in names.items()}
            gradients["output_bias"] = dy.rounded(dtype).sum(0)
            total = found["weights"] if direct is None else found["weights"] + direct
            *_, more, _ = exact_router(given, block.gate, rule, dtype, sizes, "gate.", total, dlogits)
            gradients = add_gradients(gradients, {name: g.rounded(dtype) for name, g in more.items()})
        if block.output_bias is not None:
            y = (y + given.bounded("output_bias", dtype)).written(dtype)
        if block.shared_expert is not None:
            y, more = _add_shared(given, x, y, form, dtype, dy)
            gradients = add_gradients(gradients, more)
        counts = np.array([(ids == e).sum() for e in range(E)])
        outputs: Any = {"y": y, "logits": logits, "weights": weights, "tokens_per_expert": counts}
        return Expected(outputs, gradients)

    x = inputs["x"]
    outputs = {"y": like(dtype, x.shape), "logits": like(work_dtype(dtype), x.shape[:-1], sizes.E)} | routed_like(x, sizes.K)
    outputs["tokens_per_expert"] = like(torch.int64, (sizes.E,))
    return Trial(call, inputs, exact, outputs, tuple(inputs), impl)


def _add_shared(
    given: Given, x: Bounded, y: Bounded, form: Form, dtype: torch.dtype, dy: Bounded | None
) -> tuple[Bounded, Gradients]:
    """``y + shared(x) [* sigmoid(x . w_s)]``, and the gradients that this adds."""
    prefix = "shared_expert."
    gate = given.optional(f"{prefix}gate_proj.weight", dtype)
    up, down = (given.bounded(f"{prefix}{name}.weight", dtype) for name in ("up_proj", "down_proj"))
    if "shared_expert_gate.weight" not in given.inputs:
        out, found = shared_branch(x, gate, up, down, form, dy)
        gradients = {name if name == "x" else prefix + name: g.rounded(dtype) for name, g in found.items()}
        return (y.rounded(dtype) + out.rounded(dtype)).written(dtype), gradients
    w_s = given.bounded("shared_expert_gate.weight", dtype)
    scale, slope = activation("sigmoid", linear(x, w_s).rounded(dtype), dtype)
    out, _ = shared_branch(x, gate, up, down, form, None)
    y = (y.rounded(dtype) + (out * scale).rounded(dtype)).written(dtype)
    if dy is None:
        return y, {}
    _, found = shared_branch(x, gate, up, down, form, (dy * scale).rounded(dtype))
    dlogit = ((dy * out).rounded(dtype).sum(1, keepdims=True).rounded(dtype) * slope).rounded(dtype)
    dx, dw_s, _ = linear_gradients(dlogit, x, w_s)
    gradients = {name if name == "x" else prefix + name: g.rounded(dtype) for name, g in found.items()}
    return y, add_gradients(gradients, {"x": dx.rounded(dtype), "shared_expert_gate.weight": dw_s})


CASES = {"TopKRouter": (case_topk_router, 1), "MoE": (case_moe, 2)}
