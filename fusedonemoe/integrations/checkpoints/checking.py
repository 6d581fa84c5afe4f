"""Checks of a checkpoint against a layout and a module, and of the memory that it is written into, before a number is read."""

from collections.abc import Iterable
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.blocks import Block
from fusedonemoe.integrations.checkpoints.files import FLOATS
from fusedonemoe.integrations.checkpoints.layouts import LAYOUTS, Part
from fusedonemoe.integrations.checkpoints.sources import Source
from fusedonemoe.integrations.checkpoints.weights import ExpertWeights
from fusedonemoe.layers import Experts, MoE

Extent = tuple[str, int, int, str]
"""Device, first byte and the byte after the last one, and the name of the tensor there."""


def present_parts(block: Block) -> list[Part]:
    """The layout's parts, without biases that the checkpoint does not have."""
    layout = LAYOUTS[block.layout]
    parts = [part for part in layout.parts if part.names()[0] in block.names]
    lost = [part.name for part in layout.parts if part not in parts]
    if block.bias and lost:
        raise ValueError(f"{block.prefix or 'the checkpoint'} has some of the experts' biases, but not {lost}")
    return parts


def keys_of(block: Block, part: Part) -> list[str]:
    """Every tensor's name of one part."""
    experts = range(block.num_experts) if part.form == "each" else range(1)
    return [block.key(name.format(expert)) for name in part.names() for expert in experts]


def check_shapes(source: Source, block: Block, parts: list[Part]) -> None:
    """Check that all experts have what was found for the first."""
    for part in parts:
        if part.form == "each":
            first, *others = keys_of(block, part)
            for key in others:
                if source[key].shape != source[first].shape:
                    raise ValueError(f"{key} must have shape {source[first].shape}, as {first} has, got {source[key].shape}")
        elif part.form == "mxfp4":
            blocks, scales = keys_of(block, part)
            if source[scales].shape != source[blocks].shape[:-1]:
                raise ValueError(
                    f"{scales} must have shape {source[blocks].shape[:-1]} to fit {blocks}, got {source[scales].shape}"
                )


def check_names(
    source: Source, block: Block, beside: dict[str, str], into: Experts | MoE | None, filled: ExpertWeights | None
) -> None:
    """Nothing is missing and nothing is left over."""
    used = {key for part in present_parts(block) for key in keys_of(block, part)} | {*beside.values()}
    missing: list[str] = []
    scopes = {block.key(part.name.partition(".")[0]) + "." for part in LAYOUTS[block.layout].parts}
    if isinstance(into, MoE) and filled is not None:
        has = filled.block.keys()
        missing = [block.key(BLOCK_NAMES[ours][0]) for ours in sorted(has - beside.keys())]
        used -= {key for ours, key in beside.items() if ours not in has}
        # Where the block has no module of its own, its neighbours in the layer are none of its tensors.
        is_layer = block.prefix.rpartition(".")[2].isdigit()
        modules = {alias.partition(".")[0] for aliases in BLOCK_NAMES.values() for alias in aliases if "." in alias}
        scopes |= {block.key(module) + "." for module in modules} if is_layer else {block.key("")}
    elif isinstance(into, Experts) and "output_bias" in beside:
        raise ValueError(
            f"{beside['output_bias']} is a bias of the whole block, which Experts does not have: load into a MoE with "
            "output_bias=True"
        )
    unexpected = [key for key in source if key not in used and key.startswith(tuple(scopes))]
    if hidden := {key: file for key, file in source.unlisted.items() if key.startswith(tuple(scopes))}:
        raise ValueError(
            f"the index and the shards must agree on {block.prefix or 'the checkpoint'}, got tensors in files that the index "
            f"does not name for them: {dict(list(hidden.items())[:5])}"
        )
    if missing or unexpected:
        what = "the checkpoint" if into is None else type(into).__name__
        raise ValueError(
            f"{block.prefix or 'the checkpoint'}, read as layout {block.layout!r}, does not match {what}: "
            f"missing {missing}, unexpected {unexpected}"
        )


def check_module(block: Block, into: Experts | MoE) -> None:
    """The module has the block's sizes."""
    config = into.config
    for name in ("num_experts", "hidden_size", "intermediate_size", "gated", "bias"):
        if getattr(config, name) != getattr(block, name):
            raise ValueError(
                f"into must have {name} = {getattr(block, name)}, as {block.prefix or 'the checkpoint'} has, "
                f"got {getattr(config, name)}"
            )


