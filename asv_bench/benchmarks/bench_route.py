"""Routing: from logits to weights and ids, and the plan that sorts them."""

import torch

from fusedonemoe import functional as F
from fusedonemoe import testing
from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.peers import relative_error

T, K = 512, 8


class Route:
    """Softmax over the picked, as Qwen3 and Mixtral route."""

    params = (1024,)
    param_names = ("experts",)

    def setup(self, experts):
        self.logits = testing.make_logits(T, experts)
        self.with_grad = self.logits.clone().requires_grad_()
        self.dweights = torch.ones(T, K)
        # The first call of an operator imports what its registration put off.
        self.time_forward_backward(experts)

    def time_forward(self, experts):
        with torch.no_grad():
            F.route(self.logits, K)

    def time_forward_backward(self, experts):
        weights, _ = F.route(self.with_grad, K)
        torch.autograd.grad(weights, self.with_grad, self.dweights)

    def track_peak_forward(self, experts):
        with torch.no_grad():
            return peak_extra_bytes(lambda: F.route(self.logits, K))

    track_peak_forward.unit = "bytes"

    def track_error(self, experts):
        with torch.no_grad():
            weights, _ = F.route(self.logits, K)
            exact, _ = F.route(self.logits.double(), K)
        return relative_error(weights, exact)

    track_error.unit = "relative error"


class Plan:
    """The expert-sorted order of a routing."""

    params = (1024,)
    param_names = ("experts",)

    def setup(self, experts):
        self.ids = testing.make_experts(T, experts, K, routing="distinct")

    def time_plan(self, experts):
        F.plan(self.ids, experts)
