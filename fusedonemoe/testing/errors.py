"""Errors against float64, and the bound on them."""

from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@overload
def exact_float64(tensor: Tensor | None, /) -> Any: ...
@overload
def exact_float64(first: Tensor | None, second: Tensor | None, /, *rest: Tensor | None) -> tuple[Any, ...]: ...
def exact_float64(*tensors: Tensor | None) -> Any:
    """Copies tensors of any device to NumPy without loss, for a call of the oracle; None stays None.

    Returns:
        One array for one tensor, else a tuple: float64 for floating tensors, int64 for ids and masks.

    >>> exact_float64(torch.tensor([0.5], dtype=torch.bfloat16))
    array([0.5])
    """
    arrays = [
        None
        if tensor is None
        else tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else torch.int64, copy=True).numpy()
        for tensor in tensors
    ]
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


class ErrorNorms(NamedTuple):
    """Size of a tensor or of a difference: ``max |v|`` and ``sqrt(mean(v^2))``."""

    max_abs: float
    rms: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "ErrorNorms":
        """Both norms of an array; zero when it is empty."""
        if values.size == 0:
            return cls(0.0, 0.0)
        return cls(float(np.abs(values).max()), float(np.sqrt(np.mean(values**2))))


def error_norms(actual: Tensor, exact: Tensor | NDArray[np.float64]) -> ErrorNorms:
    """Measures ``actual - exact``, the second of the same shape and in float64.

    >>> error_norms(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0], dtype=torch.float64)).max_abs
    1.0
    """
    return ErrorNorms.of(exact_float64(actual) - _exact_array(exact))


def _exact_array(exact: Tensor | NDArray[np.float64]) -> NDArray[np.float64]:
    array: NDArray[Any] = exact.detach().cpu().numpy() if isinstance(exact, Tensor) else np.asarray(exact)
    if array.dtype != np.float64:
        raise TypeError(f"exact must be float64, got {array.dtype}")
    return array


def assert_within_budget(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor | NDArray[np.float64],
    *,
    factor: float = 2.0,
    slack: float = 2.0,
    name: str = "",
) -> None:
    """Asserts that a result is about as accurate as plain PyTorch in the same dtype.

    For both norms, ``max |v|`` and ``rms(v)`` over the whole tensor:
    ``norm(actual - exact) <= factor * norm(plain - exact) + slack * eps(dtype) * norm(exact)``.

    Args:
        actual: The result under test, any floating dtype.
        plain: The same quantity from plain PyTorch operations, the same shape and dtype.
        exact: The same quantity in float64.
        factor: How many times the error of plain is allowed.
        slack: How many units in the last place of exact's size are allowed beyond that. Plain's error is zero when
            its roundings happen to cancel, as in a tensor of a few elements.
        name: Names the tensor in messages.

    Raises:
        AssertionError: If actual has another shape or dtype than plain, is not finite, or misses the budget.
        TypeError: If exact is not float64.
        ValueError: If plain or exact is no yardstick: shapes differ, values are not finite, or the tolerance they
            give would accept an all-zero result although exact is not zero.

    >>> exact = torch.ones(3, dtype=torch.float64)
    >>> assert_within_budget(torch.ones(3), torch.ones(3), exact)
    >>> assert_within_budget(torch.zeros(3), torch.ones(3), exact, name="y")
    Traceback (most recent call last):
    AssertionError: y: max error 1 exceeds 2.38e-07 = 2 * 0 (plain) + 2 * 1.19e-07 * 1 (eps * scale)
    """
    label, exact_array = name or "actual", _exact_array(exact)
    if tuple(plain.shape) != exact_array.shape:
        raise ValueError(f"{label}: plain has shape {tuple(plain.shape)}, exact has {exact_array.shape}")
    if actual.shape != plain.shape:
        raise AssertionError(f"{label}: shape {tuple(actual.shape)}, expected {tuple(plain.shape)}")
    if actual.dtype != plain.dtype:
        raise AssertionError(f"{label}: dtype {actual.dtype}, expected {plain.dtype}")
    if not (torch.isfinite(plain).all() and np.isfinite(exact_array).all()):
        raise ValueError(f"{label}: plain and exact must be finite to be a yardstick")
    if bad := int((~torch.isfinite(actual)).sum()):
        raise AssertionError(f"{label}: {bad} of {actual.numel()} values are not finite")

    eps = torch.finfo(plain.dtype).eps
    scale, plain_error = ErrorNorms.of(exact_array), error_norms(plain, exact_array)
    tolerance = ErrorNorms(*(factor * e + slack * eps * s for e, s in zip(plain_error, scale, strict=True)))
    if scale.max_abs > 0 and scale.max_abs <= tolerance.max_abs and scale.rms <= tolerance.rms:
        raise ValueError(
            f"{label}: tolerance {tolerance.max_abs:.3g} (max), {tolerance.rms:.3g} (rms) would accept zeros: "
            f"exact has {scale.max_abs:.3g} (max), {scale.rms:.3g} (rms); plain is off by {plain_error.max_abs:.3g}, "
            f"{plain_error.rms:.3g}"
        )
    error = error_norms(actual, exact_array)
    for norm, off, allowed, plain_off, size in zip(("max", "rms"), error, tolerance, plain_error, scale, strict=True):
        if not off <= allowed:
            raise AssertionError(
                f"{label}: {norm} error {off:.3g} exceeds {allowed:.3g} = {factor:g} * {plain_off:.3g} (plain) + "
                f"{slack:g} * {eps:.3g} * {size:.3g} (eps * scale)"
            )
