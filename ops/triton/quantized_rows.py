"""One grouped projection of rows by weights of 8 or 4 bits, in either direction: over their inputs, or back over their outputs.

A tile is widened in registers. Integers of 8 bits are exact in every dtype of x: forwards, where an output has one scale, it
multiplies the finished sum. Everywhere else a tile becomes ``scale * (values - zero_point)``, rounded to the dtype of x once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.formats import QuantizedWeight
from fusedonemoe.ops.records import Projection
from fusedonemoe.ops.triton.launch import launch_blocks
from fusedonemoe.ops.triton.plan import RowPlan
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.ops.triton.tiles import swizzled

# A widened tile stands in registers beside the sums; with more columns the two would not fit.
MOST_COLUMNS = 128


@triton.jit
def multiply_quantized(
    rows_ptr,  # [., length]
    stored,  # of an expert: values, scales [O, groups] and zero points [O, groups], their sizes and strides
    source,  # [BLOCK_M]
    first_column,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``rows[source] @ weights[:, columns]`` in float32, of int8 forwards without the scale; zeros in columns that do not exist.

    Of 4 bits, a tile lies within one group of inputs, and all of it exists along them.
    """
    values_ptr, scale_ptr, zero_ptr, length, columns, groups, stride_vk, stride_vn = stored
    # Values that share a byte are neighbours along the inputs: along k forwards, along n backwards.
    K_BYTES: tl.constexpr = BLOCK_K // 2 if FORMAT == "int4" and not BACK else BLOCK_K
    N_BYTES: tl.constexpr = BLOCK_N // 2 if FORMAT == "int4" and BACK else BLOCK_N
    AXIS: tl.constexpr = 1 if BACK else 0  # along which a scale is repeated
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    depth = tl.arange(0, BLOCK_K)
    column = first_column + tl.arange(0, BLOCK_N)
    in_columns = column < columns
    byte_depth = tl.arange(0, K_BYTES)
    byte_column = first_column // (BLOCK_N // N_BYTES) + tl.arange(0, N_BYTES)
    in_byte_columns = byte_column < columns // (BLOCK_N // N_BYTES)
    rows_ptrs = rows_ptr + source.to(tl.int64)[:, None] * length + depth[None, :]
    values_ptrs = values_ptr + byte_depth.to(tl.int64)[:, None] * stride_vk + byte_column.to(tl.int64)[None, :] * stride_vn
    acc = tl.zeros((source.shape[0], BLOCK_N), tl.float32)
    for k in range(0, length, BLOCK_K):
        if EVEN_K:
            rows = tl.load(rows_ptrs)
        else:
            rows = tl.load(rows_ptrs, mask=depth[None, :] < length - k, other=0.0)
        if EVEN_K and EVEN_N:
            values = tl.load(values_ptrs)
        elif EVEN_K:
            values = tl.load(values_ptrs, mask=in_byte_columns[None, :], other=0)
        else:
            values = tl.load(values_ptrs, mask=(byte_depth[:, None] < length - k) & in_byte_columns[None, :], other=0)
        if FORMAT == "int4":
            values = tl.join(values & 15, values >> 4)
            if not BACK:
                values = tl.permute(values, (0, 2, 1))
            values = tl.reshape(values, (BLOCK_K, BLOCK_N))
        if FORMAT == "int8" and not BACK:
            weights = values.to(dtype)
        else:
            if BACK:  # outputs lie along k
                place = (k + depth) * groups + first_column // GROUP_SIZE
                exists = k + depth < length
            else:
                place = column * groups + k // GROUP_SIZE
                exists = in_columns
            scale = tl.expand_dims(tl.load(scale_ptr + place, mask=exists, other=0.0), AXIS)
            zero = 8.0 if FORMAT == "int4" else 0.0
            if HAS_ZERO:
                zero = tl.expand_dims(tl.load(zero_ptr + place, mask=exists, other=0).to(tl.float32), AXIS)
            weights = ((values.to(tl.float32) - zero) * scale).to(dtype)  # rounded once
        acc = tl.dot(rows, weights, acc, input_precision=PRECISION)
        rows_ptrs += BLOCK_K
        values_ptrs += K_BYTES * stride_vk
    return acc


