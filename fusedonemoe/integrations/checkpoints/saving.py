"""From a block's weights to the tensors of a layout."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusedonemoe.checks import check_one_of
from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.layouts import LAYOUTS, Part, piece_shape
from fusedonemoe.integrations.checkpoints.weights import ExpertWeights, check_weights, pieces, weights_of
from fusedonemoe.layers import Experts, MoE

_WRITABLE = tuple(name for name, layout in LAYOUTS.items() if layout.writable)


def to_state_dict(
    block: Experts | MoE | ExpertWeights,
    layout: str | None = None,
    *,
    prefix: str | None = None,
    block_names: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Write a block's weights in a layout's names, order and orientation.

    ``to_state_dict(load_experts(x)) == x``, bit for bit. A tensor that the layout stores as it is in memory is the module's
    own, detached, as in ``state_dict()``; the others are copies.

    Args:
        block: a module, a :class:`~fusedonemoe.MoE` with its router and shared branch; or what :func:`load_experts` returned.
        layout: a name of :data:`LAYOUTS`; None for the one that the weights were read in.
        prefix: put before each name, with a dot; None for what the weights were read with, nothing for a module.
        block_names: names below the prefix for the tensors other than the experts', by :class:`~fusedonemoe.MoE`'s names, where
            they differ from the layout's: ``{"gate.weight": "router.weight"}``. A :class:`Block` has those of its checkpoint.

    Returns:
        Contiguous tensors by name.

    Raises:
        TypeError: ``block`` is none of these, a module without a layout, or one with sharded or quantised weights.
        ValueError: a layout that is unknown, cannot be written, or has no place for a tensor; shapes that do not fit.

    Example:
        >>> from fusedonemoe import MoE
        >>> from fusedonemoe.integrations.checkpoints import to_state_dict
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> {name: tuple(tensor.shape) for name, tensor in to_state_dict(moe, "torchtitan", prefix="layers.0.moe").items()}
        {'layers.0.moe.experts.w1_EFD': (4, 32, 16), 'layers.0.moe.experts.w3_EFD': (4, 32, 16),
         'layers.0.moe.experts.w2_EDF': (4, 16, 32), 'layers.0.moe.router.gate.weight': (4, 16)}
    """
    if isinstance(block, Experts | MoE):
        if layout is None:
            raise TypeError(f"layout must be one of {_WRITABLE}: a module does not say which")
        weights = weights_of(block)
    elif isinstance(block, ExpertWeights):
        check_weights(block)
        weights = block
    else:
        raise TypeError(f"block must be an Experts, a MoE or ExpertWeights, got {type(block).__name__}")
    name = weights.layout if layout is None else layout
    check_one_of("layout", name, _WRITABLE)
    parts = _parts_for(weights, name)
    named = _names_for(weights, name, dict(block_names or {}))
    written: dict[str, Tensor] = {}
    with torch.no_grad():
        for part in parts:
            written |= _write(weights, part, LAYOUTS[name].rows)
        for ours, theirs in named.items():
            tensor = weights.block[ours].contiguous()
            # Ernie's selection bias has a leading axis of one.
            written[theirs] = tensor[None] if theirs.startswith("moe_statics.") and tensor.dim() == 1 else tensor
    before = weights.prefix if prefix is None else prefix.removesuffix(".")
    return {f"{before}.{key}" if before else key: tensor for key, tensor in written.items()}


def _parts_for(weights: ExpertWeights, name: str) -> list[Part]:
    rule = LAYOUTS[name]
    if rule.gated != weights.gated:
        kind = {True: "gated", False: "plain"}
        raise ValueError(f"layout {name!r} is of {kind[rule.gated]} experts, the block's are {kind[weights.gated]}")
    biases = [part for part in rule.parts if part.target.endswith("bias")]
    if weights.down_bias is not None and not biases:
        raise ValueError(f"layout {name!r} has no place for the experts' biases")
    if weights.down_bias is None and any(part.required for part in biases):
        raise ValueError(f"layout {name!r} has biases, the block's experts have none")
    return [part for part in rule.parts if weights.down_bias is not None or part not in biases]


def _names_for(weights: ExpertWeights, name: str, given: dict[str, str]) -> dict[str, str]:
    """The names of a block's tensors other than the experts'."""
    if unknown := sorted(given.keys() - weights.block.keys()):
        raise ValueError(f"block_names must be of {sorted(weights.block)}, got {unknown}")
    known = dict(LAYOUTS[name].block_names) | (weights.block_names if name == weights.layout else {}) | given
    if "output_bias" in weights.block and "output_bias" not in known:
        raise ValueError(f"layout {name!r} has no place for output_bias: name it in block_names")
    return {ours: known.get(ours, BLOCK_NAMES[ours][0]) for ours in weights.block}


def _write(weights: ExpertWeights, part: Part, order: str) -> dict[str, Tensor]:
    """One part's tensors: a view of home, where home has all experts in the part's order, orientation and one by one."""
    E, D, F = weights.down_proj.shape
    home = weights.stack(part.target)
    view = home.transpose(1, 2) if part.transposed else home
    halves = weights.gated and not part.target.startswith("down")
    as_stored = not halves or (part.target.startswith("gate_up") and order == weights.gate_up_layout)
    if part.form != "each" and as_stored and view.is_contiguous():
        return {part.name: view.flatten(0, 1) if part.form == "flat" else view}
    shape = piece_shape(part.target, D, F)[:: -1 if part.transposed else 1]
    if part.form == "each":
        written = {part.name.format(expert): home.new_empty(shape) for expert in range(E)}
        experts = [*written.values()]
    else:
        stack = home.new_empty(E, *shape)
        written = {part.name: stack.flatten(0, 1) if part.form == "flat" else stack}
        experts = [*stack]
    for expert, piece in enumerate(experts):
        for ours, theirs in pieces(weights, piece.T if part.transposed else piece, part.target, expert, order):
            theirs.copy_(ours)
    return written
