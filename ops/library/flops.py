"""Formulas by which ``torch.utils.flop_counter`` and the profiler count the operators, from the shapes of arguments by name.

A formula counts 2 for each product of a weight and an element of a routed row, also where a backward computes it again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shapes = dict[str, Any]


def _weights(a: Shapes) -> tuple[int, int, int, int]:
    """Return routed rows and the widths D, F, G of experts that are MLPs."""
    (T, K), D = a["experts"], a["x"][1]
    if "intermediate_size" in a:  # panels do not tell it
        F = a["intermediate_size"]
        return T * K, D, F, F if a["layout"] == "plain" else 2 * F
    up = a["up_proj"] if "up_proj" in a else a["up"]
    G = up[1]
    return T * K, D, G if a["layout"] == "plain" else G // 2, G


def _adapters(a: Shapes) -> int:
    """Return the products of a row with the adapters."""
    factors = [a[name] for name in ("up_A", "up_B", "down_A", "down_B") if name in a]
    return sum(rows * width for _, rows, width in factors)


def mlp(a: Shapes) -> int:
    """Count a forward of experts that are MLPs."""
    N, D, F, G = _weights(a)
    return 2 * N * (G * D + D * F + _adapters(a))


def block(a: Shapes) -> int:
    """Count a forward of a block: the router's linear map, and experts that are MLPs."""
    T, E = a["x"][0], a["gate"][0]
    top_k = a["top_k"] or E
    return 2 * T * E * a["x"][1] + mlp({**a, "experts": (T, top_k)})


def mlp_backward(a: Shapes, needs: Sequence[bool], gradients: Sequence[str]) -> int:
    """Count a backward of experts that are MLPs: the gradient of h, and those that are needed."""
    N, D, F, G = _weights(a)
    wanted = {name for name, needed in zip(gradients, needs, strict=True) if needed}
    again = (N - a["z"][0]) * G * D
    up = N * G * D * (("x" in wanted) + ("up" in wanted or "up_proj" in wanted))
    down = N * D * F * (1 + ("down" in wanted or "down_proj" in wanted))
    return 2 * (again + up + down + 2 * N * _adapters(a))


def merged(a: Shapes) -> int:
    """Count a forward of merged projections."""
    (T, K), (_, D, F) = a["experts"], a["proj"]
    return int(2 * T * K * D * F)


def merged_backward(a: Shapes, needs: Sequence[bool], gradients: Sequence[str]) -> int:
    """Count a backward of merged projections."""
    x, weights, proj = needs
    return merged(a) * ((x or weights) + proj)


def neurons(a: Shapes) -> int:
    """Count a forward of single neurons, or of value memory."""
    T, K = a["experts"]
    table = a["up"] if "up" in a else a["table"]
    return int(2 * T * K * table[1] * (2 if "x" in a else 1))


def neurons_backward(a: Shapes, needs: Sequence[bool], gradients: Sequence[str]) -> int:
    """Count a backward of single neurons, or of value memory: a product of dy, and a row for each gradient but of weights."""
    T, K = a["experts"]
    table = a["up"] if "up" in a else a["table"]
    rows = sum(needed for name, needed in zip(gradients, needs, strict=True) if name != "weights")
    return int(2 * T * K * table[1] * (1 + rows))


def grouped_mm(a: Shapes) -> int:
    """Count the products of sorted rows."""
    return int(2 * a["rows"][0] * a["weights"][1] * a["weights"][2])


def grouped_outer(a: Shapes) -> int:
    """Count the outer products of sorted rows."""
    return int(2 * a["left"][0] * a["left"][1] * a["right"][1])


def count(operator: str, names: Sequence[str], formula: Callable[..., int], gradients: Sequence[str] = ()) -> None:
    """Register an operator's formula of the shapes of arguments by name; a backward's takes ``needs`` and ``gradients`` too."""

    def flops(*arguments: Any, out_shape: Any = None, **more: Any) -> int:
        shapes = dict(zip(names, arguments, strict=False)) | more
        return formula(shapes, shapes["needs"], gradients) if gradients else formula(shapes)

    register_flop_formula([getattr(torch.ops.fusedonemoe, operator)])(flops)
