"""Rows between processes, and rows gathered and summed inside one: with gradients, without float atomics, for any sizes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fusedonemoe.ops.library import autocast_dtype

# The functional collectives are what torch.compile traces; their Python wrappers differ from release to release.
_collectives = torch.ops._c10d_functional


def _all_to_all(rows: Tensor, receive: list[int], send: list[int], group_name: str) -> Tensor:
    if torch.compiler.is_compiling():
        return _waited_all_to_all(rows, receive, send, group_name)
    try:
        return _waited_all_to_all(rows, receive, send, group_name)
    except RuntimeError as error:
        # The backend names a socket at best; who reads this wants to know what was going on.
        raise RuntimeError(
            f"expert parallelism over {len(send)} ranks failed on rank {dist.get_rank()} while rows were exchanged; another "
            f"rank has died, or did not come within the group's timeout: {error}"
        ) from error


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


class _AllReduce(torch.autograd.Function):
    """Sums in the forward, and lets each process keep its own gradient: what follows is the same in all of them."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group_name: str) -> Tensor:
        return _collectives.wait_tensor(_collectives.all_reduce(partial.contiguous(), "sum", group_name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllReduceGradient(torch.autograd.Function):
    """The reverse: the same input in all processes, of whose gradient each has a part."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _collectives.wait_tensor(_collectives.all_reduce(grad.contiguous(), "sum", ctx.group_name)), None


def sum_of_parts(partial: Tensor, group: ProcessGroup) -> Tensor:
    """Sum what the processes computed of a common output."""
    return _AllReduce.apply(partial, group.group_name)


def with_summed_gradient(shared: Tensor, group: ProcessGroup) -> Tensor:
    """A common input, whose gradient is summed over the processes."""
    return _AllReduceGradient.apply(shared, group.group_name)


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
    return _Divide.apply(parameter, divisor)


def _gather_sum(rows_NB: Tensor, position_AP: Tensor) -> Tensor:
    """``out[a] = sum_p rows[position[a, p]]``, a position of ``N`` adding nothing; half precision is summed in float32."""
    padded = torch.cat((rows_NB, rows_NB.new_zeros(1, rows_NB.shape[1])))
    wide = torch.promote_types(rows_NB.dtype, torch.float32)
    sum_AB: Tensor | None = None
    for position in position_AP.unbind(1):
        part_AB = padded.index_select(0, position).to(wide)
        sum_AB = part_AB if sum_AB is None else sum_AB + part_AB
    assert sum_AB is not None
    return sum_AB.to(rows_NB.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_AB: Tensor, index_N: Tensor, position_AP: Tensor) -> Tensor:
        ctx.save_for_backward(position_AP)
        return values_AB.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (position_AP,) = ctx.saved_tensors
        return _gather_sum(grad, position_AP), None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NB: Tensor, index_N: Tensor, position_AP: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        return _gather_sum(rows_NB, position_AP)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index_N,) = ctx.saved_tensors
        return grad.index_select(0, index_N), None, None


def gather(values_AB: Tensor, index_N: Tensor, position_AP: Tensor) -> Tensor:
    """``values[index]`` ``[N, B]``. Its gradient is a sum in a fixed order, by the inverse of the index.

    Args:
        values_AB: the rows.
        index_N: which of them.
        position_AP: where in ``index_N`` row ``a`` stands, up to ``P`` times; ``N`` for nowhere.
    """
    return _Gather.apply(values_AB, index_N, position_AP)


def gather_sum(rows_NB: Tensor, index_N: Tensor, position_AP: Tensor) -> Tensor:
    """The transpose of :func:`gather`: ``out[a]`` is the sum of the rows whose index is ``a``. ``[A, B]``."""
    return _GatherSum.apply(rows_NB, index_N, position_AP)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """``x`` as the operator is about to cast it under autocast: there is no need to send more bits than that."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype in (dtype, torch.float64) else x.to(dtype)
