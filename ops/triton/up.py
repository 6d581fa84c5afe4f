"""Gate and up projection of gathered rows, with the activation: ``h[i] = act(x[order[i] // K] Wup_e^T + bup_e)``.

A gated expert's tile has BLOCK_N gate and BLOCK_N up columns side by side in one accumulator: they share the rows of x, and the
epilogue takes the two apart in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops.records import PLAIN, Activation
from fusedonemoe.ops.triton.launch import launch_blocks
from fusedonemoe.ops.triton.plan import RowPlan
from fusedonemoe.ops.triton.rules import Tile
from fusedonemoe.ops.triton.tiles import act_value, gated_value, multiply_rows, swizzled


@triton.jit
def gate_and_up(z, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The two ``[BLOCK_M, BLOCK_N]`` halves of a tile of ``z``."""
    if LAYOUT == "interleaved":
        gate, up = tl.split(tl.reshape(z, (BLOCK_M, BLOCK_N, 2)))
    elif LAYOUT == "gate_up":
        gate, up = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    else:
        tl.static_assert(LAYOUT == "up_gate", "unknown layout")
        up, gate = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    return gate, up


@triton.jit(do_not_specialize=["z_first", "z_end"])
def up_kernel(
    x_ptr,  # [T, D]
    up_ptr,  # [E, G, D]
    bias_ptr,  # [E, G]
    z_ptr,  # [at least z_end, G]
    h_ptr,  # [N, F]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    blocks_ptr,  # [num_blocks, 2]
    D,
    F,
    z_first,
    z_end,
    top_k,
    stride_we,
    stride_wn,
    stride_wk,
    alpha,
    limit,
    ACT: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
    STORE_H: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program: a block of rows of one expert by BLOCK_N columns of h. Of z it stores rows from z_first to z_end."""
    num_columns = tl.cdiv(F, BLOCK_N)
    block, column_block = swizzled(tl.program_id(0), tl.num_programs(0) // num_columns, num_columns, GROUP_M)
    expert = tl.load(blocks_ptr + 2 * block)
    if expert < 0:
        return
    first = tl.load(blocks_ptr + 2 * block + 1)
    end = tl.load(offsets_ptr + expert + 1)
    if not STORE_H and first + BLOCK_M <= z_first:
        return

    # A row behind the end reads the last row instead: what it computes is not stored, and the loop needs no mask.
    row = first + tl.arange(0, BLOCK_M)
    token = tl.load(order_ptr + tl.minimum(row, end - 1)) // top_k
    # z_column [columns of the tile]: the weight's rows, and the columns of z, that the tile covers.
    GATED: tl.constexpr = 1 if LAYOUT == "plain" else 2
    tile_column = tl.arange(0, GATED * BLOCK_N)
    if LAYOUT == "plain" or LAYOUT == "interleaved":
        z_column = column_block * (GATED * BLOCK_N) + tile_column
        in_columns = z_column < GATED * F
    else:
        h_column = column_block * BLOCK_N + tile_column % BLOCK_N
        z_column = h_column + tile_column // BLOCK_N * F
        in_columns = h_column < F
    up_ptr += expert.to(tl.int64) * stride_we
    z = multiply_rows(x_ptr, up_ptr, token, z_column, in_columns, D, stride_wk, stride_wn, EVEN_K, EVEN_N, PRECISION, BLOCK_K)

    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * (GATED * F) + z_column
        z += tl.load(bias_ptrs, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    # Rounded before the activation, so that h is the same whether z is saved or computed once more.
    z_rounded = z.to(z_ptr.dtype.element_ty)
    if STORE_Z and first < z_end:
        in_rows = (row >= z_first) & (row < tl.minimum(end, z_end))
        z_ptrs = z_ptr + row.to(tl.int64)[:, None] * (GATED * F) + z_column[None, :]
        tl.store(z_ptrs, z_rounded, mask=in_rows[:, None] & in_columns[None, :])
    if STORE_H:
        z = z_rounded.to(tl.float32)
        if LAYOUT == "plain":
            h = act_value(z, ACT)
        else:
            gate, up = gate_and_up(z, LAYOUT, BLOCK_M, BLOCK_N)
            h = gated_value(gate, up, alpha, limit, ACT)
        h_column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        h_ptrs = h_ptr + row.to(tl.int64)[:, None] * F + h_column[None, :]
        tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=(row < end)[:, None] & (h_column < F)[None, :])


def up_projection(
    x_TD: Tensor,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    plan: RowPlan,
    top_k: int,
    act: Activation,
    tile: Tile,
    z: Tensor,
    h_NF: Tensor | None = None,
    first_row: int = 0,
) -> None:
    """Fill ``h[i] = act(z[i])`` and ``z[i] = x[order[i] // K] Wup_e^T + bup_e`` for sorted rows.

    The first rows of z are kept, from ``first_row`` on; h where it is given. All are contiguous but up, whose rows are in
    ``act.layout``. A row of z has the same bits with h and without it. Positions from ``offsets[E]`` on are not written.
    """
    _, G, D = up_EGD.shape
    without_z = isinstance(z.shape[0], int) and z.shape[0] == 0
    launch_blocks(
        up_kernel,
        plan,
        tile,
        (x_TD, up_EGD, None if up_bias_EG is None else up_bias_EG.contiguous(), None if without_z else z, h_NF),
        D,
        G if act.layout == PLAIN else G // 2,
        (first_row, z.shape[0], top_k, *up_EGD.stride(), act.alpha, act.limit),
        ACT=act.name,
        LAYOUT=act.layout,
        HAS_BIAS=up_bias_EG is not None,
        STORE_Z=not without_z,
        STORE_H=h_NF is not None,
    )
