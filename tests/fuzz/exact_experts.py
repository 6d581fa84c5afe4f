"""The expert layers in float64 with their error bounds, forward and backward: each routed row alone with its expert's weights.

Written from the formulas in the documentation, and from nothing that the library computes with. Suffixes as everywhere:
T tokens, D hidden size, F intermediate size, E experts, K experts per token, G rows of the up-projection, N routed rows (r in
sums).
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.fuzz.bounds import PRECISIONS, Array, Bounded, add_at, contract, work_dtype

_erf = np.vectorize(math.erf, otypes=[np.float64])
_ROOT_2_PI = math.sqrt(2 * math.pi)
_TANH_SLOPE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _sigmoid(v: Array) -> Array:
    small = np.exp(-np.abs(v))
    return np.where(v >= 0, 1, small) / (1 + small)


def _normal_density(v: Array) -> Array:
    return np.exp(-0.5 * v * v) / _ROOT_2_PI


def _tanh_gelu_slope(v: Array) -> Array:
    t = np.tanh(_TANH_SLOPE * (v + _TANH_CUBE * v**3))
    return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * _TANH_SLOPE * (1 + 3 * _TANH_CUBE * v * v)


# For each activation: the function, its derivative, and the size of the terms in either of which cancellation leaves a rest.
FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "silu": (lambda v: v * _sigmoid(v), lambda v: _sigmoid(v) * (1 + v * (1 - _sigmoid(v)))),
    "gelu": (
        lambda v: 0.5 * v * (1 + _erf(v / math.sqrt(2))),
        lambda v: 0.5 * (1 + _erf(v / math.sqrt(2))) + v * _normal_density(v),
    ),
    "gelu_tanh": (
        lambda v: 0.5 * v * (1 + np.tanh(_TANH_SLOPE * (v + _TANH_CUBE * v**3))),
        _tanh_gelu_slope,
    ),
    "relu": (lambda v: np.maximum(v, 0), lambda v: (v > 0) * 1.0),
    "relu2": (lambda v: np.maximum(v, 0) ** 2, lambda v: 2 * np.maximum(v, 0)),
    "sigmoid": (_sigmoid, lambda v: _sigmoid(v) * (1 - _sigmoid(v))),
    "identity": (lambda v: v, np.ones_like),
}
SIZES: dict[str, tuple[Any, Any]] = {
    "silu": (None, lambda v: _sigmoid(v) * (1 + np.abs(v))),
    "gelu": (np.abs, lambda v: 1 + np.abs(v) * _normal_density(v)),
    "gelu_tanh": (np.abs, lambda v: 1 + np.abs(v) * (np.abs(v) < 20)),
    "sigmoid": (None, _sigmoid),
}


def activation(name: str, z: Bounded, stored: torch.dtype) -> tuple[Bounded, Bounded]:
    """The function and its derivative; both may be rounded on the way, and the sigmoid's derivative is one of its value."""
    function, slope = FUNCTIONS[name]
    size, slope_size = SIZES.get(name, (None, None))
    a = z.apply(function, size).rounded(stored)
    if name == "sigmoid":
        return a, (a * (1 - a)).rounded(stored)
    return a, z.apply(slope, slope_size).rounded(stored)


class Form(NamedTuple):
    """How a layer computes: the options of :func:`fusedonemoe.functional.experts_mlp`, and the dtype of its tensors.

    ``stored`` is the dtype in which x, the weights and the output are, autocast's where that is on.
    """

    stored: torch.dtype
    activation: str = "silu"
    gated: bool = True
    layout: str = "gate_up"
    alpha: float = 1.702
    limit: float = 7.0


def gate_columns(layout: str, F: int) -> tuple[Array, Array]:
    """Where gate and up are among the 2F rows of an up-projection."""
    if layout == "interleaved":
        return np.arange(0, 2 * F, 2), np.arange(1, 2 * F, 2)
    first, second = np.arange(F), np.arange(F, 2 * F)
    return (first, second) if layout == "gate_up" else (second, first)


