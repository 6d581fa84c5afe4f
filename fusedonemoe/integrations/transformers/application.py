"""enable, apply and their undoing: the layers that are found in a model, what changes in them, and the report."""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedonemoe.integrations.transformers import registry
from fusedonemoe.integrations.transformers.experts import activation_of, experts_forward
from fusedonemoe.integrations.transformers.routers import RouterPlan, find_router, fuse_router, is_fused, unfuse_router
from fusedonemoe.integrations.transformers.wrapping import is_around
from fusedonemoe.ops.records import PLAIN

_applied: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
# On a module of experts, the implementation that its configuration named before. What apply did is kept on the modules, so that
# copies, pickles and parts of a model, and what wraps it, know it too.
_BEFORE = "_fusedonemoe_before"
_NO_REGISTRY = "its experts do not ask transformers' registry of experts functions"


@dataclass(frozen=True)
class LayerReport:
    """One mixture-of-experts layer.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        kind: its class.
        uses: whether its experts are computed by this library.
        experts: how they are: which activation is fused, or what runs unfused; why not, where ``uses`` is False.
        router: how its router runs: which rule is fused, or why its own forward still runs.
        router_fused: whether this library routes.
    """

    name: str
    kind: str
    uses: bool
    experts: str
    router: str = ""
    router_fused: bool = False


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`apply`, one entry for each mixture-of-experts layer; ``print`` it.

    Attributes:
        layers: in the order of the model.

    Example:
        >>> from fusedonemoe.integrations.transformers import LayerReport, Report
        >>> fused = LayerReport("layers.0.mlp.experts", "Experts", True, "silu, fused", "softmax, top 2, fused", True)
        >>> other = LayerReport("layers.1.mlp.experts", "Others", False, "it does not ask the registry")
        >>> print(Report((fused, other)))
        1 of 2 MoE layers use fusedonemoe.
          1 x Experts: silu, fused; router: softmax, top 2, fused
        Not used by:
          layers.1.mlp.experts (Others): it does not ask the registry
    """

    layers: tuple[LayerReport, ...]

    @property
    def total(self) -> int:
        """``M``: how many mixture-of-experts layers the model has."""
        return len(self.layers)

    @property
    def used(self) -> int:
        """``N``: how many of them this library computes."""
        return sum(layer.uses for layer in self.layers)

    @property
    def routers_fused(self) -> int:
        """In how many of them it routes too."""
        return sum(layer.router_fused for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "0 MoE layers found: there is nothing to replace in this model."
        lines = [f"{self.used} of {self.total} MoE layers use fusedonemoe."]
        alike = Counter(f"{layer.kind}: {layer.experts}; router: {layer.router}" for layer in self.layers if layer.uses)
        lines += [f"  {count} x {text}" for text, count in alike.items()]
        if others := [layer for layer in self.layers if not layer.uses]:
            lines += ["Not used by:", *(f"  {layer.name} ({layer.kind}): {layer.experts}" for layer in others)]
        return "\n".join(lines)


class FoundLayer(NamedTuple):
    """A mixture-of-experts layer of a model."""

    name: str
    module: nn.Module  # the experts where they ask the registry; otherwise whatever shows that there are experts
    parent: nn.Module | None  # the module that it stands in, without wrappers of the experts; None for the model itself
    refusal: str  # why it cannot be replaced; empty where it asks the registry


def _parent_name(name: str) -> str:
    return name.rpartition(".")[0]


def _outermost(name: str, modules: dict[str, nn.Module]) -> str:
    """The name of the last wrapper around a module: PEFT puts one around experts for each parameter that it adapts."""
    while is_around(modules.get(_parent_name(name)), name.rpartition(".")[2]) and _parent_name(name):
        name = _parent_name(name)
    return name


def _stands_for_experts(name: str, module: nn.Module) -> bool:
    """Return whether a module that asks no registry looks like experts: by its name, its class or a count of experts."""
    # These classes share no interface, so looks have to do. They decide what the report names and nothing else.
    if hasattr(module, "config") and hasattr(module, "get_input_embeddings"):
        return False  # a model, which keeps the number of experts too, for its losses
    if isinstance(module, nn.ModuleList | nn.ModuleDict) and name.rpartition(".")[2] == "experts":
        return True
    count = getattr(module, "num_experts", None)
    return "Experts" in type(module).__name__ or (isinstance(count, int) and count > 1)


def find_layers(model: nn.Module) -> list[FoundLayer]:
    """Every mixture-of-experts layer, in the order of the model."""
    modules = dict(model.named_modules())
    order = {name: position for position, name in enumerate(modules)}
    asking = {name: _outermost(name, modules) for name, module in modules.items() if registry.interface_of(module) is not None}
    found = [FoundLayer(n, modules[n], modules.get(_parent_name(outer)) if outer else None, "") for n, outer in asking.items()]
    # A block that has experts which ask is theirs with all that stands in it: the router, shared experts.
    taken = {_parent_name(outer) for outer in asking.values()} | set(asking.values())
    others: list[str] = []
    for name, module in modules.items():
        inside = any(name == t or name.startswith(f"{t}.") for t in [*taken, *others] if t)
        around = any(not name or t.startswith(f"{name}.") for t in asking)
        if not inside and not around and _stands_for_experts(name, module):
            others.append(name)
    # Several in one parent are the projections, or the router and the experts, of one layer; in a list they are layers.
    parents = [_parent_name(name) for name in others]
    blocks = {p for p in parents if parents.count(p) > 1 and not isinstance(modules[p], nn.ModuleList | nn.ModuleDict)}
    merged = dict.fromkeys(parent if parent in blocks else name for name, parent in zip(others, parents, strict=True))
    found += [FoundLayer(name, modules[name], modules.get(_parent_name(name)), _NO_REGISTRY) for name in merged]
    return sorted(found, key=lambda layer: order[layer.name])


def enable() -> None:
    """Register ``"fusedonemoe"`` with transformers, next to its ``"eager"``, ``"grouped_mm"`` and ``"batched_mm"``.

    Afterwards ``from_pretrained(..., experts_implementation="fusedonemoe")`` and
    ``model.set_experts_implementation("fusedonemoe")`` work. transformers does not save the choice with a model.

    Raises:
        ImportError: transformers 5 or newer is not installed.
    """
    for interface in registry.interfaces():
        interface.register(registry.NAME, experts_forward)


def disable() -> None:
    """Take the name out again, after :func:`unapply` of every model that :func:`apply` was given.

    A copy of such a model, and one that was loaded with ``experts_implementation="fusedonemoe"``, raise transformers' own
    error from then on, until they are set to another.
    """
    for model in list(_applied):
        unapply(model)
    for interface in registry.interfaces():
        interface._global_mapping.pop(registry.NAME, None)


def apply(model: nn.Module, *, routers: bool = True) -> Report:
    """Let this library compute the mixture-of-experts layers of a loaded model.

    Experts are reached through transformers' registry, so parameters, checkpoints, adapters and parallel plans stay as they
    are. With ``routers``, a router is replaced where its own forward, called with random weights and inputs in float32, gives
    what one of this library's rules gives. The report says what was replaced, layer by layer, and why not the rest.

    Raises:
        ImportError: transformers 5 or newer is not installed.
        TypeError: ``model`` is no ``torch.nn.Module``.

    Example:
        >>> from transformers import AutoModelForCausalLM, Qwen3MoeConfig
        >>> from fusedonemoe.integrations.transformers import apply
        >>> sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_hidden_layers": 2, "vocab_size": 64}
        >>> model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, num_experts_per_tok=2))
        >>> print(apply(model))
        2 of 2 MoE layers use fusedonemoe.
          2 x Qwen3MoeExperts: silu, fused; router: softmax, top 2, fused
    """
    _check_model(model)
    enable()
    _restore_implementations(model)
    fused_before = {module for module in model.modules() if is_fused(module)}
    _applied.add(model)
    previous: dict[int, Any] = {}
    fused: list[nn.Module] = []
    report = Report(tuple(_apply_to(layer, previous, fused, routers) for layer in find_layers(model)))
    for router in fused_before.difference(fused):
        unfuse_router(router)
    return report


def unapply(model: nn.Module) -> None:
    """Undo :func:`apply` in a model, or in a part of one: the implementations from before, and the routers' own forwards.

    The model may be a copy of what :func:`apply` was given, a part of it, or what wraps it now; any other stays as it is. What
    others have put around a router since works as before. The layers of a model share one configuration, so their experts go
    back together.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    _check_model(model)
    _restore_implementations(model)
    for module in model.modules():
        unfuse_router(module)
    _applied.discard(model)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _apply_to(layer: FoundLayer, previous: dict[int, Any], fused: list[nn.Module], routers: bool) -> LayerReport:
    experts, kind = layer.module, type(layer.module).__name__
    if refusal := layer.refusal or _refusal(experts):
        return LayerReport(layer.name, kind, False, refusal)
    _set_implementation(experts, previous)
    description = _describe_experts(experts)
    if not routers:
        return LayerReport(layer.name, kind, True, description, "its own, as asked")
    router, why = find_router(layer.parent, experts)
    if isinstance(why, RouterPlan):
        assert router is not None
        fuse_router(router, why)
        fused.append(router)
        return LayerReport(layer.name, kind, True, description, f"{why}, fused", True)
    return LayerReport(layer.name, kind, True, description, f"its own: {why}")


