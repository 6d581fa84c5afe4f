"""Undoing apply: what others put on a model stays, what this library put there goes, and it knows its own again."""

import copy
import functools
import io
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

accelerate: Any = pytest.importorskip("accelerate")
peft: Any = pytest.importorskip("peft")

from fusedonemoe.integrations import peft as adapters  # noqa: E402
from fusedonemoe.integrations.transformers import apply, disable, enable, routers, unapply  # noqa: E402
from tests.integrations.transformers_families import build  # noqa: E402

IDS = torch.arange(18).view(2, 9) + 3
HELD: dict[Any, Any] = {}
ALL = "2 of 2 MoE layers use fusedonemoe."
FUSED = "  2 x Qwen3MoeExperts: silu, fused; router: softmax, top 3, fused"


@pytest.fixture(autouse=True)
def left_as_found(monkeypatch):
    monkeypatch.setattr(routers, "FEWEST_LOGITS", 0)  # route here at every size
    yield
    disable()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.fixture
def routed(monkeypatch) -> list[int]:
    """One entry for every call that this library routes."""
    calls, real = [], routers._outputs

    def outputs(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(routers, "_outputs", outputs)
    return calls


def routes_here(model: Any, calls: list[int]) -> bool:
    calls.clear()
    logits(model)
    assert len(calls) in (0, 2)
    return bool(calls)


def gates(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers]


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The instance attributes of every module and of its configuration, which compare by identity or value."""
    found = {name: dict(vars(module)) for name, module in model.named_modules()}
    for own in found.values():
        for name in ("_parameters", "_buffers", "_modules"):
            own[name] = {key: id(value) for key, value in own[name].items()}
    found["config"] = dict(vars(model.config))
    return found


class Counter(accelerate.hooks.ModelHook):  # type: ignore[misc]
    """A hook of accelerate's that counts and changes nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


class Calling:
    """A wrapper that is an object."""

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        self.wrapped, self.calls = wrapped, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.wrapped(*args)


def by_accelerate(gate: nn.Module) -> Callable[[], int]:
    hook = Counter()
    accelerate.hooks.add_hook_to_module(gate, hook)
    return lambda: hook.calls


def by_accelerate_twice(gate: nn.Module) -> Callable[[], int]:
    first, second = Counter(), Counter()
    accelerate.hooks.add_hook_to_module(gate, first)
    accelerate.hooks.add_hook_to_module(gate, second, append=True)
    return lambda: min(first.calls, second.calls)


def by_alignment(gate: nn.Module) -> Callable[[], int]:
    accelerate.hooks.add_hook_to_module(gate, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    return by_closure(gate)


def by_closure(gate: Any) -> Callable[[], int]:
    before, calls = gate.forward, []

    def forward(*args: Any) -> Any:
        calls.append(1)
        return before(*args)

    gate.forward = forward
    return lambda: len(calls)


def by_method(gate: Any) -> Callable[[], int]:
    before, calls = gate.forward, []

    def forward(self: nn.Module, *args: Any) -> Any:
        calls.append(self)
        return before(*args)

    gate.forward = types.MethodType(forward, gate)
    return lambda: len(calls)


def by_partial(gate: Any) -> Callable[[], int]:
    calls: list[int] = []

    def call(wrapped: Callable[..., Any], *args: Any) -> Any:
        calls.append(1)
        return wrapped(*args)

    gate.forward = functools.partial(call, gate.forward)
    return lambda: len(calls)


def by_object(gate: Any) -> Callable[[], int]:
    gate.forward = Calling(gate.forward)
    return lambda: gate.forward.calls


class Slotted:
    __slots__ = ("calls", "wrapped")

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        self.wrapped, self.calls = wrapped, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.wrapped(*args)


def by_object_with_slots(gate: Any) -> Callable[[], int]:
    gate.forward = Slotted(gate.forward)
    return lambda: gate.forward.calls


def by_torch_compile(gate: Any) -> Callable[[], int]:
    count = by_closure(gate)
    gate.forward = torch.compile(gate.forward, backend="eager")
    return count


def by_compile_in_place(gate: Any) -> Callable[[], int]:
    count = by_hooks(gate)
    gate.compile(backend="eager")
    return count


def by_hooks(gate: nn.Module) -> Callable[[], int]:
    calls: list[int] = []
    gate.register_forward_hook(lambda *_: calls.append(1))
    gate.register_forward_pre_hook(lambda *_: None)
    return lambda: len(calls)


WRAPPERS = (
    by_accelerate,
    by_accelerate_twice,
    by_alignment,
    by_closure,
    by_method,
    by_partial,
    by_object,
    by_object_with_slots,
    by_torch_compile,
    by_compile_in_place,
    by_hooks,
)
BY_ACCELERATE = (by_accelerate, by_accelerate_twice, by_alignment)


def test_a_wrapper_that_cannot_be_looked_into_is_not_said_to_be_the_routers_own(monkeypatch):
    model: Any = build("qwen3_moe")
    apply(model)
    for index, gate in enumerate(gates(model)):
        monkeypatch.setitem(HELD, index, gate.forward)
        gate.forward = lambda *args, index=index: HELD[index](*args)
    assert "router: its own: its forward was replaced after this library fused it" in str(apply(model))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_later_wrapper_stays_and_works(wrap, routed):
    model: Any = build("qwen3_moe")
    expected = logits(model)
    apply(model)
    counts = [wrap(gate) for gate in gates(model)]
    wrapped = [vars(gate).get("forward") for gate in gates(model)]
    for again in range(2):
        assert routes_here(model, routed)
        torch.testing.assert_close(logits(model), expected)
        assert str(apply(model)).splitlines() == [ALL, FUSED], again  # its own, beneath the wrapper
        unapply(model)
        before = [count() for count in counts]
        assert not routes_here(model, routed)
        assert torch.equal(logits(model), expected)
        assert all(count() > earlier for count, earlier in zip(counts, before, strict=True))
        if wrap not in (by_compile_in_place, by_hooks):  # those wrap the call, and the forward is ours alone
            assert all(vars(gate)["forward"] is theirs for gate, theirs in zip(gates(model), wrapped, strict=True))
        assert not any(name.startswith("_fusedonemoe") for module in model.modules() for name in vars(module))
        unapply(model)
        # In a closure ours is there still, and does nothing; accelerate holds the class's forward now.
        report = apply(model)
        assert all(layer.router_fused or "its forward was replaced already" in layer.router for layer in report.layers)
        assert report.routers_fused == (0 if wrap in BY_ACCELERATE else 2)
        assert routes_here(model, routed) == bool(report.routers_fused)
        if not report.routers_fused:
            return


@pytest.mark.parametrize("wrap", [by_accelerate, by_accelerate_twice, by_closure, by_method, by_partial, by_object])
def test_an_earlier_wrapper_is_reported_and_stays(wrap, routed):
    model: Any = build("qwen3_moe")
    counts = [wrap(gate) for gate in gates(model)]
    expected, before = logits(model), attributes(model)
    report = apply(model)
    assert (report.used, report.routers_fused) == (2, 0)
    assert all(layer.router == "its own: its forward was replaced already" for layer in report.layers)
    assert not routes_here(model, routed) and all(count() for count in counts)
    unapply(model)
    assert torch.equal(logits(model), expected)
    assert attributes(model) == before


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch", "disk_offload"])
def test_a_model_that_accelerate_moves_computes_what_it_did(how, tmp_path):
    def move(model: nn.Module) -> None:
        if how == "cpu_offload":
            accelerate.cpu_offload(model, torch.device("cpu"))
        elif how == "disk_offload":
            accelerate.disk_offload(model, tmp_path / str(id(model)), torch.device("cpu"))
        else:
            accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)

    model: Any = build("qwen3_moe")
    expected, keys = logits(model), list(model.state_dict())
    report = apply(model)
    move(model)
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected)
    assert str(apply(model)) == str(report)  # though the routers' weights are on the meta device by now
    torch.testing.assert_close(logits(model), expected)
    unapply(model)
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == keys
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert all(gate.forward.__func__ is type(gate).forward for gate in gates(model))


