"""The choice of the implementation that runs, by counted work; it depends on E, K, dtype and device, never on T."""

from dataclasses import dataclass

import torch

from fusedonemoe.ops import cuda, triton
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.portable import few_rows

IMPLEMENTATIONS = ("dense", "grouped", "cpu", "triton", "portable")
# The largest E/K at which dense was measured about as fast as grouped or faster on CPU (forward and backward, from 1 to 4).
# There its merged projection does the same products without a sort. Its MLP writes and masks [E, T, 2F] and lost at every ratio.
DENSE_UP_TO = {"experts_mlp": 0, "experts_mlp_lora": 0, "experts_mlp_quantized": 0, "experts_merged": 1}
# What an implementation does not do, by itself and the operator.
LACKING = {
    ("cpu", "experts_mlp_lora"): "the compiled CPU kernels have no adapters, impl='grouped' has them",
    ("portable", "experts_mlp_lora"): "merge the adapters before exporting: they have no portable form",
    ("portable", "experts_mlp_quantized"): "quantised weights have no portable form",
}


@dataclass(frozen=True)
class Work:
    """The cost of one forward of an expert layer.

    Attributes:
        flops: floating point operations of the matrix products.
        weight_bytes: bytes of expert weights read, at most.
    """

    flops: int
    weight_bytes: int


@dataclass(frozen=True)
class Choice:
    """The outcome of :func:`choose`.

    Attributes:
        impl: the implementation that runs.
        reason: why, in one sentence.
    """

    impl: str
    reason: str


def count_work(impl: str, *, tokens: int, top_k: int, num_experts: int, weight_numel: int, itemsize: float) -> Work:
    """Count the work of one forward.

    Args:
        impl: one of :data:`IMPLEMENTATIONS`.
        tokens: ``T``.
        top_k: ``K``.
        num_experts: ``E``.
        weight_numel: elements of all expert weights together.
        itemsize: bytes of one weight, with its share of a scale where it is quantised.

    Returns:
        Two operations per weight and routed row (dense routes every token to every expert), and the weights of the experts that
        can be hit. For portable this assumes evenly used experts: it pads each to the fullest, and reads all weights, unless
        there are few rows.
    """
    per_expert = weight_numel // num_experts
    rows = tokens * (num_experts if impl == "dense" else top_k)
    touched = num_experts if impl == "dense" else min(num_experts, rows)
    if impl == "portable" and not few_rows(rows, num_experts):
        rows, touched = num_experts * max(2, -(-rows // num_experts)), num_experts
    return Work(flops=2 * rows * per_expert, weight_bytes=round(touched * per_expert * itemsize))


def refusal(
    impl: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    widths: tuple[int, ...],
    contiguous: bool = True,
    operator: str = "experts_mlp",
) -> str | None:
    """Return why ``impl`` cannot run on such tensors, None when it can; the arguments are those of :func:`choose`."""
    if impl == "dense":
        return None
    if (impl, operator) in LACKING:
        return LACKING[impl, operator]
    if impl == "portable":
        return "it reads a number from the data, and meta tensors have none" if device_type == "meta" else None
    if impl == "cpu":
        if device_type != "cpu":
            return f"the CPU kernels do not run on device {device_type!r}"
        return native.refusal(dtype, contiguous)
    if impl == "triton":
        return triton.refusal(dtype, device_type)
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        return cuda.refusal(dtype, widths)
    return f"there is no grouped GEMM for device {device_type!r}"


_NAMES = ("auto", *IMPLEMENTATIONS)
CPU_KERNELS = Choice("cpu", "kernels compiled for this machine")
GPU_KERNELS = Choice("triton", "Triton kernels")
ONNX = Choice("portable", "ONNX has no other form")
ASKED_FOR = "asked for by impl="


def exporting_to_onnx() -> bool:
    """Return whether torch.onnx.export is at work, whose graphs hold no operator of this library."""
    return is_exporting() and bool(torch.onnx.is_in_onnx_export())


exporting_to_onnx.__dict__["_dynamo_marked_constant"] = True  # see ops/cpu/native.py


def no_onnx_form(impl: str) -> str:
    """Return the refusal of a named implementation while torch.onnx.export is at work."""
    return f"impl={impl!r} has no ONNX form: set impl='portable', or export inside `with fusedonemoe.export.portable(model):`"


def choose(
    operator: str,
    impl: str,
    *,
    top_k: int,
    num_experts: int,
    device_type: str,
    dtype: torch.dtype,
    widths: tuple[int, ...],
    contiguous: bool = True,
    portable: bool = False,
) -> Choice:
    """Resolve ``impl="auto"``, or check that a named implementation can run.

    Args:
        operator: ``"experts_mlp"``, ``"experts_mlp_lora"``, ``"experts_mlp_quantized"`` or ``"experts_merged"``.
        impl: ``"auto"`` or one of :data:`IMPLEMENTATIONS`.
        top_k: ``K``.
        num_experts: ``E``.
        device_type: of the tensors.
        dtype: of x and the expert weights.
        widths: the row lengths of the grouped GEMMs: D, F and what the up-projection yields.
        contiguous: whether the expert weights are.
        portable: leave out what is compiled for this machine, as an exported graph has to.

    Returns:
        The :class:`Choice`.

    Raises:
        ValueError: an unknown name, or a named implementation that cannot run here; it never falls back silently.
    """
    if impl not in _NAMES:
        raise ValueError(f"impl must be one of {_NAMES}, got {impl!r}")
    has_kernels = ("cpu", operator) not in LACKING and not portable
    if portable and exporting_to_onnx():
        if impl not in ("auto", "portable"):
            raise ValueError(no_onnx_form(impl))
        if reason := LACKING.get(("portable", operator)):
            raise ValueError(f"{operator} has no ONNX form: {reason}")
        return ONNX
    if impl == "auto" and device_type == "cpu" and has_kernels and native.refusal(dtype, contiguous) is None:
        return CPU_KERNELS
    if impl == "auto" and device_type != "cpu" and triton.refusal(dtype, device_type) is None:
        return GPU_KERNELS

    named = impl if impl != "auto" else "grouped"
    reason = refusal(named, device_type=device_type, dtype=dtype, widths=widths, contiguous=contiguous, operator=operator)
    if impl != "auto":
        if reason:
            raise ValueError(f"impl={impl!r} cannot run here: {reason}")
        return Choice(impl, ASKED_FOR)
    if num_experts <= DENSE_UP_TO[operator] * top_k:
        return Choice("dense", f"every token takes all of the {num_experts} experts: there is nothing to sort")
    if reason:
        return Choice("dense", f"grouped cannot run here: {reason}")
    if num_experts <= top_k:
        return Choice("grouped", "as much arithmetic as dense, in fewer passes over memory")
    return Choice("grouped", f"dense would do E/K = {num_experts}/{top_k} times the arithmetic")
