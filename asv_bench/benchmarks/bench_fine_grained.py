"""Fine-grained experts: single neurons and value memory."""

import torch

from fusedonemoe import testing

from .subjects import DEVICES, Subject, _Both, _Operator, present

# T, D, E, K: FlashMoE's sizes with fewer tokens and columns.
SHAPES = {"E4096": (256, 128, 4096, 16), "E16384": (1024, 256, 16384, 64), "E102400": (128, 256, 102400, 512)}


def _drawn(device: str, case: str):
    shape, dtype = case.split()
    (T, D, E, K), dtype = SHAPES[shape], getattr(torch, dtype)
    draw = torch.Generator().manual_seed(0)

    def normal(rows, scale=1.0):
        return (torch.randn(rows, D, generator=draw) * scale).to(device, dtype)

    experts = testing.make_experts(T, E, K, routing="distinct", device=device)
    return experts, torch.rand(T, K, generator=draw).to(device), normal(T), normal(E, D**-0.5), normal(E)


class Neurons(_Operator):
    """``[experts_neurons]`` with silu."""

    params = (DEVICES, ("E4096 float32", "E4096 bfloat16"))

    def subject(self, device, case):
        experts_neurons = present("functional.experts_neurons")
        experts, weights, x, down, up = _drawn(device, case)

        def call(x, weights, down, up):
            return experts_neurons(x, experts, weights, down, up)

        return Subject(call, (x, weights, down, up), call)


class NeuronsLarge(_Both):
    params = (DEVICES, ("E16384 bfloat16", "E102400 float32"))
    subject = Neurons.subject


class Values(_Operator):
    """``[experts_values]``."""

    params = (DEVICES, ("E4096 float32", "E16384 bfloat16"))

    def subject(self, device, case):
        experts_values = present("functional.experts_values")
        experts, weights, _, _, table = _drawn(device, case)

        def call(weights, table):
            return experts_values(experts, weights, table)

        return Subject(call, (weights, table), call)
