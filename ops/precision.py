"""The dtypes that sums and the rows of single experts have."""

import torch


def sum_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over numbers of these dtypes: the widest of them, and float32 at least."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of one expert's rows, and of their gradients, in a layer of this dtype.

    It is float32 for float16: one row may pass 65,504, the largest float16, though the weighted sum of a token's rows does not.
    """
    return torch.float32 if dtype == torch.float16 else dtype
