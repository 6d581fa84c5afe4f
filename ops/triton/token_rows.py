"""A token and the rows of a table that its choices name: their dot products, and their weighted sum.

    s_tj = x_t . table[experts_tj],      y_t = sum_j c_tj table[experts_tj]

Both stream rows from memory to registers, 8 vectors of 16 bytes to a thread at once, or half as many elements where rows are not
aligned. Two launches read no row twice, and one table at a time has twice the chance to stay in the L2 cache.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.launch import launch
from fusedonemoe.ops.triton.rules import BYTES_IN_FLIGHT
from fusedonemoe.ops.triton.segments import WARP, vectors_at_once
from fusedonemoe.ops.triton.tiles import act_slope, act_value, experts_of_choices

MOST_WARPS = 4


class Cut(NamedTuple):
    """The cut of a token's rows: ``choices`` rows by ``columns`` at once, by ``warps`` warps."""

    choices: int
    columns: int
    warps: int


def cut_dots(pairs: int, top_k: int, length: int, itemsize: int) -> Cut:
    """A warp takes 8 rows, 16 bytes of each to a thread. Of few pairs it takes fewer and wider rows: more warps, fewer rounds."""
    vector = 16 // itemsize
    longest = max(triton.next_power_of_2(length), 16)
    columns = min(WARP * vector, longest)
    choices = vectors_at_once(length) * WARP * vector // columns
    while columns < longest and choices > 1 and pairs * columns * itemsize < BYTES_IN_FLIGHT:
        columns, choices = 2 * columns, choices // 2
    return Cut(min(choices, triton.next_power_of_2(top_k)), columns, 1)


def cut_sums(tokens: int, top_k: int, length: int, itemsize: int) -> Cut:
    """A warp takes 16 bytes to a thread of 8 rows. For few tokens there are more programs and each has more rows under way."""
    vector, vectors = 16 // itemsize, vectors_at_once(length)
    columns, warps = min(WARP * vector, max(triton.next_power_of_2(length), 16)), 1
    most = triton.next_power_of_2(top_k)

    def choices() -> int:
        return vectors * WARP * warps * vector // columns

    while choices() < most and tokens * triton.cdiv(length, columns) * vectors * WARP * warps * 16 < BYTES_IN_FLIGHT:
        if columns > 4 * vector:  # 64 bytes, the least that memory hands out without waste
            columns //= 2
        elif warps < MOST_WARPS:
            warps *= 2
        else:
            break
    return Cut(min(choices(), most), columns, warps)


