"""The blocks of experts in a checkpoint: their places and their layout."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from itertools import islice

from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.layouts import LAYOUT_OF_MODEL_TYPE, LAYOUTS, Layout, Part
from fusedonemoe.integrations.checkpoints.sources import Source

_NUMBER = r"(?P<expert>[^.]+)"
_MOST_DIGITS = 18  # of a number that can be an expert's
_MOST_LISTED = 8  # missing experts in one message
_SCALES = 32  # values under one exponent of MXFP4


@dataclass(frozen=True)
class Block:
    """A block of experts in a checkpoint.

    Attributes:
        prefix: what stands before the names of its tensors, without the last dot: ``model.layers.3.mlp``.
        layout: a name of :data:`LAYOUTS`.
        num_experts: ``E``.
        hidden_size: ``D``.
        intermediate_size: ``F``.
        gated: whether the experts have a gate.
        bias: whether the experts have biases.
        names: the names below the prefix of the experts' tensors, by part; those of one per expert with ``{}``.
        block_names: the names below the prefix of what stands beside the experts, by :class:`~fusedonemoe.MoE`'s names;
            :func:`to_state_dict` takes them to write a block under the names that it had.
    """

    prefix: str
    layout: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    bias: bool
    names: tuple[str, ...] = field(repr=False, compare=False)
    block_names: dict[str, str] = field(repr=False, compare=False)

    @property
    def layer(self) -> int | None:
        """The last number in the prefix, or None."""
        numbers = [part for part in self.prefix.split(".") if part.isascii() and part.isdigit()]
        return int(numbers[-1]) if numbers and len(numbers[-1]) <= _MOST_DIGITS else None

    def key(self, name: str) -> str:
        """A name below the block as the checkpoint has it."""
        return _key(self.prefix, name)


def _key(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """A name below the block, behind any prefix."""
    return re.compile(r"(?:(?P<prefix>.+)\.)?" + re.escape(name).replace(r"\{\}", _NUMBER))


class _Found:
    """The tensors of one layout below one prefix: for each part's name, the experts that have it (None: one for all)."""

    def __init__(self) -> None:
        self.experts: dict[str, set[int | None]] = defaultdict(set)

    def is_complete(self, layout: Layout) -> bool:
        return all(name in self.experts for part in layout.parts if part.required for name in part.names())


def _ending(name: str) -> tuple[str, ...]:
    return tuple(name.rsplit(".", 2)[-2:])


def _expert_number(key: str, text: str) -> int | None:
    """The expert that a name is of; None where a word stands in the number's place, as in ``experts.shared``.

    A number has one spelling. With two, ``01`` would be read as the expert ``1`` and then looked for under that name.
    """
    if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS and text == str(int(text)):
        return int(text)
    if re.sub(r"[\s+_-]", "", text).isnumeric():
        raise ValueError(f"{_shortened(key)} must number its expert 0, 1, 2 and so on, got {_shortened(text)}")
    return None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}")


def _gaps(held: set[int], count: int) -> str:
    """The numbers below ``count`` that are not held: as many steps as numbers are held, however large ``count`` is."""
    lost = count - len(held)
    first = list(islice((number for number in range(count) if number not in held), _MOST_LISTED))
    return str(first) + (f" and {lost - len(first)} more" if lost > len(first) else "")


def _find(source: Source, layouts: dict[str, Layout]) -> dict[str, dict[str, _Found]]:
    """By prefix and layout, what there is."""
    found: dict[str, dict[str, _Found]] = defaultdict(lambda: defaultdict(_Found))
    users: dict[str, list[str]] = defaultdict(list)
    for layout, rule in layouts.items():
        for name in (name for part in rule.parts for name in part.names()):
            users[name].append(layout)
    # A key's last two words pick the few names that it can match.
    by_ending: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in users:
        by_ending[_ending(name)].append(name)
    for key in source.names():
        for name in by_ending.get(_ending(key), ()):
            if match := _pattern(name).fullmatch(key):
                expert = _expert_number(key, match["expert"]) if "{}" in name else None
                if expert is None and "{}" in name:
                    continue
                for layout in users[name]:
                    found[match["prefix"] or ""][layout].experts[name].add(expert)
    return found


def _num_experts(source: Source, prefix: str, layout: Layout, found: _Found, given: int | None) -> int | str:
    """``E``: the experts' numbers, the length of the first axis, or for flat parts the router's rows; or what does not fit."""
    first = layout.parts[0]
    key = _key(prefix, first.names()[0])
    if first.form == "each":
        numbers = {number for held in found.experts.values() for number in held if number is not None}
        count = max(numbers) + 1
        for part in layout.parts:
            held = {number for number in found.experts.get(part.name, numbers) if number is not None}
            if len(held) < count:
                raise ValueError(f"{prefix or 'the checkpoint'} has no {part.name} of experts {_gaps(held, count)}")
    elif first.form == "flat":
        routers = [name for router in BLOCK_NAMES["gate.weight"] if (name := _key(prefix, router)) in source]
        if given is None and not routers:
            raise ValueError(
                f"{key} holds all experts' rows in one matrix and there is no router beside it that tells how many experts: give "
                "num_experts"
            )
        for router in routers:
            if len(source.shape(router)) != 2:
                return f"{router} of shape {source.shape(router)} is no router of shape (num_experts, hidden_size)"
        count = source.shape(routers[0])[0] if routers else given or 0
    else:
        count = source.shape(key)[0] if source.shape(key) else 0
    if count < 1:
        return f"{key} of shape {source.shape(key) if key in source else ()} has no experts"
    if given is not None and given != count:
        raise ValueError(f"num_experts must be {count}, as {prefix or 'the checkpoint'} has it, got {given}")
    return count