@triton.jit
def _finish(acc, first_column, place, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scales the sums, adds the bias and stores; in halves where scale and bias of all columns would not fit the registers."""
    WIDTH: tl.constexpr = acc.shape[1]
    if SCALED and HAS_BIAS and WIDTH > 64:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        _finish(left, first_column, place, SCALED, HAS_BIAS)
        _finish(right, first_column + HALF, place, SCALED, HAS_BIAS)
    else:
        row_offset, stored, scale_ptr, bias_ptr, out_ptr, B = place
        column = first_column + tl.arange(0, WIDTH)
        in_columns = column < B
        if SCALED:
            acc *= tl.load(scale_ptr + column, mask=in_columns, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        out_ptrs = out_ptr + row_offset[:, None] + column[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=stored[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["first_row"])
def quantized_rows_kernel(
    rows_ptr,  # [N, A], or [T, A] when gathered
    values_ptr,  # [E, O, I], or bytes of [E, O, I / 2]; forwards A = I and B = O, backwards A = O and B = I
    scale_ptr,  # [E, O, groups]
    zero_ptr,  # [E, O, groups]
    bias_ptr,  # [E, B]
    out_ptr,  # [N, B]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    blocks_ptr,  # [num_blocks, 2]
    A,
    B,
    groups,
    first_row,
    top_k,
    stride_ve,
    stride_va,
    stride_vb,
    stride_se,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program: a block of rows of one expert by BLOCK_N columns of the output, from first_row on."""
    num_columns = tl.cdiv(B, BLOCK_N)
    block, column_block = swizzled(tl.program_id(0), tl.num_programs(0) // num_columns, num_columns, GROUP_M)
    expert = tl.load(blocks_ptr + 2 * block)
    if expert < 0:
        return
    first = tl.load(blocks_ptr + 2 * block + 1)
    end = tl.load(offsets_ptr + expert + 1)
    if first + BLOCK_M <= first_row:
        return

    # A row behind the end reads the last row instead: what it computes is not stored, and the loop needs no mask.
    row = first + tl.arange(0, BLOCK_M)
    source = tl.minimum(row, end - 1)
    if GATHER:
        source = tl.load(order_ptr + source) // top_k
    values_ptr += expert.to(tl.int64) * stride_ve
    scale_ptr += expert.to(tl.int64) * stride_se
    zero_ptr += expert.to(tl.int64) * stride_se
    first_column = column_block * BLOCK_N
    stored = (values_ptr, scale_ptr, zero_ptr, A, B, groups, stride_va, stride_vb)
    acc = multiply_quantized(
        rows_ptr, stored, source, first_column, FORMAT, GROUP_SIZE, BACK, HAS_ZERO, EVEN_K, EVEN_N, PRECISION, BLOCK_N, BLOCK_K
    )
    in_rows = (row >= first_row) & (row < end)
    place = (row.to(tl.int64) * B, in_rows, scale_ptr, bias_ptr + expert.to(tl.int64) * B, out_ptr, B)
    _finish(acc, first_column, place, FORMAT == "int8" and not BACK, HAS_BIAS)


def _fitted(tile: Tile, weight: QuantizedWeight, form: str, dtype: torch.dtype, back: bool) -> Tile:
    """``tile``, no larger along the inputs than a group, which then it divides, as all sizes are powers of two."""
    tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, MOST_COLUMNS))
    if dtype == torch.float32:
        # Without a matrix instruction both operands' tiles stand in registers too.
        tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, 32), BLOCK_K=16)
    if form == "int8":
        return tile
    if back:
        return tile._replace(BLOCK_N=min(tile.BLOCK_N, weight.group_size))
    return tile._replace(BLOCK_K=min(tile.BLOCK_K, weight.group_size))


def quantized_rows(
    rows: Tensor,
    projection: Projection,
    plan: RowPlan,
    tile: Tile,
    *,
    back: bool = False,
    top_k: int | None = None,
    first_row: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``out[i] = W_e rows[i] + bias[e]`` for the sorted rows ``i`` of expert ``e``; ``back``: ``out[i] = rows[i] W_e``.

    Arguments as for :func:`.rows.grouped_rows`. Rows before ``first_row`` are not written; ``tile`` is that of plain weights.
    """
    form, weight = projection.format.name, QuantizedWeight(*projection.tensors)  # type: ignore[arg-type]
    bias_EB = None if back or projection.bias is None else projection.bias.contiguous()
    rows, scale = rows.contiguous(), weight.scale.contiguous()
    zero = None if weight.zero_point is None else weight.zero_point.contiguous()
    values_EAB = weight.values if back else weight.values.transpose(1, 2)
    _, O, I = weight.shape  # noqa: E741
    A, B = (O, I) if back else (I, O)
    tile = _fitted(tile, weight, form, rows.dtype, back)
    groups, group_size = (1, 1 << 30) if form == "int8" else (scale.shape[2], weight.group_size)
    out_NB = rows.new_empty(plan.order.shape[0], B, dtype=dtype)
    launch_blocks(
        quantized_rows_kernel,
        plan,
        tile,
        (rows, values_EAB, scale, zero, bias_EB, out_NB),
        A,
        B,
        (groups, first_row, 1 if top_k is None else top_k, *values_EAB.stride(), scale.stride(0)),
        FORMAT=form,
        GROUP_SIZE=group_size,
        BACK=back,
        HAS_ZERO=zero is not None,
        GATHER=top_k is not None,
        HAS_BIAS=bias_EB is not None,
    )
    return out_NB