@triton.jit
def dots_of_rows(
    row_ptr,  # [D]
    table_rows_ptr,  # [BLOCK_J]
    here,
    D,
    FOLD: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Dot products of a token with BLOCK_J rows of a table; 0 where a row is not ``here``, whatever the token holds."""
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_J, BLOCK_D // FOLD), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + d
        row = tl.load(row_ptr + column, mask=None if EVEN_D else column < D, other=None if EVEN_D else 0.0)
        loaded = here[:, None] if EVEN_D else here[:, None] & (column < D)[None, :]
        table = tl.load(table_rows_ptr[:, None] + column[None, :], mask=loaded, other=0.0)
        products = table.to(tl.float32) * row.to(tl.float32)[None, :]
        acc += tl.sum(tl.reshape(products, (BLOCK_J, BLOCK_D // FOLD, FOLD)), 2)
    return tl.where(here, tl.sum(acc, 1), 0.0)


@triton.jit
def scores_kernel(
    rows_ptr,  # [T, D]
    experts_ptr,  # [T, K]
    table_ptr,  # [E, D]
    weights_ptr,  # [T, K]
    scores_ptr,  # [T, K]
    factors_ptr,  # [T, K]
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
    """BLOCK_J choices of a token: scores ``s``, and factors ``w act(s)`` unless ACT is none."""
    CHUNKS: tl.constexpr = (K + BLOCK_J - 1) // BLOCK_J
    token = (tl.program_id(0) // CHUNKS).to(tl.int64)
    j = tl.program_id(0) % CHUNKS * BLOCK_J + tl.arange(0, BLOCK_J)
    pair = token * K + j
    expert, here = experts_of_choices(experts_ptr, token, j, E, K)
    table_rows_ptr = table_ptr + expert * stride_te
    scores = dots_of_rows(rows_ptr + token * D, table_rows_ptr, here, D, FOLD, EVEN_D, BLOCK_J, BLOCK_D)
    tl.store(scores_ptr + pair, scores.to(scores_ptr.dtype.element_ty), mask=j < K)
    if ACT != "none":
        weight = tl.load(weights_ptr + pair, mask=here, other=0.0).to(tl.float32)
        tl.store(factors_ptr + pair, weight * act_value(scores, ACT), mask=j < K)


@triton.jit
def scores_backward_kernel(
    rows_ptr,  # [T, D]
    experts_ptr,  # [T, K]
    table_ptr,  # [E, D]
    weights_ptr,  # [T, K]
    scores_ptr,  # [T, K]
    dweights_ptr,  # [T, K]
    dscores_ptr,  # [T, K]
    factors_ptr,  # [T, K]
    E,
    D,
    stride_te,
    K: tl.constexpr,
    ACT: tl.constexpr,
    NEED_DWEIGHTS: tl.constexpr,
    NEED_DSCORES: tl.constexpr,
    NEED_FACTORS: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_J choices of a token: ``dw = q act(s)``, ``ds = q w act'(s)`` and the factors ``w act(s)`` again."""
    CHUNKS: tl.constexpr = (K + BLOCK_J - 1) // BLOCK_J
    token = (tl.program_id(0) // CHUNKS).to(tl.int64)
    j = tl.program_id(0) % CHUNKS * BLOCK_J + tl.arange(0, BLOCK_J)
    pair = token * K + j
    expert, here = experts_of_choices(experts_ptr, token, j, E, K)
    if NEED_DWEIGHTS or NEED_DSCORES:
        table_rows_ptr = table_ptr + expert * stride_te
        q = dots_of_rows(rows_ptr + token * D, table_rows_ptr, here, D, FOLD, EVEN_D, BLOCK_J, BLOCK_D)
    score = tl.load(scores_ptr + pair, mask=here, other=0.0)  # only now: they would take registers from the rows under way
    weight = tl.load(weights_ptr + pair, mask=here, other=0.0).to(tl.float32)
    if NEED_DWEIGHTS:
        tl.store(dweights_ptr + pair, (q * act_value(score, ACT)).to(dweights_ptr.dtype.element_ty), mask=j < K)
    if NEED_DSCORES:
        tl.store(dscores_ptr + pair, q * weight * act_slope(score, ACT), mask=j < K)
    if NEED_FACTORS:
        tl.store(factors_ptr + pair, weight * act_value(score, ACT), mask=j < K)


@triton.jit
def sums_kernel(
    experts_ptr,  # [T, K]
    factors_ptr,  # [T, K]
    table_ptr,  # [E, D]
    out_ptr,  # [T, D]
    E,
    D,
    stride_te,
    K: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of ``sum_j c_tj table[e]`` of a token, its choices BLOCK_J at a time."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_J // FOLD, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        pair = token * K + j
        expert, here = experts_of_choices(experts_ptr, token, j, E, K)
        table_rows_ptr = table_ptr + expert * stride_te
        loaded = here[:, None] if EVEN_D else here[:, None] & (d < D)[None, :]
        rows = tl.load(table_rows_ptr[:, None] + d[None, :], mask=loaded, other=0.0)
        factor = tl.load(factors_ptr + pair, mask=here, other=0.0).to(tl.float32)
        # A thread's rows lie BLOCK_J / FOLD apart, so that it adds them by itself.
        acc += tl.sum(tl.reshape(rows.to(tl.float32) * factor[:, None], (FOLD, BLOCK_J // FOLD, BLOCK_D)), 0)
    tl.store(out_ptr + token * D + d, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=d < D)


def fold_of(length: int, itemsize: int) -> int:
    """Elements of a row in one thread, which it adds by itself; rows that begin anywhere are read element by element."""
    return 1 if length % 16 else 16 // itemsize


def by_rows(table_ED: Tensor) -> Tensor:
    """A table whose rows are contiguous; they may lie apart."""
    return table_ED if table_ED.stride(1) == 1 else table_ED.contiguous()


def _launch_pairs(
    kernel: Any, rows_TD: Tensor, experts_TK: Tensor, table_ED: Tensor, others: Sequence[Any], **constants: Any
) -> None:
    """Launch a kernel that multiplies each token's row with those that its choices name in a table."""
    table_ED = by_rows(table_ED)
    (T, K), (E, D), itemsize = experts_TK.shape, table_ED.shape, table_ED.element_size()
    cut = cut_dots(rules.hint(T) * K, K, D, itemsize)
    launch(
        kernel,
        (T * triton.cdiv(K, cut.choices),),
        (rows_TD, experts_TK, table_ED, *others),
        (E, D, table_ED.stride(0)),
        K=K,
        FOLD=fold_of(D, itemsize),
        EVEN_D=D % cut.columns == 0,
        BLOCK_J=cut.choices,
        BLOCK_D=cut.columns,
        num_warps=cut.warps,
        num_stages=1,
        **constants,
    )


def scores(
    rows_TD: Tensor,
    experts_TK: Tensor,
    table_ED: Tensor,
    dtype: torch.dtype,
    weights_TK: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """``s_tj = rows_t . table[experts_tj]`` in ``dtype``, and with weights the factors ``c_tj = w_tj act(s_tj)`` in float32.

    All are contiguous but the table. Both results are ``[T, K]``, 0 for an id out of range; without weights the second is empty.
    """
    s_TK = torch.empty(experts_TK.shape, dtype=dtype, device=rows_TD.device)
    factors_TK = torch.empty(0 if weights_TK is None else experts_TK.shape, dtype=torch.float32, device=rows_TD.device)
    _launch_pairs(scores_kernel, rows_TD, experts_TK, table_ED, (weights_TK, s_TK, factors_TK), ACT=activation)
    return s_TK, factors_TK


def scores_backward(
    dy_TD: Tensor,
    s_TK: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up_ED: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``dw = q act(s)``, ``ds = q w act'(s)`` and ``c = w act(s)`` of every pair, with ``q_tj = dy_t . up[experts_tj]``.

    All are contiguous but the table. The results are ``[T, K]``, empty if not wanted; dw has the weights' dtype, the others
    float32.
    """
    dtypes = (weights_TK.dtype, torch.float32, torch.float32)
    results = [
        torch.empty(experts_TK.shape if needed else 0, dtype=dtype, device=dy_TD.device)
        for dtype, needed in zip(dtypes, needs, strict=True)
    ]
    if any(needs):
        wanted = dict(zip(("NEED_DWEIGHTS", "NEED_DSCORES", "NEED_FACTORS"), needs, strict=True))
        _launch_pairs(scores_backward_kernel, dy_TD, experts_TK, up_ED, (weights_TK, s_TK, *results), ACT=activation, **wanted)
    dweights_TK, ds_TK, factors_TK = results
    return dweights_TK, ds_TK, factors_TK


def sums(experts_TK: Tensor, factors_TK: Tensor, table_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """``out_t = sum_j c_tj table[experts_tj]``, ``[T, D]``, in float32 and a fixed order, rounded once."""
    table_ED = by_rows(table_ED)
    (T, K), (E, D) = experts_TK.shape, table_ED.shape
    cut = cut_sums(rules.hint(T), K, D, table_ED.element_size())
    out_TD = torch.empty((T, D), dtype=dtype, device=table_ED.device)
    launch(
        sums_kernel,
        (T, triton.cdiv(D, cut.columns)),
        (experts_TK, factors_TK, table_ED, out_TD),
        (E, D, table_ED.stride(0)),
        K=K,
        FOLD=min(vectors_at_once(D), cut.choices),
        EVEN_D=D % cut.columns == 0,
        BLOCK_J=cut.choices,
        BLOCK_D=cut.columns,
        num_warps=cut.warps,
        num_stages=1,
    )
    return out_TD
