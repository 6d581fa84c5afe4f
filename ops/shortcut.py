"""Calls of an operator that leave the dispatcher out where nothing could notice.

For one token of a small layer the kernel takes 2 us, and the dispatcher and torch.library's Python around it take 30, or 70
where gradients are recorded. A mode, a transform, a trace, the profiler and a tensor that is more than plain memory must see
the operator. In every other call the kernel is called directly, with the operator's autograd formula: the bits are the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad


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
# The keys that a thread adds to every call when it is in no dispatch mode, transform or trace; in inference mode or not. A
# compiler or an exporter that runs Python is in a mode, except for dynamo, which is asked.
_RESTING = {_bits(DispatchKey.BackendSelect), _bits(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)}


def unwatched(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether an operator that is called with these tensors would go straight to its CPU kernel, seen by nothing.

    Args:
        tensors: all that the operator would get.

    Returns:
        False under torch.compile, export and ``torch.jit.trace``, in a dispatch or a function mode, in a transform of
        ``torch.func``, in a level of forward mode, under CPU autocast and under the profiler, and for tensors of a subclass,
        of another device or layout; otherwise True.
    """
    if (
        torch.compiler.is_dynamo_compiling()
        or forward_ad._current_level >= 0
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _RESTING
        or torch._C._has_torch_function(tensors)
        or torch.is_autocast_enabled("cpu")
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for tensor in tensors:  # noqa: SIM110  all() of a generator takes a Python frame for each tensor
        if tensor is not None and torch._C._dispatch_keys(tensor).raw_repr() not in _PLAIN:
            return False
    return True


def recorder(
    name: str,
    *,
    pack: Callable[[tuple[Any, ...]], Sequence[Any]],
    kernel: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
) -> Callable[..., Any]:
    """Return a function that records gradients as ``register_autograd`` with the same formula would.

    Args:
        name: of an operator ``fusedonemoe::name``; the function has the same name for autograd, as ``grad_fn`` prints it.
        pack: from the operator's arguments to those of ``kernel``.
        kernel: what the operator runs on CPU.
        backward: as for ``register_autograd``.
        setup_context: as for ``register_autograd``.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*pack(args))
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"GeneratedBackwardFor_fusedonemoe_{name}_default", (torch.autograd.Function,), methods)
    # Function.apply goes over all arguments for the tensors of a transform that has ended, which are not plain tensors.
    return super(torch.autograd.Function, function).apply


def shortcut(
    operator: Callable[..., Any],
    *,
    tensors: int,
    pack: Callable[[tuple[Any, ...]], Sequence[Any]],
    kernel: Callable[..., Any],
    first: bool,
    recording: Callable[..., Any] | None,
    impl: str | None,
) -> Callable[..., Any]:
    """Return a function to call in place of an operator, with the operator's positional arguments.

    Args:
        operator: an operator of this library.
        tensors: how many arguments, from the first, are tensors or None.
        pack: from the operator's arguments to those of ``kernel``.
        kernel: what the operator runs on CPU.
        first: whether ``kernel`` returns the first result alone, without those that only autograd reads.
        recording: what to call where gradients are recorded; None for the operator.
        impl: the last argument of the calls that ``kernel`` and ``recording`` are for; None for all calls.
    """
    record = recording or operator

    def call(*flat: Any) -> Any:
        if impl not in (None, flat[-1]) or not unwatched(flat[:tensors]):
            return operator(*flat)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return record(*flat)
        result = kernel(*pack(flat))
        return (result,) if first else result

    return call