def test_nothing_is_left(routed):
    model: Any = build("qwen3_moe")
    expected, before, keys = logits(model), attributes(model), list(model.state_dict())
    for _ in range(3):
        assert str(apply(model)).splitlines() == [ALL, FUSED]
        apply(model)
        assert routes_here(model, routed) and list(model.state_dict()) == keys
        unapply(model)
        unapply(model)
        assert attributes(model) == before and list(model.state_dict()) == keys
        assert torch.equal(logits(model), expected)


def test_a_model_that_was_never_applied_stays_as_it_is():
    enable()
    chosen: Any = build("qwen3_moe")
    chosen.set_experts_implementation("fusedonemoe")  # by somebody else
    for gate in gates(chosen):
        by_closure(gate)
    before = attributes(chosen)
    unapply(chosen)
    assert attributes(chosen) == before
    apply(chosen)
    unapply(chosen)
    assert attributes(chosen) == before
    unapply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        unapply(None)


def test_an_implementation_that_was_set_since_stays():
    model: Any = build("qwen3_moe")
    apply(model)
    model.set_experts_implementation("batched_mm")
    unapply(model)
    assert model.get_experts_implementation() == {"": "batched_mm"}


def test_a_part_and_then_the_whole(routed):
    model: Any = build("qwen3_moe")
    expected, before = logits(model), attributes(model)
    assert apply(model.model.layers[0]).routers_fused == 1
    assert str(apply(model)).splitlines() == [ALL, FUSED]
    assert routes_here(model, routed)
    unapply(model)
    assert attributes(model) == before and torch.equal(logits(model), expected)
    apply(model)
    assert apply(model.model.layers[1]).routers_fused == 1
    unapply(model.model.layers[1])
    assert "forward" not in vars(gates(model)[1]) and "forward" in vars(gates(model)[0])
    unapply(model)
    assert attributes(model) == before


