"""The form of transformers' modules of experts: flags, activation and gate, as an :class:`ExpertsForm`."""

from torch import nn

from fusedonemoe.integrations.transformers.gates import activation_of
from fusedonemoe.integrations.transformers.registry import default_gates
from fusedonemoe.layers import Experts
from fusedonemoe.layers.form import ExpertsForm
from fusedonemoe.layers.form import form_of as form_of_experts
from fusedonemoe.ops.options import activation_options


def form_of(module: nn.Module) -> ExpertsForm | None:
    """Return the form of a module of experts, ours or transformers'; None for any other module.

    Raises a ValueError for experts with something between or behind their projections that the operators do not have.
    """
    if isinstance(module, Experts):
        return form_of_experts(module)
    down = dict(module.named_parameters(recurse=False)).get("down_proj")
    if down is None or down.dim() != 3 or not (hasattr(module, "num_experts") and hasattr(module, "_apply_gate")):
        return None  # without the attributes that transformers' decorator of experts sets
    kind = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{kind} normalises each expert's output, which the operators do not")
    gated = getattr(module, "has_gate", True)
    up = "gate_up_proj" if gated else "up_proj"
    act = activation_of(module)
    if act is None:
        own_gate = "_apply_gate" in vars(module) or getattr(type(module), "_apply_gate", None) not in default_gates()
        if gated and own_gate:
            raise ValueError(f"{kind} has a gate of its own, which the operators do not")
        name = type(getattr(module, "act_fn", None)).__name__
        raise ValueError(f"{kind} has the activation {name}, which the operators do not")
    has_bias = getattr(module, "has_bias", False)
    return ExpertsForm(
        up=up,
        up_bias=f"{up}_bias" if has_bias else None,
        down_bias="down_proj_bias" if has_bias else None,
        transposed=getattr(module, "is_transposed", False),
        **activation_options(act),
    )
