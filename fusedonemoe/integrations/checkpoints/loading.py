"""From a checkpoint to a block's weights, one expert at a time."""

from collections.abc import Iterator
from typing import TypeVar, overload

import torch
from torch import Tensor

from fusedonemoe.checks import check_integer, check_one_of
from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.blocks import Block, find_blocks
from fusedonemoe.integrations.checkpoints.layouts import LAYOUTS, Part
from fusedonemoe.integrations.checkpoints.mxfp4 import dequantize_mxfp4
from fusedonemoe.integrations.checkpoints.sources import Checkpoint, Source
from fusedonemoe.integrations.checkpoints.weights import ExpertWeights, pieces, store_packed, weights_of
from fusedonemoe.layers import Experts, MoE

Module = TypeVar("Module", Experts, MoE)

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def list_blocks(checkpoint: Checkpoint, layout: str = "auto", *, num_experts: int | None = None) -> list[Block]:
    """Find every block of experts in a checkpoint, without reading a weight.

    Args:
        checkpoint: as for :func:`load_experts`.
        layout: likewise.
        num_experts: likewise.

    Returns:
        One :class:`Block` each, in the checkpoint's order; none for a checkpoint without experts.

    Raises:
        TypeError: ``checkpoint`` is no state dict and no path, or ``num_experts`` no integer.
        ValueError: an unknown layout, a layout that is ambiguous, experts that are missing.
        FileNotFoundError: a file or shard that is not there.

    Example:
        >>> import torch
        >>> from fusedonemoe.integrations.checkpoints import list_blocks
        >>> shapes = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
        >>> one = "layers.0.mlp.experts.{}.{}.weight"
        >>> list_blocks({one.format(e, name): torch.randn(shapes[name]) for e in range(4) for name in shapes})
        [Block(prefix='layers.0.mlp', layout='hf', num_experts=4, hidden_size=16, intermediate_size=32, gated=True,
               bias=False)]
    """
    _check_layout(layout, num_experts)
    with Source(checkpoint) as source:
        return find_blocks(source, layout, num_experts)[0]


