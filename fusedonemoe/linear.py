"""The routers' linear map, which runs in float32 whatever surrounds it, and how the weights of linear maps are drawn."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedonemoe.ops.library import autocast_dtype
from fusedonemoe.ops.route import routing_dtype


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which costs ten times the question when there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def in_routing_dtype(tensor: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return in_dtype(tensor, routing_dtype(tensor.dtype))


def routing_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T (+ b)`` in the routing dtype of x."""
    dtype = routing_dtype(x.dtype)
    bias = None if bias is None else in_dtype(bias, dtype)
    return nn.functional.linear(in_dtype(x, dtype), in_dtype(weight, dtype), bias)


def outside_autocast(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``compute(x)``, which autocast leaves alone."""
    device = x.device.type
    if autocast_dtype(device) is None:
        return compute(x)
    with torch.autocast(device, enabled=False):
        return compute(x)


def uniform_by_fan_in(parameter: Tensor, fan_in: int) -> None:
    """What ``nn.Linear`` would draw: uniform within ``1 / sqrt(fan_in)``."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)
