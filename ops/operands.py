"""Operands: tensors as a kernel reads them: of one shape, one dtype and one device, contiguous.

Saved-tensor hooks may change strides or the tensor, and an operator can be called by its name, past the public functions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
# Rows are counted, sorted and numbered in 32 bits.
MOST_ROWS = 2**31 - 1


def check_rows(experts: Tensor) -> None:
    """``T * K`` fits into 32 bits; of a symbolic size, which would become a guard of the graph, the kernels say so."""
    if torch.compiler.is_dynamo_compiling():
        return
    rows = experts.numel()
    if isinstance(rows, int) and rows > MOST_ROWS:
        raise ValueError(f"experts must have fewer than 2**31 entries, T * K, got {rows} of shape {tuple(experts.shape)}")


def check_choices_of(logits: Tensor, top_k: int, dims: int = 1) -> None:
    """Check that the choices of logits, whose last ``dims`` dimensions are a token's, can be numbered in 32 bits."""
    if torch.compiler.is_dynamo_compiling():
        return
    rows = math.prod(logits.shape[:-dims]) * top_k
    if isinstance(rows, int) and rows > MOST_ROWS:
        raise ValueError(
            f"logits must be of fewer than 2**31 choices, T * K, got {rows} of shape {tuple(logits.shape)} and top_k {top_k}"
        )


def check_dim(name: str, tensor: Tensor, dims: int) -> None:
    """Check the number of dimensions."""
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")


def check_one_device(names: Sequence[str], values: Sequence[object]) -> None:
    """Check that the tensors among an operator's arguments are on one device.

    With a meta tensor among them torch would only compute shapes, and return memory that nobody wrote.
    """
    first: tuple[str, torch.device] | None = None
    for name, value in zip(names, values, strict=False):
        if isinstance(value, Tensor):
            owner, device = first = first or (name, value.device)
            if value.device != device:
                raise ValueError(f"{name} must be on the device of {owner} ({device}), got {value.device}")


class Reader(NamedTuple):
    """Reads the tensors of a call: all on one device, x and the expert weights of one dtype, and x perhaps of symbolic sizes."""

    device: torch.device
    dtype: torch.dtype
    symbolic: bool

    def read(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (), *, views: bool = False
    ) -> Tensor:
        """Check and return ``tensor``, contiguous unless ``views`` will do; it has one of ``dtypes``, by default that of x.

        Symbolic sizes are not compared with ``shape``, which would make guards of the graph.
        """
        if tensor.dtype != self.dtype if not dtypes else tensor.dtype not in dtypes:
            raise TypeError(f"{name} must have dtype {' or '.join(map(str, dtypes or (self.dtype,)))}, got {tensor.dtype}")
        if tensor.dim() != len(shape) or (not self.symbolic and tensor.shape != shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, got {tensor.device}")
        return tensor if views else tensor.contiguous()

    def read_optional(
        self, name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()
    ) -> Tensor | None:
        """:meth:`read`, where there is one."""
        return None if tensor is None else self.read(name, tensor, shape, dtypes)

    def routing(self, experts: Tensor, weights: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Ids and weights ``[T, K]``."""
        check_dim("experts", experts, 2)
        check_rows(experts)
        shape = (tokens, experts.shape[1])
        if shape[1] < 1:
            raise ValueError(f"experts must have shape [T, K] with K >= 1, got {tuple(experts.shape)}")
        return self.read("experts", experts, shape, INTEGERS), self.read("weights", weights, shape, FLOATS)

    def plan(self, order: Tensor, offsets: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """The sorted order of a routing; that it is the one of these ids is for a kernel to see."""
        order = self.read("order", order, (experts.numel(),), (torch.int32,))
        return order, self.read("offsets", offsets, (num_experts + 1,), (torch.int32,))

    def rows(
        self, z: Tensor, order: Tensor, offsets: Tensor, experts: Tensor, up_shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read the sorted rows that a forward kept, all or the first, for an up-projection ``[E, G, D]``."""
        E, G, _ = up_shape
        check_dim("z", z, 2)
        if not self.symbolic and z.shape[0] > experts.numel():
            raise ValueError(f"z must have at most {experts.numel()} rows, got {z.shape[0]}")
        return self.read("z", z, (z.shape[0], G)), *self.plan(order, offsets, experts, E)


def reader_of(x: Tensor) -> Reader:
    """The reader of a call with this x ``[T, D]``."""
    check_dim("x", x, 2)
    return Reader(x.device, x.dtype, any(type(size) is not int for size in x.shape))
