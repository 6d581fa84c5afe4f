"""A GPU that is not there: Triton compiles for it through its normal launch path, and nothing ever runs.

Tensors are torch's fake ones with device "cuda"; what the launchers ask of the device is answered from a table.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._higher_order_ops.triton_kernel_wrap import TraceableTritonKernelWrapper
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

from tests.triton import fake_cuda

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one program may have of the memory that its threads share.
SHARED_BYTES = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}


class FakeDriver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> int:
        return 1000 + list(TARGETS).index(self.arch)  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@functools.cache
def _install_device_guard() -> None:
    if torch.version.cuda is None:
        fake_cuda.load()
    else:
        torch._C._ensureCUDADeviceGuardSet()  # a CUDA build brings what a missing device needs


def _answer(answer: Any, *args: Any) -> Any:
    return answer


@contextlib.contextmanager
def fake_gpu(arch: str) -> Iterator[None]:
    """Pretend that device 0 is an ``arch``."""
    target = TARGETS[arch]
    is_cuda = target.backend == "cuda"
    capability = divmod(target.arch, 10) if is_cuda else (9, 4)
    properties = SimpleNamespace(
        name=f"fake {arch}",
        gcnArchName="" if is_cuda else arch,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=80 << 30,
        shared_memory_per_block_optin=SHARED_BYTES[arch],
        warp_size=target.warp_size,
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_properties": properties,
        # Dynamo, told that there is a GPU, asks for its stream and keeps its generator's state.
        "_lazy_init": None,
        "get_rng_state": torch.empty(0, dtype=torch.uint8),
        "set_rng_state": None,
    }
    _install_device_guard()
    before = getattr(driver, "_active", None)
    driver.set_active(FakeDriver(arch))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.version, "hip", None if is_cuda else "6.0"))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, functools.partial(_answer, answer)))
        try:
            yield
        finally:
            driver._active = before


@dataclass(frozen=True)
class Launch:
    """What Triton would compile for one launch, after it looked at the arguments.

    Attributes:
        kernel: the jit function.
        signature: argument names to types.
        constexprs: argument positions to values.
        attrs: argument positions to what is known of them, such as being divisible by 16.
        options: num_warps, num_stages and the like.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: Any

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments by name."""
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.constexprs.items()}

    @property
    def key(self) -> str:
        """Equal for launches that would run the same machine code on one target."""
        parts = (self.kernel.cache_key, self.signature, sorted(self.constexprs.items(), key=str), self.attrs, self.options)
        return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.name}({shown}, warps={self.options.num_warps}, stages={self.options.num_stages})"


class _Pointer(MockTensor):  # type: ignore[misc]  # triton has no types
    """Stands for a fake tensor: its dtype, and where in its aligned storage it begins."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.dtype)
        self.offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset


def _mocked(arg: Any) -> Any:
    return _Pointer(arg) if isinstance(arg, torch.Tensor) else arg


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of compiling and running them; to be used inside :func:`fake_gpu`."""
    launches: list[Launch] = []
    shipped_run = JITFunction.run

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        launches.append(Launch(self, signature, constexprs, attrs, options))
        # None: not compiled, so nothing is launched or remembered.

    def run(self, *args, grid, warmup, **kwargs):
        named = {name: _mocked(value) for name, value in kwargs.items()}
        return shipped_run(self, *map(_mocked, args), grid=grid, warmup=True, **named)

    def call(self, *args, **kwargs):
        return self.kernel[self.grid](*args, **kwargs)  # without torch's operator around it, which hides a fake launch

    with (
        mock.patch.object(JITFunction, "_do_compile", record),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(TraceableTritonKernelWrapper, "__call__", call),
    ):
        yield launches
