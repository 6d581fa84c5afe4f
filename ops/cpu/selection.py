"""The router's selection as a function of tensors: the compiled kernel for float32, torch's arithmetic for the rest."""

import torch
from torch import Tensor

from fusedonemoe.ops import route
from fusedonemoe.ops.cpu import native


def select(keys_TE: Tensor, k: int) -> Tensor:
    """Run :func:`fusedonemoe.ops.route.select`, in one kernel where there is one."""
    if keys_TE.dim() != 2 or not 0 <= k <= keys_TE.shape[1]:
        raise ValueError(f"keys must have shape [T, E] with E >= k, got {tuple(keys_TE.shape)} and k = {k}")
    if keys_TE.dtype != torch.float32 or native.refusal(torch.float32, True) is not None:
        return route.select(keys_TE, k)
    return torch.ops.fusedonemoe.select_float32.default(keys_TE, k)
