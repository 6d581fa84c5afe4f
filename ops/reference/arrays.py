"""The NumPy that the oracle's formulas are written in."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]


def float64(array: ArrayLike) -> FloatArray:
    """Anything that ``numpy.asarray`` takes."""
    return np.asarray(array, dtype=np.float64)


def sigmoid(z: FloatArray) -> FloatArray:
    """``1 / (1 + exp(-z))`` without overflow at either end."""
    return np.exp(-np.logaddexp(0.0, -z))


def softmax(row: FloatArray) -> FloatArray:
    """``exp(l) / sum(exp(l))`` of one row."""
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def routed_rows(experts: ArrayLike, num_experts: int) -> Iterator[tuple[int, int, int]]:
    """Token, choice and expert of each row that has an expert here."""
    for (t, j), expert in np.ndenumerate(np.asarray(experts, dtype=np.int64)):
        if 0 <= expert < num_experts:
            yield t, j, int(expert)
