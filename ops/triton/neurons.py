"""Single-neuron experts and value memory: experts that are rows of tables ``[E, D]``, with E up to a million.

With ``e = experts_tj`` and ``c_tj = act(s_tj) w_tj``:

    s_tj = x_t . down[e],      y_t = sum_j c_tj up[e]
    q_tj = dy_t . up[e],       dw_tj = q_tj act(s_tj),       ds_tj = q_tj w_tj act'(s_tj)
    dx_t = sum_j ds_tj down[e],   ddown_e = sum_tj ds_tj x_t,   dup_e = sum_tj c_tj dy_t

A value memory has one table and no scores, ``y_t = sum_j w_tj table[e]``. All of it is three kernels: the dot products of a
token with its rows, the weighted sum of a token's rows, and the weighted sum of a row's tokens (in :mod:`.segments`). The first
two stream rows from memory to registers and multiply nothing twice, so memory alone decides their speed: nothing of size
``[T, K, D]`` exists, no token waits for a sort, and 8 vectors of 16 bytes are under way in each thread at any time. Scores and
sums are two launches also where there are tokens enough for one: a pass over one table at a time finds twice as much of it in
the L2 cache, and the sums, all tokens of one block of columns before the next, find nearly all of it there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.segments import NO_ACTIVATION, VECTORS, WARP, rows_plan, table_gradient
from fusedonemoe.ops.triton.tiles import act_slope, act_value

# Memory answers in about a microsecond, so a GPU of 132 multiprocessors and 4.8 TB/s must have about 5 MB under way.
BYTES_IN_FLIGHT = 132 * 40 * 1024
MOST_WARPS = 4


class Cut(NamedTuple):
    """How a token's rows are cut: ``choices`` rows by ``columns`` at once, by ``warps`` warps."""

    choices: int
    columns: int
    warps: int


def cut_dots(pairs: int, top_k: int, length: int, itemsize: int) -> Cut:
    """A warp takes 8 rows, 16 bytes of each to a thread. Of few pairs it takes fewer and wider rows: more warps, fewer rounds.

    Args:
        pairs: ``T * K``.
        top_k: ``K``.
        length: ``D``.
        itemsize: bytes of an element of the table.
    """
    vector = 16 // itemsize
    longest = max(triton.next_power_of_2(length), 16)
    columns = min(WARP * vector, longest)
    choices = VECTORS * WARP * vector // columns
    while columns < longest and choices > 1 and pairs * columns * itemsize < BYTES_IN_FLIGHT:
        columns, choices = 2 * columns, choices // 2
    return Cut(min(choices, triton.next_power_of_2(top_k)), columns, 1)


def cut_sums(tokens: int, top_k: int, length: int, itemsize: int) -> Cut:
    """A warp takes 16 bytes to a thread of 8 rows. For few tokens there are more programs and each has more rows under way.

    Args:
        tokens: ``T``.
        top_k: ``K``.
        length: ``D``.
        itemsize: bytes of an element of the table.
    """
    vector = 16 // itemsize
    columns, warps = min(WARP * vector, max(triton.next_power_of_2(length), 16)), 1
    most = triton.next_power_of_2(top_k)

    def choices() -> int:
        return VECTORS * WARP * warps * vector // columns

    while choices() < most and tokens * triton.cdiv(length, columns) * VECTORS * WARP * warps * 16 < BYTES_IN_FLIGHT:
        if columns > 4 * vector:  # 64 bytes, the least that memory hands out without waste
            columns //= 2
        elif warps < MOST_WARPS:
            warps *= 2
        else:
            break
    return Cut(min(choices(), most), columns, warps)


