"""Gradient of an expert's hidden row, and everything of the backward that depends on it element by element.

With ``dA'_i = dy_t Wdown_e`` and ``A_i = act(z_i)`` for sorted row ``i``: ``dz_i = act'(z_i) (w dA'_i)``, ``wA_i = w A_i``, and
``<dA'_i, A_i>``, the routing gradient, as one partial sum per block of columns (SonicMoE, arXiv 2512.14080).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.records import Activation
from fusedonemoe.ops.triton.launch import launch_blocks
from fusedonemoe.ops.triton.plan import RowPlan
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.ops.triton.tiles import act_slope, act_value, gated_slopes, gated_value, multiply_rows, swizzled


@triton.jit
def _finish(
    acc,
    first_column,
    block,
    ACT: tl.constexpr,
    LAYOUT: tl.constexpr,
    WITH_DZ: tl.constexpr,
    WITH_WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stores what depends on these columns of ``dA'``, CHUNK of them at a time, and returns ``<dA', A>`` of each row.

    All columns at once, with two of z and two of dz for each, would not fit the registers.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    WIDTH: tl.constexpr = acc.shape[1]
    if WIDTH > CHUNK:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        total = _finish(left, first_column, block, ACT, LAYOUT, WITH_DZ, WITH_WEIGHTED, CHUNK)
        total += _finish(right, first_column + HALF, block, ACT, LAYOUT, WITH_DZ, WITH_WEIGHTED, CHUNK)
    else:
        rows, in_rows, weight, z_ptr, dz_ptr, weighted_ptr, F, alpha, limit = block
        f = first_column + tl.arange(0, WIDTH)
        stored = in_rows[:, None] & (f < F)[None, :]
        dtype = z_ptr.dtype.element_ty
        if LAYOUT == "interleaved":
            # Both of a pair in one read of neighbouring columns, and split in registers.
            pair = 2 * first_column + tl.arange(0, 2 * WIDTH)
            z_offsets = rows[:, None] * (2 * F) + pair[None, :]
            in_pairs = in_rows[:, None] & (pair < 2 * F)[None, :]
            z = tl.load(z_ptr + z_offsets, mask=in_pairs, other=0.0)
            gate, up = tl.split(tl.reshape(z, (BLOCK_M, WIDTH, 2)))
        elif LAYOUT == "plain":
            gate_offsets = rows[:, None] * F + f[None, :]
            gate = tl.load(z_ptr + gate_offsets, mask=stored, other=0.0)
        else:
            first_half = rows[:, None] * (2 * F) + f[None, :]
            gate_offsets = first_half if LAYOUT == "gate_up" else first_half + F
            up_offsets = first_half + F if LAYOUT == "gate_up" else first_half
            gate = tl.load(z_ptr + gate_offsets, mask=stored, other=0.0)
            up = tl.load(z_ptr + up_offsets, mask=stored, other=0.0)
        gate = gate.to(tl.float32)
        if LAYOUT == "plain":
            h = act_value(gate, ACT)
        else:
            up = up.to(tl.float32)
            h = gated_value(gate, up, alpha, limit, ACT)

        # Columns behind F add nothing: their weights, and with them acc, are zero; act(0) may not be.
        total = tl.sum(acc * h, axis=1)
        if WITH_WEIGHTED:
            weighted_ptrs = weighted_ptr + rows[:, None] * F + f[None, :]
            tl.store(weighted_ptrs, (weight[:, None] * h).to(dtype), mask=stored)
        if WITH_DZ:
            dh = acc * weight[:, None]
            if LAYOUT == "plain":
                tl.store(dz_ptr + gate_offsets, (dh * act_slope(gate, ACT)).to(dtype), mask=stored)
            else:
                dgate, dup = gated_slopes(gate, up, dh, alpha, limit, ACT)
                if LAYOUT == "interleaved":
                    dz = tl.reshape(tl.join(dgate.to(dtype), dup.to(dtype)), (BLOCK_M, 2 * WIDTH))
                    tl.store(dz_ptr + z_offsets, dz, mask=in_pairs)
                else:
                    tl.store(dz_ptr + gate_offsets, dgate.to(dtype), mask=stored)
                    tl.store(dz_ptr + up_offsets, dup.to(dtype), mask=stored)
    return total


@triton.jit
def dh_kernel(
    dy_ptr,  # [T, D]
    down_ptr,  # [E, D, F]
    z_ptr,  # [N, G]
    weights_ptr,  # [T * K]
    dz_ptr,  # [N, G]
    weighted_ptr,  # [N, F]
    partial_ptr,  # [N, column blocks]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    blocks_ptr,  # [B, 2]
    D,
    F,
    stride_we,
    stride_wd,
    stride_wf,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    ACT: tl.constexpr,
    LAYOUT: tl.constexpr,
    WITH_DZ: tl.constexpr,
    WITH_WEIGHTED: tl.constexpr,
    WITH_PARTIAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """BLOCK_M rows of one expert by BLOCK_N columns of h."""
    num_columns = tl.cdiv(F, BLOCK_N)
    block, column = swizzled(tl.program_id(0), tl.num_programs(0) // num_columns, num_columns, GROUP_M)
    # Loaded here, not in a function: torch takes a pointer that a call's result depends on for written.
    expert = tl.load(blocks_ptr + 2 * block)
    first = tl.load(blocks_ptr + 2 * block + 1)
    end = tl.load(offsets_ptr + expert + 1)
    if expert < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    in_rows = rows < end
    # Rows behind the expert's last repeat it: they are computed without a mask and not stored.
    source = tl.load(order_ptr + tl.minimum(rows, end - 1))
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = f < F

    if WITH_DZ or WITH_PARTIAL:
        down_ptr += expert.to(tl.int64) * stride_we
        acc = multiply_rows(
            dy_ptr, down_ptr, source // TOP_K, f, in_columns, D, stride_wd, stride_wf, EVEN_K, EVEN_N, PRECISION, BLOCK_K
        )
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    weight = tl.load(weights_ptr + source, mask=in_rows, other=0.0).to(tl.float32)
    # From here on the block's first row is the origin, so that offsets within the block fit 32 bits, and half the registers.
    G = F if LAYOUT == "plain" else 2 * F
    first_row = first.to(tl.int64)
    z_ptr += first_row * G
    dz_ptr += first_row * G
    weighted_ptr += first_row * F
    place = (tl.arange(0, BLOCK_M), in_rows, weight, z_ptr, dz_ptr, weighted_ptr, F, alpha, limit)
    total = _finish(acc, column * BLOCK_N, place, ACT, LAYOUT, WITH_DZ, WITH_WEIGHTED, CHUNK)
    if WITH_PARTIAL:
        tl.store(partial_ptr + rows.to(tl.int64) * num_columns + column, total, mask=in_rows)


class HiddenGradient(NamedTuple):
    """The results of :func:`hidden_gradient`, in sorted order; a zero-size tensor for one that is not wanted."""

    dz: Tensor  # [N, G] gradient of the pre-activations, columns in their order
    weighted: Tensor  # [N, F] the hidden rows times their routing weights
    partial: Tensor  # [N, column blocks] float32; a row's sum is its routing gradient, but for the down bias


def hidden_gradient(
    dy_TD: Tensor,
    z_NG: Tensor,
    weights_TK: Tensor,
    down_EDF: Tensor,
    plan: RowPlan,
    act: Activation,
    tile: Tile,
    *,
    dz: bool,
    weighted: bool,
    partial: bool,
) -> HiddenGradient:
    """The gradient of the hidden rows, used up at once; dz, weighted and partial: whether to store them.

    All tensors are contiguous but down, of any strides. Rows of ids outside ``[0, E)`` are not written.
    """
    N, (_, D, F) = z_NG.shape[0], down_EDF.shape
    num_columns = triton.cdiv(F, tile.BLOCK_N)
    dz_NG = torch.empty_like(z_NG) if dz else z_NG.new_empty(0)
    weighted_NF = z_NG.new_empty((N, F) if weighted else (0,))
    partial_NC = z_NG.new_empty((N, num_columns) if partial else (0,), dtype=torch.float32)
    launch_blocks(
        dh_kernel,
        plan,
        tile,
        (dy_TD, down_EDF, z_NG, weights_TK, dz_NG, weighted_NF, partial_NC),
        D,
        F,
        (*down_EDF.stride(), act.alpha, act.limit),
        TOP_K=weights_TK.shape[1],
        ACT=act.name,
        LAYOUT=act.layout,
        WITH_DZ=dz,
        WITH_WEIGHTED=weighted,
        WITH_PARTIAL=partial,
        # Eight values of each thread at once: with more, one program's registers fill half of an SM and none runs beside it.
        CHUNK=max(16, 256 * tile.num_warps // tile.BLOCK_M),
    )
    return HiddenGradient(dz_NG, weighted_NF, partial_NC)
