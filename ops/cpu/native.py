"""The compiled CPU kernels: when they apply, and their pool of memory."""

import contextlib
import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import build

_ELEMENTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# Tensors from this size on come from the kernels' own pool: torch gives each fresh pages, and the system zeroes them.
POOLED_BYTES = 1 << 20


def refusal(dtype: torch.dtype, contiguous: bool) -> str | None:
    """Why the kernels cannot run for such weights; None when they can."""
    if dtype not in _ELEMENTS:
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
def _panel_sizes(dtype: torch.dtype) -> tuple[int, int]:
    library = build.load()
    return library.fusedonemoe_panel_columns(), getattr(library, f"fusedonemoe_elements_per_unit_{_ELEMENTS[dtype]}")()


def panel_sizes(dtype: torch.dtype) -> tuple[int, int]:
    """Return columns of a panel and elements of a unit, on this machine."""
    return _panel_sizes(dtype)


panel_sizes.__dict__["_dynamo_marked_constant"] = True


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
        return torch.empty(shape, dtype=dtype, device="cpu")
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