@triton.jit
def dots_kernel(
    rows_ptr,  # [T, D]
    experts_ptr,  # [T, K]
    table_ptr,  # [E, D]
    weights_ptr,  # [T, K]
    scores_ptr,  # [T, K]
    dots_ptr,  # [T, K]
    dscores_ptr,  # [T, K]
    E,
    D,
    stride_te,
    K: tl.constexpr,
    ACT: tl.constexpr,
    NEED_DOTS: tl.constexpr,
    NEED_DSCORES: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_J choices of a token: their dot products or, behind an activation, the gradients of weights and scores."""
    CHUNKS: tl.constexpr = (K + BLOCK_J - 1) // BLOCK_J
    token = (tl.program_id(0) // CHUNKS).to(tl.int64)
    j = tl.program_id(0) % CHUNKS * BLOCK_J + tl.arange(0, BLOCK_J)
    pair = token * K + j
    expert = tl.load(experts_ptr + pair, mask=j < K, other=-1).to(tl.int64)
    here = (j < K) & (expert >= 0) & (expert < E)
    table_rows_ptr = table_ptr + tl.where(here, expert, 0) * stride_te

    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_J, BLOCK_D // FOLD), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + d
        row = tl.load(rows_ptr + token * D + column, mask=None if EVEN_D else column < D, other=None if EVEN_D else 0.0)
        loaded = here[:, None] if EVEN_D else here[:, None] & (column < D)[None, :]
        table = tl.load(table_rows_ptr[:, None] + column[None, :], mask=loaded, other=0.0)
        products = table.to(tl.float32) * row.to(tl.float32)[None, :]
        acc += tl.sum(tl.reshape(products, (BLOCK_J, BLOCK_D // FOLD, FOLD)), 2)
    # A row of no expert was not read, but the token's may hold an infinity.
    dots = tl.where(here, tl.sum(acc, 1), 0.0)

    if ACT == "none":
        tl.store(dots_ptr + pair, dots.to(dots_ptr.dtype.element_ty), mask=j < K)
    else:
        score = tl.load(scores_ptr + pair, mask=here, other=0.0)
        if NEED_DOTS:
            tl.store(dots_ptr + pair, (dots * act_value(score, ACT)).to(dots_ptr.dtype.element_ty), mask=j < K)
        if NEED_DSCORES:
            weight = tl.load(weights_ptr + pair, mask=here, other=0.0).to(tl.float32)
            tl.store(dscores_ptr + pair, dots * weight * act_slope(score, ACT), mask=j < K)


@triton.jit
def sums_kernel(
    experts_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    scores_ptr,  # [T, K]
    table_ptr,  # [E, D]
    out_ptr,  # [T, D]
    E,
    D,
    stride_te,
    K: tl.constexpr,
    ACT: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of a token, its choices BLOCK_J at a time: ``sum_j w_tj (act(s_tj)) table[e]``."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_J // FOLD, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        pair = token * K + j
        expert = tl.load(experts_ptr + pair, mask=j < K, other=-1).to(tl.int64)
        here = (j < K) & (expert >= 0) & (expert < E)
        table_rows_ptr = table_ptr + tl.where(here, expert, 0) * stride_te
        loaded = here[:, None] if EVEN_D else here[:, None] & (d < D)[None, :]
        rows = tl.load(table_rows_ptr[:, None] + d[None, :], mask=loaded, other=0.0)
        weight = tl.load(weights_ptr + pair, mask=here, other=0.0).to(tl.float32)
        if ACT != "none":
            weight *= act_value(tl.load(scores_ptr + pair, mask=here, other=0.0), ACT)
        # A thread's rows lie BLOCK_J / FOLD apart, so that it adds them by itself.
        acc += tl.sum(tl.reshape(rows.to(tl.float32) * weight[:, None], (FOLD, BLOCK_J // FOLD, BLOCK_D)), 0)
    tl.store(out_ptr + token * D + d, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=d < D)


def by_rows(table_ED: Tensor) -> Tensor:
    """A table whose rows are contiguous; they may lie apart."""
    return table_ED if table_ED.stride(1) == 1 else table_ED.contiguous()


def dots(rows_TD: Tensor, experts_TK: Tensor, table_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """``out_tj = rows_t . table[experts_tj]``, ``[T, K]`` in ``dtype``; 0 for an id outside ``[0, E)``. All but table contiguous."""
    out_TK = torch.empty(experts_TK.shape, dtype=dtype, device=rows_TD.device)
    _launch_dots(rows_TD, experts_TK, by_rows(table_ED), None, None, NO_ACTIVATION, out_TK, None)
    return out_TK


def _launch_dots(
    rows_TD: Tensor,
    experts_TK: Tensor,
    table_ED: Tensor,
    weights_TK: Tensor | None,
    scores_TK: Tensor | None,
    activation: str,
    dots_TK: Tensor | None,
    dscores_TK: Tensor | None,
) -> None:
    T, K = experts_TK.shape
    E, D = table_ED.shape
    itemsize = table_ED.element_size()
    cut = cut_dots(rules.hint(T) * K, K, D, itemsize)
    wrap_triton(dots_kernel)[(T * triton.cdiv(K, cut.choices),)](
        rows_TD,
        experts_TK,
        table_ED,
        rows_TD if weights_TK is None else weights_TK,
        rows_TD if scores_TK is None else scores_TK,
        rows_TD if dots_TK is None else dots_TK,
        rows_TD if dscores_TK is None else dscores_TK,
        E,
        D,
        table_ED.stride(0),
        K=K,
        ACT=activation,
        NEED_DOTS=dots_TK is not None,
        NEED_DSCORES=dscores_TK is not None,
        FOLD=1 if D % 16 else 16 // itemsize,  # rows that begin anywhere are read element by element
        EVEN_D=D % cut.columns == 0,
        BLOCK_J=cut.choices,
        BLOCK_D=cut.columns,
        num_warps=cut.warps,
        num_stages=1,
    )


def sums(
    experts_TK: Tensor, weights_TK: Tensor, scores_TK: Tensor | None, table_ED: Tensor, activation: str, dtype: torch.dtype
) -> Tensor:
    """``out_t = sum_j w_tj act(s_tj) table[experts_tj]`` in float32 and a fixed order, rounded once. All but table contiguous.

    Args:
        experts_TK: any integer dtype; a choice whose id lies outside ``[0, E)`` is skipped, its weight is not read.
        weights_TK: any floating dtype.
        scores_TK: float32, or None with :data:`NO_ACTIVATION`: then the weight alone is the factor.
        table_ED: ``[E, D]``.
        activation: of the scores.
        dtype: of the result.

    Returns:
        ``[T, D]``.
    """
    table_ED = by_rows(table_ED)
    T, K = experts_TK.shape
    E, D = table_ED.shape
    itemsize = table_ED.element_size()
    cut = cut_sums(rules.hint(T), K, D, itemsize)
    out_TD = torch.empty((T, D), dtype=dtype, device=table_ED.device)
    wrap_triton(sums_kernel)[(T, triton.cdiv(D, cut.columns))](
        experts_TK,
        weights_TK,
        weights_TK if scores_TK is None else scores_TK,
        table_ED,
        out_TD,
        E,
        D,
        table_ED.stride(0),
        K=K,
        ACT=activation,
        FOLD=min(VECTORS, cut.choices),
        EVEN_D=D % cut.columns == 0,
        BLOCK_J=cut.choices,
        BLOCK_D=cut.columns,
        num_warps=cut.warps,
        num_stages=1,
    )
    return out_TD


def experts_neurons(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """``y_t = sum_j act(s_tj) w_tj up[e]`` with ``s_tj = x_t . down[e]``.

    Args:
        x_TD: bfloat16, float16 or float32.
        experts_TK: any integer dtype; a choice whose id lies outside ``[0, E)`` adds nothing and reads no row.
        weights_TK: any floating dtype.
        down_ED: the rows that x is multiplied with.
        up_ED: the rows that are added.
        activation: one that :func:`.tiles.act_value` knows.

    Returns:
        ``y [T, D]`` in the dtype of x, and ``s [T, K]`` float32, which the backward wants: 0 for an id outside ``[0, E)``.
    """
    x_TD, experts_TK, weights_TK = x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous()
    s_TK = dots(x_TD, experts_TK, down_ED, torch.float32)
    return sums(experts_TK, weights_TK, s_TK, up_ED, activation, x_TD.dtype), s_TK


def experts_neurons_backward(
    dy_TD: Tensor,
    s_TK: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`experts_neurons`.

    Args:
        dy_TD: gradient of y.
        s_TK: of the forward.
        x_TD: as in the forward.
        experts_TK: as in the forward.
        weights_TK: as in the forward.
        down_ED: as in the forward.
        up_ED: as in the forward.
        activation: as in the forward.
        needs: whether ``dx``, ``dweights``, ``ddown`` and ``dup`` are wanted.

    Returns:
        ``(dx, dweights, ddown, dup)``, each in the dtype of its argument, without elements where it is not wanted.
    """
    need_x, need_weights, need_down, need_up = needs
    dy_TD, s_TK, x_TD, experts_TK, weights_TK = (t.contiguous() for t in (dy_TD, s_TK, x_TD, experts_TK, weights_TK))
    dx_TD, dweights_TK, ddown_ED, dup_ED = (t.new_empty(0) for t in (x_TD, weights_TK, down_ED, up_ED))
    ds_TK = torch.empty_like(s_TK) if need_x or need_down else None
    if need_weights:
        dweights_TK = torch.empty_like(weights_TK)
    if need_weights or ds_TK is not None:
        dw_TK = dweights_TK if need_weights else None
        _launch_dots(dy_TD, experts_TK, by_rows(up_ED), weights_TK, s_TK, activation, dw_TK, ds_TK)
    if need_x:
        assert ds_TK is not None
        dx_TD = sums(experts_TK, ds_TK, None, down_ED, NO_ACTIVATION, x_TD.dtype)
    if need_down or need_up:
        plan = rows_plan(experts_TK, down_ED.shape[0])
        if need_down:
            assert ds_TK is not None
            ddown_ED = table_gradient(x_TD, experts_TK, ds_TK, None, NO_ACTIVATION, plan, down_ED.dtype)
        if need_up:
            dup_ED = table_gradient(dy_TD, experts_TK, weights_TK, s_TK, activation, plan, up_ED.dtype)
    return dx_TD, dweights_TK, ddown_ED, dup_ED


def experts_values(experts_TK: Tensor, weights_TK: Tensor, table_ED: Tensor) -> Tensor:
    """``y_t = sum_j w_tj table[experts_tj]``, ``[T, D]`` in the dtype of the table.

    Args:
        experts_TK: any integer dtype; ids outside ``[0, E)`` add nothing.
        weights_TK: any floating dtype.
        table_ED: bfloat16, float16 or float32.
    """
    return sums(experts_TK.contiguous(), weights_TK.contiguous(), None, table_ED, NO_ACTIVATION, table_ED.dtype)


def experts_values_backward(
    dy_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, table_ED: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`experts_values`: ``dw_tj = dy_t . table[e]`` and ``dtable_e = sum_tj w_tj dy_t``.

    Args:
        dy_TD: gradient of y.
        experts_TK: as in the forward.
        weights_TK: as in the forward.
        table_ED: as in the forward.
        needs: whether ``dweights`` and ``dtable`` are wanted.

    Returns:
        ``(dweights, dtable)``, each in the dtype of its argument, without elements where it is not wanted.
    """
    need_weights, need_table = needs
    dy_TD, experts_TK, weights_TK = dy_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous()
    dweights_TK, dtable_ED = weights_TK.new_empty(0), table_ED.new_empty(0)
    if need_weights:
        dweights_TK = dots(dy_TD, experts_TK, table_ED, weights_TK.dtype)
    if need_table:
        plan = rows_plan(experts_TK, table_ED.shape[0])
        dtable_ED = table_gradient(dy_TD, experts_TK, weights_TK, None, NO_ACTIVATION, plan, table_ED.dtype)
    return dweights_TK, dtable_ED
