"""How transformers' modules of experts are to be read: their flags, activation and gate, as an :class:`ExpertsForm`."""

from typing import Any

from torch import nn

from fusedonemoe.layers import Experts
from fusedonemoe.lora import ExpertsForm
from fusedonemoe.lora import form_of as form_of_experts


def _activation(act_fn: Any) -> str | None:
    """Our name of an activation; by identity, as a name would not say which of the gelus it is."""
    from transformers import activations

    if act_fn is nn.functional.silu or isinstance(act_fn, nn.SiLU | activations.SiLUActivation):
        return "silu"
    if isinstance(act_fn, nn.GELU):
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    kinds = {
        activations.GELUActivation: "gelu",
        activations.NewGELUActivation: "gelu_tanh",
        activations.GELUTanh: "gelu_tanh",
        activations.ReLUSquaredActivation: "relu2",
        nn.ReLU: "relu",
        nn.Sigmoid: "sigmoid",
    }
    return next((name for kind, name in kinds.items() if isinstance(act_fn, kind)), None)


def _is_experts(module: nn.Module) -> bool:
    """Whether a module has what transformers' decorator of experts gives."""
    parameters = dict(module.named_parameters(recurse=False))
    down = parameters.get("down_proj")
    return down is not None and down.dim() == 3 and hasattr(module, "num_experts") and hasattr(module, "_apply_gate")


def form_of(module: nn.Module) -> ExpertsForm | None:
    """How to read a module of experts, ours or transformers'; None for a module that is none.

    Args:
        module: any.

    Raises:
        ValueError: experts with something between or behind their projections that the operators do not have.
    """
    if isinstance(module, Experts):
        return form_of_experts(module)
    if not _is_experts(module):
        return None
    kind = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{kind} normalises each expert's output, which the operators do not")
    gated = getattr(module, "has_gate", True)
    up = "gate_up_proj" if gated else "up_proj"
    has_bias = getattr(module, "has_bias", False)
    form: dict[str, Any] = {
        "up": up,
        "up_bias": f"{up}_bias" if has_bias else None,
        "down_bias": "down_proj_bias" if has_bias else None,
        "transposed": getattr(module, "is_transposed", False),
        "gated": gated,
        "gate_up_layout": "gate_up" if getattr(module, "is_concatenated", True) else "interleaved",
    }
    from transformers.integrations.moe import _default_apply_gate
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    gate = getattr(type(module), "_apply_gate", None)
    if gated and gate is GptOssExperts._apply_gate:
        alpha, limit = float(module.alpha), float(module.limit)  # type: ignore[arg-type]
        form |= {"activation": "swiglu_oai", "gate_up_layout": "interleaved", "swiglu_alpha": alpha, "swiglu_limit": limit}
        return ExpertsForm(**form)
    if gated and gate is not _default_apply_gate:
        raise ValueError(f"{kind} has a gate of its own, which the operators do not")
    act_fn = getattr(module, "act_fn", None)
    activation = _activation(act_fn)
    if activation is None:
        raise ValueError(f"{kind} has the activation {type(act_fn).__name__}, which the operators do not")
    return ExpertsForm(**form, activation=activation)
