"""Calls of an operator that leave the dispatcher out where nothing could notice.

For one token of a small layer the kernel takes 2 us, and the dispatcher and torch.library's Python around it take 30, or 70
where gradients are recorded. A mode, a transform, a trace or the profiler must see the operator, and so must a tensor that
is more than plain memory; who is none of these gets the operator's body, with the same autograd formula: the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from fusedonemoe.ops.derivatives import in_forward_mode


def _bits(*keys: DispatchKey) -> int:
    union = DispatchKeySet(keys[0])
    for key in keys[1:]:
        union = union | DispatchKeySet(key)
    return union.raw_repr()


# The dispatch keys of a strided CPU tensor, made in inference mode or not. A subclass with __torch_dispatch__, a tensor with
# the negative bit, a wrapper of a transform, another layout and another device all have others.
_PLAIN = {
    _bits(DispatchKey.CPU, DispatchKey.AutocastCPU),
    _bits(DispatchKey.CPU, DispatchKey.AutocastCPU, DispatchKey.ADInplaceOrView, DispatchKey.AutogradCPU),
}
# The keys that a thread adds to every call when it is in no dispatch mode, transform or trace; in inference mode or not.
_RESTING = {_bits(DispatchKey.BackendSelect), _bits(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)}


def unwatched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an operator that is called with these tensors would go straight to its CPU body, seen by nobody.

    Args:
        tensors: all that the operator would get.

    Returns:
        False under torch.compile, export and ``torch.jit.trace``, in a dispatch or a function mode, in a transform of
        ``torch.func``, in a level of forward mode, under CPU autocast and under the profiler, and for tensors of a subclass,
        of another device or layout; otherwise True.
    """
    return not (
        torch.compiler.is_compiling()
        or in_forward_mode()
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _RESTING
        or torch._C._has_torch_function(tensors)
        or torch.is_autocast_enabled("cpu")
        or torch._C._autograd._profiler_enabled()
    ) and all(tensor is None or torch._C._dispatch_keys(tensor).raw_repr() in _PLAIN for tensor in tensors)


def recorder(name: str, body: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]) -> Any:
    """A function that records gradients as ``register_autograd`` with the same formula would.

    Args:
        name: of an operator ``fusedonemoe::name``; its name for autograd is the function's too, for whoever prints grad_fn.
        body: what the operator runs on CPU.
        backward: as for ``register_autograd``.
        setup_context: likewise.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = body(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"GeneratedBackwardFor_fusedonemoe_{name}_default", (torch.autograd.Function,), methods)
    return function.apply


def shortcut(
    name: str,
    body: Callable[..., Any],
    tensors: int,
    record: Callable[..., Any] | None = None,
    *,
    impl: str | None = None,
) -> Callable[..., Any]:
    """A function to call in place of an operator, with the operator's positional arguments.

    Args:
        name: of an operator ``fusedonemoe::name``.
        body: what the operator runs on CPU; of the results it may leave out the last ones, which autograd alone reads.
        tensors: how many arguments, from the first, are tensors or None.
        record: what to call where gradients are recorded; the operator, if None.
        impl: the last argument of the calls that ``body`` and ``record`` are for; None for all calls.
    """
    operator = getattr(torch.ops.fusedonemoe, name)
    recording = record or operator

    def call(*args: Any) -> Any:
        if impl not in (None, args[-1]) or not unwatched(args[:tensors]):
            return operator(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return recording(*args)
        return body(*args)

    return call
