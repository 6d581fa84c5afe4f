"""The routers' linear map, which runs in float32 whatever surrounds it, and how the weights of linear maps are drawn."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fusedonemoe.ops.library import autocast_dtype
from fusedonemoe.ops.route import routing_dtype


def are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether no tensor is of a class with functions of its own, as a shard or a quantised weight is."""
    for tensor in tensors:  # noqa: SIM110 - Dynamo guards all(), and a set by each of its members
        if tensor is not None and type(tensor) is not Parameter and type(tensor) is not Tensor:
            return False
    return True


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which costs ten times the question when there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def in_routing_dtype(tensor: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return in_dtype(tensor, routing_dtype(tensor.dtype))


def routing_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T (+ b)`` in the routing dtype of x, with autocast off."""
    if weight.device != x.device:  # torch takes a weight without memory for a question about shapes
        raise ValueError(f"the router's weight must be on the device of x ({x.device}), got {weight.device}")
    device = x.device.type
    if (device != "cpu" or torch.is_autocast_enabled("cpu")) and autocast_dtype(device) is not None:
        with torch.autocast(device, enabled=False):
            return routing_linear(x, weight, bias)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    if x.dtype is not dtype:
        x = x.to(dtype)
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return nn.functional.linear(x, weight, bias)


def outside_autocast(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``compute(x)`` with autocast off."""
    device = x.device.type
    if autocast_dtype(device) is None:
        return compute(x)
    with torch.autocast(device, enabled=False):
        return compute(x)


def uniform_by_fan_in(parameter: Tensor, fan_in: int) -> None:
    """Initialise as ``nn.Linear`` does: uniform within ``1 / sqrt(fan_in)``."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)
