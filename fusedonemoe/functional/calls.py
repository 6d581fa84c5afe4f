"""The steps of the public functions between validation and the operator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.checks import check_one_of
from fusedonemoe.ops import choose, library
from fusedonemoe.ops.choice import exporting_to_onnx, no_onnx_form

ROUTING_IMPLEMENTATIONS = ("auto", "dense", "portable")


def records_gradients(*tensors: Tensor | None) -> bool:
    """Return whether a call with these tensors is recorded for a backward pass."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator would cost a frame a tensor
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def choose_impl(operator: str, impl: str, x: Tensor, experts: Tensor, widths: tuple[int, ...], *expert_weights: Tensor) -> str:
    """Return the implementation that runs a call; raise where a named one cannot."""
    device_type, dtype = x.device.type, x.dtype
    # On CPU autocast is asked here: a call of a function costs more.
    if dtype is not torch.float64 and (device_type != "cpu" or torch.is_autocast_enabled("cpu")):
        dtype = library.autocast_dtype(device_type) or dtype
    return choose(
        operator,
        impl,
        top_k=experts.shape[-1],
        num_experts=expert_weights[0].shape[0],
        device_type=device_type,
        dtype=dtype,
        contiguous=all(map(Tensor.is_contiguous, expert_weights)),
        widths=widths,
        portable=torch.compiler.is_exporting(),
    ).impl


def choose_routing(impl: str) -> str:
    """Return the routing that runs: ``auto``, ``dense`` or ``portable``, which ``auto`` is while ONNX is exported."""
    if impl not in ROUTING_IMPLEMENTATIONS:
        check_one_of("impl", impl, ROUTING_IMPLEMENTATIONS)
    if not exporting_to_onnx():
        return impl
    if impl == "dense":
        raise ValueError(no_onnx_form(impl))
    return "portable"


def run_portable(operator: str, compute: Callable[..., Tensor], arguments: Sequence[Any]) -> Tensor:
    """Return ``compute(*arguments)``, with the arguments of an operator cast as autocast casts them there, and autocast off."""
    device_type = next(argument for argument in arguments if isinstance(argument, Tensor)).device.type
    dtype = library.autocast_dtype(device_type)
    if dtype is None:
        return compute(*arguments)
    cast = library.cast_arguments(operator, arguments, dtype)
    with torch.autocast(device_type, enabled=False):
        return compute(*cast)


def as_rows(tensor: Tensor) -> Tensor:
    """The leading dimensions as one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def with_leading(rows: Tensor, like: Tensor) -> Tensor:
    """The leading dimensions of ``like`` again."""
    return rows if like.dim() == 2 else rows.reshape(*like.shape[:-1], rows.shape[-1])
