"""The expert layers: the gated MLP and the merged up-projection, at small shapes and at blocks of known models."""

import torch

from fusedonemoe import functional as F
from fusedonemoe import testing
from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.peers import relative_error

# T, D, F, E, K. The models keep their widths and experts per token; tokens and experts are cut to fit a small machine.
SHAPES = {
    "small-E32": (512, 128, 512, 32, 8),
    "small-E128": (512, 128, 512, 128, 8),
    "small-E1024": (512, 128, 512, 1024, 8),
    "qwen3-30b": (256, 2048, 768, 16, 8),
    "mixtral": (64, 1024, 3584, 8, 2),
    "olmoe": (128, 2048, 1024, 16, 8),
    "call": (1, 16, 16, 4, 2),  # next to no arithmetic: what a call costs
}
FORWARD = (
    "small-E32 float32",
    "small-E128 bfloat16",
    "small-E1024 float32",
    "small-E1024 bfloat16",
    "qwen3-30b bfloat16",
    "mixtral bfloat16",
    "olmoe bfloat16",
    "call float32",
)
FORWARD_BACKWARD = ("small-E128 bfloat16", "small-E1024 float32", "qwen3-30b bfloat16", "call float32")
PEAK = ("small-E32 float32", "small-E1024 bfloat16")
TRAINING_PEAK = ("small-E128 bfloat16",)
ERROR = ("small-E32 float32", "small-E128 bfloat16")
MERGED_FORWARD = ("small-E1024 float32", "small-E1024 bfloat16", "call float32")
MERGED_PEAK = ("small-E1024 bfloat16",)
MERGED_ERROR = ("small-E128 bfloat16",)


def _of(case):
    shape, dtype = case.split()
    return SHAPES[shape], getattr(torch, dtype)


class _MLP:
    """``[experts_mlp]`` with silu and gate, as Qwen3, Mixtral and OLMoE have it."""

    param_names = ("case",)
    # Whether the tensors record gradients.
    grad = False

    def setup(self, case):
        shape, dtype = _of(case)
        self.inputs = testing.make_mlp_inputs(*shape, dtype=dtype, routing="distinct", requires_grad=self.grad)
        self.dy = torch.ones_like(self.inputs.x)
        # The first call of an operator imports what its registration put off.
        self.call()

    def call(self):
        i = self.inputs
        y = F.experts_mlp(i.x, i.experts, i.weights, i.up_proj, i.down_proj)
        if not self.grad:
            return y
        return y, *torch.autograd.grad(y, (i.x, i.weights, i.up_proj, i.down_proj), self.dy)


class MLPForward(_MLP):
    params = (FORWARD,)

    def time_forward(self, case):
        self.call()


class MLPForwardBackward(_MLP):
    params = (FORWARD_BACKWARD,)
    grad = True

    def time_forward_backward(self, case):
        self.call()


class MLPPeak(_MLP):
    params = (PEAK,)

    def track_peak_forward(self, case):
        return peak_extra_bytes(self.call)

    track_peak_forward.unit = "bytes"


class MLPTrainingPeak(_MLP):
    params = (TRAINING_PEAK,)
    grad = True

    def track_peak_forward_backward(self, case):
        return peak_extra_bytes(self.call)

    track_peak_forward_backward.unit = "bytes"


class MLPError(_MLP):
    params = (ERROR,)

    def track_error(self, case):
        i = self.inputs
        exact = F.experts_mlp(
            i.x.double(), i.experts, i.weights.double(), i.up_proj.double(), i.down_proj.double(), impl="grouped"
        )
        return relative_error(self.call(), exact)

    track_error.unit = "relative error"


class _Merged:
    """``[experts_merged]``, the up-projection of the original."""

    param_names = ("case",)

    def setup(self, case):
        shape, dtype = _of(case)
        self.inputs = testing.make_merged_inputs(*shape, dtype=dtype, routing="distinct")
        self.call()

    def call(self):
        i = self.inputs
        return F.experts_merged(i.x, i.experts, i.weights, i.proj)


class MergedForward(_Merged):
    params = (MERGED_FORWARD,)

    def time_forward(self, case):
        self.call()


class MergedPeak(_Merged):
    params = (MERGED_PEAK,)

    def track_peak_forward(self, case):
        return peak_extra_bytes(self.call)

    track_peak_forward.unit = "bytes"


class MergedError(_Merged):
    params = (MERGED_ERROR,)

    def track_error(self, case):
        i = self.inputs
        exact = F.experts_merged(i.x.double(), i.experts, i.weights.double(), i.proj.double(), impl="grouped")
        return relative_error(self.call(), exact)

    track_error.unit = "relative error"
