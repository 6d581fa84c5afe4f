"""The blocks of experts in a checkpoint: their places and their layout."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from itertools import islice

from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.files import Source
from fusedonemoe.integrations.checkpoints.layouts import LAYOUT_OF_MODEL_TYPE, LAYOUTS, Layout, Part, piece_shape

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


# The tensors of one layout below one prefix: for each part's name, the experts that have it (None: one for all).
_Found = dict[str, set[int | None]]


class _MisfitError(Exception):
    """The reason why tensors that are named like a block's do not fit a layout."""


def _ending(name: str) -> tuple[str, ...]:
    return tuple(name.rsplit(".", 2)[-2:])


def _expert_number(key: str, text: str) -> int | None:
    """The expert that a name is of; None where a word stands in the number's place, as in ``experts.shared``."""
    # A number has one spelling. With two, ``01`` would be read as the expert ``1`` and then looked for under that name.
    if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS and text == str(int(text)):
        return int(text)
    if re.sub(r"[\s+_-]", "", text).isnumeric():
        raise ValueError(f"{_shortened(key)} must number its expert 0, 1, 2 and so on, got {_shortened(text)}")
    return None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}")


def _find(source: Source, layouts: dict[str, Layout]) -> dict[str, dict[str, _Found]]:
    """By prefix and layout, what there is."""
    found: dict[str, dict[str, _Found]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    # A key's last two words pick the few names that it can match.
    by_ending: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for layout, rule in layouts.items():
        for name in rule.names():
            by_ending[_ending(name)][name].append(layout)
    for key in source:
        for name, users in by_ending.get(_ending(key), {}).items():
            if match := _pattern(name).fullmatch(key):
                expert = _expert_number(key, match["expert"]) if "{}" in name else None
                for layout in users if expert is not None or "{}" not in name else ():
                    found[match["prefix"] or ""][layout][name].add(expert)
    return found


def _num_experts(source: Source, prefix: str, layout: Layout, found: _Found, given: int | None) -> int:
    """``E``: the experts' numbers, the length of the first axis, or for flat parts the router's rows."""
    first = layout.parts[0]
    key = _key(prefix, first.names()[0])
    if first.form == "each":
        numbers = {number for held in found.values() for number in held if number is not None}
        count = max(numbers) + 1
        for part in layout.parts:
            held = {number for number in found.get(part.name, numbers) if number is not None}
            if lost := count - len(held):  # named in as many steps as numbers are held, however large the count is
                first_lost = list(islice((number for number in range(count) if number not in held), _MOST_LISTED))
                more = f" and {lost - len(first_lost)} more" if lost > len(first_lost) else ""
                raise ValueError(f"{prefix or 'the checkpoint'} has no {part.name} of experts {first_lost}{more}")
    elif first.form == "flat":
        routers = [name for router in BLOCK_NAMES["gate.weight"] if (name := _key(prefix, router)) in source]
        if given is None and not routers:
            raise ValueError(
                f"{key} holds all experts' rows in one matrix and there is no router beside it that tells how many experts: give "
                "num_experts"
            )
        for router in routers:
            if len(source[router].shape) != 2:
                raise _MisfitError(f"{router} of shape {source[router].shape} is no router of shape (num_experts, hidden_size)")
        count = source[routers[0]].shape[0] if routers else given or 0
    else:
        count = source[key].shape[0] if source[key].shape else 0
    if count < 1:
        raise _MisfitError(f"{key} of shape {source[key].shape if key in source else ()} has no experts")
    if given is not None and given != count:
        raise ValueError(f"num_experts must be {count}, as {prefix or 'the checkpoint'} has it, got {given}")
    return count


def _expert_shape(source: Source, prefix: str, part: Part, E: int) -> tuple[int, ...]:
    """Shape of one expert's piece in home's orientation."""
    shape = source[_key(prefix, part.names()[0].format(0))].shape
    match part.form:
        case "each":
            piece = shape
        case "flat" if len(shape) == 2 and not shape[0] % E:
            piece = (shape[0] // E, shape[1])
        case "mxfp4" if len(shape) == 4 and shape[3] * 2 == _SCALES:
            piece = (shape[1], shape[2] * _SCALES)
        case "stack" if shape[:1] == (E,):
            piece = shape[1:]
        case _:
            piece = ()
    if len(piece) != (1 if part.target.endswith("bias") else 2):
        raise _MisfitError(f"{_key(prefix, part.name)} of shape {shape} is not {E} experts' {part.target}")
    return piece[::-1] if part.transposed else piece


def _sizes(source: Source, prefix: str, layout: Layout, found: _Found, given: int | None) -> tuple[int, int, int]:
    """``E, D, F``, on which all parts must agree."""
    E = _num_experts(source, prefix, layout, found, given)
    parts = {part.target: part for part in layout.parts if part.names()[0] in found}
    shapes = {target: _expert_shape(source, prefix, part, E) for target, part in parts.items()}
    names = {target: _key(prefix, part.name) for target, part in parts.items()}
    D, F = shapes["down"]
    if not (D and F):
        raise _MisfitError(f"{names['down']} has shape {shapes['down']} per expert, which holds nothing")
    for target, shape in shapes.items():
        if shape != (expected := piece_shape(target, D, F)):
            raise _MisfitError(f"{names[target]} has shape {shape} per expert, and {names['down']} asks for {expected}")
    return E, D, F


def _choose(source: Source, prefix: str, complete: dict[str, _Found], given: int | None) -> Block:
    """The one layout that fits, with its sizes."""
    # An up and a down projection are a plain expert only where there is no gate beside them.
    largest = [a for a in complete if not any(complete[a].keys() < other.keys() for other in complete.values())]
    fitting: dict[str, tuple[int, int, int]] = {}
    misfits = []
    for layout in largest:
        try:
            fitting[layout] = _sizes(source, prefix, LAYOUTS[layout], complete[layout], given)
        except _MisfitError as misfit:
            misfits.append(f"not {layout}: {misfit}")
    if not fitting:
        raise _MisfitError("; ".join(misfits))
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
    names = tuple(complete[layout])
    bias = any(part.target.endswith("bias") and part.names()[0] in names for part in LAYOUTS[layout].parts)
    own = dict(LAYOUTS[layout].block_names)
    beside: dict[str, str] = {}
    for ours, aliases in BLOCK_NAMES.items():
        tried = (own[ours], *aliases) if ours in own else aliases
        if here := [name for name in tried if _key(prefix, name) in source]:
            beside[ours] = here[0]
    return Block(prefix, layout, *fitting[layout], LAYOUTS[layout].gated, bias, names, beside)


def find_blocks(source: Source, layout: str, num_experts: int | None) -> tuple[list[Block], dict[str, str]]:
    """Every block of experts in the checkpoint's order, and the reasons by prefix why other tensors only look like one."""
    layouts = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
    blocks: list[Block] = []
    misfits: dict[str, str] = {}
    for prefix, by_layout in _find(source, layouts).items():
        complete = {name: held for name, held in by_layout.items() if held.keys() >= {*LAYOUTS[name].names(required=True)}}
        try:
            blocks += [_choose(source, prefix, complete, num_experts)] if complete else []
        except _MisfitError as misfit:
            misfits[prefix] = str(misfit)
    return blocks, misfits
