"""The only door to torch.library: from a row of the table, an operator with all that belongs to it.

Each public operator is a ``triton_op``: eager calls run its body as one operator with a hand-written backward, torch.compile
inlines the body, torch.export keeps the operator. The ``*_dense`` operators are composites, which autograd and ``torch.func``
look through. A compiled CPU kernel is an operator of its own, opaque to compilation.

Every operator takes ``build``, a fingerprint of this package's source: torch.compile's on-disk cache knows an operator by its
name and arguments, and would go on running the old body after an upgrade.
"""

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from fusedonemoe.ops import triton
from fusedonemoe.ops.cpu import build, native
from fusedonemoe.ops.derivatives import no_second_derivative, refuse_forward_mode, refused
from fusedonemoe.ops.library.flops import count
from fusedonemoe.ops.library.rows import Compiled, Kernel, Operator
from fusedonemoe.ops.library.signature import Part, Signature
from fusedonemoe.ops.operands import check_one_device, check_rows

NAMESPACE = "fusedonemoe"


def _fingerprint() -> int:
    """Return a 62-bit digest of the operators' source files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "big") >> 2


BUILD = _fingerprint()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in on a device; None where it is off or does not exist."""
    # Dynamo of torch 2.11 cannot trace the question; of the devices that it meets, meta alone has no autocast.
    traced = torch.compiler.is_dynamo_compiling()
    if device_type == "meta" or not (traced or torch.amp.is_autocast_available(device_type)):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


lib: torch.library.Library = torch.library.Library(NAMESPACE, "FRAGMENT")


@contextmanager
def without_source_search() -> Iterator[None]:
    """Keep ``triton_op`` from reading the bodies' source for kernels, for torch.compile's cache, which has the fingerprint.

    The search imports inductor, which takes as long as importing torch, or warns where Triton is not installed.
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


_OWN = ("build", "impl")  # what an operator takes and its kernels do not
# An operator's autograd formula: its setup_context and its backward.
Formula = tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]
formulas: dict[str, Formula] = {}


def register(row: Operator) -> Callable[..., Any]:
    """Register the operator of a row, its backward, its compiled kernel, its autograd formula and its autocast rule.

    Returns the function to call in place of the operator: an eager call takes less Python than torch.library's own.
    """
    if row.compiled:
        _define_compiled(row, row.compiled)
    body = _body(row)
    with without_source_search():
        operator: Any = triton_op(f"{NAMESPACE}::{row.name}", body, mutates_args=())
    refuse_torch_func(row.name)
    if row.backward:
        setup_context, backward = formulas[row.name] = formula_of(row, row.backward, register(row.backward))
        operator.register_autograd(backward, setup_context=setup_context)
    else:
        refuse = _refusing(row.refusal) if row.refusal else no_second_derivative
        operator.register_autograd(refuse, setup_context=refuse if row.refuses_early else None)
    define_autocast(row.name, row.signature, row.casts)
    if row.flops:
        count(row.name, row.signature.names, row.flops, row.gradients)
        if row.compiled:
            count(row.compiled_name, row.taken_by(row.compiled.arguments).names, row.flops, row.gradients)
    return _eager_call(row)


def register_composite(
    name: str, arguments: Sequence[str | Part], results: int, kernel: Kernel, casts: tuple[str, ...] = ()
) -> None:
    """Register an operator that autograd, torch.func and compilation look through."""
    signature = Signature.of(*arguments, "int build")
    pack = signature.packer(Signature.of(*arguments))

    def body(*flat: Any) -> Any:
        check_one_device(signature.names, flat)
        return _function(kernel)(*pack(flat))

    lib.define(f"{name}({signature.schema(symbolic=True)}) -> {_returned(results)}")
    lib.impl(name, body, "CompositeImplicitAutograd")
    lib.impl(name, body, "FuncTorchBatched")  # without it vmap would run a loop over the batch, and say so
    define_autocast(name, signature, casts)


def register_transparent(name: str, arguments: str, body: Callable[..., Any], results: int) -> Any:
    """Register Python as an operator that hides it from Dynamo, and from nothing behind that; return the operator."""
    lib.define(f"{name}({arguments}) -> {_returned(results)}")
    # In a transform of torch.func, the operators inside have to meet the transform themselves.
    for key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
        lib.impl(name, _on_one_device(arguments, body), key)
    return getattr(torch.ops.fusedonemoe, name).default


def refuse_torch_func(name: str) -> None:
    """Have an operator refuse the transforms of torch.func, traced as well as eager."""
    lib.impl(name, refused, "FuncTorchDynamicLayerFrontMode")


def define_opaque(
    name: str, arguments: str, fake: Callable[..., Any], kernels: Mapping[str, Callable[..., Any]], results: int = 1
) -> None:
    """Register an operator that is opaque to compilation, with a kernel for each dispatch key."""
    lib.define(f"{name}({arguments}) -> {_returned(results)}")
    for key, kernel in kernels.items():
        lib.impl(name, _in_reverse_mode(kernel), key)
    define_fake(name, arguments, _in_reverse_mode(fake))
    refuse_torch_func(name)


def define_fake(name: str, arguments: str, fake: Callable[..., Any]) -> None:
    """Register what makes an operator's results where there is no memory to compute in."""
    torch.library.register_fake(f"{NAMESPACE}::{name}", _on_one_device(arguments, fake), lib=lib)


