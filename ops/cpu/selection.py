"""The router's selection as a function of tensors: the compiled kernel for float32, torch's arithmetic for the rest."""

import struct
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import route
from fusedonemoe.ops.cpu import build

# Keys below which a second thread costs more than it saves, where a row takes as long as so many keys by itself. No result
# depends on the number of threads.
KEYS_PER_THREAD, KEYS_PER_ROW = 1 << 15, 128
_pack = struct.Struct("6q").pack


@cache
def _kernel() -> Any:
    try:
        return build.load().fusedonemoe_select_f32
    except build.Unavailable:
        return None


def threads_for(T: int, E: int) -> int:
    """Return the number of threads that go over ``[T, E]`` keys."""
    return max(1, min(torch.get_num_threads(), T * (E + KEYS_PER_ROW) // KEYS_PER_THREAD))


def select(keys_TE: Tensor, k: int) -> Tensor:
    """Run :func:`fusedonemoe.ops.route.select`, in one kernel where there is one."""
    if keys_TE.dim() != 2 or not 0 <= k <= keys_TE.shape[1]:
        raise ValueError(f"keys must have shape [T, E] with E >= k, got {tuple(keys_TE.shape)} and k = {k}")
    if keys_TE.dtype != torch.float32 or (kernel := _kernel()) is None:
        return route.select(keys_TE, k)
    keys_TE = keys_TE.contiguous()
    T, E = keys_TE.shape
    ids_TK = torch.empty((T, k), dtype=torch.int64, device="cpu")
    if kernel(_pack(keys_TE.data_ptr(), ids_TK.data_ptr(), T, E, k, threads_for(T, E))):
        raise MemoryError(f"no memory for the buffers of a selection of {k} from {E}")
    return ids_TK
