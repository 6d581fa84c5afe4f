"""Checks of arguments that several of the modules share."""

import math

import torch
from torch import Tensor

from fusedonemoe.checks import check_float, check_ids, check_last_dim, check_like_x, check_number, check_same_device, check_shape


def check_finite(name: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """A finite number, at least ``least`` and greater than ``above``."""
    check_number(name, value)
    if not math.isfinite(value) or value < least or value <= above:
        bound = f"at least {least:g}" if least > -math.inf else f"greater than {above:g}" if above > -math.inf else "finite"
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def check_config(config: object, kind: type) -> None:
    """An object of this class."""
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")


def check_flag(name: str, value: bool) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_placed(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, owner: str = "input", *, ids: bool = False
) -> None:
    """Floats, or integers where they are ids, of this shape and on the device of ``owner``."""
    if ids:
        check_ids(tensor, name)
    else:
        check_float(name, tensor)
    check_shape(name, tensor, shape)
    check_same_device(name, tensor, owner, device)


def check_like_input(name: str, tensor: Tensor, x: Tensor) -> None:
    """Check as :func:`fusedonemoe.checks.check_like_x` does, where x is called ``input``."""
    try:
        check_like_x(name, tensor, x)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(" of x (", " of input (")) from None


def check_last(name: str, tensor: Tensor, size: int) -> None:
    """A floating tensor ``[..., size]``."""
    check_float(name, tensor)
    check_last_dim(name, tensor, size)
