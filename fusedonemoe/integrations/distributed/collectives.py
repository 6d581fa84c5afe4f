"""Rows between processes, and rows gathered and summed inside one: with gradients, without float atomics, for any sizes."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from fusedonemoe.agreement import failures_named
from fusedonemoe.ops.library import autocast_dtype

# The functional collectives are what torch.compile traces; their Python wrappers differ from release to release.
_collectives = torch.ops._c10d_functional


def _all_to_all(rows: Tensor, receive: list[int], send: list[int], group_name: str) -> Tensor:
    if torch.compiler.is_compiling():
        return _waited_all_to_all(rows, receive, send, group_name)
    group = distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]
    with failures_named("expert parallelism", group, "rows were exchanged"):
        return _waited_all_to_all(rows, receive, send, group_name)


def _waited_all_to_all(rows: Tensor, receive: list[int], send: list[int], group_name: str) -> Tensor:
    out = _collectives.all_to_all_single(rows.contiguous(), receive, send, group_name)
    # Before a kernel reads it: until then there may be no memory behind it.
    return _collectives.wait_tensor(out)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, receive: list[int], send: list[int], group_name: str) -> Tensor:
        ctx.receive, ctx.send, ctx.group_name = receive, send, group_name
        return _all_to_all(rows, receive, send, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.send, ctx.receive, ctx.group_name), None, None, None


def all_to_all(rows: Tensor, receive: list[int], send: list[int], group: ProcessGroup) -> Tensor:
    """Send ``send[r]`` consecutive rows to each rank ``r``, receive ``receive[r]`` from it; the gradient goes back."""
    return _AllToAll.apply(rows, receive, send, group.group_name)


def _sum(partial: Tensor, group_name: str) -> Tensor:
    return _collectives.wait_tensor(_collectives.all_reduce(partial.contiguous(), "sum", group_name))


class _AllReduce(torch.autograd.Function):
    """Sums over the processes, either the values or their gradients; the other ones are left as they are."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group_name: str, gradient: bool) -> Tensor:
        ctx.group_name, ctx.gradient = group_name, gradient
        return values.view_as(values) if gradient else _sum(values, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum(grad, ctx.group_name) if ctx.gradient else grad, None, None


def sum_of_parts(partial: Tensor, group: ProcessGroup) -> Tensor:
    """Sum what the processes computed of a common output; each keeps its own gradient, as all do the same with the sum."""
    return _AllReduce.apply(partial, group.group_name, False)


def with_summed_gradient(shared: Tensor, group: ProcessGroup) -> Tensor:
    """A common input, of whose gradient each process has a part: it is summed over them."""
    return _AllReduce.apply(shared, group.group_name, True)


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.divisor, None


def with_divided_gradient(parameter: Tensor, divisor: int) -> Tensor:
    """The parameter, whose gradient is divided: a mean over processes out of a sum over them."""
    return _Divide.apply(parameter, divisor) if divisor > 1 else parameter


def _gather_sum(rows_NB: Tensor, position_AP: Tensor) -> Tensor:
    """``out[a] = sum_p rows[position[a, p]]``, a position of ``N`` adding nothing; half precision is summed in float32."""
    padded = torch.cat((rows_NB, rows_NB.new_zeros(1, rows_NB.shape[1])))
    wide = torch.promote_types(rows_NB.dtype, torch.float32)
    first, *others = position_AP.unbind(1)
    sum_AB = padded.index_select(0, first).to(wide)
    for position in others:
        sum_AB = sum_AB + padded.index_select(0, position).to(wide)
    return sum_AB.to(rows_NB.dtype)


class _Gather(torch.autograd.Function):
    """Gathers rows by an index, or sums them by its inverse: each is the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, position_AP: Tensor, summed: bool) -> Tensor:
        ctx.summed = summed
        ctx.save_for_backward(index_N if summed else position_AP)
        return _gather_sum(rows, position_AP) if summed else rows.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        return grad.index_select(0, saved) if ctx.summed else _gather_sum(grad, saved), None, None, None


def gather(values_AB: Tensor, index_N: Tensor, position_AP: Tensor) -> Tensor:
    """``values[index]`` ``[N, B]``. ``position`` has the places of row ``a`` in ``index``, up to ``P``; ``N`` stands for none."""
    return _Gather.apply(values_AB, index_N, position_AP, False)


def gather_sum(rows_NB: Tensor, index_N: Tensor, position_AP: Tensor) -> Tensor:
    """The transpose of :func:`gather`: ``out[a]`` is the sum of the rows whose index is ``a``, in a fixed order. ``[A, B]``."""
    return _Gather.apply(rows_NB, index_N, position_AP, True)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """``x`` as the operator is about to cast it under autocast: there is no need to send more bits than that."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype in (dtype, torch.float64) else x.to(dtype)