def test_without_routers_takes_them_back(routed):
    model: Any = build("qwen3_moe")
    apply(model)
    report = apply(model, routers=False)
    assert (report.used, report.routers_fused) == (2, 0) and not routes_here(model, routed)
    assert not any("forward" in vars(module) for module in model.modules())


def copied(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copied, loaded])
def test_a_copy_is_known_again(again, routed):
    model: Any = build("qwen3_moe")
    expected, before = logits(model), attributes(model)
    apply(model)
    twin = again(model)
    torch.testing.assert_close(logits(twin), expected)
    assert str(apply(twin)).splitlines() == [ALL, FUSED]
    assert routes_here(twin, routed)
    unapply(twin)
    assert not routes_here(twin, routed) and torch.equal(logits(twin), expected)
    assert attributes(twin).keys() == before.keys()
    assert all(own.keys() == before[name].keys() for name, own in attributes(twin).items())
    assert routes_here(model, routed)  # the first is still applied
    other = again(model)
    unapply(other)  # without a call of apply between
    assert torch.equal(logits(other), expected) and not any("forward" in vars(m) for m in other.modules())
    assert other.get_experts_implementation() == build("qwen3_moe").get_experts_implementation()


@pytest.mark.parametrize("change", ["top_k", "norm_topk_prob"])
def test_a_router_that_is_changed_afterwards_is_followed(change, routed):
    model: Any = build("qwen3_moe")
    twin = copy.deepcopy(model)
    apply(model)
    value = 2 if change == "top_k" else not gates(model)[0].norm_topk_prob
    for gate in (*gates(model), *gates(twin)):
        setattr(gate, change, value)
    expected = logits(twin)
    torch.testing.assert_close(logits(model), expected)
    assert not torch.allclose(expected, logits(build("qwen3_moe")), atol=1e-4)
    report = apply(model)
    assert report.routers_fused == 2 and routes_here(model, routed)
    if change == "top_k":
        assert report.layers[0].router == "softmax, top 2, fused"
    torch.testing.assert_close(logits(model), expected)
    unapply(model)
    assert torch.equal(logits(model), expected)


def test_a_change_is_followed_in_a_compiled_model():
    model: Any = build("qwen3_moe")
    apply(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))
    for gate in gates(model):
        gate.top_k = 2
    torch.testing.assert_close(logits(compiled), logits(model))
    unapply(compiled)
    assert torch.equal(logits(model), logits(compiled))


def test_a_configuration_that_a_router_reads_at_each_call_is_followed(routed):
    model: Any = build("qwen3_moe")
    for gate in gates(model):

        class Reading(type(gate)):  # type: ignore[misc]
            def forward(self, hidden_states: Tensor) -> Any:
                self.top_k = self.config.num_experts_per_tok
                return super().forward(hidden_states)

        gate.__class__, gate.config = Reading, model.config
    assert apply(model).routers_fused == 2 and routes_here(model, routed)
    model.config.num_experts_per_tok = 1
    assert not routes_here(model, routed)
    assert apply(model).layers[0].router == "softmax, top 1, fused"


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_up_proj", "down_proj"]], ids=["one", "both"])
def test_under_peft_there_are_as_many_layers_as_before(targets, order, routed):
    model: Any = build("qwen3_moe")
    if order == "before":
        apply(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{name}" for name in targets])
    wrapped = peft.get_peft_model(model, config)
    expected = logits(wrapped)
    assert str(apply(wrapped)).splitlines() == [ALL, FUSED]
    assert routes_here(wrapped, routed)
    torch.testing.assert_close(logits(wrapped), expected)
    adapters.from_peft(wrapped)
    assert str(apply(wrapped)).splitlines() == [ALL, FUSED]
    unapply(wrapped)
    assert not routes_here(wrapped, routed)
    assert not any(name.startswith("_fusedonemoe") for module in wrapped.modules() for name in vars(module))


def test_under_adapters_of_this_library_there_are_as_many_layers_as_before(routed):
    model: Any = build("qwen3_moe")
    adapters.add_lora(model, r=2)
    assert str(apply(model)).splitlines() == [ALL, FUSED] and routes_here(model, routed)


def test_a_router_that_peft_adapts_is_found_inside_its_wrapper(routed):
    model: Any = build("qwen3_moe")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = logits(wrapped)
    assert apply(wrapped).routers_fused == 2 and routes_here(wrapped, routed)
    torch.testing.assert_close(logits(wrapped), expected)
    unapply(wrapped)
    assert torch.equal(logits(wrapped), expected)


def test_a_cast_selection_bias_is_read_as_the_models_own_forward_reads_it():
    model: Any = build("deepseek_v3").bfloat16()
    gate: Any = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.4, 8))
    assert gate.e_score_correction_bias.dtype == torch.bfloat16  # it is transformers' own buffer
    x = torch.randn(50, gate.weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    own = gate(x)
    apply(model)
    ours = gate(x)
    order = [outputs[2].sort().values for outputs in (own, ours)]
    assert torch.equal(*order)
