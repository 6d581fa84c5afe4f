"""Forward mode and torch.func: no operator takes a zero for a tangent, traced, compiled or eager; dense has these derivatives."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from fusedonemoe import FineGrainedMoE, FusedOneMoE, MoE, MoEConfig, QuantizedExperts
from fusedonemoe import functional as F
from fusedonemoe.ops import library
from fusedonemoe.ops.cpu import native

T, D, K, E, INNER = 4, 8, 2, 4, 8
NO_KERNELS = native.refusal(torch.float32, True)
BY_NAME = r"need impl='dense'|first derivatives only; impl='dense' has"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


UP, DOWN, PROJ, TABLE = draw(E, 2 * INNER, D), draw(E, D, INNER), draw(E, D, INNER), draw(E, D)
EXPERTS = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2]])
WEIGHTS = draw(T, K)
ADAPTER = {"gate_up_A": draw(E, 2, D), "gate_up_B": draw(E, 2 * INNER, 2)}


def quantised(dtype: str, impl: str):
    wide = draw(E, 64, 32), draw(E, 32, 32)
    weights = [F.quantize_weight(w, dtype, **({"group_size": 32} if dtype == "int4" else {})) for w in wide]
    return lambda x: F.experts_mlp_quantized(x, EXPERTS, WEIGHTS, *weights, impl=impl)


def of_routing(route):
    """The weights of a routing: its part with derivatives."""
    return lambda logits: route(logits)[0]


def operators(impl: str):
    """Each operator of the library as a function of one tensor, and the shape of that tensor."""
    routing = "dense" if impl == "dense" else "auto"
    return {
        "route": (of_routing(partial(F.route, top_k=K, impl=routing)), (T, E)),
        "route of sigmoids": (of_routing(partial(F.route, top_k=K, scoring="sigmoid", impl=routing)), (T, E)),
        "topk_softmax": (of_routing(partial(F.topk_softmax, top_k=K, impl=routing)), (T, E)),
        "product keys": (of_routing(partial(F.route_product_key, top_k=K, impl=routing)), (T, 2, E)),
        "mlp": (lambda x: F.experts_mlp(x, EXPERTS, WEIGHTS, UP, DOWN, impl=impl), (T, D)),
        "mlp's weights": (lambda up: F.experts_mlp(draw(T, D), EXPERTS, WEIGHTS, up, DOWN, impl=impl), (E, 2 * INNER, D)),
        "merged": (lambda x: F.experts_merged(x, EXPERTS, WEIGHTS, PROJ, impl=impl), (T, D)),
        "neurons": (lambda x: F.experts_neurons(x, EXPERTS, WEIGHTS, TABLE, TABLE, impl=impl), (T, D)),
        "values": (lambda table: F.experts_values(EXPERTS, WEIGHTS, table, impl=impl), (E, D)),
        "lora": (
            lambda x: F.experts_mlp_lora(x, EXPERTS, WEIGHTS, UP, DOWN, **ADAPTER, impl="auto" if impl == "cpu" else impl),
            (T, D),
        ),
        "int8": (quantised("int8", impl), (T, 32)),
        "int4": (quantised("int4", impl), (T, 32)),
    }


NAMES = tuple(operators("dense"))


def tangent_of(x: Tensor) -> Tensor:
    return torch.arange(1.0, x.numel() + 1, device=x.device).cos().reshape(x.shape)


def jvp(f, x):
    return torch.func.jvp(f, (x,), (tangent_of(x),))[1]


def dual(f, x):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent_of(x)))).tangent
        return torch.zeros_like(x) if tangent is None else tangent.clone()


def total(f):
    return lambda x: f(x).sum()


def gradient(f, x):
    return torch.func.grad(total(f))(x)


TRANSFORMS = {
    "jvp": jvp,
    "dual": dual,
    "grad": gradient,
    "vjp": lambda f, x: torch.func.vjp(total(f), x)[1](torch.ones(()))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(total(f))(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
}


def compiled(f, backend="eager"):
    torch.compiler.reset()
    return torch.compile(f, backend=backend)


CALLS = [(name, "grouped" if NO_KERNELS else "cpu") for name in NAMES] + [("mlp", "grouped"), ("neurons", "grouped")]


@pytest.mark.parametrize(("name", "impl"), CALLS)
def test_every_operator_refuses_a_tangent_on_every_path(name, impl):
    f, shape = operators(impl)[name]
    x = draw(*shape)
    traced, warm = make_fx(f)(x), compiled(f)
    warm(x)  # compiled outside, used inside
    for derive in (jvp, dual):
        for called in (f, traced, warm):
            with pytest.raises(RuntimeError, match=BY_NAME):
                derive(called, x)
    with pytest.raises(RuntimeError, match=BY_NAME):
        compiled(lambda x: jvp(f, x))(x)


WAYS = [(name, True, "eager") for name in TRANSFORMS]
WAYS += [("jvp", True, "aot_eager"), ("dual", True, "aot_eager"), ("dual", False, "aot_eager"), ("grad", False, "aot_eager")]


@pytest.mark.parametrize(("transform", "grad_mode", "backend"), WAYS)
def test_every_transform_is_refused_compiled(transform, grad_mode, backend):
    layer = MoE(MoEConfig(hidden_size=D, intermediate_size=INNER, num_experts=E, top_k=K))
    x, derive = draw(T, D), TRANSFORMS[transform]
    with torch.set_grad_enabled(grad_mode):
        with pytest.raises(RuntimeError, match=BY_NAME):
            compiled(lambda x: derive(layer, x), backend)(x)
        warm = compiled(layer, backend)
        y = warm(x)
        # torch itself refuses to linearize what is compiled.
        with pytest.raises(RuntimeError, match="FX" if transform == "linearize" else BY_NAME):
            derive(warm, x)
        assert torch.equal(warm(x), y)  # the graph is still good outside


def test_a_graph_without_operators_is_not_used_in_a_level_of_forward_mode():
    # In float64 the router is inlined: nothing is left in the graph that could refuse, and inductor's kernels drop tangents.
    x = draw(T, E).double()
    warm = compiled(of_routing(partial(F.route, top_k=K)), "aot_eager")
    warm(x)
    for derive in (jvp, dual):
        with pytest.raises(RuntimeError, match=BY_NAME):
            derive(warm, x)


@pytest.mark.parametrize("name", ["route", "product keys", "mlp", "merged", "neurons", "values", "lora"])
def test_dense_has_them_compiled(name):
    f, shape = operators("dense")[name]
    x = draw(*shape)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(f(leaf).sum(), leaf)[0]
    tangent = compiled(lambda x: jvp(f, x), "aot_eager")(x)
    step = 1e-3 * tangent_of(x)
    assert_close(tangent, (f(x + step) - f(x - step)) / 2e-3, rtol=2e-2, atol=2e-2)
    assert tangent.abs().max() > 0.01
    assert_close(jvp(compiled(f, "aot_eager"), x), tangent, rtol=1e-3, atol=1e-3)
    derive = torch.func.jacrev(f) if name in ("route", "mlp") else torch.func.grad(total(f))
    actual = compiled(derive, "aot_eager")(x)
    assert_close(
        actual.sum(tuple(range(actual.dim() - x.dim()))) if actual.dim() > x.dim() else actual, expected, rtol=1e-3, atol=1e-3
    )


def layers() -> dict[str, nn.Module]:
    config = MoEConfig(hidden_size=32, intermediate_size=32, num_experts=E, top_k=K)
    with_int8 = MoE(config)
    with_int8.register_module("experts", QuantizedExperts.from_experts(with_int8.experts, "int8"))
    return {
        "MoE": MoE(config),
        "with int8": with_int8,
        "FusedOneMoE": FusedOneMoE(32, 32, groups=E, is_sparse=True, topk=K),
        "FineGrainedMoE": FineGrainedMoE(32, 16, K, input_norm=None),
    }


@pytest.mark.parametrize("name", ["MoE", "with int8", "FusedOneMoE", "FineGrainedMoE"])
def test_layers_refuse_tangents_of_inputs_and_of_parameters(name):
    layer = layers()[name].eval()
    x = draw(T, 32)
    parameters = {key: parameter.detach() for key, parameter in layer.named_parameters()}
    last = next(reversed(parameters))

    def of_a_parameter(value: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {**parameters, last: value}, (x,))

    for f, at in ((layer, x), (of_a_parameter, parameters[last])):
        for derive in (jvp, gradient):
            with pytest.raises(RuntimeError, match=BY_NAME):
                compiled(lambda at, derive=derive, f=f: derive(f, at))(at)


def test_an_applied_model_refuses_compiled():
    transformers = pytest.importorskip("transformers")
    from fusedonemoe.integrations import transformers as integration

    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, vocab_size=16,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    integration.apply(model)
    block = model.model.layers[0].mlp

    def output(x: Tensor) -> Tensor:
        y = block(x)
        return y[0] if isinstance(y, tuple) else y

    with pytest.raises(RuntimeError, match=BY_NAME):
        compiled(lambda x: jvp(output, x))(draw(1, 4, 16))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_second_derivative_is_refused_compiled(backend):
    layer = MoE(MoEConfig(hidden_size=D, intermediate_size=INNER, num_experts=E, top_k=K))
    x = draw(T, D).requires_grad_()
    (grad,) = torch.autograd.grad(compiled(layer, backend)(x).square().sum(), x, create_graph=True)
    # Of a graph with a backward of its own torch itself refuses the second.
    with pytest.raises(RuntimeError, match=BY_NAME if backend == "eager" else "does not currently support double backward"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=BY_NAME):
        torch.autograd.functional.jvp(layer, x.detach(), torch.ones_like(x))


def test_operators_refuse_when_nothing_was_asked_before():
    # The layers' own check is not what this rests on: an operator that is called by name refuses as well.
    x, act = draw(T, D), ("silu", "gate_up", 1.702, 7.0)
    arguments = (EXPERTS, WEIGHTS, UP, DOWN, None, None, *act, 100, library.BUILD)
    for impl in ("grouped", *([] if NO_KERNELS else ["cpu"])):
        for call in (torch.ops.fusedonemoe.experts_mlp, library.experts_mlp):
            for derive in (jvp, dual, gradient):
                with pytest.raises(RuntimeError, match=BY_NAME):
                    derive(lambda x, call=call, impl=impl: call(x, *arguments, impl)[0], x)
    offsets = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=BY_NAME):
        dual(lambda x: torch.ops.fusedonemoe.grouped_mm(x, PROJ, offsets), x)
