"""The CPU kernels as functions of tensors: argument blocks, output buffers, and when they apply."""

import contextlib
import ctypes
import math
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import build
from fusedonemoe.ops.operands import read_merged

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# Weight-row products below which a second thread costs more than it saves. No result depends on the number of threads.
PRODUCTS_PER_THREAD = 1 << 18
# Outputs from this size on come from the kernels' own pool: torch gives each fresh pages, and the system zeroes them.
POOLED_BYTES = 1 << 20
BAD_PLAN = 2  # what a kernel returns that was given a plan of another routing, as in native/moe.cpp


def refusal(dtype: torch.dtype, contiguous: bool) -> str | None:
    """Why the kernels cannot run for such weights; None when they can."""
    if dtype not in _SUFFIX:
        return f"the CPU kernels have float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not contiguous:
        return "the CPU kernels read contiguous expert weights"
    if build.library is None:
        try:
            build.load()
        except build.Unavailable as error:
            return str(error)
    return None


# A graph is compiled for the machine it is traced on. torch.compiler.assume_constant_result sets this too, but imports dynamo,
# which takes as long as importing torch.
refusal.__dict__["_dynamo_marked_constant"] = True


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return getattr(build.load(), f"fusedonemoe_{name}_{_SUFFIX[dtype]}")


@cache
def _pool() -> Any:
    allocate = build.load().fusedonemoe_pooled_bytes
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_int64]
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return allocate, capsule


def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; a large one from the pool, to which its memory returns when it dies."""
    size = math.prod(shape) * dtype.itemsize
    if size < POOLED_BYTES:
        return torch.empty(*shape, dtype=dtype, device="cpu")  # torch is faster at numbers than at a tuple of them
    allocate, capsule = _pool()
    managed = allocate(size)
    if managed is None:
        raise MemoryError(f"no memory for a tensor of {size} bytes")
    # detach: autograd forbids writing into an operator's output that is a view.
    return torch.utils.dlpack.from_dlpack(capsule(managed, b"dltensor", None)).view(dtype).view(shape).detach()


def new_on(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor; on CPU one of the pool, whose large pages are read faster than torch's small ones."""
    if device.type != "cpu" or refusal(torch.float32, True) is not None:
        return torch.empty(shape, dtype=dtype, device=device)
    return new(shape, dtype)


