"""Grouped GEMMs on CUDA: torch's own, which never reads ``offsets`` on the host where it has a kernel for the dtype."""

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16


def refusal(dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    """Return why torch's grouped GEMM cannot run for rows of these widths; None when it can."""
    if dtype == torch.float64:
        return "torch's CUDA grouped GEMM has no float64"
    if any(width * dtype.itemsize % ALIGNMENT_BYTES for width in widths):
        return f"torch's CUDA grouped GEMM needs rows of a multiple of {ALIGNMENT_BYTES} bytes"
    return None


def grouped_mm(rows_NA: Tensor, weights_EAB: Tensor, offsets: Tensor) -> Tensor:
    """``out[i] = rows[i] @ weights[e]`` for ``offsets[e] <= i < offsets[e + 1]``, zeros past ``offsets[E]``. ``[N, B]``.

    Weights of a narrower dtype than the rows are widened.
    """
    out_NB = torch.nn.functional.grouped_mm(rows_NA, weights_EAB.to(rows_NA.dtype), offs=offsets[1:])
    is_routed = torch.arange(rows_NA.shape[0], device=rows_NA.device) < offsets[-1]
    return torch.where(is_routed[:, None], out_NB, 0)


def grouped_outer(left_NA: Tensor, right_NB: Tensor, offsets: Tensor) -> Tensor:
    """``out[e] = left[rows of e]^T @ right[rows of e]``; zeros for an expert without rows. ``[E, A, B]``."""
    return torch.nn.functional.grouped_mm(left_NA.t(), right_NB, offs=offsets[1:])
