"""The steps that the public functions have in common, from the checks of experts to the operator's rows."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.compiler import is_dynamo_compiling

from fusedonemoe.checks import check_dim, check_fits, check_like_x, check_one_of, check_shape
from fusedonemoe.linear import are_plain
from fusedonemoe.ops import choose, library
from fusedonemoe.ops.choice import exporting_to_onnx, no_onnx_form
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.exporting import is_exporting

ROUTING_IMPLEMENTATIONS = ("auto", "dense", "portable")


def intermediate_size(E: int, G: int, gated: bool) -> int:
    """``F`` of an up-projection ``[E, G, D]``: of at least one expert, with as many gate rows as up rows."""
    if E < 1:
        raise ValueError("gate_up_proj must hold at least one expert, got E = 0")
    if gated and G % 2:
        raise ValueError(f"gate_up_proj must have as many gate rows as up rows, got {G} in all")
    return G // 2 if gated else G


def projections(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *, gated: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    """The checked weights as ``[E, G, D]`` and ``[E, D, F]``: views where they come ``transposed``."""
    dtype, device = x.dtype, x.device
    if not isinstance(gate_up_proj, Tensor) or gate_up_proj.dtype != dtype or gate_up_proj.device != device:
        check_like_x("gate_up_proj", gate_up_proj, x)
    if not isinstance(down_proj, Tensor) or down_proj.dtype != dtype or down_proj.device != device:
        check_like_x("down_proj", down_proj, x)
    if gate_up_proj.dim() != 3:
        check_dim("gate_up_proj", gate_up_proj, "E, D, G" if transposed else "E, G, D")
    up_EGD = gate_up_proj.transpose(1, 2) if transposed else gate_up_proj
    E, G, D = up_EGD.shape
    F = G // 2 if gated else G
    if E < 1 or (gated and G % 2):
        intermediate_size(E, G, gated)
    if x.shape[-1] != D:
        check_fits(x, D, "gate_up_proj")
    expected = (E, F, D) if transposed else (E, D, F)
    if down_proj.shape != expected:
        check_shape("down_proj", down_proj, expected)
    return up_EGD, down_proj.transpose(1, 2) if transposed else down_proj


def check_biases(x: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Check the biases, where there are some, of an up-projection of this shape ``[E, G, D]``."""
    E, G, D = shape
    for name, bias, width in (("gate_up_bias", gate_up_bias, G), ("down_bias", down_bias, D)):
        if bias is not None:
            check_like_x(name, bias, x)
            check_shape(name, bias, (E, width))


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
        portable=is_exporting(),
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


@cache
def _fingerprint() -> int:
    """Return a 62-bit digest of the Python that transparent operators hide: torch's cache would run an old version without it."""
    digest = hashlib.blake2b(str(library.BUILD).encode(), digest_size=8)
    package = Path(__file__).parent.parent
    for path in (*sorted((package / "functional").glob("*.py")), package / "linear.py", package / "checks.py"):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "big") >> 2


def traced_build() -> int:
    """Return the number by which torch's cache tells versions of that Python apart, with CPU kernels and without."""
    return _fingerprint() ^ (native.refusal(torch.float32, True) is None)


traced_build.__dict__["_dynamo_marked_constant"] = True  # see ops/cpu/native.py


def is_hidden(*tensors: Tensor | None) -> bool:
    """Return whether Dynamo traces a call, and none of its tensors and no mode has functions of its own for the steps in it.

    Such a call is one operator for Dynamo, see :mod:`fusedonemoe.functional.traced`.
    """
    return is_dynamo_compiling() and not is_exporting() and not _len_torch_function_stack() and are_plain(tensors)
