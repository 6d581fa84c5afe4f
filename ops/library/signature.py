"""An operator's arguments by name: from one text come its schema, its annotations and the records that its kernels take."""

import ast
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

_TYPES: dict[str, Any] = {
    "Tensor": Tensor,
    "Tensor?": Tensor | None,
    "int": int,
    "SymInt": int,
    "float": float,
    "bool": bool,
    "str": str,
    "bool[]": Sequence[bool],
}


class Argument(NamedTuple):
    """An argument of an operator, as in the schema; its default is ``inspect.Parameter.empty`` for none."""

    type: str
    name: str
    default: Any = inspect.Parameter.empty

    @property
    def is_tensor(self) -> bool:
        """Return whether the argument is a tensor, or a tensor or None."""
        return self.type.startswith("Tensor")

    @property
    def is_required(self) -> bool:
        """Return whether the argument has no default."""
        return self.default is inspect.Parameter.empty


class Part(NamedTuple):
    """Adjacent arguments, as a schema lists them, that kernels take as one record, which ``make`` makes of their tuple."""

    text: str
    make: Callable[[tuple[Any, ...]], Any]


def record(kind: Any, text: str = "") -> Part:
    """Return the part that is a NamedTuple: one argument for each field, with the field's name and type where none are given."""
    text = text or ", ".join(f"{field_type.__name__} {name}" for name, field_type in get_type_hints(kind).items())
    return Part(text, partial(tuple.__new__, kind))  # the class itself would run Python


def flags(kind: Any) -> Part:
    """Return the part ``needs`` that is a NamedTuple of bools: one argument, a list of them."""
    return Part("bool[] needs", lambda arguments: kind._make(*arguments))


def _parse(text: str) -> list[Argument]:
    arguments = []
    for declaration in text.split(", "):
        kind, _, name = declaration.partition(" ")
        name, has_default, default = name.partition("=")
        arguments.append(Argument(kind, name, ast.literal_eval(default) if has_default else inspect.Parameter.empty))
    return arguments


# Adjacent arguments, and the record that kernels take in place of them, if any.
_Group = tuple[list[Argument], Callable[[tuple[Any, ...]], Any] | None]


class Signature:
    """The arguments of an operator, flat as the dispatcher passes them and packed as kernels take them."""

    def __init__(self, groups: Iterable[_Group]) -> None:
        self._groups = list(groups)
        self.arguments: list[Argument] = [argument for group, _ in self._groups for argument in group]
        self.names: list[str] = [argument.name for argument in self.arguments]
        self.defaults: tuple[Any, ...] = tuple(argument.default for argument in self.arguments)
        # How many arguments, from the first, are tensors or None.
        self.leading_tensors: int = [*(argument.is_tensor for argument in self.arguments), False].index(False)

    @classmethod
    def of(cls, *parts: str | Part) -> "Signature":
        """Return the signature of arguments as a schema lists them, in parts."""
        split = (part if isinstance(part, Part) else (part, None) for part in parts if part)
        return cls((_parse(text), make) for text, make in split)

    def schema(self, *, symbolic: bool) -> str:
        """Return the arguments as a schema lists them; with ``symbolic``, integers are SymInts."""
        texts = []
        for kind, name, default in self.arguments:
            kind = "SymInt" if symbolic and kind == "int" else kind
            value = f'"{default}"' if isinstance(default, str) else default
            texts.append(f"{kind} {name}" if default is inspect.Parameter.empty else f"{kind} {name}={value}")
        return ", ".join(texts)

    def annotate(self, body: Any, results: int) -> None:
        """Give a function of ``*args`` this signature, of which ``torch.library`` infers the schema."""
        form = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(name, form, annotation=_TYPES[kind], default=default) for kind, name, default in self.arguments
        ]
        returned: Any = Tensor if results == 1 else tuple[(Tensor,) * results]  # type: ignore[misc]
        body.__signature__ = inspect.Signature(parameters, return_annotation=returned)

    def picker(self, names: Sequence[str], behind: Sequence[str] = ()) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Return a function that picks arguments by name from all of them, followed by values with the names ``behind``."""
        every = [*self.names, *behind]
        places = [every.index(name) for name in names]
        if len(places) > 1:
            return itemgetter(*places)
        return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))

    def packer(self, taken: "Signature") -> Callable[[tuple[Any, ...]], Sequence[Any]]:
        """Return a function from these arguments, flat, to those that a kernel takes; optional ones at the end may be missing."""
        steps: list[tuple[Callable[[tuple[Any, ...]], Any] | None, slice]] = []
        for group, make in taken._groups:
            places = [self.names.index(argument.name) for argument in group]
            if make is not None:
                assert places == list(range(places[0], places[-1] + 1)), "a record's arguments must be adjacent"
                steps.append((make, slice(places[0], places[-1] + 1)))
                continue
            for place in places:
                joins = steps and steps[-1][0] is None and steps[-1][1].stop == place
                steps.append((None, slice(steps.pop()[1].start if joins else place, place + 1)))

        def pack(flat: tuple[Any, ...]) -> Sequence[Any]:
            packed: list[Any] = []
            for make, span in steps:
                if make is None:
                    packed += flat[span]
                else:
                    packed.append(make(flat[span]))
            return packed

        return pack
