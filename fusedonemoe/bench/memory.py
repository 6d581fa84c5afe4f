"""Memory of a call, to the byte: its peak on the CPU, and what it holds for its backward."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.cpu.native import pool_peak, pooled_size, trim


def peak_extra_bytes(call: Callable[[], Tensor | Iterable[Tensor | None]]) -> int:
    """Measure the most bytes that a call holds at one moment besides its inputs and its results.

    Every allocation and release of torch's CPU allocator is replayed in order, those inside opaque operators included
    (a dispatch mode would miss them, and resident memory would see pages that malloc keeps). The memory of the returned
    tensors is left out from the moment of its allocation. The pool of the CPU kernels is counted with torch's allocator,
    each with its own peak, so the sum is an upper bound. Scratch that a BLAS allocates for itself is not seen.
    """
    # Kineto announces its stages on stderr; it reads this once, when the process profiles for the first time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # A cycle of an earlier call that is collected during this one would be counted as its release.
    gc.collect()
    # An idle block may be handed out that is twice as large as what is asked for.
    trim()
    pool_peak()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    results = [result] if isinstance(result, Tensor) else [t for t in result if t is not None]
    kept = {t.untyped_storage().data_ptr() for t in results}
    in_pool = pool_peak()
    events = sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns)
    held = _replay([(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in events], kept)
    return held + max(0, in_pool - sum(pooled_size(t) for t in results))


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def _replay(allocations: list[tuple[int, int]], kept: set[int]) -> int:
    """Return the peak of allocations (positive) and releases by address, without the last at each address in ``kept``."""
    last = {ptr: i for i, (ptr, size) in enumerate(allocations) if size > 0 and ptr in kept}
    held = peak = 0
    for i, (ptr, size) in enumerate(allocations):
        if last.get(ptr) == i:
            continue
        held += size
        peak = max(peak, held)
    return peak


def held_bytes(call: Callable[[], Tensor], parameters: Iterable[Tensor | None]) -> tuple[int, Tensor]:
    """Return the bytes that autograd holds for a backward, each storage once, those of parameters left out, and the result."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    # torch.compile keeps some tensors that the hooks do not see.
    for tensor in getattr(result.grad_fn, "_tensors_no_vc_check", ()):
        pack(tensor)
    for parameter in parameters:
        if parameter is not None:
            held.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(held.values()), result
