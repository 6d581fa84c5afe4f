"""The MLP from packed weights, for inference, and the way back to the weights: compiled CPU kernels without gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import mlp as cpu
from fusedonemoe.ops.formats import panels
from fusedonemoe.ops.library.mlp import ACT, as_call
from fusedonemoe.ops.library.registration import NAMESPACE, define_cpu, lib
from fusedonemoe.ops.records import PACKED_ARGUMENTS
from fusedonemoe.ops.shortcut import shortcut

FOR_INFERENCE = (
    "packed weights are for inference, and this call records gradients: call it under torch.no_grad() or "
    "torch.inference_mode(), or call unpack() before training"
)


def _refuse_gradients(*_: Any, **__: Any) -> Any:
    raise RuntimeError(FOR_INFERENCE)


def _home_fake(panels: Tensor, rows: int, width: int, layout: str) -> Tensor:
    return panels.new_empty(panels.shape[0], rows, width)


_packed = as_call(PACKED_ARGUMENTS, cpu.experts_mlp_packed)
define_cpu(
    "experts_mlp_packed(Tensor x, Tensor experts, Tensor weights, Tensor packed_up, Tensor packed_down, Tensor? up_bias, "
    f"Tensor? down_bias, SymInt intermediate_size, {ACT}) -> Tensor",
    _packed,
    lambda x, *_: x.new_empty(x.shape),
)
define_cpu("unpack_weights(Tensor panels, SymInt rows, SymInt width, str layout) -> Tensor", panels.unpack, _home_fake)
for _name in ("experts_mlp_packed", "unpack_weights"):
    # Refused in the forward already: what came out would otherwise look like a constant.
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _refuse_gradients, setup_context=_refuse_gradients, lib=lib)

experts_mlp_packed: Callable[..., Any] = shortcut("experts_mlp_packed", _packed, 7)
unpack_weights: Callable[..., Any] = shortcut("unpack_weights", panels.unpack, 1)
pack_weight: Callable[..., Tensor] = panels.pack
