"""What the public functions ask of their arguments; the messages name the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

from fusedonemoe.ops import library
from fusedonemoe.ops.operands import check_rows
from fusedonemoe.ops.records import NORM_EPS

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """The tensor has this shape."""
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_dim(name: str, tensor: Tensor, meaning: str) -> None:
    """As many dimensions as ``meaning`` names, as in ``"E, G, D"``."""
    expected = meaning.count(",") + 1
    if tensor.dim() != expected:
        raise ValueError(f"{name} must have {expected} dimensions [{meaning}], got shape {tuple(tensor.shape)}")


def check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """The value is an allowed name."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_tensor(name: str, value: object) -> None:
    """The value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_integer(name: str, value: object) -> None:
    """An integer, or a symbolic one; no bool."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_count(name: str, value: int, least: int = 1, most: int | None = None, most_is: str = "") -> None:
    """A whole number from ``least`` to ``most``; ``most_is`` names what sets the upper end."""
    check_integer(name, value)
    if value >= least and (most is None or value <= most):
        return
    upper = f"{most_is} ({most})" if most_is else most
    expected = f"at least {least}" if most is None else f"from {least} to {upper}"
    raise ValueError(f"{name} must be {expected}, got {value}")


def check_number(name: str, value: object) -> None:
    """An integer or a float; no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_ids(experts: Tensor, name: str = "experts") -> None:
    """Expert ids of an integer dtype."""
    check_tensor(name, experts)
    if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {experts.dtype}")


def check_choices(experts: Tensor) -> None:
    """Expert ids ``[..., K]``, at least one for each token."""
    check_ids(experts)
    if experts.dim() < 1 or experts.shape[-1] < 1:
        raise ValueError(f"experts must have shape [..., K] with K >= 1, got {tuple(experts.shape)}")
    check_rows(experts)


def check_same_device(name: str, tensor: Tensor, owner: str, device: torch.device) -> None:
    """The tensor is on the device of its owner."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {owner} ({device}), got {tensor.device}")


def check_float(name: str, tensor: Tensor) -> None:
    """A tensor of a dtype that is computed in."""
    check_tensor(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def check_logits(logits: Tensor) -> None:
    """Router logits ``[..., E]``, of at least one expert."""
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., E] with E >= 1, got {tuple(logits.shape)}")


def check_selection_bias(selection_bias: Tensor, logits: Tensor) -> None:
    """One entry for each expert."""
    check_float("selection_bias", selection_bias)
    check_shape("selection_bias", selection_bias, logits.shape[-1:])
    check_same_device("selection_bias", selection_bias, "logits", logits.device)


def check_last_dim(name: str, tensor: Tensor, size: int) -> None:
    """A tensor ``[..., size]``."""
    if tensor.shape[-1:] != (size,):
        raise ValueError(f"{name} must have shape [..., {size}], got {tuple(tensor.shape)}")


def check_fits(x: Tensor, D: int, name: str) -> None:
    """Rows of ``x`` are as wide as those of the weight of that name."""
    if x.shape[-1] != D:
        raise ValueError(f"x must have shape [..., {D}] to fit {name}, got {tuple(x.shape)}")


def check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    """Expert weights share x's device, and its dtype too unless autocast is about to cast both."""
    check_float(name, tensor)
    check_same_device(name, tensor, "x", x.device)
    if tensor.dtype != x.dtype and library.autocast_dtype(x.device.type) is None:
        raise TypeError(f"{name} must have the dtype of x ({x.dtype}), got {tensor.dtype}")


def check_routing(x: Tensor, experts: Tensor, weights: Tensor) -> None:
    """Ids and weights ``[..., K]`` on the device of x ``[..., D]``."""
    check_float("x", x)
    check_ids(experts)
    check_float("weights", weights)
    x_shape, experts_shape, device = x.shape, experts.shape, x.device
    if not x_shape or x_shape[-1] < 1:
        raise ValueError(f"x must have shape [..., D] with D >= 1, got {tuple(x_shape)}")
    if not experts_shape or experts_shape[-1] < 1:
        raise ValueError(f"experts must have shape [..., K] with K >= 1, got {tuple(experts_shape)}")
    check_shape("experts", experts, x_shape[:-1] + experts_shape[-1:])
    check_rows(experts)
    check_shape("weights", weights, experts_shape)
    check_same_device("experts", experts, "x", device)
    check_same_device("weights", weights, "x", device)


def check_norm_eps(norm_eps: float, scoring: str) -> None:
    """A small positive number, for sigmoids."""
    check_number("norm_eps", norm_eps)
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps must be positive and finite, got {norm_eps}")
    if scoring == "softmax" and norm_eps != NORM_EPS:
        raise ValueError(f"norm_eps is for scoring 'sigmoid', a softmax is divided without one, got {norm_eps}")


def check_gate(activation: str, gated: bool) -> None:
    """A gate, where the activation is made of one."""
    if activation == "swiglu_oai" and not gated:
        raise ValueError("activation 'swiglu_oai' is gated by definition, got gated=False")


def check_save_percent(save_percent: int) -> None:
    """A whole number from 0 to 100."""
    if isinstance(save_percent, bool) or not isinstance(save_percent, int) or not 0 <= save_percent <= 100:
        raise ValueError(f"save_percent must be an integer from 0 to 100, got {save_percent!r}")
