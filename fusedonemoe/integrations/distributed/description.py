"""The settings of a model's blocks that every process must share, for :func:`fusedonemoe.agreement.agree`."""

import dataclasses

import torch
from torch import Tensor, nn

import fusedonemoe
from fusedonemoe.layers import Experts, MoE
from fusedonemoe.layers.lora import LoRAExperts
from fusedonemoe.layers.quantized import QuantizedExperts
from fusedonemoe.layers.routers import ProductKeyRouter, TopKRouter
from fusedonemoe.ops.rules import ROUTE_OPTIONS

# Attributes that can be changed after the module was built, or that no configuration holds.
_FIELDS: dict[type[nn.Module], tuple[str, ...]] = {
    TopKRouter: ("top_k", *ROUTE_OPTIONS),
    ProductKeyRouter: ("num_keys", "top_k", "num_heads", "norm_topk_prob", "input_norm"),
    QuantizedExperts: ("dtype", "group_size", "symmetric"),
    LoRAExperts: ("r", "alpha", "targets", "use_rslora"),
}
# How much a process keeps for the backward decides its memory, and no result.
_FREE = ("save_percent",)


def library_versions() -> dict[str, object]:
    """The versions that decide what travels: this library's and torch's, without the part that names a build for a device."""
    return {"version of fusedonemoe": fusedonemoe.__version__, "version of torch": torch.__version__.partition("+")[0]}


def describe_blocks(model: nn.Module) -> dict[str, object]:
    """The versions; and settings and tensors of each block, all that is in it, and of routers and experts, by their names."""
    settings = library_versions()
    kinds = (MoE, Experts, *_FIELDS)
    blocks: list[str] = []
    for name, module in model.named_modules():
        kind = next((kind for kind in kinds if isinstance(module, kind)), None)
        before = f"{name}." if name else ""
        if kind is MoE:
            blocks.append(before)
        elif kind is None and not name.startswith(tuple(blocks)):
            continue
        settings[name or "model"] = (kind or type(module)).__name__
        if kind in _FIELDS:
            settings |= {f"{before}{field}": getattr(module, field) for field in _FIELDS[kind]}
        elif isinstance(module, MoE | Experts):
            config = dataclasses.asdict(module.config)
            settings |= {f"{before}config.{field}": value for field, value in config.items() if field not in _FREE}
        settings |= describe_tensors(module, before)
    return settings


def describe_tensors(module: nn.Module, before: str = "") -> dict[str, object]:
    """The module's own parameters and buffers: shape, dtype, device type, and whether they are trained."""
    described: dict[str, object] = {}
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        kind = "" if type(tensor) in (Tensor, nn.Parameter) else f" {type(tensor).__name__}"
        trained = "trained" if tensor.requires_grad else "not trained"
        dtype = str(tensor.dtype).removeprefix("torch.")
        described[before + name] = _Unquoted(f"{dtype} {tuple(tensor.shape)} on {tensor.device.type}, {trained}{kind}")
    return described


class _Unquoted(str):
    """A text that prints without quotes."""

    __repr__ = str.__str__
