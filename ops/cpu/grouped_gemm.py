"""Grouped GEMMs on CPU from torch's own: a batched matmul over padded experts, or one GEMM per expert.

These run inside opaque operators, where ``offsets`` can be read. Experts with few rows are batched, each padded to the longest of
its batch, a batch small enough to stay in cache. With many rows a GEMM is worth its call.
"""

import torch
from torch import Tensor

# Experts in a batch, by the rows it should hold (a larger one leaves the cache, and its padding is memory): measured.
ROWS_PER_BATCH, FEWEST_EXPERTS, MOST_EXPERTS = 512, 8, 32
# The mean number of rows per expert from which one GEMM each was measured as fast as padded batches.
ROWS_FOR_OWN_GEMM = 192
# A batch is padded to at most this many times its rows, and by at most this share of all rows, which bounds the memory; a
# batch that would need more is done one expert at a time.
MOST_PADDING, MOST_PADDING_OF_ALL, FREE_PADDING_ROWS = 4, 1 / 4, 512


def _padded_index(offsets: Tensor, first: int, last: int, length: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows of experts ``first`` to ``last``, each as ``length`` indices, and the mask of the real ones. ``[experts, length]``."""
    index = offsets[first:last, None] + torch.arange(length, dtype=offsets.dtype, device="cpu")
    is_real = index < offsets[first + 1 : last + 1, None]
    return index.clamp_(max=num_rows - 1), is_real


def _bounds(offsets: Tensor, num_experts: int, num_rows: int) -> list[int]:
    """The offsets as numbers, which every row of the result is found by."""
    bounds: list[int] = offsets.tolist()
    if len(bounds) != num_experts + 1 or bounds[0] != 0 or bounds[-1] > num_rows or sorted(bounds) != bounds:
        raise ValueError(f"offsets must be {num_experts + 1} rising numbers from 0 to at most {num_rows}, got {bounds}")
    return bounds


def grouped_mm(rows_NA: Tensor, weights_EAB: Tensor, offsets: Tensor) -> Tensor:
    """``out[i] = rows[i] @ weights[e]`` for ``offsets[e] <= i < offsets[e + 1]``, zeros past ``offsets[E]``, ``[N, B]``.

    Weights have any strides; of a narrower dtype than the rows, which the result has, they are widened some experts at a time.
    """
    N, E = rows_NA.shape[0], weights_EAB.shape[0]
    bounds = _bounds(offsets, E, N)
    out_NB = rows_NA.new_empty(N, weights_EAB.shape[2])
    out_NB[bounds[-1] :] = 0
    per_batch = 1
    if bounds[-1] < ROWS_FOR_OWN_GEMM * E:
        per_batch = min(MOST_EXPERTS, max(FEWEST_EXPERTS, ROWS_PER_BATCH * E // max(bounds[-1], 1)))
    most_extra = max(FREE_PADDING_ROWS, int(MOST_PADDING_OF_ALL * N))
    for first in range(0, E, per_batch):
        last = min(first + per_batch, E)
        start, stop = bounds[first], bounds[last]
        if start == stop:
            continue
        longest = max(bounds[e + 1] - bounds[e] for e in range(first, last))
        padded_rows, real_rows = longest * (last - first), stop - start
        too_long = padded_rows > MOST_PADDING * real_rows or padded_rows - real_rows > most_extra
        if too_long or per_batch == 1:
            for e in range(first, last):
                if bounds[e] < bounds[e + 1]:
                    rows = slice(bounds[e], bounds[e + 1])
                    torch.mm(rows_NA[rows], weights_EAB[e].to(rows_NA.dtype), out=out_NB[rows])
        else:
            index, is_real = _padded_index(offsets, first, last, longest, N)
            padded = rows_NA.index_select(0, index.view(-1)).view(last - first, longest, -1)
            y = torch.bmm(padded, weights_EAB[first:last].to(padded.dtype)).flatten(0, 1)
            torch.index_select(y, 0, is_real.view(-1).nonzero().squeeze(1), out=out_NB[start:stop])
    return out_NB


def grouped_outer(left_NA: Tensor, right_NB: Tensor, offsets: Tensor) -> Tensor:
    """``out[e] = left[rows of e]^T @ right[rows of e]``, ``[E, A, B]``; zeros for an expert without rows."""
    bounds = _bounds(offsets, offsets.numel() - 1, left_NA.shape[0])
    out_EAB = left_NA.new_empty(len(bounds) - 1, left_NA.shape[1], right_NB.shape[1])
    for e, out_AB in enumerate(out_EAB.unbind()):
        rows = slice(bounds[e], bounds[e + 1])
        torch.mm(left_NA[rows].t(), right_NB[rows], out=out_AB)
    return out_EAB