def block_shapes(block: Block) -> dict[str, tuple[int, ...]]:
    """Shapes of other tensors that the experts' sizes decide; the shared branch has a width of its own."""
    E, D = block.num_experts, block.hidden_size
    return {
        "gate.weight": (E, D),
        "gate.bias": (E,),
        "gate.e_score_correction_bias": (E,),
        "output_bias": (D,),
        "shared_expert_gate.weight": (1, D),
    }


def _check_numbers(source: Source, key: str, purpose: str = "") -> None:
    """A tensor has floats that can be read."""
    if why := source[key].refusal():
        raise TypeError(f"{key} must be {why}")
    if source[key].dtype not in FLOATS:
        raise TypeError(
            f"{key} must be float64, float32, bfloat16 or float16{purpose}, got {source[key].dtype}: dequantise it first"
        )


def check_beside(source: Source, beside: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
    """The router, the shared branch and the biases have these shapes, and numbers that can be rounded to the module's dtype."""
    for ours, key in beside.items():
        _check_numbers(source, key, f" to be {ours}")
        # Ernie's selection bias has a leading axis of one.
        if ours in shapes and source[key].shape not in (shape := shapes[ours], (1, *shape)):
            raise ValueError(f"{key} must have shape {shape}, as {ours} has, got {source[key].shape}")


def check_dtypes(source: Source, block: Block, parts: list[Part]) -> None:
    """The experts' tensors have numbers that can be converted."""
    for part in parts:
        for key in keys_of(block, part):
            if part.form != "mxfp4":
                _check_numbers(source, key)
            elif why := source[key].refusal():
                raise TypeError(f"{key} must be {why}")
            elif source[key].dtype != torch.uint8:
                raise TypeError(f"{key} must be uint8, as MXFP4 is stored, got {source[key].dtype}")


def stored_dtypes(source: Source, block: Block, parts: list[Part]) -> dict[str, torch.dtype]:
    """Return a dtype that holds all that is stored for each stack of home: ``up`` with the gate, ``down``, and their biases."""
    held: dict[str, set[torch.dtype]] = {}
    for part in parts:
        stack = part.target.replace("gate_up", "up").replace("gate", "up")
        # check_dtypes() has refused all that torch has no dtype for.
        dtypes = {torch.bfloat16} if part.form == "mxfp4" else {source[key].dtype for key in keys_of(block, part)}
        held[stack] = held.get(stack, set()) | dtypes  # type: ignore[operator]
    return {stack: reduce(torch.promote_types, dtypes) for stack, dtypes in held.items()}


def named_tensors(home: ExpertWeights) -> dict[str, Tensor]:
    """Every tensor of a block's weights, by the name that messages use."""
    up = "gate_up_proj" if home.gated else "up_proj"
    named = {
        f"experts.{up}": home.gate_up_proj,
        "experts.down_proj": home.down_proj,
        f"experts.{up}_bias": home.gate_up_bias,
        "experts.down_proj_bias": home.down_bias,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None} | home.block


def _overlaps_itself(tensor: Tensor) -> bool:
    """Two elements may be one memory: an expanded tensor, or one with a stride below what smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _extent(tensor: Tensor) -> tuple[str, int, int]:
    """Device, first byte and the byte after the last one."""
    span = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def check_writable(home: ExpertWeights) -> list[Extent]:
    """Every tensor of a module can take the checkpoint's numbers. Returns the memory that they lie in."""
    tensors = named_tensors(home)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"into is on the meta device ({name}): give it memory first, into.to_empty(device=...)")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} of into must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name} of into was made in inference mode: load it within torch.inference_mode(), too")
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{name} of into must have memory of its own for each element, got strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}"
            )
    extents = sorted((*_extent(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    for (place, _, end, owner), (device, first, _, name) in pairwise(extents):
        if device == place and first < end:
            raise ValueError(f"{owner} and {name} of into share memory: what is loaded into one would overwrite the other")
    return extents


def check_apart(key: str, pairs: Iterable[tuple[Tensor, Tensor]], extents: list[Extent]) -> None:
    """A tensor of a state dict in memory shares none with the module, or is the very tensor that it is loaded into."""

    def place(tensor: Tensor) -> object:
        return tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.shape

    for ours, theirs in pairs:
        device, first, last = _extent(theirs)
        holders = [name for there, a, b, name in extents if there == device and a < last and first < b]
        if holders and theirs.numel() and place(ours) != place(theirs):
            raise ValueError(
                f"{key} shares memory with {holders[0]} of into and would be overwritten while it is read: give a clone"
            )
