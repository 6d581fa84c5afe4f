"""Subjects of measurement: a function of leaf tensors, its gradients, its peak memory, its error against float64."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fusedonemoe

try:
    # setup may raise any NotImplementedError; a benchmark itself may raise only this one.
    from asv_runner.benchmarks.mark import SkipNotImplemented as NotApplicable
except ImportError:
    NotApplicable = NotImplementedError

# device_count asks the driver's library, not CUDA: a CUDA context made here could not be used after asv's fork.
DEVICES = ("cpu", "cuda") if torch.cuda.device_count() else ("cpu",)

# T, D, F, E, K. The models keep their widths and experts per token; tokens and experts are cut to fit a small machine.
SHAPES = {
    "E32": (512, 128, 512, 32, 8),
    "E128": (512, 128, 512, 128, 8),
    "E1024": (512, 128, 512, 1024, 8),
    "qwen3-30b": (256, 2048, 768, 16, 8),
    "mixtral": (64, 1024, 3584, 8, 2),
    "decode": (4, 2048, 768, 16, 8),  # few tokens: bound by reading the weights
    "call": (1, 16, 16, 4, 2),  # next to no arithmetic: what a call costs
}

# A smoke run only shows that everything runs: it draws fewer weights and does not use inductor's compiler.
SMOKE = "ASV_SMOKE" in os.environ
if SMOKE:
    SHAPES = {name: (T, min(D, 256), min(F, 256), min(E, 128), K) for name, (T, D, F, E, K) in SHAPES.items()}


def parse(case: str) -> tuple[str, tuple[int, ...], torch.dtype]:
    """``"auto E32 float32"`` to an implementation, the sizes of a shape and a dtype."""
    impl, shape, dtype = case.split()
    return impl, SHAPES[shape], getattr(torch, dtype)


def present(path: str):
    """A name of this library by its path; at a commit that has not got it the benchmark is n/a."""
    found = fusedonemoe
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise NotApplicable(f"this commit has no fusedonemoe.{path}") from None
    return found


def needs(function: Callable, *arguments: str) -> None:
    """Nothing when a function takes these keywords; at a commit where it does not the benchmark is n/a."""
    missing = set(arguments) - set(inspect.signature(function).parameters)
    if missing:
        raise NotApplicable(f"{function.__name__} of this commit has no {', '.join(sorted(missing))}")


@dataclass(frozen=True)
class Subject:
    """A function of floating-point leaves.

    Attributes:
        call: what is measured.
        leaves: its arguments, which get gradients.
        exact: the same mathematics, for leaves in float64.
    """

    call: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    exact: Callable[..., Tensor] | None = None

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self._finished(self.call(*self.leaves))

    def gradients(self) -> Sequence[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        return self._gradients(self.call(*leaves), leaves)

    def _gradients(self, y: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor]:
        # Drawn, not ones: normalised weights sum to a constant, whose gradient is zero.
        dy = torch.rand(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device, y.dtype)
        return self._finished(torch.autograd.grad(y, of, dy))

    def in_float64(self) -> "Subject":
        return replace(self, call=self.exact, leaves=tuple(leaf.double() for leaf in self.leaves))

    def _finished(self, result):
        if self.leaves[0].is_cuda:
            torch.cuda.synchronize()
        return result


def relative_error(found: Tensor, exact: Tensor) -> float:
    """``||found - exact|| / ||exact||`` in float64."""
    return float((found.double() - exact).norm() / exact.norm())


def peak_bytes(call: Callable, device: str) -> int:
    """The most bytes that a call holds at one moment, beside its arguments."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        from fusedonemoe.bench import memory
    except ImportError:
        raise NotApplicable("this commit has no meter of the CPU's memory") from None
    return memory.peak_extra_bytes(call)


class _Subjects:
    """Parameters and setup that every operator and layer has."""

    param_names = ("device", "case")
    # One round keeps a full run short. The check asks for more.
    rounds = 1
    repeat = (2, 8, 0.3)

    # Each benchmark's own. Declared and not defined: asv would take a NotImplementedError here for "n/a".
    subject: Callable[[str, str], Subject]

    def setup(self, device, case):
        self.measured = self.subject(device, case)
        try:
            self.prepare()
        except ValueError as error:
            if "impl" not in str(error):
                raise
            raise NotApplicable(str(error)) from None

    def prepare(self):
        """The first call, which compiles the CPU kernels of a commit, and imports what its registration put off."""
        self.measured.forward()


class _Forward(_Subjects):
    def time_forward(self, device, case):
        self.measured.forward()


class _Both(_Forward):
    def time_forward_backward(self, device, case):
        self.measured.gradients()


class _Memory(_Subjects):
    def track_peak_forward(self, device, case):
        return peak_bytes(self.measured.forward, device)

    track_peak_forward.unit = "bytes"

    def track_peak_forward_backward(self, device, case):
        return peak_bytes(self.measured.gradients, device)

    track_peak_forward_backward.unit = "bytes"


class _Accuracy(_Subjects):
    def track_error(self, device, case):
        return relative_error(self.measured.forward(), self.measured.in_float64().forward())

    track_error.unit = "relative error"

    def track_gradient_error(self, device, case):
        """The worst of all gradients."""
        pairs = zip(self.measured.gradients(), self.measured.in_float64().gradients(), strict=True)
        return max(relative_error(found, exact) for found, exact in pairs)

    track_gradient_error.unit = "relative error"


class _Operator(_Both, _Memory, _Accuracy):
    """Time, memory and accuracy, forward and backward."""
