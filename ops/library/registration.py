"""How this package's operators are registered: the only door to torch.library, and the fingerprint of the source.

Each public operator is a ``triton_op``: eager calls run its body as one operator with a hand-written backward, torch.compile
inlines the body and fuses it, torch.export keeps the operator. The body takes the branch of the tensors' device. The
``*_dense`` operators are composites instead: autograd, ``torch.func`` and export look straight through them, so they have
derivatives of every order.

Every operator takes ``build``, a fingerprint of this package's source. torch.compile's on-disk cache knows an operator by
its name and arguments, not by its Python, and would go on running the old body after an upgrade; the fingerprint in the
graph makes the new one a different graph.
"""

import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from fusedonemoe.ops import triton
from fusedonemoe.ops.derivatives import refuse_forward_mode, refused

NAMESPACE = "fusedonemoe"


def _fingerprint() -> int:
    """A 62-bit digest of the operators' source files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "big") >> 2


BUILD = _fingerprint()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a device; None where it is off, or not to be had."""
    # Dynamo of torch 2.11 cannot trace the question; of the devices that it meets, meta alone has no autocast.
    traced = torch.compiler.is_dynamo_compiling()
    if device_type == "meta" or not (traced or torch.amp.is_autocast_available(device_type)):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


lib: torch.library.Library = torch.library.Library(NAMESPACE, "FRAGMENT")


@contextmanager
def without_source_search() -> Iterator[None]:
    """Keep ``triton_op`` from reading the bodies' source for kernels.

    It would tell torch.compile's cache of them, which the fingerprint does. And it imports inductor for that, which takes as
    long as importing torch, or logs a warning where Triton is not installed, without which the CPU bodies do.
    """
    search = "get_inner_triton_kernels"
    found = getattr(torch._library.triton, search, None)
    if found is None:  # private, so it may go
        yield
        return
    setattr(torch._library.triton, search, lambda body: [])
    try:
        yield
    finally:
        setattr(torch._library.triton, search, found)


def _in_reverse_mode(body: Callable[..., Any]) -> Callable[..., Any]:
    """``body``, which a level of forward mode refuses: torch would take its missing rule for a tangent of zeros."""

    @wraps(body)
    def checked(*args: Any, **kwargs: Any) -> Any:
        refuse_forward_mode()
        return body(*args, **kwargs)

    return checked


def refuse_torch_func(name: str) -> None:
    """Have an operator refuse the transforms of torch.func, traced as well as eager."""
    lib.impl(name, refused, "FuncTorchDynamicLayerFrontMode")


def operator(name: str, body: Callable[..., Any]) -> Any:
    """Register an operator with an opaque eager body that compilation inlines; the schema is read off its annotations."""
    with without_source_search():
        made = triton_op(f"{NAMESPACE}::{name}", _in_reverse_mode(body), mutates_args=())
    refuse_torch_func(name)
    return made


def composite(name: str, body: Callable[..., Any]) -> None:
    """Register an operator that autograd, torch.func and compilation look through."""
    lib.define(name + torch.library.infer_schema(body, mutates_args=()))
    lib.impl(name, body, "CompositeImplicitAutograd")
    lib.impl(name, body, "FuncTorchBatched")  # without it vmap would run a loop over the batch, and say so


def define_autocast(name: str, casts: Sequence[int]) -> None:
    """Under autocast, cast the floating arguments at ``casts`` and run the body with autocast off.

    The others keep their dtype: routing arithmetic and routing weights are float32 whatever the model's dtype is.
    """
    op = getattr(torch.ops.fusedonemoe, name).default

    def rule_for(device: str) -> Callable[..., Any]:
        def rule(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [
                a.to(dtype) if i in casts and isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
                for i, a in enumerate(args)
            ]
            with torch.autocast(device, enabled=False):
                return op(*cast)

        return rule

    lib.impl(name, rule_for("cpu"), "AutocastCPU")
    lib.impl(name, rule_for("cuda"), "AutocastCUDA")


def define_cpu(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register a compiled CPU kernel: opaque to compilation."""
    define_opaque(schema, fake, CPU=kernel)


def define_opaque(schema: str, fake: Callable[..., Any], **kernels: Callable[..., Any]) -> None:
    """Register an operator that is opaque to compilation, with a kernel for each dispatch key."""
    lib.define(schema)
    name = schema.partition("(")[0]
    for key, kernel in kernels.items():
        lib.impl(name, _in_reverse_mode(kernel), key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", _in_reverse_mode(fake), lib=lib)
    refuse_torch_func(name)


def wanted(needs: Sequence[bool], *likes: Tensor | None) -> tuple[Tensor, ...]:
    """What a backward returns: a contiguous tensor like each argument, or an empty one where no gradient is needed."""
    owner = next(like for like in likes if like is not None)
    return tuple(
        like.new_empty(like.shape) if needed and like is not None else owner.new_empty(0)
        for needed, like in zip(needs, likes, strict=True)
    )


def keeping(tensors: int) -> Callable[..., None]:
    """What autograd does after a forward: keep all outputs but the first, the first ``tensors`` inputs and the constants.

    Args:
        tensors: how many inputs are tensors; what else there is stands behind them, ``build`` and ``impl`` at the end.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *inputs[:tensors])
        ctx.constants, ctx.impl = inputs[tensors:-2], inputs[-1]

    return setup_context


def gpu_kernels(name: str) -> Any:
    """A module of ``ops.triton``, imported now: only who computes on a GPU has to have triton."""
    return importlib.import_module(f"{triton.__name__}.{name}")
