"""Checks of the memory that a checkpoint is written into, before the first number is written."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fusedonemoe.integrations.checkpoints.files import FLOATS
from fusedonemoe.integrations.checkpoints.weights import ExpertWeights


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


class Extents:
    """The stretches of memory that tensors lie in."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._found = sorted((*_extent(tensor), name) for name, tensor in tensors.items() if tensor.numel())

    def shared_by_two(self) -> tuple[str, str] | None:
        """The names of two of the tensors that lie in the same memory, if there are any."""
        end, owner, place = 0, "", ""
        for device, first, last, name in self._found:
            if owner and device == place and first < end:
                return owner, name
            if device != place or last > end:
                end, owner, place = last, name, device
        return None

    def holder_of(self, tensor: Tensor) -> str | None:
        """The name of one of the tensors that another one shares memory with, or None."""
        if not tensor.numel():
            return None
        device, first, last = _extent(tensor)
        return next((name for there, a, b, name in self._found if there == device and a < last and first < b), None)


def _extent(tensor: Tensor) -> tuple[str, int, int]:
    """Device, first byte and the byte after the last one."""
    span = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def check_writable(home: ExpertWeights) -> Extents:
    """Every tensor of a module can take the checkpoint's numbers."""
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
    extents = Extents(tensors)
    if shared := extents.shared_by_two():
        raise ValueError(f"{shared[0]} and {shared[1]} of into share memory: what is loaded into one would overwrite the other")
    return extents


def check_apart(key: str, pairs: Iterable[tuple[Tensor, Tensor]], extents: Extents) -> None:
    """A tensor of a state dict in memory shares none with the module, or is the very tensor that it is loaded into."""

    def place(tensor: Tensor) -> object:
        return tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.shape

    for ours, theirs in pairs:
        name = extents.holder_of(theirs)
        if name is not None and place(ours) != place(theirs):
            raise ValueError(f"{key} shares memory with {name} of into and would be overwritten while it is read: give a clone")