def _refusal(experts: nn.Module) -> str:
    if not registry.is_ours(experts):
        return "its experts ask a registry of their own (quantised weights)"
    names = ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")
    for name in names:
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"it has no stacked weight {name} [experts, rows, columns]"
        if not weight.is_floating_point():
            return f"its {name} is quantised ({weight.dtype})"
    if not hasattr(experts.config, "_experts_implementation"):
        return "its configuration has no experts implementation to set"
    return ""


def _describe_experts(experts: Any) -> str:
    if getattr(experts, "has_post_expert_norm", False):
        return "unfused, two grouped products with the experts' own gate between and their norm behind"
    act = activation_of(experts)
    if act is None:
        return "unfused, two grouped products with the experts' own gate between"
    layout = {PLAIN: ", no gate", "gate_up": ""}.get(act.layout, f" {act.layout}")
    return f"{act.name}{layout}, fused"


def _set_implementation(experts: Any, previous: dict[int, Any]) -> None:
    """Set it in this module's configuration alone: the public setter would also set parts without experts."""
    config = experts.config
    if config._experts_implementation != registry.NAME:
        previous[id(config)] = config._experts_implementation
        config._experts_implementation_internal = registry.NAME
    if id(config) in previous:  # otherwise somebody else chose this library
        setattr(experts, _BEFORE, previous[id(config)])


def _restore_implementations(model: nn.Module) -> None:
    """Give each configuration the implementation that it named, unless it was set to another since."""
    for module in model.modules():
        if _BEFORE in vars(module):
            before, config = vars(module).pop(_BEFORE), vars(module)["config"]
            if config._experts_implementation == registry.NAME:
                config._experts_implementation_internal = before
