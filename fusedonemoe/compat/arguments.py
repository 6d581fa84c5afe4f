"""What several of the modules ask of their arguments, and the logits that they compute."""

import math

import torch
from torch import Tensor, nn

from fusedonemoe.checks import check_float, check_integer, check_like_x, check_same_device, check_shape, check_tensor
from fusedonemoe.ops.library import autocast_dtype


def check_count(name: str, value: int, least: int = 1, most: int | None = None, most_is: str = "") -> None:
    """A whole number from ``least`` to ``most``; ``most_is`` names what sets the upper end."""
    check_integer(name, value)
    if value < least or (most is not None and value > most):
        expected = (
            f"at least {least}"
            if most is None
            else f"from {least} to {most_is} ({most})"
            if most_is
            else f"from {least} to {most}"
        )
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_number(name: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """A finite number, at least ``least`` and greater than ``above``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < least or value <= above:
        bound = f"at least {least:g}" if least > -math.inf else f"greater than {above:g}" if above > -math.inf else "finite"
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_ids_like(name: str, ids: Tensor, shape: tuple[int, ...], owner: str, device: torch.device) -> None:
    """Integers of this shape, on the device of ``owner``."""
    check_tensor(name, ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {ids.dtype}")
    check_shape(name, ids, shape)
    check_same_device(name, ids, owner, device)


def check_like_input(name: str, tensor: Tensor, x: Tensor) -> None:
    """What :func:`fusedonemoe.checks.check_like_x` asks, where x is called ``input``."""
    try:
        check_like_x(name, tensor, x)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(" of x (", " of input (")) from None


def check_last(name: str, tensor: Tensor, size: int) -> None:
    """A floating tensor ``[..., size]``."""
    check_float(name, tensor)
    if tensor.shape[-1:] != (size,):
        raise ValueError(f"{name} must have shape [..., {size}], got {tuple(tensor.shape)}")


def router_logits(x: Tensor, weight_DE: Tensor) -> Tensor:
    """``x @ weight`` in float32 (float64 for float64 x), autocast or not: a bfloat16 product would decide who is picked."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    device = x.device.type
    if autocast_dtype(device) is None:
        return x.to(dtype) @ weight_DE.to(dtype)
    with torch.autocast(device, enabled=False):
        return x.to(dtype) @ weight_DE.to(dtype)


def uniform_by_fan_in(parameter: Tensor, fan_in: int) -> None:
    """What ``nn.Linear`` would draw."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)
