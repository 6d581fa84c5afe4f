"""Checks of names, numbers and flags; the messages name the argument, what was expected and what came."""

import math

import torch


def check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check for an allowed name."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_integer(name: str, value: object) -> None:
    """Check for an integer, which may be symbolic; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_count(name: str, value: int, least: int = 1, most: int | None = None, most_is: str = "") -> None:
    """Check for an integer from ``least`` to ``most``; ``most_is`` names what sets the upper end."""
    check_integer(name, value)
    if value >= least and (most is None or value <= most):
        return
    upper = f"{most_is} ({most})" if most_is else most
    expected = f"at least {least}" if most is None else f"from {least} to {upper}"
    raise ValueError(f"{name} must be {expected}, got {value}")


def check_number(name: str, value: object) -> None:
    """Check for an integer or a float; a bool is neither."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Check for a positive and finite number."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_flag(name: str, value: object) -> None:
    """Check for a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_save_percent(save_percent: int) -> None:
    """Check for an integer from 0 to 100."""
    if isinstance(save_percent, bool) or not isinstance(save_percent, int) or not 0 <= save_percent <= 100:
        raise ValueError(f"save_percent must be an integer from 0 to 100, got {save_percent!r}")
