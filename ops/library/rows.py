"""The rows of the table of operators: what registration derives all else from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fusedonemoe.ops.library.signature import Part, Signature

# A kernel in Python: a function, or the name of one and its module, or the module's name in ops.triton.
Kernel = Callable[..., Any] | tuple[ModuleType | str, str]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiled CPU kernel of an operator, which is an operator ``*_cpu`` of its own, in native/operators.cpp."""

    fake: Callable[..., Any] | None = None  # makes tensors like the results; None for a backward, whose are like arguments
    arguments: tuple[str | Part, ...] | None = None  # those of *_cpu, in parts as fake takes them; None for all of the operator's


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A row of the table: an operator of this library."""

    name: str  # of fusedonemoe::name
    arguments: tuple[str | Part, ...]  # as a schema lists them, in parts; build and impl follow
    kernels: Mapping[str, Kernel]  # the implementations in Python by name
    compiled: Compiled | None = None  # the implementation cpu
    choose: Callable[..., str] | None = None  # from the kernels' arguments to an implementation's name; None where impl names it
    optional: str = ""  # arguments behind impl, each with a default
    casts: tuple[str, ...] = ()  # arguments that autocast casts where they are floats; routing weights are never cast
    results: tuple[str, ...] = ()  # of a forward; the first has gradients, the others are for the backward
    gradients: tuple[str, ...] = ()  # of a backward: the arguments whose gradients it returns; without needs the one, in any case
    backward: "Operator | None" = None  # of a forward; its arguments are named d and the first result, results, arguments
    ungraded: tuple[str, ...] = ()  # of a forward: arguments that must not require a gradient; all, without a backward
    refusal: str = ""  # of a forward: the error for a gradient that does not exist
    refuses_early: bool = False  # the error comes in the forward, whose result would look like a constant
    vanishing: tuple[str, ...] = ()  # of a backward: arguments without a gradient where they have no elements
    slotted: tuple[str, ...] = ()  # of a backward: gradients with num_slots rows where the argument slots is given
    flops: Callable[..., int] | None = None  # the formula in flops that counts its floating-point operations
    signature: Signature = field(init=False)
    taken: Signature = field(init=False)

    def __post_init__(self) -> None:
        build_and_impl = "int build" if self.choose else 'int build, str impl="grouped"'
        object.__setattr__(self, "signature", Signature.of(*self.arguments, build_and_impl, self.optional))
        object.__setattr__(self, "taken", Signature.of(*self.arguments, self.optional))
        if not self.results:
            object.__setattr__(self, "results", tuple(f"d{name}" for name in self.gradients))

    def taken_by(self, arguments: tuple[str | Part, ...] | None) -> Signature:
        """Return the signature of a kernel that takes these arguments; None for all of the operator's."""
        return self.taken if arguments is None else Signature.of(*arguments)

    @property
    def compiled_name(self) -> str:
        """Return the name of the operator of the compiled kernel."""
        base = self.name.removesuffix("_backward")
        return f"{base}_cpu_backward" if base != self.name else f"{base}_cpu"
