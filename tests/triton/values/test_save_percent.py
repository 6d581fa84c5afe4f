"""The memory dial of the Triton kernels: what is held for the backward, and that gradients do not depend on it."""

from functools import partial

import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.bench.memory import held_bytes
from fusedonemoe.testing import make_mlp_inputs

T, D, INNER, E, K = 23, 40, 24, 6, 2


@pytest.mark.parametrize("gated", [True, False])
def test_what_is_held_is_the_formula_and_gradients_stay(gated, device):
    inputs = make_mlp_inputs(T, D, INNER, E, K, gated=gated, routing="distinct", requires_grad=True, device=device)
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
    N, row = T * K, inputs.up_proj.shape[1] * 4
    leaves = [inputs.x, inputs.weights, inputs.up_proj, inputs.down_proj]
    results = []
    for save_percent in (100, 37, 0):
        call = partial(F.experts_mlp, *arguments, gated=gated, save_percent=save_percent, impl="triton")
        size, y = held_bytes(call, [inputs.up_proj, inputs.down_proj])
        routing = inputs.experts.nbytes + inputs.weights.nbytes + 4 * N + 4 * (E + 1)
        assert size == inputs.x.nbytes + routing + N * save_percent // 100 * row
        results.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    assert all(g.abs().max() > 0 for g in results[0])
