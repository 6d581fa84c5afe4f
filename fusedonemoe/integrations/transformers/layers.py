"""Finding a model's mixture-of-experts layers: those that ask transformers' registry, and those that do not."""

from typing import NamedTuple

from torch import nn

from fusedonemoe.integrations.transformers.registry import interface_of
from fusedonemoe.integrations.transformers.wrapping import is_around

_NO_REGISTRY = "its experts do not ask transformers' registry of experts functions"


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
    asking = {name: _outermost(name, modules) for name, module in modules.items() if interface_of(module) is not None}
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
