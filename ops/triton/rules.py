"""The tiles that a kernel runs with: a small table on (architecture, dtype, rows per expert, D, F).

Where the number of tokens is symbolic, its hint decides and no guard is made: a graph keeps the tiles it was traced with.
"""

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe import files
from fusedonemoe.ops.cpu.build import cache_directory
from fusedonemoe.ops.triton import INTERPRETED


class Tile(NamedTuple):
    """The cut of one launch: BLOCK_M rows by BLOCK_N columns of output, BLOCK_K of the sum at a time.

    The fields bear the names of a kernel's arguments, so a launch takes ``**tile._asdict()``.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8


class Tiles(NamedTuple):
    """The tiles of all kernels of one layer. The first four walk the schedule of rows and have one BLOCK_M.

    Attributes:
        up: gate and up projection; BLOCK_N columns of h, so twice as many weights when gated.
        down: down projection.
        dh: gradient of h, with the activation's derivative in the epilogue.
        dx: gradient of the gathered rows of x.
        dup: weight gradient of the up-projection; BLOCK_K rows at a time.
        ddown: weight gradient of the down-projection.
    """

    up: Tile
    down: Tile
    dh: Tile
    dx: Tile
    dup: Tile
    ddown: Tile


class Layer(NamedTuple):
    """The facts that decide the tiles; ``rows`` is the power of two nearest to the rows per expert."""

    arch: str
    dtype: str
    rows: int
    D: int
    F: int
    gated: bool


def layer_of(arch: str, dtype: torch.dtype, rows_per_expert: float, D: int, F: int, gated: bool) -> Layer:
    """The :class:`Layer` for arguments of :func:`tiles_for`."""
    rows = 1 << max(0, round(max(rows_per_expert, 1.0)) * 3 // 2).bit_length() - 1
    return Layer(arch, str(dtype).removeprefix("torch."), rows, D, F, gated)


def hint(n: int) -> int:
    """``n``, or the value that a symbolic ``n`` was traced with; many, where there was none. Makes no guard."""
    if isinstance(n, int):
        return n
    value = n.node.hint
    return 8192 if value is None else int(value)


def architecture(device: torch.device) -> str:
    """``"sm90"``, ``"gfx942"``, ... of a device, ``"interpreter"`` where kernels are interpreted, empty where there is no GPU."""
    if INTERPRETED:
        return "interpreter"
    if not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


# Without a plan each routed row reads its expert for itself. With N = E rows spread evenly, every expert that is hit is read 1.6
# times, the repeats mostly from the L2 cache; more would cost more than the plan saved. Beyond 32 rows the tensor cores have work
# enough, unless nearly all rows have an expert of their own (N <= E / 4).
FEW_ROWS = 32
# Memory answers in about a microsecond, so a GPU of 132 multiprocessors and 4.8 TB/s must have about 5 MB under way.
BYTES_IN_FLIGHT = 132 * 40 * 1024
# The largest number in a tile that is read from a file.
LARGEST = 1024


def few_rows(rows: int, num_experts: int) -> bool:
    """Return whether ``rows = T * K`` rows are few enough for the path without a plan."""
    return rows <= max(num_experts // 4, min(FEW_ROWS, num_experts))


def tiles_for(arch: str, dtype: torch.dtype, rows_per_expert: float, D: int, F: int, gated: bool) -> Tiles:
    """The tiles for a layer: those that were measured for it on this machine by :func:`fusedonemoe.tune`, or by rule.

    ``arch`` is that of :func:`architecture`, ``rows_per_expert`` is ``N / E``.
    """
    layer = layer_of(arch, dtype, rows_per_expert, D, F, gated)
    return _tried or _measured().get(layer) or tiles_by_rule(arch, dtype, rows_per_expert, D, F)


def tiles_of(x_TD: Tensor, rows: int, shape: Sequence[int], *, gated: bool) -> Tiles:
    """The tiles for ``rows`` routed rows of ``x`` and a down-projection of this shape ``[E, D, F]``."""
    E, D, F = shape
    return tiles_for(architecture(x_TD.device), x_TD.dtype, hint(rows) / E, D, F, gated)


def tiles_by_rule(arch: str, dtype: torch.dtype, rows_per_expert: float, D: int, F: int) -> Tiles:
    """The tiles that need no measurement. Arguments as for :func:`tiles_for`.

    The tests compile every one: no register spills, copies that run ahead of the products, Hopper's wide products where rows
    allow.
    """
    if arch == "interpreter":
        return Tiles(*[Tile(16, 16, 16, 4, 1, GROUP_M=2)] * 6)
    if dtype == torch.float32 or D % 16 or F % 16:
        # Rows that begin anywhere are read element by element, with an address for each: small tiles, or they spill.
        outer = Tile(64, 64, 32, 4, 3 if dtype == torch.float32 else 2)
        rows = outer._replace(BLOCK_M=16) if rows_per_expert <= 16 else outer
        return Tiles(rows, rows, rows, rows, outer, outer)
    if arch.startswith("gfx"):
        tiles = _half_precision("sm80", rows_per_expert)
        return Tiles(*(tile._replace(num_stages=2) for tile in tiles))  # 64 KiB of shared memory
    return _half_precision("sm80" if arch in ("sm80", "sm86", "sm89") else "sm90", rows_per_expert)


def _half_precision(arch: str, rows_per_expert: float) -> Tiles:
    """For bfloat16 and float16 with rows of a multiple of 16 elements."""
    hopper = arch == "sm90"
    outer = Tile(128, 128, 64, 8, 5) if hopper else Tile(128, 128, 32, 8, 5)
    if rows_per_expert <= 16:
        few = Tile(16, 64, 128, 4, 3, GROUP_M=1) if hopper else Tile(16, 64, 64, 4, 4, GROUP_M=1)
        return Tiles(few, few._replace(BLOCK_N=128), few, few, outer, outer)
    if rows_per_expert <= 64:
        # Two programs on a multiprocessor: one computes while the other begins or ends.
        mid = Tile(64, 64, 64, 4, 4) if hopper else Tile(64, 64, 32, 4, 4)
        return Tiles(mid, mid._replace(BLOCK_N=128), mid, mid._replace(BLOCK_N=128), outer, outer)
    if not hopper:
        wide = Tile(128, 128, 32, 8, 4)
        return Tiles(wide._replace(BLOCK_N=64), wide, Tile(128, 64, 64, 8, 3), wide, outer, outer)
    wide = Tile(128, 256, 64, 8, 4)
    if rows_per_expert >= 512:
        outer = Tile(128, 256, 64, 8, 5)
    return Tiles(wide._replace(BLOCK_N=128), wide, Tile(128, 128, 64, 8, 3), wide, outer, outer)


# Measured tiles: read from the cache once, and written by fusedonemoe.tune alone.

_tried: Tiles | None = None
_read: dict[Layer, Tiles] | None = None


@contextmanager
def trying(tiles: Tiles) -> Iterator[None]:
    """Every layer runs with these tiles, in this process, until the end of the block."""
    global _tried
    before, _tried = _tried, tiles
    try:
        yield
    finally:
        _tried = before


def _measurements() -> Path:
    """Tiles that are best for one version of the compiler are not for another."""
    return cache_directory() / f"tiles-triton-{importlib.metadata.version('triton')}.json"


def _measured() -> dict[Layer, Tiles]:
    global _read
    if _read is None:
        try:
            entries = json.loads(_measurements().read_text(encoding="utf-8"))
            _read = {Layer(**e["layer"]): Tiles(**{name: _tile(tile) for name, tile in e["tiles"].items()}) for e in entries}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ImportError):
            _read = {}  # none yet, or a file that somebody else wrote: the rules are always there
    return _read


def _tile(values: Sequence[object]) -> Tile:
    """A tile as it was read from a file."""
    if not all(type(value) is int and 1 <= value <= LARGEST for value in values):
        raise ValueError(f"a tile must have whole numbers from 1 to {LARGEST}, got {values}")
    tile = Tile(*values)  # type: ignore[arg-type]
    if any(block & (block - 1) for block in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K)):
        raise ValueError(f"blocks must be powers of two, got {tile}")
    return tile


def check_cache() -> None:
    """Raise ``UnwritableError`` if :func:`keep` cannot write."""
    files.check(_measurements())


def keep(layer: Layer, tiles: Tiles) -> Path:
    """Add measured tiles to the cache, for this process and for later ones. Returns the cache's file."""
    global _read
    path = _measurements()
    _read = None  # another process may have written since
    known = {**_measured(), layer: tiles}
    entries = [{"layer": at._asdict(), "tiles": best._asdict()} for at, best in known.items()]
    files.write(path, json.dumps(entries, indent=1).encode())
    _read = known
    return path


def describe(arch: str, dtype: torch.dtype, rows: int, num_experts: int, D: int, F: int, gated: bool, *, inference: bool) -> str:
    """One line on what :func:`tiles_for` and, in ``inference``, the decode path choose for ``rows`` routed rows."""
    if inference and few_rows(rows, num_experts):
        return f"{arch}: one program per routed row and block of columns, no plan, where no gradients are recorded"
    tiles = tiles_for(arch, dtype, rows / num_experts, D, F, gated)
    cuts = (f"{name} {t.BLOCK_M}x{t.BLOCK_N}x{t.BLOCK_K}/{t.num_warps}w{t.num_stages}s" for name, t in tiles._asdict().items())
    return f"{arch}, {rows / num_experts:.4g} rows per expert: {', '.join(cuts)}"