def _on_one_device(arguments: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` of an operator's arguments, which refuses tensors on several devices."""
    names = Signature.of(arguments).names

    def checked(*args: Any) -> Any:
        check_one_device(names, args)
        return function(*args)

    return checked


def _in_reverse_mode(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``kernel``, which a level of forward mode refuses: torch would take its missing rule for a tangent of zeros."""

    @wraps(kernel)
    def checked(*args: Any, **kwargs: Any) -> Any:
        refuse_forward_mode()
        return kernel(*args, **kwargs)

    return checked


def _returned(results: int) -> str:
    return "Tensor" if results == 1 else "()" if results == 0 else f"({', '.join(['Tensor'] * results)})"


def _refusing(message: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(message)

    return refuse


def _function(kernel: Kernel) -> Callable[..., Any]:
    """Return a kernel in Python, looked up now."""
    if callable(kernel):
        return kernel
    module, name = kernel
    return getattr(gpu_kernels(module) if isinstance(module, str) else module, name)


def gpu_kernels(name: str) -> Any:
    """Return a module of ``ops.triton``, imported now: a machine without a GPU does not need triton."""
    return importlib.import_module(f"{triton.__name__}.{name}")


def _body(row: Operator) -> Callable[..., Any]:
    """Return what an operator runs: the kernel that its arguments name or the row chooses."""
    signature, choose, kernels = row.signature, row.choose, dict(row.kernels)
    pack, defaults = signature.packer(row.taken), signature.defaults
    experts_and_impl = None if choose else signature.picker(("experts", "impl"))
    compiled = None
    if row.compiled:
        flatten = signature.picker(row.taken_by(row.compiled.arguments).names)
        compiled = getattr(torch.ops.fusedonemoe, row.compiled_name).default

    def body(*given: Any) -> Any:
        refuse_forward_mode()
        check_one_device(signature.names, given)
        flat = (*given, *defaults[len(given) :])
        if experts_and_impl:
            experts, impl = experts_and_impl(flat)
            check_rows(experts)
        else:
            impl = choose(*pack(flat))  # type: ignore[misc]
        if impl == "cpu" and compiled is not None:
            return compiled(*flatten(flat))
        if impl not in kernels:
            raise ValueError(f"impl must be one of {(*kernels, *(['cpu'] if compiled else []))}, got {impl!r}")
        return _function(kernels[impl])(*pack(flat))

    signature.annotate(body, len(row.results))
    return body


def _define_compiled(row: Operator, compiled: Compiled) -> None:
    """Register the operator of a compiled CPU kernel; the kernel registers itself when the library is loaded."""
    signature = row.taken_by(compiled.arguments)
    if compiled.fake is None:
        fake = _gradients_fake(row, signature)
    else:
        make, pack = compiled.fake, signature.packer(signature)

        def fake(*flat: Any) -> Any:
            return make(*pack(flat))

    define_compiled(row.compiled_name, signature.schema(symbolic=False), fake, len(row.results))


def define_compiled(name: str, arguments: str, fake: Callable[..., Any], results: int = 1) -> None:
    """Register an operator whose CPU kernel is compiled, and registered with torch when the library is loaded."""

    def load_and_call(*args: Any) -> Any:
        # torch prefers the kernel for the CPU to this one, once it is there.
        forms = {(argument.device.type, str(argument.layout)) for argument in args if isinstance(argument, Tensor)}
        if forms != {("cpu", "torch.strided")} or build.library is not None:
            raise NotImplementedError(f"fusedonemoe::{name} takes strided tensors on the CPU, got {sorted(forms)}")
        if reason := native.refusal(torch.float32, contiguous=True):
            raise RuntimeError(f"fusedonemoe::{name} cannot run here: {reason}")
        return getattr(torch.ops.fusedonemoe, name).default(*args)

    define_opaque(name, arguments, fake, {"CompositeExplicitAutograd": load_and_call}, results)


def _gradients_fake(row: Operator, signature: Signature) -> Callable[..., Any]:
    """Return the fake of a backward: a tensor like each argument, or like its slots; an empty one where no gradient is needed."""
    likes_of = signature.picker(row.gradients)
    needs_of = signature.picker(("needs",)) if "needs" in signature.names else None
    slots_of = signature.picker(("slots", "num_slots")) if row.slotted else None

    def fake(*given: Any) -> Any:
        flat = (*given, *signature.defaults[len(given) :])
        likes = dict(zip(row.gradients, likes_of(flat), strict=True))
        if needs_of is None:
            (like,) = likes.values()
            return like.new_empty(like.shape)
        (needs,) = needs_of(flat)
        slots, num_slots = slots_of(flat) if slots_of else (None, 0)
        owner = next(like for name, like in likes.items() if name != "weights")
        gradients = []
        for needed, (name, like) in zip(needs, likes.items(), strict=True):
            if not needed or like is None:
                gradients.append(owner.new_empty(0))
            elif slots is not None and name in row.slotted:
                gradients.append(like.new_empty(num_slots, like.shape[1]))
            else:
                gradients.append(like.new_empty(like.shape))
        return tuple(gradients)

    return fake


# For each argument of an operator, whether autocast casts it where it is a float.
_is_cast: dict[str, list[bool]] = {}


def cast_arguments(name: str, flat: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Return the arguments of an operator as autocast casts them; those at the end may be missing."""
    return [
        a.to(dtype) if casts and isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
        for a, casts in zip(flat, _is_cast[name], strict=False)
    ]


def define_autocast(name: str, signature: Signature, casts: tuple[str, ...]) -> None:
    """Under autocast, cast the floating arguments ``casts`` and run the operator with autocast off."""
    op = getattr(torch.ops.fusedonemoe, name).default
    assert set(casts) <= set(signature.names), (name, casts)
    _is_cast[name] = [argument in casts for argument in signature.names]

    def rule_for(device: str) -> Callable[..., Any]:
        def rule(*flat: Any) -> Any:
            cast = cast_arguments(name, flat, torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return op(*cast)

        return rule

    lib.impl(name, rule_for("cpu"), "AutocastCPU")
    lib.impl(name, rule_for("cuda"), "AutocastCUDA")


def formula_of(row: Operator, backward_row: Operator, gradients_of: Callable[..., Any]) -> Formula:
    """Return the steps of autograd after a forward and in a backward, which calls ``gradients_of`` as the backward's operator."""
    signature, (first, *_) = row.signature, row.results
    taken = [a for a in backward_row.signature.arguments if a.name not in (f"d{first}", "needs", *_OWN) and a.is_required]
    saved_names = [a.name for a in taken if a.is_tensor]
    saved_of = signature.picker(saved_names, behind=row.results)
    constants_of = signature.picker([a.name for a in taken if not a.is_tensor])
    own_of = signature.picker([name for name in _OWN if name in backward_row.signature.names])
    needs_of, refused_of = signature.picker(backward_row.gradients), signature.picker(row.ungraded)
    vanishing = [(backward_row.gradients.index(name), saved_names.index(name)) for name in backward_row.vanishing]
    places = [signature.names.index(name) for name in backward_row.gradients]
    selective = "needs" in backward_row.signature.names
    several = len(row.results) > 1

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if several else (output,)
        if several:
            _, *others = outputs
            ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved_of((*inputs, *outputs)))
        ctx.constants, ctx.own = constants_of(inputs), own_of(inputs)

    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        returned: list[Tensor | None] = [None] * len(needed)
        if gradient is None:
            return tuple(returned)
        saved = ctx.saved_tensors  # once: checkpointing refuses to give them twice
        if not selective:
            (place,) = places
            returned[place] = gradients_of(gradient, *saved, *ctx.constants, *ctx.own)
            return tuple(returned)
        if row.ungraded and any(refused_of(needed)):
            raise RuntimeError(row.refusal)
        needs = list(needs_of(needed))
        for place, like in vanishing:
            needs[place] = needs[place] and saved[like].numel() > 0
        gradients = gradients_of(gradient, *saved, *ctx.constants, needs, *ctx.own)
        for place, need, value in zip(places, needs, gradients, strict=True):
            if need:
                returned[place] = value
        return tuple(returned)

    return setup_context, backward


def _eager_call(row: Operator) -> Callable[..., Any]:
    """Return the function to call in place of an operator."""
    operator, compiled, signature = getattr(torch.ops.fusedonemoe, row.name), row.compiled, row.signature
    if compiled is None and row.choose is None:
        return operator
    tensors, kernel = signature.leading_tensors, _eager_kernel(row)
    record = recorder(row, kernel, formulas[row.name]) if row.backward else operator
    of_any_impl = row.choose is not None

    def call(*flat: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or not (of_any_impl or flat[-1] == "cpu")
            or torch.is_autocast_enabled("cpu")
            or torch._C._is_tracing()
            or torch._C._len_torch_dispatch_stack()  # a mode sees the operator that a policy of checkpointing may name
        ):
            return operator(*flat)
        if torch.is_grad_enabled():
            for tensor in flat[:tensors]:
                if tensor is not None and tensor.requires_grad:
                    # The operator refuses the transforms of torch.func.
                    return (operator if torch._C._are_functorch_transforms_active() else record)(*flat)
        return kernel(*flat)

    return call


def _eager_kernel(row: Operator) -> Callable[..., Any]:
    """Return the function of an operator's arguments that computes, without what the operator has around it."""
    pack, choose = row.signature.packer(row.taken), row.choose
    if row.compiled is None:
        assert choose is not None
        kernels = row.kernels

        def chosen(*flat: Any) -> Any:
            check_one_device(row.signature.names, flat)
            packed = pack(flat)
            return _function(kernels[choose(*packed)])(*packed)

        return chosen
    flatten = row.signature.picker(row.taken_by(row.compiled.arguments).names)
    operator, compiled = getattr(torch.ops.fusedonemoe, row.name), getattr(torch.ops.fusedonemoe, row.compiled_name).default
    defaults = row.signature.defaults
    if choose is None:
        return lambda *flat: compiled(*flatten((*flat, *defaults[len(flat) :])))

    def kernel(*flat: Any) -> Any:
        first = flat[0]
        if first.device.type == "cpu" and native.refusal(first.dtype, contiguous=True) is None:
            return compiled(*flatten(flat))
        return operator(*flat)

    return kernel


def recorder(row: Operator, kernel: Callable[..., Any], formula: Formula) -> Callable[..., Any]:
    """Return a function that records gradients with a formula, as the operator does, in fewer steps."""
    setup_context, backward = formula

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # Autograd and grad_fn show the name that the operator's own function has.
    function: Any = type(f"GeneratedBackwardFor_{NAMESPACE}_{row.name}_default", (torch.autograd.Function,), methods)
    # Function.apply has more Python, for transforms of torch.func, which the kernels refuse.
    return super(torch.autograd.Function, function).apply
