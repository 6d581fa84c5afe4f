"""Wrappers around modules and around their forwards, which others put there before this library or after it."""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fusedonemoe.layers.lora import LoRAExperts

# The names under which wrappers keep the one module that they are around: PEFT's layers, ours, torch.compile, FSDP, activation
# checkpointing, and DataParallel of either kind.
_INNER = ("base_layer", "base", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_MOST = 10_000  # values that a search looks at


def is_around(wrapper: nn.Module | None, leaf: str) -> bool:
    """Return whether a module is a wrapper of its child of this name."""
    return wrapper is not None and leaf in _INNER and (leaf != "base" or isinstance(wrapper, LoRAExperts))


def inside(module: nn.Module) -> nn.Module:
    """The module itself, without the wrappers around it."""
    while inner := next((child for leaf, child in module.named_children() if is_around(module, leaf)), None):
        module = inner
    return module


def _parts(value: Any) -> Iterator[Any]:
    """Return what a callable holds that it may call in turn."""
    if isinstance(value, types.MethodType):
        yield value.__func__
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield value.func
        yield from value.args
        yield from value.keywords.values()
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a cell that nothing has filled yet
                continue
        yield from value.__defaults__ or ()
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    if callable(value):
        # __wrapped__ says what a wrapper was made of, and is not what it calls.
        yield from (held for name, held in getattr(value, "__dict__", {}).items() if name != "__wrapped__")
        for kind in type(value).__mro__:
            if "__slots__" in vars(kind):
                members = (member for member in vars(kind).values() if isinstance(member, types.MemberDescriptorType))
                yield from (getattr(value, member.__name__, None) for member in members)


def is_bound(value: Any, function: Callable[..., Any], module: nn.Module) -> bool:
    """Return whether a value is this function, bound to this module."""
    return isinstance(value, types.MethodType) and value.__func__ is function and value.__self__ is module


def reaches(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Return whether the forward of a module's instance is this function bound to it, or a wrapper that may call it."""
    # Accelerate keeps what it wrapped as an attribute of the module; others keep it in a closure, a partial or an object.
    own = vars(module)
    if "forward" not in own:
        return False
    waiting = [own["forward"], own.get("_old_forward")]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if is_bound(value, function, module):
            return True
        if id(value) in seen or isinstance(value, nn.Module | Tensor | type | types.ModuleType):
            continue
        seen.add(id(value))
        waiting.extend(_parts(value))
    return False


def remove(module: nn.Module, function: Callable[..., Any]) -> None:
    """Take a function that is bound to a module out of its attributes, and leave every other wrapper where it is."""
    # Where a later wrapper kept it as an attribute, the class's own forward takes its place. In a closure it stays, and has to
    # do nothing there by itself.
    own = vars(module)
    if is_bound(own.get("forward"), function, module):
        del own["forward"]
    plain = types.MethodType(type(module).forward, module)
    for name, value in list(own.items()):
        if is_bound(value, function, module):
            own[name] = plain
    held = getattr(own.get("forward"), "__dict__", {})
    if is_bound(held.get("__wrapped__"), function, module):
        held["__wrapped__"] = plain
