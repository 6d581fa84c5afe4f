"""From a routing to the rows in the order of their experts, and to the blocks of rows that the row kernels walk.

With ``N = T * K`` rows ``n = t * K + j`` and ``c_e`` of them on expert ``e`` the sort is a stable counting sort:

    position[n] = offsets[e] + #{m < n: expert m = expert n},    offsets[e] = c_0 + ... + c_{e - 1}

Three launches: count (a histogram per tile of rows), scan (rows of each expert in earlier tiles), place (rank of a row inside its
tile); one launch where all rows fit one tile. Every word is an integer with one writer, so the bits repeat.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedonemoe.ops import plan as torch_plan
from fusedonemoe.ops.triton.launch import launch

TILE = 1024  # rows that one program sorts
SCAN_TILES, SCAN_EXPERTS = 256, 16  # tile counts by experts that one program of the scan sees at a time
MAX_EXPERTS = 4096  # one program holds a word for every expert; torch sorts the routings of more
RESTORE_ROWS, RESTORE_BLOCKS = 1024, 256  # rows, or blocks, of one program of the restoring kernel
MIN_BINS = 256
WARPS = 8


class RowPlan(NamedTuple):
    """The expert-sorted order of a routing and its schedule, all int32."""

    order: Tensor  # [N] the flattened row t * K + j at a sorted position; rows whose id names no expert are last
    offsets: Tensor  # [E + 1] expert e owns sorted positions offsets[e] to offsets[e + 1]
    position: Tensor  # [N] the sorted position of a flattened row: the inverse of order
    blocks: Tensor  # [B, 2] the expert and the first position of each block of at most block_m rows; (-1, 0) behind the last


def num_blocks(num_rows: int, num_experts: int, block_m: int) -> int:
    """Bound of the number of blocks: every block has a row, and every expert at most one block that is not full.

    One expert counts as two: a symbolic number of blocks that may be 1 would make torch ask whether it is.
    """
    bound: int = torch.sym_min(num_rows, max(num_experts, 2) + num_rows // block_m)
    return bound


@triton.jit
def named_experts(ids, exists, E):
    """Ids of a tile of rows as int32: E for an id that names no expert, E + 1 behind the last row.

    The load itself stands in the kernels: torch.compile takes a pointer that is loaded behind a call for one that is written.
    """
    ids = ids.to(tl.int64)  # a uint64 past 2^63 turns negative
    ids = tl.where((ids >= 0) & (ids < E), ids, E)
    return tl.where(exists, ids, E + 1).to(tl.int32)


@triton.jit
def sort_tile(ids, TILE: tl.constexpr):
    """Ids in rising order, and the rows of the tile they came from; the row in the key makes the sort stable."""
    keys = tl.sort(ids * TILE + tl.arange(0, TILE))
    return keys // TILE, keys % TILE


@triton.jit
def store_block(blocks_ptr, block, expert, first, mask):
    """One row of the schedule."""
    tl.store(blocks_ptr + 2 * block, expert, mask=mask)
    tl.store(blocks_ptr + 2 * block + 1, first, mask=mask)


@triton.jit
def place(
    plan,
    first_row,
    num_blocks,
    E,
    ids,
    rows,
    counts,
    offsets,
    rank,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Writes what a sorted tile knows: its rows' places, the blocks they begin, its share of the empty blocks."""
    order_ptr, offsets_ptr, position_ptr, blocks_ptr = plan
    lane = tl.arange(0, TILE)
    routed = ids < E
    bins = tl.minimum(ids, BINS - 1)
    blocks_of = (counts + (BLOCK_M - 1)) // BLOCK_M
    first_blocks = tl.cumsum(blocks_of, 0) - blocks_of
    num_routed = tl.sum(counts, 0)
    num_used = tl.sum(blocks_of, 0)

    to = tl.where(routed, tl.gather(offsets, bins, 0), num_routed) + rank
    exists = ids <= E
    tl.store(order_ptr + to, first_row + rows, mask=exists)
    tl.store(position_ptr + first_row + rows, to, mask=exists)

    block = tl.gather(first_blocks, bins, 0) + rank // BLOCK_M
    store_block(blocks_ptr, block, ids, to, routed & (rank % BLOCK_M == 0))
    empty = first_row + lane
    store_block(blocks_ptr, empty, tl.full([TILE], -1, tl.int32), lane * 0, (empty >= num_used) & (empty < num_blocks))

    if first_row == 0:
        expert = tl.arange(0, BINS)
        tl.store(offsets_ptr + expert, offsets, mask=expert < E)
        tl.store(offsets_ptr + E, num_routed)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def plan_one_tile_kernel(
    experts_ptr,  # [N]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    position_ptr,  # [N]
    blocks_ptr,  # [B, 2]
    num_rows,
    num_blocks,
    E,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The whole plan of at most TILE rows in one program."""
    row = tl.arange(0, TILE)
    unsorted = named_experts(tl.load(experts_ptr + row, mask=row < num_rows, other=0), row < num_rows, E)
    counts = tl.histogram(tl.minimum(unsorted, BINS - 1), BINS, mask=unsorted < E)
    offsets = tl.cumsum(counts, 0) - counts
    ids, rows = sort_tile(unsorted, TILE)
    begins = tl.where(ids < E, tl.gather(offsets, tl.minimum(ids, BINS - 1), 0), tl.sum(counts, 0))
    rank = row - begins
    plan = (order_ptr, offsets_ptr, position_ptr, blocks_ptr)
    place(plan, 0, num_blocks, E, ids, rows, counts, offsets, rank, TILE, BINS, BLOCK_M)


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(
    experts_ptr,  # [N]
    tile_counts_ptr,  # [tiles, E + 1]
    num_rows,
    E,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows of every expert in one tile; the last column counts the rows whose id names no expert."""
    tile = tl.program_id(0)
    row = tile * TILE + tl.arange(0, TILE)
    ids = named_experts(tl.load(experts_ptr + row, mask=row < num_rows, other=0), row < num_rows, E)
    counts_ptr = tile_counts_ptr + tile.to(tl.int64) * (E + 1)
    for first in tl.static_range(0, BINS, CHUNK):  # a histogram keeps all its bins in registers
        here = (ids >= first) & (ids < first + CHUNK) & (ids < E)
        counts = tl.histogram(tl.where(here, ids - first, 0), CHUNK, mask=here)
        expert = first + tl.arange(0, CHUNK)
        tl.store(counts_ptr + expert, counts, mask=expert < E)
    tl.store(counts_ptr + E, tl.sum((ids == E).to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_tiles"])
def scan_kernel(
    tile_counts_ptr,  # [tiles, E + 1]
    before_ptr,  # [tiles, E + 1]
    counts_ptr,  # [E + 1]
    num_tiles,
    columns,
    SCAN_TILES: tl.constexpr,
    SCAN_EXPERTS: tl.constexpr,
):
    """Rows of each expert in the tiles before a tile, and in all tiles."""
    column = tl.program_id(0) * SCAN_EXPERTS + tl.arange(0, SCAN_EXPERTS)
    carry = tl.zeros([SCAN_EXPERTS], tl.int32)
    for first in range(0, num_tiles, SCAN_TILES):
        tile = first + tl.arange(0, SCAN_TILES)
        cell = tile[:, None].to(tl.int64) * columns + column[None, :]
        inside = (tile[:, None] < num_tiles) & (column[None, :] < columns)
        counts = tl.load(tile_counts_ptr + cell, mask=inside, other=0)
        tl.store(before_ptr + cell, carry[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        carry += tl.sum(counts, 0)
    tl.store(counts_ptr + column, carry, mask=column < columns)


@triton.jit
def larger(a, b):
    """The operation of a running maximum."""
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def place_kernel(
    experts_ptr,  # [N]
    before_ptr,  # [tiles, E + 1]
    counts_ptr,  # [E + 1]
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    position_ptr,  # [N]
    blocks_ptr,  # [B, 2]
    num_rows,
    num_blocks,
    E,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sorts one tile; a row's rank in its expert is its place in the tile's run of that expert, and the rows before the tile."""
    tile = tl.program_id(0)
    expert = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    offsets = tl.cumsum(counts, 0) - counts

    lane = tl.arange(0, TILE)
    row = tile * TILE + lane
    unsorted = named_experts(tl.load(experts_ptr + row, mask=row < num_rows, other=0), row < num_rows, E)
    ids, rows = sort_tile(unsorted, TILE)
    before = tl.load(before_ptr + tile.to(tl.int64) * (E + 1) + ids, mask=ids <= E, other=0)
    begins_run = ids != tl.gather(ids, tl.maximum(lane - 1, 0), 0)
    rank = before + lane - tl.associative_scan(tl.where(begins_run, lane, 0), 0, larger)
    plan = (order_ptr, offsets_ptr, position_ptr, blocks_ptr)
    place(plan, tile * TILE, num_blocks, E, ids, rows, counts, offsets, rank, TILE, BINS, BLOCK_M)


@triton.jit
def count_not_above(values, limits, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """Counts of ``values [SIZE]``, which never fall, that are at most each limit: a binary search for all limits abreast."""
    found = limits * 0
    for bit in tl.static_range(LOG_SIZE):
        half = SIZE >> (bit + 1)
        found += tl.where(tl.gather(values, found + half - 1, 0) <= limits, half, 0)
    return found + (tl.gather(values, found, 0) <= limits).to(tl.int32)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "row_programs"])
def restore_kernel(
    order_ptr,  # [N]
    offsets_ptr,  # [E + 1]
    position_ptr,  # [N]
    blocks_ptr,  # [B, 2]
    num_rows,
    num_blocks,
    row_programs,
    E,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
    LOG_BINS: tl.constexpr,
):
    """The first programs invert the order; the others find the experts of BLOCKS blocks each.

    Block ``b`` belongs to the first expert whose blocks end behind ``b``, so its number is that of the experts that end before.
    """
    pid = tl.program_id(0)
    if pid < row_programs:
        i = pid * ROWS + tl.arange(0, ROWS)
        row = tl.load(order_ptr + i, mask=i < num_rows, other=0)
        tl.store(position_ptr + row, i, mask=i < num_rows)
    else:
        block = (pid - row_programs) * BLOCKS + tl.arange(0, BLOCKS)
        expert = tl.zeros([BLOCKS], tl.int32)
        begin = tl.zeros([BLOCKS], tl.int32)  # blocks of the experts before
        total = 0
        for first in range(0, E, BINS):
            e = first + tl.arange(0, BINS)
            count = tl.load(offsets_ptr + e + 1, mask=e < E, other=0) - tl.load(offsets_ptr + e, mask=e < E, other=0)
            blocks_of = (count + (BLOCK_M - 1)) // BLOCK_M
            ends = total + tl.cumsum(blocks_of, 0)
            ended = count_not_above(ends, block, BINS, LOG_BINS)
            expert += ended
            begin = tl.where(ended > 0, tl.gather(ends, tl.maximum(ended - 1, 0), 0), begin)
            total += tl.sum(blocks_of, 0)
        used = block < total
        start = tl.load(offsets_ptr + expert, mask=used, other=0) + (block - begin) * BLOCK_M
        store_block(blocks_ptr, block, tl.where(used, expert, -1), tl.where(used, start, 0), block < num_blocks)


def make_plan(experts_TK: Tensor, num_experts: int, block_m: int) -> RowPlan:
    """Sort the rows of a routing by expert and cut them into blocks of at most ``block_m`` rows, a power of two."""
    if num_experts > MAX_EXPERTS:
        return from_saved(*torch_plan.make_plan(experts_TK, num_experts), block_m)
    ids = experts_TK.reshape(-1).contiguous()  # a flat view of every second column has a stride, and the kernels read an address
    N, E = ids.shape[0], num_experts
    B = num_blocks(N, E, block_m)
    order, position, offsets = (_integers(ids, size) for size in (N, N, E + 1))
    plan = RowPlan(order, offsets, position, _integers(ids, B, 2))
    bins = max(MIN_BINS, triton.next_power_of_2(E))

    if isinstance(N, int) and N <= TILE and bins <= 1024:
        tile = max(16, triton.next_power_of_2(N))
        warps = 4 if tile <= 256 else WARPS
        launch(plan_one_tile_kernel, (1,), (ids, *plan), (N, B, E), TILE=tile, BINS=bins, BLOCK_M=block_m, num_warps=warps)
        return plan

    tiles = N // TILE + 1  # never none, also where a symbolic N turns out to be 0: the offsets must be written
    cut = {"TILE": TILE, "BINS": bins, "num_warps": WARPS}
    scan = {"SCAN_TILES": SCAN_TILES, "SCAN_EXPERTS": SCAN_EXPERTS, "num_warps": WARPS}
    # Flat, as torch asks of a matrix whether it has one row, which would guard on a symbolic number of tiles.
    tile_counts, before, counts = (_integers(ids, size) for size in (tiles * (E + 1), tiles * (E + 1), E + 1))
    launch(count_kernel, (tiles,), (ids, tile_counts), (N, E), CHUNK=min(bins, 512), **cut)
    launch(scan_kernel, (triton.cdiv(E + 1, SCAN_EXPERTS),), (tile_counts, before, counts), (tiles, E + 1), **scan)
    launch(place_kernel, (tiles,), (ids, before, counts, *plan), (N, B, E), BLOCK_M=block_m, **cut)
    return plan


def from_saved(order: Tensor, offsets: Tensor, block_m: int) -> RowPlan:
    """The plan again from what a forward pass keeps, in one launch; ``block_m`` may differ from the forward's."""
    N, E = order.shape[0], offsets.shape[0] - 1
    B = num_blocks(N, E, block_m)
    plan = RowPlan(order, offsets, _integers(order, N), _integers(order, B, 2))
    row_programs = N // RESTORE_ROWS + 1
    bins = min(max(MIN_BINS, triton.next_power_of_2(E)), MAX_EXPERTS)
    launch(
        restore_kernel,
        (row_programs + B // RESTORE_BLOCKS + 1,),
        plan,
        (N, B, row_programs, E),
        BLOCK_M=block_m,
        ROWS=RESTORE_ROWS,
        BLOCKS=RESTORE_BLOCKS,
        BINS=bins,
        LOG_BINS=bins.bit_length() - 1,
        num_warps=WARPS,
    )
    return plan


def _integers(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=like.device)
