"""Operators refuse meta tensors among tensors with memory, which torch would take for a question about shapes alone."""

import itertools
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fusedonemoe import MoE
from fusedonemoe import functional as F
from fusedonemoe.functional.calls import traced_build
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.library import BUILD

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
T, D, K, E, INNER = 4, 32, 2, 4, 32
EXPERTS = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2]])
ALL = sorted(name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedonemoe::"))


def draw(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(requires_grad)


def operator(name: str) -> Any:
    return getattr(torch.ops.fusedonemoe, name).default


class Recorder(TorchDispatchMode):
    """Keeps the arguments of the last call of each operator of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedonemoe":
            self.calls[func._opname] = args
        return func(*args, **(kwargs or {}))


def call_the_public_functions(impl: str) -> None:
    experts, weights = EXPERTS, draw(T, K)
    up, down, table, x = draw(E, 2 * INNER, D), draw(E, D, INNER), draw(E, D), draw(T, D)
    biases = {"gate_up_bias": draw(E, 2 * INNER), "down_bias": draw(E, D)}
    adapter = {"gate_up_A": draw(E, 2, D), "gate_up_B": draw(E, 2 * INNER, 2)}
    quantised = [F.quantize_weight(w.detach(), "int4", group_size=32) for w in (up, down)]
    routing = "dense" if impl == "dense" else "auto"
    results = [
        F.route(draw(T, E), K, selection_bias=draw(E, requires_grad=False), impl=routing)[0],
        F.route_product_key(draw(T, 2, E), K, impl=routing)[0],
        F.experts_mlp(x, experts, weights, up, down, **biases, impl=impl),
        F.experts_mlp_lora(x, experts, weights, up, down, **biases, **adapter, impl="auto" if impl == "cpu" else impl),
        F.experts_mlp_quantized(x, experts, weights, *quantised, **biases, impl=impl),
        F.experts_merged(x, experts, weights, down, impl=impl),
        F.experts_neurons(x, experts, weights, table, table.detach().clone(), impl=impl),
        F.experts_values(experts, weights, table, impl=impl),
    ]
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    if impl != "cpu":
        return
    with torch.no_grad():
        F.experts_mlp(x, experts, weights, up, down, **biases, impl=impl)
        F.experts_mlp_quantized(x, experts, weights, *quantised, **biases, impl=impl)
        packed = F.pack_experts(up, down)
        F.experts_mlp(x, experts, weights, packed=packed, **biases)
        packed.unpack()


# Arguments of operators that the public functions call inside of another operator, or not in every call.
OFFSETS = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
INNER_CALLS: dict[str, tuple[Any, ...]] = {
    "grouped_mm": (torch.ones(T, D), torch.ones(E, D, INNER), OFFSETS),
    "grouped_outer": (torch.ones(T, D), torch.ones(T, INNER), OFFSETS),
    "select_experts": (torch.ones(T, E), K),
    "select_float32": (torch.ones(T, E), K),
    "select_product_keys": (torch.ones(T, 2, E), K),
    "count_tokens_": (torch.zeros(E, dtype=torch.int64), EXPERTS),
}


def block_calls() -> dict[str, tuple[Any, ...]]:
    """Return arguments of the operators of a whole block."""
    moe = MoE(hidden_size=D, intermediate_size=INNER, num_experts=E, top_k=K, bias=True, router_bias=True, selection_bias=True)
    gate, layer, config, x = moe.gate, moe.experts, moe.config, draw(T, D)
    router = gate.weight, gate.bias, gate.e_score_correction_bias
    experts = layer.gate_up_proj, layer.down_proj, layer.gate_up_proj_bias, layer.down_proj_bias
    whole = (x, *router, *config.route_rule, *experts, *config.act)
    rule, form = gate.__dict__["_form"], config.experts_form
    return {
        "moe_inference": (*whole, BUILD),
        "moe_inference_cpu": whole,
        "route_linear": (x, *router, rule, "auto", traced_build()),
        "experts_form": (x, EXPERTS, draw(T, K), *experts, *config.act, 100, False, "auto", traced_build()),
        "block_form": (x, *router, *experts, rule, form, traced_build()),
    }


@cache
def calls() -> dict[str, tuple[Any, ...]]:
    """Return arguments on the CPU for each operator of the library."""
    with Recorder() as recorder:
        for impl in ("dense", "grouped", *(() if _REFUSAL else ("cpu",))):
            call_the_public_functions(impl)
    found = {**INNER_CALLS, **(block_calls() if _REFUSAL is None else {}), **recorder.calls}
    for name, given in recorder.calls.items():
        values = dict(zip((a.name for a in operator(name)._schema.arguments), given, strict=False))
        base = name.removesuffix("_backward")
        for other in (f"{base}_cpu_backward" if base != name else f"{base}_cpu", f"{name}_dense"):
            if other in ALL:
                taken = operator(other)._schema.arguments
                found[other] = tuple(values.get(a.name, a.default_value) for a in taken)
    return found


def tensors_of(arguments: tuple[Any, ...]) -> list[int]:
    """The places of the tensors."""
    return [place for place, value in enumerate(arguments) if isinstance(value, Tensor)]


def on_meta(arguments: tuple[Any, ...], places: list[int]) -> list[Any]:
    """The arguments, without gradients, with the tensors in some places on the meta device."""
    detached = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
    return [value.to("meta") if place in places else value for place, value in enumerate(detached)]


@needs_kernels
def test_every_operator_has_arguments_here():
    assert set(calls()) == set(ALL)
    several = [name for name, arguments in calls().items() if len(tensors_of(arguments)) > 1]
    assert len(several) > len(calls()) - 8  # selections and the like take one tensor


@pytest.mark.parametrize("name", ALL)
def test_a_meta_tensor_among_others_is_refused(name):
    if name not in calls():
        pytest.skip(f"no CPU kernels: {_REFUSAL}")
    arguments = calls()[name]
    places, named = tensors_of(arguments), operator(name)._schema.arguments
    for place in places:
        for moved in ([place], [other for other in places if other != place]):
            if 0 < len(moved) < len(places):
                given = on_meta(arguments, moved)
                first, *_ = places
                other = next(i for i in places if given[i].device != given[first].device)
                devices = [given[first].device, given[other].device]
                message = "{} must be on the device of {} ({}), got {}".format(named[other].name, named[first].name, *devices)
                with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                    operator(name)(*given)


@pytest.mark.parametrize("name", ALL)
def test_tensors_that_are_all_on_the_meta_device_or_fake_are_not(name):
    if name not in calls():
        pytest.skip(f"no CPU kernels: {_REFUSAL}")
    if name == "pack_weights_":
        pytest.skip("has no form without memory")
    arguments = calls()[name]
    detached = on_meta(arguments, [])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in detached]
        results = operator(name)(*fakes)
    for result in results if isinstance(results, tuple) else (results,):
        assert result is None or result.device.type == "cpu"
    if "_cpu" in name or name in INNER_CALLS or name == "unpack_weights":
        results = operator(name)(*on_meta(arguments, tensors_of(arguments)))
        for result in results if isinstance(results, tuple) else (results,):
            assert result is None or result.is_meta


@pytest.mark.parametrize("impl", ["grouped", pytest.param("cpu", marks=needs_kernels)])
def test_a_saved_tensor_that_comes_back_on_the_meta_device_is_refused(impl):
    moe = MoE(hidden_size=D, intermediate_size=INNER, num_experts=E, top_k=K, impl=impl)
    for moved in range(8):
        numbers = itertools.count()

        def back(tensor: Tensor, moved: int = moved, numbers: Any = numbers) -> Tensor:
            return tensor.to("meta") if next(numbers) == moved else tensor

        with saved_tensors_hooks(lambda tensor: tensor, back):
            y = moe(draw(T, D)).sum()
        with pytest.raises((ValueError, RuntimeError), match=r"must be on|on the expected device"):
            y.backward()
