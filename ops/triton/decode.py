"""Few rows (decoding): the experts' MLP as two matrix-vector launches, without a plan, a sort or an atomic.

``h_tj = act(x_t Wup_e^T + bup_e)`` for each pair of a token and a choice, then ``y_t = sum_j w_tj (h_tj Wdown_e^T + bdown_e)``.
An expert's weights are read about once, so the speed of memory counts: many bytes under way, along the contiguous axis.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.records import PLAIN, ExpertsCall
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.launch import launch
from fusedonemoe.ops.triton.rules import BYTES_IN_FLIGHT
from fusedonemoe.ops.triton.tiles import act_value, experts_of_choices, gated_value

NUM_WARPS = 4
NUM_STAGES = 3
# The weights of one step of a program: 8 vectors of 16 bytes a thread. Copied asynchronously, NUM_STAGES - 1 steps are under way
# at any time; plain loads were scheduled one after the other to save registers.
TILE_BYTES = 8 * 16 * 32 * NUM_WARPS
CHOICES_AT_ONCE = 8


class Cut(NamedTuple):
    """The cut of a product: a program computes ``outputs`` columns, and takes ``reduced`` elements of the sum at a time."""

    outputs: int
    reduced: int


def cut(rows: int, columns: int, widest: int, narrowest: int, length: int, itemsize: int, copies: int) -> Cut:
    """Return the widest cut, in powers of two, with enough bytes under way; each output has ``copies`` rows of weights."""
    outputs = widest
    in_flight = (NUM_STAGES - 1) * TILE_BYTES
    while outputs > narrowest and rows * triton.cdiv(columns, outputs) * in_flight < BYTES_IN_FLIGHT:
        outputs //= 2
    return Cut(outputs, min(TILE_BYTES // itemsize // (outputs * copies), max(triton.next_power_of_2(length), 16)))


@triton.jit
def _up_kernel(
    x_ptr,  # [T, D]
    experts_ptr,  # [T, K]
    up_ptr,  # [E, G, D]
    bias_ptr,  # [E, G]
    h_ptr,  # [N, F]
    alpha,
    limit,
    E,
    D,
    F,
    stride_ue,
    stride_ug,
    stride_ud,
    K: tl.constexpr,
    ACT: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALONG_D: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_F: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    pair = tl.program_id(0)
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    first = tl.program_id(1) * BLOCK_F
    GATED: tl.constexpr = LAYOUT != "plain"
    COLUMNS: tl.constexpr = 2 * BLOCK_F if GATED else BLOCK_F
    g = tl.arange(0, COLUMNS)
    if LAYOUT == "interleaved":
        column = 2 * first + g
        in_columns = column < 2 * F
    else:
        column = first + g % BLOCK_F
        in_columns = column < F
        column += g // BLOCK_F * F
    x_row_ptr = x_ptr + (pair // K).to(tl.int64) * D
    up_rows_ptr = up_ptr + expert * stride_ue + column.to(tl.int64) * stride_ug

    d = tl.arange(0, BLOCK_D)
    if ALONG_D:
        acc = tl.zeros((COLUMNS, BLOCK_D // FOLD), tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            in_d = start + d < D
            x = tl.load(x_row_ptr + start + d, mask=None if EVEN_D else in_d, other=None if EVEN_D else 0.0)
            up_ptrs = up_rows_ptr[:, None] + (start + d)[None, :] * stride_ud
            if EVEN_D and EVEN_F:
                up = tl.load(up_ptrs)
            else:
                up = tl.load(up_ptrs, mask=in_columns[:, None] & in_d[None, :], other=0.0)
            products = up.to(tl.float32) * x.to(tl.float32)[None, :]
            acc += tl.sum(tl.reshape(products, (COLUMNS, BLOCK_D // FOLD, FOLD)), 2)
        z = tl.sum(acc, 1)
    else:
        acc = tl.zeros((BLOCK_D // FOLD, COLUMNS), tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            in_d = start + d < D
            x = tl.load(x_row_ptr + start + d, mask=None if EVEN_D else in_d, other=None if EVEN_D else 0.0)
            up_ptrs = up_rows_ptr[None, :] + (start + d).to(tl.int64)[:, None] * stride_ud
            if EVEN_D and EVEN_F:
                up = tl.load(up_ptrs)
            else:
                up = tl.load(up_ptrs, mask=in_columns[None, :] & in_d[:, None], other=0.0)
            products = up.to(tl.float32) * x.to(tl.float32)[:, None]
            acc += tl.sum(tl.reshape(products, (FOLD, BLOCK_D // FOLD, COLUMNS)), 0)
        z = tl.sum(acc, 0)
    G = 2 * F if GATED else F
    if HAS_BIAS:
        z += tl.load(bias_ptr + expert * G + column, mask=in_columns, other=0.0).to(tl.float32)
    z = z.to(h_ptr.dtype.element_ty).to(tl.float32)
    if LAYOUT == "plain":
        h = act_value(z, ACT)
    else:
        if LAYOUT == "interleaved":
            gate, up_value = tl.split(tl.reshape(z, (BLOCK_F, 2)))
        else:
            gate, up_value = tl.split(tl.trans(tl.reshape(z, (2, BLOCK_F))))
            if LAYOUT == "up_gate":
                gate, up_value = up_value, gate
        h = gated_value(gate, up_value, alpha, limit, ACT)
    f = first + tl.arange(0, BLOCK_F)
    tl.store(h_ptr + pair.to(tl.int64) * F + f, h.to(h_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _down_kernel(
    h_ptr,  # [N, F]
    experts_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    down_ptr,  # [E, D, F]
    bias_ptr,  # [E, D]
    y_ptr,  # [T, D]
    E,
    D,
    F,
    stride_de,
    stride_dd,
    stride_df,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALONG_F: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_F: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    f = tl.arange(0, BLOCK_F)
    y = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        expert, here = experts_of_choices(experts_ptr, token, j, E, K)
        weight = tl.load(weights_ptr + token * K + j, mask=here, other=0.0).to(tl.float32)
        h_rows_ptr = h_ptr + (token * K + j) * F
        # The weights are read as a matrix, the choice the lower part of its row: the layout of a tensor of three axes, and with
        # it how often h is read and whether a fold stays within a thread, differs between versions of Triton.
        if ALONG_F:
            row = tl.arange(0, BLOCK_D * BLOCK_J)
            row_expert, in_rows = experts_of_choices(experts_ptr, token, first + row % BLOCK_J, E, K)
            row_d = tl.program_id(1) * BLOCK_D + row // BLOCK_J
            in_rows = in_rows & (row_d < D)
            down_rows_ptr = down_ptr + row_expert * stride_de + row_d.to(tl.int64) * stride_dd
            acc = tl.zeros((BLOCK_D, BLOCK_J, BLOCK_F // FOLD), tl.float32)
            for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
                in_f = start + f < F
                h = tl.load(h_rows_ptr[:, None] + (start + f)[None, :], mask=here[:, None] & in_f[None, :], other=0.0)
                down_ptrs = down_rows_ptr[:, None] + (start + f)[None, :] * stride_df
                in_down = in_rows[:, None] if EVEN_F else in_rows[:, None] & in_f[None, :]
                down = tl.reshape(tl.load(down_ptrs, mask=in_down, other=0.0), (BLOCK_D, BLOCK_J, BLOCK_F))
                products = down.to(tl.float32) * h.to(tl.float32)[None, :, :]
                acc += tl.sum(tl.reshape(products, (BLOCK_D, BLOCK_J, BLOCK_F // FOLD, FOLD)), 3)
            rows = tl.trans(tl.sum(acc, 2))
        else:
            row = tl.arange(0, BLOCK_F * BLOCK_J)
            row_expert, in_rows = experts_of_choices(experts_ptr, token, first + row % BLOCK_J, E, K)
            row_f = row // BLOCK_J
            down_rows_ptr = down_ptr + row_expert * stride_de
            in_tile = in_rows[:, None] & in_d[None, :]
            acc = tl.zeros((BLOCK_F // FOLD, BLOCK_J, BLOCK_D), tl.float32)
            for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
                in_f = start + f < F
                h = tl.load(h_rows_ptr[None, :] + (start + f)[:, None], mask=here[None, :] & in_f[:, None], other=0.0)
                # What does not change is kept apart, so that it changes its layout before the loop.
                in_block = (start + row_f)[:, None]
                down_ptrs = down_rows_ptr[:, None] + d.to(tl.int64)[None, :] * stride_dd + in_block.to(tl.int64) * stride_df
                in_down = in_tile if EVEN_F else in_tile & (in_block < F)
                down = tl.load(down_ptrs, mask=in_down, other=0.0)
                down = tl.reshape(down, (BLOCK_F, BLOCK_J, BLOCK_D))
                products = down.to(tl.float32) * h.to(tl.float32)[:, :, None]
                acc += tl.sum(tl.reshape(products, (FOLD, BLOCK_F // FOLD, BLOCK_J, BLOCK_D)), 0)
            rows = tl.sum(acc, 0)
        if HAS_BIAS:
            bias_ptrs = bias_ptr + expert[:, None] * D + d[None, :]
            rows += tl.load(bias_ptrs, mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        # Rounded as the rows of the sorted path are, which are stored. A row of float16 may be too large for it.
        if y_ptr.dtype.element_ty != tl.float16:
            rows = rows.to(y_ptr.dtype.element_ty).to(tl.float32)
        y += tl.sum(rows * weight[:, None], 0)
    tl.store(y_ptr + token * D + d, y.to(y_ptr.dtype.element_ty), mask=in_d)


def experts_mlp(call: ExpertsCall) -> Tensor:
    """``y_t = sum_j w_tj (act(x_t Wup_e + bup_e) Wdown_e + bdown_e)``, forward only, of float weights without adapters.

    It is fastest where D or G of up is contiguous, and F or D of down. Pre-activations, h and the row of each choice are rounded
    to the dtype of x on the way, but a row not to float16.
    """
    x_TD, experts_TK, weights_TK, (up, down, act) = call
    up_EGD, down_EDF = up.floats, down.floats
    T, K = experts_TK.shape
    E, D, F = down_EDF.shape
    x_TD, experts_TK, weights_TK = x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous()
    up_bias_EG, down_bias_ED = (None if side.bias is None else side.bias.contiguous() for side in (up, down))
    h_NF, y_TD = x_TD.new_empty((T * K, F)), torch.empty_like(x_TD)
    tokens, itemsize = rules.hint(T), x_TD.element_size()
    vector = 16 // itemsize
    options = {"K": K, "STAGES": NUM_STAGES, "num_warps": NUM_WARPS, "num_stages": 1}

    along_d = up_EGD.stride(2) == 1
    copies = 1 if act.layout == PLAIN else 2
    widest, narrowest = (16 if along_d else 64) // copies, (2 if along_d else 16) // copies
    tile = cut(tokens * K, F, widest, narrowest, D, itemsize, copies)
    launch(
        _up_kernel,
        (T * K, triton.cdiv(F, tile.outputs)),
        (x_TD, experts_TK, up_EGD, up_bias_EG, h_NF),
        (act.alpha, act.limit, E, D, F, *up_EGD.stride()),
        ACT=act.name,
        LAYOUT=act.layout,
        HAS_BIAS=up_bias_EG is not None,
        ALONG_D=along_d,
        FOLD=vector if along_d else 8,
        EVEN_F=F % tile.outputs == 0,
        EVEN_D=D % tile.reduced == 0,
        BLOCK_F=tile.outputs,
        BLOCK_D=tile.reduced,
        **options,
    )

    along_f = down_EDF.stride(2) == 1
    choices = min(triton.next_power_of_2(K), CHOICES_AT_ONCE)
    widest, narrowest = (max(32 // choices, 8), 2) if along_f else (64, 16)
    tile = cut(tokens, D, widest, narrowest, F, itemsize, choices)
    launch(
        _down_kernel,
        (T, triton.cdiv(D, tile.outputs)),
        (h_NF, experts_TK, weights_TK, down_EDF, down_bias_ED, y_TD),
        (E, D, F, *down_EDF.stride()),
        HAS_BIAS=down_bias_ED is not None,
        ALONG_F=along_f,
        FOLD=vector if along_f else 8,
        EVEN_F=F % tile.reduced == 0,
        BLOCK_J=choices,
        BLOCK_D=tile.outputs,
        BLOCK_F=tile.reduced,
        **options,
    )
    return y_TD
