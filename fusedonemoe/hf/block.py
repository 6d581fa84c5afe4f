"""A Hugging Face block's own tensors, by the names that :class:`fusedonemoe.MoE` has for them."""

from typing import Any

from torch import Tensor, nn

# What stands beside the experts: our name, and the names that models and checkpoints have for it. Reading accepts them all;
# writing a checkpoint takes the layout's own, or the first.
BLOCK_NAMES: dict[str, tuple[str, ...]] = {
    "gate.weight": tuple(
        f"{gate}.weight" for gate in ("gate", "router", "router.layer", "router.gate", "gate.wg", "router.classifier")
    ),
    "gate.bias": tuple(f"{gate}.bias" for gate in ("gate", "router", "router.layer", "router.gate")),
    "gate.e_score_correction_bias": (
        *(
            f"{holder}e_score_correction_bias"
            for holder in ("gate.", "", "router.", "gate.moe_statics.", "moe_statics.", "experts.")
        ),
        *("gate.expert_bias", "expert_bias", "expert_bias_E"),
    ),
    "output_bias": ("experts.bias", "bias"),
    "shared_expert_gate.weight": ("shared_expert_gate.weight",),
    **{
        f"shared_expert.{ours}.weight": (
            *(f"{branch}.{ours}.weight" for branch in ("shared_expert", "shared_experts", "shared_mlp")),
            *(f"{branch}.{theirs}.weight" for branch in ("shared_expert", "shared_experts")),
        )
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
    },
}
_EXPERT_NAMES: dict[str, tuple[str, ...]] = {
    "experts.gate_up_proj": ("experts.gate_up_proj", "input_linear.weight"),
    "experts.up_proj": ("experts.up_proj",),
    "experts.down_proj": ("experts.down_proj", "output_linear.weight"),
    **{f"experts.{name}_bias": (f"experts.{name}_bias",) for name in ("gate_up_proj", "up_proj", "down_proj")},
}


def config_of(block: nn.Module) -> Any:
    """The configuration that a block, its experts or its router keep; a ValueError where none of them does."""
    for module in (block, *(getattr(block, name, None) for name in ("experts", "gate", "router"))):
        config = getattr(module, "config", None)
        if config is not None:
            return config
    raise ValueError(f"module {type(block).__name__} keeps no configuration: give config, as MoEConfig.from_hf(model.config)")


def tensors_of(block: nn.Module, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parameters and buffers of a transformers model's sparse block, by the names in a :class:`fusedonemoe.MoE`.

    They are the tensors themselves; ``expected`` are the names and shapes that the MoE has.

    Raises:
        ValueError: a tensor is missing, has another shape, or is left over.
    """
    held: dict[str, Tensor] = dict(block.named_parameters()) | dict(block.named_buffers())
    known = _EXPERT_NAMES | BLOCK_NAMES
    names = {ours: here[0] for ours, aliases in known.items() if (here := [name for name in aliases if name in held])}
    missing = sorted(expected.keys() - names.keys())
    unexpected = sorted(held.keys() - {names[ours] for ours in expected.keys() & names.keys()})
    if missing or unexpected:
        raise ValueError(
            f"module {type(block).__name__} does not have the tensors of this MoE, so it cannot share them: "
            f"missing {missing}, unexpected {unexpected}"
        )
    found = {ours: held[names[ours]] for ours in expected}
    for ours, shape in expected.items():
        if ours == "gate.e_score_correction_bias":  # Ernie's has a leading axis of one; no gradient flows through it
            found[ours] = found[ours].detach().view(-1)
        if tuple(found[ours].shape) != shape:
            raise ValueError(f"{names[ours]} must have shape {shape} to be {ours}, got {tuple(found[ours].shape)}")
    return found
