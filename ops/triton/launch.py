"""The way from tensors to a launch, which all kernels share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from fusedonemoe.ops.triton.rules import Tile

if TYPE_CHECKING:
    from fusedonemoe.ops.triton.plan import RowPlan


def launch(kernel: Any, grid: Sequence[Any], tensors: Sequence[Tensor | None], numbers: Sequence[Any], **constants: Any) -> None:
    """Launch a kernel, which takes its tensors first, then its numbers, then its constants.

    The first tensor stands in for one that is None: a kernel's constants tell it what not to read.
    """
    given = [tensors[0] if tensor is None else tensor for tensor in tensors]
    wrap_triton(kernel)[tuple(grid)](*given, *numbers, **constants)


def launch_blocks(
    kernel: Any,
    plan: "RowPlan",
    tile: Tile,
    tensors: Sequence[Tensor | None],
    length: int,
    columns: int,
    numbers: Sequence[Any],
    **constants: Any,
) -> None:
    """Launch a kernel, each program of which multiplies a block of sorted rows by BLOCK_N columns of an expert's weights.

    It takes ``tensors``, the rows first, the plan's order, offsets and blocks, ``length`` of the sum, ``columns``, ``numbers``.
    """
    rows = tensors[0]
    assert rows is not None
    launch(
        kernel,
        (plan.blocks.shape[0] * triton.cdiv(columns, tile.BLOCK_N),),
        (*tensors, plan.order, plan.offsets, plan.blocks),
        (length, columns, *numbers),
        EVEN_K=length % tile.BLOCK_K == 0,
        EVEN_N=columns % tile.BLOCK_N == 0,
        PRECISION=dot_precision(rows.dtype),
        **constants,
        **tile._asdict(),
    )


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a kernel's ``tl.dot``: TF32 for float32 where torch's own products may use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
