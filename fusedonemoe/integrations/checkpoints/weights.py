"""A block's weights in home's form, and the view of one expert's rows that every layout is read into and written from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.checks import check_one_of
from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.blocks import Block
from fusedonemoe.integrations.checkpoints.files import FLOATS, reach, refusal
from fusedonemoe.integrations.checkpoints.layouts import Target, home_shapes, module_names, stack_of
from fusedonemoe.layers import Experts, MoE
from fusedonemoe.layers.panels import home_of, packed_names, write_home
from fusedonemoe.ops.activation import split_gate_up
from fusedonemoe.ops.records import GATE_UP_LAYOUTS

Extent = tuple[str, int, int, str]
"""Device, first byte and the byte after the last one, and the name of the tensor there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """A block's weights, as :func:`fusedonemoe.functional.experts_mlp` takes them.

    Attributes:
        gate_up_proj: ``[E, 2F, D]``, or the up rows ``[E, F, D]`` when plain.
        down_proj: ``[E, D, F]``.
        gate_up_bias: ``[E, 2F]``, ``[E, F]`` when plain, or None.
        down_bias: ``[E, D]`` or None.
        gated: whether ``gate_up_proj`` holds gate and up.
        gate_up_layout: order of its rows.
        block: what else the block has, by :class:`~fusedonemoe.MoE`'s names: ``gate.weight`` ``[E, D]``, ``gate.bias``,
            ``gate.e_score_correction_bias``, ``shared_expert.*``, ``shared_expert_gate.weight``; and ``output_bias`` ``[D]``,
            which is added to each token's sum once.
        layout: the layout that they were read in.
        prefix: what stood before their names.
        block_names: the names below the prefix that the tensors of ``block`` had.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gated: bool = True
    gate_up_layout: str = "gate_up"
    block: dict[str, Tensor] = field(default_factory=dict)
    layout: str = "hf"
    prefix: str = ""
    block_names: dict[str, str] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.down_proj.shape[0]

    def stack(self, target: Target) -> Tensor:
        """Return all experts' tensor that a part of a checkpoint belongs to."""
        return getattr(self, stack_of(target))


def weights_of(module: Experts | MoE, *, to_write: bool = False) -> ExpertWeights:
    """A module's parameters without autograd: themselves, and of packed ones the home form in new tensors.

    ``to_write`` refuses tensors that are not the module's own parameters and buffers: what is written into others is lost.
    """
    experts = module.experts if isinstance(module, MoE) else module
    if not isinstance(experts, Experts):
        raise TypeError(f"experts must be Experts, with the plain weights that checkpoints hold, got {type(experts).__name__}")
    config = experts.config
    own: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own_ids = {id(tensor) for tensor in own.values()}
    names, packed = module_names(config.gated), packed_names(experts)
    held: dict[str, Any] = {}
    for stack, shape in home_shapes(config.num_experts, config.hidden_size, config.intermediate_size, config.gated).items():
        if stack.endswith("bias") and not config.bias:
            continue
        name, flipped = names[stack], config.transposed and len(shape) == 3
        weight = getattr(experts, name, None)
        if to_write and isinstance(weight, Tensor) and id(weight) not in own_ids:
            raise _computed(f"experts.{name}")
        if name in packed:
            weight = home_of(experts, name)
        weight = _readable(f"experts.{name}", weight, (shape[0], *shape[:0:-1]) if flipped else shape)
        held[stack] = weight.mT if flipped else weight
    block = {}
    if isinstance(module, MoE):
        for key, value in module.state_dict(keep_vars=to_write).items():
            if key.startswith("experts."):
                continue
            if to_write and key not in own and id(value) not in own_ids and key in BLOCK_NAMES:
                raise _computed(key)
            # A hook may have put copies there, and what is written into those is lost.
            block[key] = _readable(key, own.get(key, value) if to_write else value, None)
        if unknown := sorted(block.keys() - BLOCK_NAMES.keys()):
            raise ValueError(f"module must have the tensors of a MoE, got {unknown} as well, which no checkpoint has")
    return ExpertWeights(**held, gated=config.gated, gate_up_layout=config.gate_up_layout, block=block)


