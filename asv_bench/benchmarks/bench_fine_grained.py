"""Fine-grained experts: product keys, single neurons, value memory; and the routing variants beside them."""

import torch

from fusedonemoe import functional as F
from fusedonemoe import testing
from fusedonemoe.bench.memory import peak_extra_bytes

# T, D, E, K: FlashMoE's sizes with fewer tokens and columns.
SHAPES = {"E16384": (1024, 256, 16384, 64), "E102400": (128, 256, 102400, 512)}
NEURONS = ("E16384 bfloat16", "E102400 float32")
VALUES = ("E16384 bfloat16",)


class ProductKeys:
    """T = 4096 tokens to 16 of G * G experts; logits of few values have ties everywhere."""

    params = ("continuous", "integers")
    param_names = ("logits",)

    def setup(self, logits):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(4096, 2, 128, generator=draw)
        self.logits = x if logits == "continuous" else (2 * x).round()
        # The first call of an operator imports what its registration put off.
        self.time_forward(logits)

    def time_forward(self, logits):
        with torch.no_grad():
            F.route_product_key(self.logits, 16)


class _Tables:
    param_names = ("case",)

    def setup(self, case):
        shape, dtype = case.split()
        (T, D, E, K), dtype = SHAPES[shape], getattr(torch, dtype)
        draw = torch.Generator().manual_seed(0)

        def normal(rows, scale=1.0):
            return (torch.randn(rows, D, generator=draw) * scale).to(dtype).requires_grad_()

        self.experts = testing.make_experts(T, E, K, routing="distinct")
        self.weights = torch.rand(T, K, generator=draw).requires_grad_()
        self.x, self.down, self.up = normal(T), normal(E, D**-0.5), normal(E)
        self.dy = torch.ones_like(self.x)
        self.time_forward_backward(case)

    def time_forward(self, case):
        with torch.no_grad():
            self.call()

    def time_forward_backward(self, case):
        torch.autograd.grad(self.call(), self.leaves(), self.dy)


class Neurons(_Tables):
    """``[experts_neurons]`` with silu."""

    params = NEURONS

    def leaves(self):
        return [self.x, self.weights, self.down, self.up]

    def call(self):
        return F.experts_neurons(self.x, self.experts, self.weights, self.down, self.up)

    def track_peak_forward_backward(self, case):
        return peak_extra_bytes(lambda: torch.autograd.grad(self.call(), self.leaves(), self.dy))

    track_peak_forward_backward.unit = "bytes"


class Values(_Tables):
    """``[experts_values]``."""

    params = VALUES

    def leaves(self):
        return [self.weights, self.up]

    def call(self):
        return F.experts_values(self.experts, self.weights, self.up)


class Variants:
    """What masks or drops rows of a routing."""

    params = (128,)
    param_names = ("experts",)

    def setup(self, experts):
        self.logits = testing.make_logits(4096, experts)
        self.experts = testing.make_experts(4096, experts, 8, routing="skewed")
        self.weights = torch.rand(4096, 8, generator=torch.Generator().manual_seed(0))
        self.time_top_p(experts)
        self.time_capacity(experts)

    def time_top_p(self, experts):
        F.route_top_p(self.logits, 1 / 128)

    def time_capacity(self, experts):
        F.apply_capacity(self.experts, self.weights, experts, 1.25)
