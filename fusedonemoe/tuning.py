"""Measuring the tiles of the GPU kernels, for who asks for it: nothing here runs by itself."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.config import MoEConfig
from fusedonemoe.layers import Experts, MoE
from fusedonemoe.ops.choice import refusal
from fusedonemoe.ops.triton import rules
from fusedonemoe.ops.triton.rules import Tile, Tiles

__all__ = ["Tuned", "tune"]

ROUNDS = 5  # timed calls of one candidate, of which the median counts
WORTH = 0.98  # a candidate has to take at most this share of the best time so far: less is noise
MEMORY = 0.8  # of the free device memory


@dataclass(frozen=True)
class Tuned:
    """The finding of :func:`tune` for one number of tokens.

    Attributes:
        layer: architecture, dtype, rows per expert (to a power of two) and sizes that the tiles are for.
        tiles: the best that were measured.
        milliseconds: median time of one call with them.
        milliseconds_by_rule: the same with the tiles that are chosen without measuring.
        tried: candidates that were measured.
        complete: whether the time sufficed for all candidates.
    """

    layer: rules.Layer
    tiles: Tiles
    milliseconds: float
    milliseconds_by_rule: float
    tried: int
    complete: bool


def candidates(best: Tiles, name: str) -> Iterator[Tiles]:
    """Yield the neighbours of ``best``: other blocks of rows (``name`` is ``"rows"``), or another tile for one kernel."""
    if name == "rows":
        # All kernels that walk the schedule have the same blocks of rows.
        for block in sorted({16, 32, 64, 128} - {best.up.BLOCK_M}):
            walking = {kernel: getattr(best, kernel)._replace(BLOCK_M=block) for kernel in ("up", "down", "dh", "dx")}
            yield best._replace(**walking)
        return
    tile: Tile = getattr(best, name)
    neighbours = {
        "num_warps": {4, 8} - {tile.num_warps},
        "BLOCK_N": {tile.BLOCK_N // 2, tile.BLOCK_N * 2} & {32, 64, 128, 256},
        "BLOCK_K": {tile.BLOCK_K // 2, tile.BLOCK_K * 2} & {32, 64, 128},
        "num_stages": {tile.num_stages - 1, tile.num_stages + 1} & {2, 3, 4, 5},
    }
    for field, values in neighbours.items():
        yield from (best._replace(**{name: tile._replace(**{field: value})}) for value in values)


def search(
    start: Tiles, names: tuple[str, ...], measure: Callable[[Tiles], float], seconds: float, clock: Callable[[], float]
) -> tuple[Tiles, float, float, int, bool]:
    """Take one kernel of a call after the other, and keep what is faster; ``"rows"`` names their common blocks of rows.

    Return the best tiles, their milliseconds, those of ``start``, how many were measured, and whether the time sufficed for all.
    """
    end = clock() + seconds
    best, first = start, measure(start)
    least, tried = first, 1
    for name in names:
        for tiles in list(candidates(best, name)):
            if clock() >= end:
                return best, least, first, tried, False
            taken = measure(tiles)
            tried += 1
            if taken < WORTH * least:
                best, least = tiles, taken
    return best, least, first, tried, True


def _median_milliseconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[ROUNDS // 2]


def _bytes_needed(config: MoEConfig, tokens: int, itemsize: int, backward: bool) -> int:
    """Count the activations of a call and its gradients, twice: another may begin before the memory of one is reused."""
    rows = tokens * config.experts_per_token
    activations = rows * (config.up_rows * (3 if backward else 1) + 2 * config.intermediate_size + 2 * config.hidden_size)
    weights = config.num_experts * config.hidden_size * (config.up_rows + config.intermediate_size)
    return 2 * itemsize * (activations + (weights if backward else 0))


def tune(layer: MoE | Experts, tokens: int, *, backward: bool = True, seconds: float = 60.0) -> Tuned:
    """Measure tiles of the GPU kernels for a layer and keep the best for later calls on this machine.

    The library chooses tiles by a small table of rules and never measures by itself. This does, on request: one kernel after
    the other, a few neighbours of the tile in use each, with uniformly routed random tokens. What is found holds for layers
    of the same sizes and dtype with about as many rows per expert (to a power of two), in this process and, through a file in
    the cache directory, in later ones. Graphs that were compiled before keep the tiles they were compiled with.

    Args:
        layer: on a CUDA device, with ``impl`` ``"auto"`` or ``"triton"``.
        tokens: ``T`` of the calls to tune for.
        backward: measure forward and backward together; otherwise inference.
        seconds: when to stop measuring, compilation of the kernels included.

    Returns:
        :class:`Tuned`.

    Raises:
        TypeError: ``layer`` is no MoE or Experts, ``tokens`` no integer, or ``seconds`` no number.
        ValueError: the GPU kernels cannot run this layer, so few rows that no tiles are used, ``tokens`` below 1, or
            ``seconds`` below 0 or NaN.
        OSError: the cache directory cannot be written; said before anything is measured.
        RuntimeError: called while a CUDA graph is captured or under compilation, or more than four fifths of the free
            device memory would be needed.
    """
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError("tune measures, so it cannot run under torch.compile or while a CUDA graph is captured")
    experts = layer.experts if isinstance(layer, MoE) else layer
    if not isinstance(experts, Experts):
        raise TypeError(f"layer must be a MoE or Experts, got {type(layer).__name__}")
    if not isinstance(tokens, int) or isinstance(tokens, bool):
        raise TypeError(f"tokens must be an integer, got {type(tokens).__name__}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"seconds must be a number, got {type(seconds).__name__}")
    if not seconds >= 0:
        raise ValueError(f"seconds must be a number from 0, got {seconds}")
    config, weight = experts.config, experts.down_proj
    E, D, K = config.num_experts, config.hidden_size, config.experts_per_token
    reason = refusal("triton", device_type=weight.device.type, dtype=weight.dtype, widths=())
    if config.impl not in ("auto", "triton"):
        reason = f"it names impl={config.impl!r}"
    if reason:
        raise ValueError(f"layer cannot be tuned: {reason}")
    if not backward and rules.few_rows(tokens * K, E):
        raise ValueError(f"tokens must be more than {tokens} for this layer: so few take the path without tiles")
    rules.check_cache()
    _check_memory(weight, _bytes_needed(config, tokens, weight.dtype.itemsize, backward))

    arch, rows, F_ = rules.architecture(weight.device), tokens * K / E, config.intermediate_size
    at = rules.layer_of(arch, weight.dtype, rows, D, F_, config.gated)
    start = rules.tiles_by_rule(arch, weight.dtype, rows, D, F_)
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(tokens, D, generator=generator, device=weight.device).to(weight.dtype).requires_grad_(backward)
    weights, ids = F.route(torch.rand(tokens, E, generator=generator, device=weight.device), K)
    names = ("rows", "up", "down", *(("dh", "dx", "dup", "ddown") if backward else ()))

    def measure(tiles: Tiles) -> float:
        try:
            with rules.trying(tiles):
                return _median_milliseconds(lambda: _call(experts, x, ids, weights, backward))
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # Triton's: more shared memory or registers than there are
                raise
            return float("inf")

    best, least, first, tried, complete = search(start, names, measure, seconds, time.monotonic)
    rules.keep(at, best)
    return Tuned(at, best, least, first, tried, complete)


def _check_memory(weight: Tensor, needed: int) -> None:
    if weight.is_cuda:
        free, _ = torch.cuda.mem_get_info(weight.device)
        if needed > MEMORY * free:
            raise RuntimeError(f"tuning needs {needed / 1e9:.2f} GB of device memory, and {free / 1e9:.2f} GB are free")


def _call(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, backward: bool) -> object:
    if not backward:
        with torch.no_grad():
            return experts(x, ids, weights)
    y = experts(x, ids, weights)
    return torch.autograd.grad(y, [x, *experts.parameters()], torch.ones_like(y))