def activate(z: Bounded, form: Form) -> tuple[Bounded, list[tuple[Array, Bounded]]]:
    """``h``, and its derivatives with respect to the columns of ``z``."""
    stored = form.stored
    if not form.gated:
        h, slope = activation(form.activation, z, stored)
        return h, [(np.arange(z.value.shape[1]), slope)]
    gates, ups = gate_columns(form.layout, z.value.shape[1] // 2)
    gate, up = z[:, gates], z[:, ups]
    if form.activation != "swiglu_oai":
        a, slope = activation(form.activation, gate, stored)
        return a * up, [(gates, slope * up), (ups, a)]
    alpha, limit = form.alpha, form.limit
    g, is_below = gate.apply(lambda v: np.minimum(v, limit)), gate.apply(lambda v: (v <= limit) * 1.0)
    u, is_within = up.apply(lambda v: np.clip(v, -limit, limit)), up.apply(lambda v: (np.abs(v) <= limit) * 1.0)
    s = g.apply(lambda v: _sigmoid(alpha * v)).rounded(stored)
    a, above = (g * s).rounded(stored), (u + 1).rounded(stored)
    slope = (s * (1 + (alpha * g * (1 - s)).rounded(stored)).rounded(stored)).rounded(stored)
    return above * a, [(gates, (above * slope).rounded(stored) * is_below), (ups, a * is_within)]


class Rows(NamedTuple):
    """The routed rows ``(t, j)`` whose id names an expert."""

    token: Array
    choice: Array
    expert: Array


def routed_rows(ids: Array, num_experts: int) -> Rows:
    """Those rows, token by token; ids outside ``[0, E)`` are skipped."""
    rows = [(t, j, int(e)) for t, choices in enumerate(ids.tolist()) for j, e in enumerate(choices) if 0 <= int(e) < num_experts]
    token, choice, expert = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    return Rows(token, choice, expert)


def by_expert(rows: Rows, left: Bounded, right: Bounded, E: int) -> Bounded:
    """``out_e = sum_n left_n^T right_n`` over the rows of ``e``."""
    shape = (E, left.value.shape[1], right.value.shape[1])
    out = Bounded(np.zeros(shape), None, left.work)
    for e in np.unique(rows.expert):
        mine = rows.expert == e
        part = contract("ra,rb->ab", left[mine], right[mine], int(mine.sum()))
        out.value[e], out.error[e] = part.value, part.error
    return out


class Adapter(NamedTuple):
    """A low-rank addition ``scale * B_e A_e`` to a projection."""

    A: Bounded
    B: Bounded
    scale: float


Gradients = dict[str, Bounded]


def settle_tokens(x: Bounded, y: Bounded, gradients: Gradients) -> tuple[Bounded, Gradients]:
    """What is promised of a token that holds a NaN or an infinity: nothing of its own output and gradients."""
    lost = ~np.isfinite(x.value).all(1, keepdims=True)
    own = {name: gradients[name].forget(lost) for name in ("x", "weights") if name in gradients}
    return y.forget(lost), gradients | own


def _through(x: Bounded, weight: Bounded) -> Bounded:
    """``x_n W_n^T``."""
    return contract("rd,rgd->rg", x, weight, x.value.shape[1])


def _back(dz: Bounded, weight: Bounded) -> Bounded:
    """``dz_n W_n``."""
    return contract("rg,rgd->rd", dz, weight, dz.value.shape[1])


def experts_mlp(
    x: Bounded,
    ids: Array,
    weights: Bounded,
    up: Bounded,
    down: Bounded,
    form: Form,
    *,
    up_bias: Bounded | None = None,
    down_bias: Bounded | None = None,
    up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
    dy: Bounded | None = None,
) -> tuple[Bounded, Gradients]:
    """``y_t = sum_j w_tj (act(x_t Wup_e + bup_e) Wdown_e + bdown_e)`` with its gradients where ``dy`` is given.

    What is written in the dtype of x is ``z``, ``h``, ``w h``, the output, ``dz`` and each gradient; other intermediates may be
    rounded but must not overflow.
    """
    T, E, stored = x.value.shape[0], up.value.shape[0], form.stored
    rows = routed_rows(ids, E)
    x_N, w_N = x[rows.token], weights[rows.token, rows.choice][:, None]
    up_N, down_N = up[rows.expert], down[rows.expert]
    z = _through(x_N, up_N)
    if up_adapter is not None:
        A1, B1 = up_adapter.A[rows.expert], up_adapter.B[rows.expert]
        narrow = (_through(x_N, A1).rounded(stored) * up_adapter.scale).rounded(stored)
        z = z.rounded(stored) + _through(narrow, B1).rounded(stored)
    if up_bias is not None:
        z = z.rounded(stored) + up_bias[rows.expert]
    z = z.written(stored)
    h, slopes = activate(z, form)
    h = h.written(stored)
    row = _through(h.rounded(stored), down_N)
    if down_adapter is not None:
        A2, B2 = down_adapter.A[rows.expert], down_adapter.B[rows.expert]
        h_narrow = (_through(h, A2).rounded(stored) * down_adapter.scale).rounded(stored)
        row = row.rounded(stored) + _through(h_narrow, B2).rounded(stored)
    if down_bias is not None:
        row = row.rounded(stored) + down_bias[rows.expert]
    y = add_at(x.value.shape, rows.token, w_N * row.rounded(stored)).written(stored)
    if dy is None:
        return settle_tokens(x, y, {})

    dy_N = dy[rows.token]
    dh = _back(dy_N.rounded(stored), down_N)  # some implementations weigh the gradient before the product, which rounds it
    if down_adapter is not None:
        v = (_back(dy_N, B2).rounded(stored) * down_adapter.scale).rounded(stored)
        dh = dh.rounded(stored) + _back(v, A2).rounded(stored)
    dh = dh.rounded(stored)
    F = h.value.shape[1]
    dweight = contract("rf,rf->r", dh, h.rounded(stored), F)
    if down_bias is not None:
        dweight = dweight + contract("rd,rd->r", dy_N.rounded(stored), down_bias[rows.expert], dy_N.value.shape[1])
    dact = (w_N * dh).rounded(stored)
    dz = Bounded(np.zeros_like(z.value), None, z.work)
    # A product of several factors passes through small numbers, in an order that is nobody's business.
    small = 4 * PRECISIONS[stored].least * (1 + np.abs(z.value))
    for columns, slope in slopes:
        part = (dact.rounded(stored) * slope.rounded(stored)).written(stored)
        dz.value[:, columns], dz.error[:, columns] = part.value, part.error + small[:, columns]
    dx_N = _back(dz, up_N)
    weighted_h = (w_N * h).written(stored)  # a factor of its own, for which some kernels have a tensor
    gradients = {
        "weights": add_at(weights.value.shape, (rows.token, rows.choice), dweight),
        "up": by_expert(rows, dz, x_N, E),
        "down": by_expert(rows, dy_N, weighted_h, E),
        "up_bias": add_at((E, z.value.shape[1]), rows.expert, dz),
        "down_bias": add_at((E, dy.value.shape[1]), rows.expert, (w_N * dy_N).rounded(stored)),
    }
    if up_adapter is not None:
        g = (_back(dz, B1).rounded(stored) * up_adapter.scale).rounded(stored)
        dx_N = dx_N.rounded(stored) + _back(g, A1).rounded(stored)
        gradients |= {"up_A": by_expert(rows, g, x_N, E), "up_B": by_expert(rows, dz, narrow, E)}
    if down_adapter is not None:
        gradients |= {
            "down_A": by_expert(rows, (w_N * v).rounded(stored), h, E),
            "down_B": by_expert(rows, dy_N, (w_N * h_narrow).rounded(stored), E),
        }
    gradients["x"] = add_at((T, x.value.shape[1]), rows.token, dx_N.rounded(stored))
    gradients = {name: gradient if name == "weights" else gradient.written(stored) for name, gradient in gradients.items()}
    return settle_tokens(x, y, gradients)


def experts_merged(
    x: Bounded, ids: Array, weights: Bounded, proj: Bounded, stored: torch.dtype, dh: Bounded | None = None
) -> tuple[Bounded, Gradients]:
    """``h_t = sum_j w_tj (x_t W_e)``."""
    T, (E, D, F) = x.value.shape[0], proj.value.shape
    rows = routed_rows(ids, E)
    x_N, w_N, proj_N = x[rows.token], weights[rows.token, rows.choice][:, None], proj[rows.expert]
    # Some implementations weigh the token before the product, which rounds it: as much as once more after it.
    row = contract("rd,rdf->rf", x_N.rounded(stored), proj_N, D)
    h = add_at((T, F), rows.token, w_N * row.rounded(stored)).written(stored)
    if dh is None:
        return settle_tokens(x, h, {})
    dh_N = dh[rows.token]
    q = contract("rf,rdf->rd", dh_N.rounded(stored), proj_N, F).rounded(stored)
    gradients = {
        "weights": add_at(weights.value.shape, (rows.token, rows.choice), contract("rd,rd->r", q, x_N.rounded(stored), D)),
        "x": add_at((T, D), rows.token, (w_N * q).rounded(stored)).written(stored),
        "proj": by_expert(rows, (w_N * x_N).written(stored), dh_N, E).written(stored),
    }
    return settle_tokens(x, h, gradients)


def experts_neurons(
    x: Bounded,
    ids: Array,
    weights: Bounded,
    down: Bounded,
    up: Bounded,
    name: str,
    stored: torch.dtype,
    dy: Bounded | None = None,
) -> tuple[Bounded, Gradients]:
    """``y_t = sum_j act(<x_t, d_e>) w_tj u_e``."""
    E, D = down.value.shape
    rows = routed_rows(ids, E)
    x_N, w_N = x[rows.token], weights[rows.token, rows.choice]
    down_N, up_N = down[rows.expert], up[rows.expert]
    s = contract("rd,rd->r", x_N, down_N, D).rounded(stored)
    a, slope = activation(name, s, stored)
    coefficient = (a.rounded(stored) * w_N).rounded(stored)
    y = add_at(x.value.shape, rows.token, coefficient[:, None] * up_N).written(stored)
    if dy is None:
        return settle_tokens(x, y, {})
    dy_N = dy[rows.token]
    q = contract("rd,rd->r", dy_N.rounded(stored), up_N, D).rounded(stored)
    ds = ((q * w_N).rounded(stored) * slope.rounded(stored)).rounded(stored)[:, None]
    index = (rows.token, rows.choice)
    gradients = {
        "weights": add_at(weights.value.shape, index, q * a.rounded(stored)),
        "x": add_at(x.value.shape, rows.token, ds * down_N).written(stored),
        "down": add_at((E, D), rows.expert, ds * x_N).written(stored),
        "up": add_at((E, D), rows.expert, coefficient[:, None] * dy_N).written(stored),
    }
    return settle_tokens(x, y, gradients)


def experts_values(
    ids: Array, weights: Bounded, table: Bounded, stored: torch.dtype, dy: Bounded | None = None
) -> tuple[Bounded, Gradients]:
    """``y_t = sum_j w_tj v_e``."""
    (T, _), (E, D) = weights.value.shape, table.value.shape
    rows = routed_rows(ids, E)
    w_N, table_N = weights[rows.token, rows.choice].rounded(stored), table[rows.expert]
    y = add_at((T, D), rows.token, w_N[:, None] * table_N).written(stored)
    if dy is None:
        return y, {}
    dy_N = dy[rows.token]
    gradients = {
        "weights": add_at(weights.value.shape, (rows.token, rows.choice), contract("rd,rd->r", dy_N, table_N, D)),
        "table": add_at((E, D), rows.expert, w_N[:, None] * dy_N).written(stored),
    }
    return y, gradients


def bounded(array: Array, dtype: torch.dtype, given: torch.dtype | None = None) -> Bounded:
    """Values that a computation in ``dtype`` is given exactly, or rounds to its working precision if they are ``given`` wider."""
    work = PRECISIONS[work_dtype(dtype)]
    rounds = given == torch.float64 and work_dtype(dtype) != torch.float64
    return Bounded(array, work.unit * np.abs(array) if rounds else None, work)
