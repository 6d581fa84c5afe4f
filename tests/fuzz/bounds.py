"""Numbers with a bound on the error of a computation: the yardstick of the fuzz.

A :class:`Bounded` holds exact values in float64 and, for each, how far a computation in a given precision may be from it. Each
operation adds the rounding that any sensible order of the same arithmetic commits (running error analysis), so the bound knows
the condition of the problem: where terms cancel it is wide, where they do not it is a few units in the last place. An infinite
bound means that nothing is promised, as behind a NaN or a tensor that overflows where it is written.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

Array = Any  # a NumPy array of float64


class Precision(NamedTuple):
    """A floating-point format.

    Attributes:
        unit: half a unit in the last place of 1, the relative error of one rounding.
        least: the absolute error of a rounding among the smallest numbers.
        most: the largest number.
    """

    unit: float
    least: float
    most: float


PRECISIONS = {
    torch.float64: Precision(2.0**-53, 2.0**-1022, torch.finfo(torch.float64).max),
    torch.float32: Precision(2.0**-24, 2.0**-126, torch.finfo(torch.float32).max),
    torch.bfloat16: Precision(2.0**-8, 2.0**-126, torch.finfo(torch.bfloat16).max),
    torch.float16: Precision(2.0**-11, 2.0**-24, torch.finfo(torch.float16).max),
}


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of routing arithmetic: float32, or float64 where the input is that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _settled(value: Array, error: Array) -> Array:
    """The bound, infinite where the value or the bound is no number."""
    return np.where(np.isfinite(value) & ~np.isnan(error), error, np.inf)


class Bounded:
    """Exact values and the error that a computation may have made in them.

    Args:
        value: float64.
        error: of the same shape, or None where the computation has the exact values too.
        work: the precision of the arithmetic.
    """

    __array_priority__ = 1000.0  # `array * bounded` asks this class

    def __init__(self, value: Array, error: Array | None, work: Precision) -> None:
        self.value = np.asarray(value, dtype=np.float64)
        self.work = work
        if error is None or np.shape(error) != self.value.shape:
            error = np.broadcast_to(0.0 if error is None else error, self.value.shape)
        self.error = _settled(self.value, error)

    def _of(self, other: Any) -> "Bounded":
        return other if isinstance(other, Bounded) else Bounded(np.asarray(other, dtype=np.float64), None, self.work)

    def _rounded(self, value: Array, error: Array) -> "Bounded":
        """The result of one operation in the working precision; what overflows there is not promised."""
        over = np.abs(value) > self.work.most
        return Bounded(value, np.where(over, np.inf, error + self.work.unit * np.abs(value) + self.work.least), self.work)

    def __add__(self, other: Any) -> "Bounded":
        other = self._of(other)
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Any) -> "Bounded":
        other = self._of(other)
        return self._rounded(self.value - other.value, self.error + other.error)

    def __rsub__(self, other: Any) -> "Bounded":
        return self._of(other) - self

    def __neg__(self) -> "Bounded":
        return Bounded(-self.value, self.error, self.work)

    def __mul__(self, other: Any) -> "Bounded":
        other = self._of(other)
        error = np.abs(self.value) * other.error + self.error * (np.abs(other.value) + other.error)
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Any) -> "Bounded":
        """A quotient by positive numbers."""
        other = self._of(other)
        value = self.value / other.value
        least = np.maximum(other.value - other.error, 0)
        return self._rounded(value, (self.error + np.abs(value) * other.error) / least)

    __radd__ = __add__
    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> "Bounded":
        return Bounded(self.value[index], self.error[index], self.work)

    def reshape(self, *shape: int) -> "Bounded":
        """The same numbers in another shape."""
        return Bounded(self.value.reshape(*shape), self.error.reshape(*shape), self.work)

    def swap(self, first: int, second: int) -> "Bounded":
        """With two axes exchanged."""
        return Bounded(np.swapaxes(self.value, first, second), np.swapaxes(self.error, first, second), self.work)

    def sum(self, axis: int, keepdims: bool = False) -> "Bounded":
        """Sums along an axis in any order."""
        count = self.value.shape[axis]
        size = np.abs(self.value).sum(axis, keepdims=keepdims)
        error = self.error.sum(axis, keepdims=keepdims) + count * self.work.unit * size + self.work.least
        return self._rounded(self.value.sum(axis, keepdims=keepdims), error)

    def apply(self, function: Callable[[Array], Array], size: Callable[[Array], Array] | None = None) -> "Bounded":
        """A function of each number, evaluated to a few units in the last place of ``size`` (of the result where None).

        The values at both ends of the error's interval bound what the argument's error does, at a kink too.
        """
        value = function(self.value)
        ends = (function(self.value + self.error), function(self.value - self.error))
        moved = np.maximum(*(np.abs(end - value) for end in ends))
        moved = np.where(np.isfinite(self.error), moved, np.inf)  # NaN is not above 0, and relu of it is no number all the same
        scale = np.abs(value) if size is None else size(self.value)
        return self._rounded(value, moved + 6 * self.work.unit * scale)

    def rounded(self, stored: torch.dtype) -> "Bounded":
        """Perhaps rounded to a dtype on the way, whose range must not matter."""
        to = PRECISIONS[stored]
        return Bounded(self.value, self.error + to.unit * np.abs(self.value) + to.least, self.work)

    def written(self, stored: torch.dtype) -> "Bounded":
        """Written as a tensor of a dtype: rounded once, and not promised where it overflows."""
        rounded = self.rounded(stored)
        over = np.abs(self.value) + rounded.error > PRECISIONS[stored].most
        return Bounded(self.value, np.where(over, np.inf, rounded.error), self.work)

    def forget(self, rows: Array) -> "Bounded":
        """With nothing promised where ``rows`` is true."""
        return Bounded(self.value, np.where(rows, np.inf, self.error), self.work)


def contract(spec: str, a: Bounded, b: Bounded, terms: int) -> Bounded:
    """``einsum(spec, a, b)``, sums of ``terms`` products in any order."""
    size_a, size_b = np.abs(a.value), np.abs(b.value)
    size = np.einsum(spec, size_a, size_b)
    error = np.einsum(spec, size_a + a.error, b.error) + np.einsum(spec, a.error, size_b)
    error = error + (terms + 1) * (a.work.unit * size + a.work.least)
    return a._rounded(np.einsum(spec, a.value, b.value), error)


def add_at(shape: tuple[int, ...], index: Array, rows: Bounded) -> Bounded:
    """``out[index[n]] += rows[n]``, from zero, in any order."""
    value, error, size, count = (np.zeros(shape) for _ in range(4))
    np.add.at(value, index, rows.value)
    np.add.at(error, index, rows.error)
    np.add.at(size, index, np.abs(rows.value))
    np.add.at(count, index, np.ones_like(rows.value))
    over = size > rows.work.most
    error = np.where(over, np.inf, error + count * (rows.work.unit * size + rows.work.least))
    return Bounded(value, error, rows.work)


def join(parts: "list[Bounded]", axis: int) -> Bounded:
    """Parts along an axis."""
    value, error = (np.concatenate([getattr(part, name) for part in parts], axis) for name in ("value", "error"))
    return Bounded(value, error, parts[0].work)
