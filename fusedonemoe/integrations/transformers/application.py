"""enable, apply and their undoing: what changes in transformers and in a loaded model, and how it is put back."""

import weakref
from typing import Any

from torch import Tensor, nn

from fusedonemoe.integrations.transformers import registry
from fusedonemoe.integrations.transformers.experts import experts_forward
from fusedonemoe.integrations.transformers.gates import activation_of
from fusedonemoe.integrations.transformers.layers import FoundLayer, find_layers
from fusedonemoe.integrations.transformers.report import LayerReport, Report
from fusedonemoe.integrations.transformers.routers import RouterPlan, find_router, fuse_router, is_fused, unfuse_router
from fusedonemoe.ops.records import PLAIN

_applied: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
# On a module of experts, the implementation that its configuration named before. What apply did is kept on the modules, so that
# copies, pickles and parts of a model, and what wraps it, know it too.
_BEFORE = "_fusedonemoe_before"


def enable() -> None:
    """Register ``"fusedonemoe"`` with transformers, next to its ``"eager"``, ``"grouped_mm"`` and ``"batched_mm"``.

    Afterwards ``from_pretrained(..., experts_implementation="fusedonemoe")`` and
    ``model.set_experts_implementation("fusedonemoe")`` work. transformers does not save the choice with a model.

    Raises:
        ImportError: transformers 5 or newer is not installed.
    """
    registry.register(experts_forward)


def disable() -> None:
    """Take the name out again, after :func:`unapply` of every model that :func:`apply` was given.

    A copy of such a model, and one that was loaded with ``experts_implementation="fusedonemoe"``, raise transformers' own
    error from then on, until they are set to another.
    """
    for model in list(_applied):
        unapply(model)
    registry.unregister()


def apply(model: nn.Module, *, routers: bool = True) -> Report:
    """Let this library compute the mixture-of-experts layers of a loaded model.

    Experts are reached through transformers' registry, so parameters, checkpoints, adapters and parallel plans stay as they
    are. With ``routers``, a router is replaced where its own forward, called with random weights and inputs in float32, gives
    what one of this library's rules gives. The report says what was replaced, layer by layer, and why not the rest.

    Raises:
        ImportError: transformers 5 or newer is not installed.
        TypeError: ``model`` is no ``torch.nn.Module``.

    Example:
        >>> from transformers import AutoModelForCausalLM, Qwen3MoeConfig
        >>> from fusedonemoe.integrations.transformers import apply
        >>> sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_hidden_layers": 2, "vocab_size": 64}
        >>> model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, num_experts_per_tok=2))
        >>> print(apply(model))
        2 of 2 MoE layers use fusedonemoe.
          2 x Qwen3MoeExperts: silu, fused; router: softmax, top 2, fused
    """
    _check_model(model)
    enable()
    _restore_implementations(model)
    fused_before = {module for module in model.modules() if is_fused(module)}
    _applied.add(model)
    previous: dict[int, Any] = {}
    fused: list[nn.Module] = []
    report = Report(tuple(_apply_to(layer, previous, fused, routers) for layer in find_layers(model)))
    for router in fused_before.difference(fused):
        unfuse_router(router)
    return report


def unapply(model: nn.Module) -> None:
    """Undo :func:`apply` in a model, or in a part of one: the implementations from before, and the routers' own forwards.

    The model may be a copy of what :func:`apply` was given, a part of it, or what wraps it now; any other stays as it is. What
    others have put around a router since works as before. The layers of a model share one configuration, so their experts go
    back together.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    _check_model(model)
    _restore_implementations(model)
    for module in model.modules():
        unfuse_router(module)
    _applied.discard(model)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _apply_to(layer: FoundLayer, previous: dict[int, Any], fused: list[nn.Module], routers: bool) -> LayerReport:
    experts, kind = layer.module, type(layer.module).__name__
    if refusal := layer.refusal or _refusal(experts):
        return LayerReport(layer.name, kind, False, refusal)
    _set_implementation(experts, previous)
    description = _describe_experts(experts)
    if not routers:
        return LayerReport(layer.name, kind, True, description, "its own, as asked")
    router, why = find_router(layer.parent, experts)
    if isinstance(why, RouterPlan):
        assert router is not None
        fuse_router(router, why)
        fused.append(router)
        return LayerReport(layer.name, kind, True, description, f"{why}, fused", True)
    return LayerReport(layer.name, kind, True, description, f"its own: {why}")


def _refusal(experts: nn.Module) -> str:
    """Why the experts function cannot compute this module."""
    if not registry.is_ours(experts):
        return "its experts ask a registry of their own (quantised weights)"
    names = ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")
    for name in names:
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"it has no stacked weight {name} [experts, rows, columns]"
        if not weight.is_floating_point():
            return f"its {name} is quantised ({weight.dtype})"
    if not hasattr(experts.config, "_experts_implementation"):
        return "its configuration has no experts implementation to set"
    return ""


def _describe_experts(experts: Any) -> str:
    if getattr(experts, "has_post_expert_norm", False):
        return "unfused, two grouped products with the experts' own gate between and their norm behind"
    act = activation_of(experts)
    if act is None:
        return "unfused, two grouped products with the experts' own gate between"
    layout = "" if act.layout in (PLAIN, "gate_up") else f" {act.layout}"
    plain = ", no gate" if act.layout == PLAIN else ""
    return f"{act.name}{layout}{plain}, fused"


def _set_implementation(experts: Any, previous: dict[int, Any]) -> None:
    """Set it in this module's configuration alone: the public setter would also set parts without experts."""
    config = experts.config
    if config._experts_implementation != registry.NAME:
        previous[id(config)] = config._experts_implementation
        config._experts_implementation_internal = registry.NAME
    if id(config) in previous:  # otherwise somebody else chose this library
        setattr(experts, _BEFORE, previous[id(config)])


def _restore_implementations(model: nn.Module) -> None:
    """Give each configuration the implementation that it named, unless it was set to another since."""
    for module in model.modules():
        if _BEFORE in vars(module):
            before, config = vars(module).pop(_BEFORE), vars(module)["config"]
            if config._experts_implementation == registry.NAME:
                config._experts_implementation_internal = before
