"""Checks of tensors for the public functions; the messages name the argument, what was expected and what came."""

import torch
from torch import Tensor

from fusedonemoe.ops import library
from fusedonemoe.ops.operands import INTEGERS, MOST_ROWS, check_rows
from fusedonemoe.ops.values import check_count as check_count
from fusedonemoe.ops.values import check_flag as check_flag
from fusedonemoe.ops.values import check_integer as check_integer
from fusedonemoe.ops.values import check_number as check_number
from fusedonemoe.ops.values import check_one_of as check_one_of
from fusedonemoe.ops.values import check_save_percent as check_save_percent

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Check for a shape."""
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_dim(name: str, tensor: Tensor, meaning: str) -> None:
    """Check for as many dimensions as ``meaning`` names, as in ``"E, G, D"``."""
    expected = meaning.count(",") + 1
    if tensor.dim() != expected:
        raise ValueError(f"{name} must have {expected} dimensions [{meaning}], got shape {tuple(tensor.shape)}")


def check_tensor(name: str, value: object) -> None:
    """Check for a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_ids(experts: Tensor, name: str = "experts") -> None:
    """Check for expert ids of an integer dtype."""
    check_tensor(name, experts)
    if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {experts.dtype}")


def check_choices(experts: Tensor) -> None:
    """Check for expert ids ``[..., K]``, at least one for each token."""
    check_ids(experts)
    if experts.dim() < 1 or experts.shape[-1] < 1:
        raise ValueError(f"experts must have shape [..., K] with K >= 1, got {tuple(experts.shape)}")
    check_rows(experts)


def check_same_device(name: str, tensor: Tensor, owner: str, device: torch.device) -> None:
    """Check for a tensor on the device of its owner."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {owner} ({device}), got {tensor.device}")


def check_float(name: str, tensor: Tensor) -> None:
    """Check for a tensor of a dtype that is computed in."""
    check_tensor(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def check_logits(logits: Tensor) -> None:
    """Check for router logits ``[..., E]`` of at least one expert."""
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., E] with E >= 1, got {tuple(logits.shape)}")


def check_selection_bias(selection_bias: Tensor, logits: Tensor) -> None:
    """Check for one entry for each expert."""
    check_float("selection_bias", selection_bias)
    check_shape("selection_bias", selection_bias, logits.shape[-1:])
    check_same_device("selection_bias", selection_bias, "logits", logits.device)


def check_last_dim(name: str, tensor: Tensor, size: int) -> None:
    """Check for a tensor ``[..., size]``."""
    if tensor.shape[-1:] != (size,):
        raise ValueError(f"{name} must have shape [..., {size}], got {tuple(tensor.shape)}")


def check_fits(x: Tensor, D: int, name: str) -> None:
    """Check that rows of ``x`` are as wide as the rows of the weight ``name``."""
    if x.shape[-1] != D:
        raise ValueError(f"x must have shape [..., {D}] to fit {name}, got {tuple(x.shape)}")


def check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    """Check for expert weights on the device of x, and in its dtype unless autocast is about to cast both."""
    check_float(name, tensor)
    check_same_device(name, tensor, "x", x.device)
    if tensor.dtype != x.dtype and library.autocast_dtype(x.device.type) is None:
        raise TypeError(f"{name} must have the dtype of x ({x.dtype}), got {tensor.dtype}")


def check_routing(x: Tensor, experts: Tensor, weights: Tensor) -> None:
    """Check for ids and weights ``[..., K]`` on the device of x ``[..., D]``."""
    # Each call of a check stands behind its condition: one that finds no fault costs a layer of one token more than its kernel.
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        check_float("x", x)
    if not isinstance(experts, Tensor) or experts.dtype not in INTEGERS:
        check_ids(experts)
    if not isinstance(weights, Tensor) or weights.dtype not in _FLOATS:
        check_float("weights", weights)
    x_shape, experts_shape, device = x.shape, experts.shape, x.device
    if not x_shape or x_shape[-1] < 1:
        raise ValueError(f"x must have shape [..., D] with D >= 1, got {tuple(x_shape)}")
    if not experts_shape or experts_shape[-1] < 1:
        raise ValueError(f"experts must have shape [..., K] with K >= 1, got {tuple(experts_shape)}")
    expected = x_shape[:-1] + experts_shape[-1:]
    if experts_shape != expected:
        check_shape("experts", experts, expected)
    if not torch.compiler.is_dynamo_compiling() and isinstance(rows := experts.numel(), int) and rows > MOST_ROWS:
        check_rows(experts)
    if weights.shape != experts_shape:
        check_shape("weights", weights, experts_shape)
    if experts.device != device:
        check_same_device("experts", experts, "x", device)
    if weights.device != device:
        check_same_device("weights", weights, "x", device)
