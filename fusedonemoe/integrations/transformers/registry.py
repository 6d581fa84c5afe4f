"""transformers' registry of experts functions: where the name "fusedonemoe" is entered, and taken out again."""

import importlib
import inspect
import sys
from typing import Any

from torch import nn

NAME = "fusedonemoe"
_MOE = "transformers.integrations.moe"


def import_hf(module: str) -> Any:
    """Import a module of transformers, in versions that have the registry."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "fusedonemoe.integrations.transformers needs transformers 5 or newer, which has the registry of experts functions: "
            "pip install 'fusedonemoe[hf]'"
        ) from error


def _copies() -> list[Any]:
    """Every copy of transformers' module of experts functions that is loaded."""
    # transformers imports lazily and under more than one path, which can leave two; a model asks the copy of its decorator.
    import_hf(_MOE)
    found = [module for name, module in list(sys.modules.items()) if name.endswith("integrations.moe")]
    return [module for module in found if hasattr(module, "ExpertsInterface")]


def default_gates() -> list[Any]:
    """The functions that ``use_experts_implementation`` gives a class without a gate of its own."""
    return [module._default_apply_gate for module in _copies() if hasattr(module, "_default_apply_gate")]


def interfaces() -> list[Any]:
    """The classes of all registries to enter ourselves in, each once."""
    found = [type(import_hf("transformers.modeling_utils").ALL_EXPERTS_FUNCTIONS)]
    for module in _copies():
        found += [module.ExpertsInterface, type(module.ALL_EXPERTS_FUNCTIONS)]
        # The registry that this copy's decorator binds to its classes; it had no such argument at first.
        if bound := inspect.signature(module.use_experts_implementation).parameters.get("experts_interface"):
            found.append(type(bound.default))
    return list(dict.fromkeys(found))


def interface_of(module: nn.Module) -> Any:
    """The registry that a module's forward asks; None for a module that asks none."""
    for owner in type(module).__mro__:
        forward: Any = owner.__dict__.get("forward")
        code = getattr(forward, "__code__", None)
        if code is not None and "experts_interface" in code.co_freevars:
            return forward.__closure__[code.co_freevars.index("experts_interface")].cell_contents
    return None


def is_ours(module: nn.Module) -> bool:
    """Return whether this library is entered in the registry that a module asks."""
    return isinstance(interface_of(module), tuple(interfaces()))
