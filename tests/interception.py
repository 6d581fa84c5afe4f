"""Another kernel in the place of a compiled one, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import fusedonemoe.ops  # noqa: F401  defines the operators


@contextmanager
def intercepted(name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let an operator run ``change(kernel)`` in place of its kernel, in compiled graphs too."""
    operator = getattr(torch.ops.fusedonemoe, name).default
    key = torch._C.DispatchKey.BackendSelect  # each call passes this key on its way to the kernel

    def body(keys: Any, *arguments: Any) -> Any:
        return change(lambda *given: operator.redispatch(keys.remove(key), *given))(*arguments)

    lib = torch.library.Library("fusedonemoe", "IMPL")
    lib.impl(name, body, "BackendSelect", with_keyset=True)
    try:
        yield
    finally:
        lib._destroy()