def _readable(name: str, tensor: object, shape: tuple[int, ...] | None) -> Tensor:
    """A module's tensor without autograd, if its numbers are its own and lie in one piece of memory."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of the module, got {type(tensor).__name__}")
    if why := refusal(tensor):
        raise TypeError(f"{name} must be {why}: load before weights are sharded or quantised")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, as the configuration says, got {tuple(tensor.shape)}")
    if tensor.grad_fn is not None:
        raise _computed(name)
    return tensor.detach()


def _computed(name: str) -> ValueError:
    return ValueError(
        f"{name} must be a parameter, got the result of a computation: remove the parametrisation or the pruning first"
    )


def check_weights(weights: ExpertWeights) -> None:
    """Weights that somebody put together fit each other."""
    down = _readable("down_proj", weights.down_proj, None)
    if down.dim() != 3:
        raise ValueError(f"down_proj must have 3 dimensions [E, D, F], got shape {tuple(down.shape)}")
    check_one_of("gate_up_layout", weights.gate_up_layout, GATE_UP_LAYOUTS)
    if (weights.gate_up_bias is None) != (weights.down_bias is None):
        raise ValueError("gate_up_bias and down_bias must both be given, or neither")
    E, D, F = down.shape
    for name, shape in home_shapes(E, D, F, weights.gated).items():
        if not name.endswith("bias") or weights.down_bias is not None:
            _readable(name, getattr(weights, name), shape)
    if unknown := sorted(weights.block.keys() - BLOCK_NAMES.keys()):
        raise ValueError(f"block must have names of {sorted(BLOCK_NAMES)}, got {unknown}")
    for name, tensor in weights.block.items():
        _readable(name, tensor, None)


def store_packed(module: Experts | MoE, home: ExpertWeights) -> None:
    """Write what :func:`weights_of` returned back into the parameters that are packed, of which it holds copies."""
    experts = module.experts if isinstance(module, MoE) else module
    for name in packed_names(experts):
        write_home(experts, name, home.down_proj if name == "down_proj" else home.gate_up_proj)


def pieces(home: ExpertWeights, piece: Tensor, target: Target, expert: int, order: str) -> list[tuple[Tensor, Tensor]]:
    """Views that hold the same numbers, in home and in a checkpoint's piece of one expert, oriented as in home.

    ``order`` is that of the rows of ``gate_up`` in the checkpoint.
    """
    stored, half = home.stack(target)[expert], target.removesuffix("_bias")
    if half == "down" or not home.gated or (half == "gate_up" and order == home.gate_up_layout):
        return [(stored, piece)]
    if half == "gate_up":
        return list(zip(_gate_and_up(stored, home.gate_up_layout), _gate_and_up(piece, order), strict=True))
    return [(_gate_and_up(stored, home.gate_up_layout)[half == "up"], piece)]


def _gate_and_up(rows: Tensor, order: str) -> list[Tensor]:
    """Views of the gate's and the up-projection's rows (first axis) of one expert."""
    return [half.movedim(-1, 0) for half in split_gate_up(rows.movedim(0, -1), order)]


def named_tensors(home: ExpertWeights) -> dict[str, Tensor]:
    """Every tensor of a block's weights, by the name that messages use."""
    named = {f"experts.{name}": getattr(home, stack) for stack, name in module_names(home.gated).items()}
    return {name: tensor for name, tensor in named.items() if tensor is not None} | home.block


def _overlaps_itself(tensor: Tensor) -> bool:
    """Two elements may be one memory: an expanded tensor, or one with a stride below what smaller strides reach."""
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= last:
                return True
            last += stride * (size - 1)
    return False


def _extent(tensor: Tensor, name: str) -> Extent:
    first = tensor.data_ptr()
    return str(tensor.device), first, first + reach(tensor) * tensor.element_size(), name


def check_target(block: Block, into: Experts | MoE, home: ExpertWeights) -> list[Extent]:
    """Check that a module has a block's sizes and can take its numbers; return the memory of its tensors."""
    for name in ("num_experts", "hidden_size", "intermediate_size", "gated", "bias"):
        wanted, got = getattr(block, name), getattr(into.config, name)
        if got != wanted:
            raise ValueError(f"into must have {name} = {wanted}, as {block.prefix or 'the checkpoint'} has, got {got}")
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
    extents = sorted(_extent(tensor, name) for name, tensor in tensors.items() if tensor.numel())
    for (place, _, end, owner), (device, first, _, name) in pairwise(extents):
        if device == place and first < end:
            raise ValueError(f"{owner} and {name} of into share memory: what is loaded into one would overwrite the other")
    return extents


def check_apart(key: str, pairs: Iterable[tuple[Tensor, Tensor]], extents: list[Extent]) -> None:
    """Check that a tensor in memory shares none with the module, or is the very tensor that it is loaded into."""

    def place(tensor: Tensor) -> object:
        return tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.shape

    for ours, theirs in pairs:
        device, first, last, _ = _extent(theirs, key)
        holders = [name for there, a, b, name in extents if there == device and a < last and first < b]
        if holders and theirs.numel() and place(ours) != place(theirs):
            raise ValueError(
                f"{key} shares memory with {holders[0]} of into and would be overwritten while it is read: give a clone"
            )