def _expert_shape(source: Source, prefix: str, part: Part, E: int) -> tuple[int, ...] | None:
    """Shape of one expert's piece in home's orientation, or None when the tensor cannot be E of them."""
    shape = source.shape(_key(prefix, part.names()[0].format(0)))
    is_bias = part.target.endswith("bias")
    match part.form:
        case "each":
            piece = shape
        case "flat":
            if len(shape) != 2 or shape[0] % E:
                return None
            piece = (shape[0] // E, *shape[1:])
        case "mxfp4":
            if len(shape) != 4 or shape[3] * 2 != _SCALES:
                return None
            piece = (shape[1], shape[2] * _SCALES)
        case _:
            if not shape or shape[0] != E:
                return None
            piece = shape[1:]
    if len(piece) != (1 if is_bias else 2):
        return None
    return piece[::-1] if part.transposed else piece


def _sizes(source: Source, prefix: str, layout: Layout, found: _Found, E: int) -> tuple[int, int] | str:
    """``D, F``, on which all parts must agree, or what does not fit."""
    parts = [part for part in layout.parts if part.names()[0] in found.experts]
    shapes = {part.target: _expert_shape(source, prefix, part, E) for part in parts}
    names = {part.target: _key(prefix, part.name) for part in parts}
    for target, shape in shapes.items():
        if shape is None:
            part = next(part for part in parts if part.target == target)
            return (
                f"{names[target]} of shape {source.shape(_key(prefix, part.names()[0].format(0)))} is not {E} experts' {target}"
            )
    D, F = shapes["down"]  # type: ignore[misc]
    if not (D and F):
        return f"{names['down']} has shape {shapes['down']} per expert, which holds nothing"
    expected = {
        "gate_up": (2 * F, D), "gate": (F, D), "up": (F, D), "down": (D, F),
        "gate_up_bias": (2 * F,), "gate_bias": (F,), "up_bias": (F,), "down_bias": (D,),
    }  # fmt: skip
    for target, shape in shapes.items():
        if shape != expected[target]:
            return f"{names[target]} has shape {shape} per expert, and {names['down']} asks for {expected[target]}"
    return D, F


@dataclass(frozen=True)
class Misfit:
    """Tensors named like a block's that are none, and why."""

    prefix: str
    reason: str


def _choose(source: Source, prefix: str, complete: dict[str, _Found], given: int | None) -> Block | Misfit:
    """The one layout that fits, with its sizes."""
    tensors = {layout: frozenset(found.experts) for layout, found in complete.items()}
    # An up and a down projection are a plain expert only where there is no gate beside them.
    largest = [a for a in tensors if not any(tensors[a] < tensors[b] for b in tensors)]
    fitting: dict[str, tuple[int, tuple[int, int]]] = {}
    misfits = []
    for layout in largest:
        E = _num_experts(source, prefix, LAYOUTS[layout], complete[layout], given)
        if isinstance(E, str):
            misfits.append(f"not {layout}: {E}")
            continue
        sizes = _sizes(source, prefix, LAYOUTS[layout], complete[layout], E)
        if isinstance(sizes, str):
            misfits.append(f"not {layout}: {sizes}")
        else:
            fitting[layout] = E, sizes
    if not fitting:
        return Misfit(prefix, "; ".join(misfits))
    layout = LAYOUT_OF_MODEL_TYPE.get(source.model_type or "", "")
    if layout not in fitting:
        meanings = {(LAYOUTS[name].parts[0].name, LAYOUTS[name].parts[0].transposed, LAYOUTS[name].rows) for name in fitting}
        if len(meanings) > 1:
            raise ValueError(
                f"layout of {prefix or 'the checkpoint'} is ambiguous: its names and shapes fit {sorted(fitting)}, which mean "
                "different things; say which"
            )
        # The same experts under the same names: what stands beside them decides, by the names that each family writes.
        layout = max(fitting, key=lambda name: sum(_key(prefix, theirs) in source for _, theirs in LAYOUTS[name].block_names))
    E, (D, F) = fitting[layout]
    names = tuple(complete[layout].experts)
    bias = any(part.target.endswith("bias") and part.names()[0] in names for part in LAYOUTS[layout].parts)
    return Block(prefix, layout, E, D, F, LAYOUTS[layout].gated, bias, names, _block_names(source, prefix, layout))


def _block_names(source: Source, prefix: str, layout: str) -> dict[str, str]:
    """Map our names of a block's other tensors to the checkpoint's."""
    own = dict(LAYOUTS[layout].block_names)
    names = {}
    for ours, aliases in BLOCK_NAMES.items():
        tried = (own[ours], *aliases) if ours in own else aliases
        here = next((name for name in tried if _key(prefix, name) in source), None)
        if here is not None:
            names[ours] = here
    return names


def find_blocks(source: Source, layout: str, num_experts: int | None) -> tuple[list[Block], list[Misfit]]:
    """Every block of experts in the checkpoint's order, and what only looks like one."""
    layouts = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
    found: list[Block | Misfit] = []
    for prefix, by_layout in _find(source, layouts).items():
        complete = {name: tensors for name, tensors in by_layout.items() if tensors.is_complete(LAYOUTS[name])}
        if complete:
            found.append(_choose(source, prefix, complete, num_experts))
    return [each for each in found if isinstance(each, Block)], [each for each in found if isinstance(each, Misfit)]
