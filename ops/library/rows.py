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
    """The compiled CPU kernel of an operator, which is an operator ``*_cpu`` of its own, in native/operators.cpp.

    Attributes:
        fake: makes tensors like the results; None for a backward, whose results are like arguments.
        arguments: those of ``*_cpu``, in parts as ``fake`` takes them; None for all of the operator's.
    """

    fake: Callable[..., Any] | None = None
    arguments: tuple[str | Part, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A row of the table: an operator of this library.

    Attributes:
        name: of ``fusedonemoe::name``.
        arguments: as a schema lists them, in parts; ``build`` and ``impl`` follow.
        results: of a forward: names of the results. The first has gradients, the others are for the backward.
        kernels: the implementations in Python by name.
        compiled: the implementation ``cpu``.
        choose: from the kernels' arguments to the name of an implementation; None where the argument ``impl`` names it.
        optional: arguments behind ``impl``, each with a default.
        casts: arguments that autocast casts where they are floats. Routing weights are float32 whatever the model's dtype is.
        gradients: of a backward: the arguments whose gradients it returns; the one gradient in any case without ``needs``.
        backward: of a forward: the row of its backward, whose arguments are ``d`` and the first result, results, arguments.
        ungraded: of a forward: arguments that must not require a gradient; all, where there is no backward.
        refusal: of a forward: the error for a gradient that does not exist.
        refuses_early: whether that error comes in the forward already, where its result would look like a constant.
        vanishing: of a backward: arguments that have no gradient where they have no elements.
        flops: the formula that counts its floating-point operations, in :mod:`fusedonemoe.ops.library.flops`.
    """

    name: str
    arguments: tuple[str | Part, ...]
    kernels: Mapping[str, Kernel]
    compiled: Compiled | None = None
    choose: Callable[..., str] | None = None
    optional: str = ""
    casts: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    backward: "Operator | None" = None
    ungraded: tuple[str, ...] = ()
    refusal: str = ""
    refuses_early: bool = False
    vanishing: tuple[str, ...] = ()
    flops: Callable[..., int] | None = None
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