def pooled_size(tensor: Tensor) -> int:
    """The bytes of the pool that an output like ``tensor`` occupies; 0 for one that is too small for it."""
    size = tensor.numel() * tensor.element_size()
    return -(-size // build.HUGE_PAGE) * build.HUGE_PAGE if size >= POOLED_BYTES else 0


def pool_peak() -> int:
    """The most bytes of the pool in use at once since the last call, beyond those in use then; 0 without kernels."""
    try:
        peak = build.load().fusedonemoe_pool_peak
    except build.Unavailable:
        return 0
    peak.restype = ctypes.c_int64
    return int(peak())


def trim() -> None:
    """Give the pool's idle memory back to the system."""
    with contextlib.suppress(build.Unavailable):
        build.load().fusedonemoe_trim()


def addresses(*tensors: Tensor | None) -> list[int]:
    """Return where each tensor begins; 0 for none."""
    found = []
    for tensor in tensors:  # a comprehension takes a Python frame
        found.append(0 if tensor is None else tensor.data_ptr())  # noqa: PERF401
    return found


def as_saved(dtype: torch.dtype, operands: Sequence[tuple[Tensor | None, torch.dtype, tuple[int, ...]]]) -> bool:
    """Return whether operands are as a forward saved them: on the CPU, contiguous, of these dtypes and shapes.

    Args:
        dtype: of the layer; False for one that the kernels do not have.
        operands: each with its dtype and shape; None for one that is absent.
    """
    if dtype not in _SUFFIX:
        return False
    for tensor, expected, shape in operands:
        if tensor is None:
            continue
        if tensor.dtype is not expected or tensor.shape != shape or not tensor.is_contiguous() or tensor.device.type != "cpu":
            return False
    return True


def call(name: str, dtype: torch.dtype, words: Sequence[int], floats: Sequence[float] = ()) -> None:
    """Run a kernel on its argument block: addresses and int64s, then float64s, in the order of the struct."""
    code = _kernel(name, dtype)(struct.pack(f"{len(words)}q{len(floats)}d", *words, *floats))
    if code == BAD_PLAN:
        raise ValueError(f"order and offsets must be the plan of experts, got another for {name}")
    if code:
        raise MemoryError(f"no memory for the scratch buffers of {name}")


def threads(rows: int, *widths: int) -> int:
    """Return the number of threads that multiply ``rows`` rows by weights of these widths."""
    return max(1, min(torch.get_num_threads(), rows * math.prod(widths) // PRODUCTS_PER_THREAD))


@cache
def gate_up_rows(layout: str, inner: int) -> tuple[int, int, int, int]:
    """Return the first gate row, the first up row, the distance of rows, and whether there is a gate."""
    match layout:
        case "gate_up":
            return 0, inner, 1, 1
        case "up_gate":
            return inner, 0, 1, 1
        case "interleaved":
            return 0, 1, 2, 1
    assert layout == "plain"
    return 0, 0, 1, 0


def read_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as a kernel reads it; a conversion that does nothing costs ten times what it costs to ask."""
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def as_ids(experts_TK: Tensor) -> Tensor:
    """Expert ids as the kernels read them."""
    return read_as(experts_TK, torch.int64)


def as_float_weights(weights_TK: Tensor) -> Tensor:
    """Routing weights as the kernels read them."""
    return read_as(weights_TK, torch.float32)


def new_gradients(
    needs: Sequence[bool], x_TD: Tensor, weights_TK: Tensor, *parameters: Tensor | None
) -> tuple[Tensor | None, ...]:
    """An uninitialised tensor for each gradient that is needed, in the dtype of x; of the routing weights in float32."""

    def wanted(needed: bool, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if not needed or like is None else new(tuple(like.shape), dtype)

    of_x, of_weights, *of_parameters = needs
    return (
        wanted(of_x, x_TD, x_TD.dtype),
        wanted(of_weights, weights_TK, torch.float32),
        *(wanted(needed, like, x_TD.dtype) for needed, like in zip(of_parameters, parameters, strict=True)),
    )


def returned(gradients: Sequence[Tensor | None], owner: Tensor, weights_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients as operators return them: those of the routing weights in their dtype, an empty tensor where none was needed."""
    dx, dweights, *rest = gradients
    if dweights is not None:
        dweights = dweights.to(weights_dtype)
    return tuple(owner.new_empty(0) if gradient is None else gradient for gradient in (dx, dweights, *rest))


def experts_merged_checked(*operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`experts_merged` on operands that nothing has checked."""
    return experts_merged(*read_merged(*operands)[1])


def experts_merged(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, proj_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.grouped.experts_merged` in one kernel."""
    E, D, F = proj_EDF.shape
    x_TD, ids, weights_TK = x_TD.contiguous(), as_ids(experts_TK), as_float_weights(weights_TK)
    h_TF = new((x_TD.shape[0], F), x_TD.dtype)
    order = torch.empty(experts_TK.numel(), dtype=torch.int32, device="cpu")
    offsets = torch.empty(E + 1, dtype=torch.int32, device="cpu")
    sizes = (*experts_TK.shape, E, D, F, threads(experts_TK.numel(), *proj_EDF.shape[1:]))
    call("merged_forward", x_TD.dtype, (*addresses(x_TD, proj_EDF, ids, weights_TK, h_TF, order, offsets), *sizes))
    return h_TF, order, offsets


def experts_merged_backward(
    dh_TF: Tensor,
    order: Tensor,
    offsets: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    proj_EDF: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.grouped.experts_merged_backward` in one kernel."""
    reader, (x_TD, experts_TK, weights_TK, proj_EDF) = read_merged(x_TD, experts_TK, weights_TK, proj_EDF)
    dh_TF = reader.read("dh", dh_TF, (x_TD.shape[0], proj_EDF.shape[2]))
    order, offsets = reader.plan(order, offsets, experts_TK, proj_EDF.shape[0])
    ids, float_weights = as_ids(experts_TK), as_float_weights(weights_TK)
    gradients = new_gradients(needs, x_TD, weights_TK, proj_EDF)
    sizes = (*experts_TK.shape, *proj_EDF.shape, threads(order.shape[0], *proj_EDF.shape[1:]))
    call(
        "merged_backward",
        x_TD.dtype,
        (*addresses(dh_TF, x_TD, proj_EDF, ids, float_weights, order, offsets, *gradients), *sizes),
    )
    return returned(gradients, x_TD, weights_TK.dtype)  # type: ignore[return-value]