@overload
def load_experts(
    checkpoint: Checkpoint,
    layout: str = "auto",
    *,
    prefix: str | None = None,
    layer: int | None = None,
    into: None = None,
    num_experts: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ExpertWeights: ...
@overload
def load_experts(
    checkpoint: Checkpoint,
    layout: str = "auto",
    *,
    prefix: str | None = None,
    layer: int | None = None,
    into: Module,
    num_experts: int | None = None,
) -> Module: ...
def load_experts(
    checkpoint: Checkpoint,
    layout: str = "auto",
    *,
    prefix: str | None = None,
    layer: int | None = None,
    into: Experts | MoE | None = None,
    num_experts: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ExpertWeights | Experts | MoE:
    """Read one block of experts, one expert at a time, from whatever layout it is stored in.

    Rows, transposition and order of gate and up are converted to the library's own on the way. Everything is checked before
    the first weight is written: a call that raises has changed nothing.

    Args:
        checkpoint: a state dict; a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file; the ``.index.json`` of a sharded one;
            or a directory that holds one of them.
        layout: a name of :data:`LAYOUTS`, or ``"auto"`` to go by names and shapes, and by ``config.json`` where those leave
            it open.
        prefix: the block's, as :func:`list_blocks` has it (``"model.layers.3.mlp"``). None is for a checkpoint with one block.
        layer: the block whose prefix has this as its last number, instead of ``prefix``.
        into: the module to fill: an :class:`~fusedonemoe.Experts`, or a :class:`~fusedonemoe.MoE` with its router and shared
            branch. None returns tensors.
        num_experts: ``E``, for a flat layout (``megablocks``, ``dbrx``) without a router beside the experts.
        dtype: of the tensors that are returned; the checkpoint's own if None. A module keeps its dtype.
        device: of the tensors that are returned.

    Returns:
        ``into``, filled; or :class:`ExpertWeights`.

    Raises:
        TypeError: an argument of the wrong type, or a checkpoint whose weights are no floating-point tensors.
        ValueError: an unknown or ambiguous layout, no such block, or several; sizes that differ from the module's; missing or
            unexpected names, which the message lists.
        FileNotFoundError: a file or shard that is not there.
        ImportError: a safetensors file without the package.

    Example:
        >>> import torch
        >>> from fusedonemoe import MoE
        >>> from fusedonemoe.integrations.checkpoints import load_experts, to_state_dict
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> saved = to_state_dict(moe, "mixtral", prefix="model.layers.0.block_sparse_moe")
        >>> sorted(saved)[:2]
        ['model.layers.0.block_sparse_moe.experts.0.w1.weight', 'model.layers.0.block_sparse_moe.experts.0.w2.weight']
        >>> other = load_experts(saved, into=MoE(moe.config))
        >>> torch.equal(other.experts.gate_up_proj, moe.experts.gate_up_proj)
        True
    """
    _check_layout(layout, num_experts)
    if into is not None and not isinstance(into, Experts | MoE):
        raise TypeError(f"into must be an Experts or a MoE, got {type(into).__name__}")
    if into is not None and (dtype is not None or device is not None):
        raise ValueError("dtype and device are those of the module: give them without into")
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if prefix is not None and layer is not None:
        raise ValueError(f"give either prefix or layer, got both: {prefix!r} and {layer!r}")
    with Source(checkpoint) as source:
        block = _pick(source, layout, num_experts, prefix, layer)
        parts = _present_parts(block)
        _check_shapes(source, block, parts)
        names = block.block_names
        _check_names(source, block, names, into)
        if into is None:
            home = _allocate(source, block, parts, names, dtype, device)
        else:
            _check_module(block, into)
            home = weights_of(into)
        _check_dtypes(source, block, parts)
        beside = {ours: block.key(theirs) for ours, theirs in names.items() if ours in home.block}
        _check_beside(source, beside, home)
        _copy(source, block, parts, home)
        if into is not None:
            store_packed(into, home)
        for ours, key in beside.items():
            home.block[ours].copy_(source.read(key).reshape(home.block[ours].shape))
    return home if into is None else into


def _check_layout(layout: str, num_experts: int | None) -> None:
    check_one_of("layout", layout, ("auto", *LAYOUTS))
    if num_experts is not None:
        check_integer("num_experts", num_experts)


def _pick(source: Source, layout: str, num_experts: int | None, prefix: str | None, layer: int | None) -> Block:
    """The one block that was asked for."""
    blocks, misfits = find_blocks(source, layout, num_experts)
    prefix = None if prefix is None else prefix.removesuffix(".")
    fitting = [b for b in blocks if prefix in (None, b.prefix) and layer in (None, b.layer)]
    if len(fitting) == 1:
        return fitting[0]
    asked = f"prefix {prefix!r}" if prefix is not None else f"layer {layer}" if layer is not None else "prefix"
    if fitting:
        raise ValueError(f"{asked} must name one block of experts, give one of the prefixes {[b.prefix for b in fitting]}")
    reasons = [f"{m.prefix or 'the checkpoint'}: {m.reason}" for m in misfits if prefix in (None, m.prefix)]
    if reasons:
        raise ValueError(f"no block of experts fits: {'; '.join(reasons)}")
    if blocks:
        raise ValueError(f"{asked} names no block of experts, the checkpoint has {[b.prefix for b in blocks]}")
    expected = "any known layout" if layout == "auto" else f"layout {layout!r}"
    raise ValueError(f"no experts of {expected} in the checkpoint; its names begin with {source.names()[:5]}")


def _present_parts(block: Block) -> list[Part]:
    """The layout's parts, without biases that the checkpoint does not have."""
    layout = LAYOUTS[block.layout]
    parts = [part for part in layout.parts if part.names()[0] in block.names]
    lost = [part.name for part in layout.parts if part not in parts]
    if block.bias and lost:
        raise ValueError(f"{block.prefix or 'the checkpoint'} has some of the experts' biases, but not {lost}")
    return parts


def _keys(block: Block, part: Part) -> list[str]:
    """Every tensor's name of one part."""
    experts = range(block.num_experts) if part.form == "each" else range(1)
    return [block.key(name.format(expert)) for name in part.names() for expert in experts]


def _check_shapes(source: Source, block: Block, parts: list[Part]) -> None:
    """What was found for the first expert holds for all."""
    for part in parts:
        if part.form == "each":
            first, *others = _keys(block, part)
            for key in others:
                if source.shape(key) != source.shape(first):
                    raise ValueError(f"{key} must have shape {source.shape(first)}, as {first} has, got {source.shape(key)}")
        elif part.form == "mxfp4":
            blocks, scales = _keys(block, part)
            if source.shape(scales) != source.shape(blocks)[:-1]:
                raise ValueError(
                    f"{scales} must have shape {source.shape(blocks)[:-1]} to fit {blocks}, got {source.shape(scales)}"
                )


def _check_names(source: Source, block: Block, names: dict[str, str], into: Experts | MoE | None) -> None:
    """Nothing is missing and nothing is left over."""
    used = {key for part in _present_parts(block) for key in _keys(block, part)}
    used |= {block.key(theirs) for theirs in names.values()}
    missing: list[str] = []
    scopes = {block.key(part.name.partition(".")[0]) + "." for part in LAYOUTS[block.layout].parts}
    if isinstance(into, MoE):
        has = {key for key in into.state_dict() if not key.startswith("experts.")}
        missing = [block.key(BLOCK_NAMES[ours][0]) for ours in sorted(has - names.keys())]
        used -= {block.key(theirs) for ours, theirs in names.items() if ours not in has}
        # Where the block has no module of its own, its neighbours in the layer are none of its tensors.
        is_layer = block.prefix.rpartition(".")[2].isdigit()
        modules = {alias.partition(".")[0] for aliases in BLOCK_NAMES.values() for alias in aliases if "." in alias}
        scopes |= {block.key(module) + "." for module in modules} if is_layer else {block.key("")}
    elif isinstance(into, Experts) and "output_bias" in names:
        raise ValueError(
            f"{block.key(names['output_bias'])} is a bias of the whole block, which Experts does not have: load into a MoE with "
            "output_bias=True"
        )
    unexpected = [key for key in source.names() if key not in used and any(key.startswith(scope) for scope in scopes)]
    if missing or unexpected:
        what = "the checkpoint" if into is None else type(into).__name__
        raise ValueError(
            f"{block.prefix or 'the checkpoint'}, read as layout {block.layout!r}, does not match {what}: "
            f"missing {missing}, unexpected {unexpected}"
        )


def _check_module(block: Block, into: Experts | MoE) -> None:
    """The module has the block's sizes."""
    config = into.config
    for name in ("num_experts", "hidden_size", "intermediate_size", "gated", "bias"):
        if getattr(config, name) != getattr(block, name):
            raise ValueError(
                f"into must have {name} = {getattr(block, name)}, as {block.prefix or 'the checkpoint'} has, "
                f"got {getattr(config, name)}"
            )
    if any(tensor.is_meta for tensor in into.state_dict().values()):
        raise ValueError("into is on the meta device: give it memory first, into.to_empty(device=...)")


def _check_beside(source: Source, beside: dict[str, str], home: ExpertWeights) -> None:
    """What stands beside the experts has the module's shapes."""
    for ours, key in beside.items():
        # Ernie's selection bias has a leading axis of one.
        if source.shape(key) not in (shape := tuple(home.block[ours].shape), (1, *shape)):
            raise ValueError(f"{key} must have shape {shape}, as {ours} has, got {source.shape(key)}")


def _check_dtypes(source: Source, block: Block, parts: list[Part]) -> None:
    for part in parts:
        for key in _keys(block, part):
            dtype = source.read(key, slice(0, 0)).dtype
            if part.form == "mxfp4":
                if dtype != torch.uint8:
                    raise TypeError(f"{key} must be uint8, as MXFP4 is stored, got {dtype}")
            elif dtype not in _FLOATS:
                raise TypeError(f"{key} must be float64, float32, bfloat16 or float16, got {dtype}: dequantise it first")


def _allocate(
    source: Source,
    block: Block,
    parts: list[Part],
    names: dict[str, str],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> ExpertWeights:
    """Empty weights in home's form."""
    stored = {part.target: torch.bfloat16 if part.form == "mxfp4" else None for part in parts}
    for part in parts:
        stored[part.target] = stored[part.target] or source.read(_keys(block, part)[0], slice(0, 0)).dtype
    E, D, F = block.num_experts, block.hidden_size, block.intermediate_size
    G = 2 * F if block.gated else F
    up = stored.get("gate_up") or stored["up"]

    def empty(own: torch.dtype | None, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype or own, device=device)

    beside = {ours: source.read(block.key(theirs)) for ours, theirs in names.items()}
    return ExpertWeights(
        gate_up_proj=empty(up, E, G, D),
        down_proj=empty(stored["down"], E, D, F),
        gate_up_bias=empty(stored.get("gate_up_bias") or stored.get("up_bias"), E, G) if block.bias else None,
        down_bias=empty(stored["down_bias"], E, D) if block.bias else None,
        gated=block.gated,
        gate_up_layout=LAYOUTS[block.layout].rows,
        block={ours: empty(tensor.dtype, *tensor.shape) for ours, tensor in beside.items()},
        layout=block.layout,
        prefix=block.prefix,
        block_names=names,
    )


def _read(source: Source, block: Block, part: Part, dtype: torch.dtype) -> Iterator[Tensor]:
    """Each expert's tensor, in the part's own orientation."""
    for expert in range(block.num_experts):
        keys = [block.key(name.format(expert)) for name in part.names()]
        match part.form:
            case "each":
                yield source.read(keys[0])
            case "stack":
                yield source.read(keys[0], slice(expert, expert + 1))[0]
            case "flat":
                size = source.shape(keys[0])[0] // block.num_experts
                yield source.read(keys[0], slice(expert * size, (expert + 1) * size))
            case "mxfp4":
                blocks, scales = (source.read(key, slice(expert, expert + 1))[0] for key in keys)
                yield dequantize_mxfp4(blocks, scales, dtype)


@torch.no_grad()
def _copy(source: Source, block: Block, parts: list[Part], home: ExpertWeights) -> None:
    for part in parts:
        for expert, piece in enumerate(_read(source, block, part, home.down_proj.dtype)):
            oriented = piece.T if part.transposed else piece
            for ours, theirs in pieces(home, oriented, part.target, expert, LAYOUTS[block.layout].rows):
                ours.copy_(theirs)
