"""The floating-point operations that torch's counter finds in the operators, against a count over the routed rows."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusedonemoe import LoRAExperts, MoE, QuantizedExperts
from fusedonemoe import functional as F
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import make_merged_inputs

T, D, INNER, E, K = 6, 32, 64, 5, 2
N = T * K
ONE_PRODUCT = 2 * N * D * INNER  # of the down-projection; the gated up-projection takes two
ROUTER = 2 * T * D * E
IMPLS = ["dense", "grouped"] if native.refusal(torch.float32, True) else ["dense", "grouped", "cpu"]


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def block(impl, **options):
    return MoE(hidden_size=D, intermediate_size=INNER, num_experts=E, top_k=K, impl=impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_forward(impl):
    moe, x = block(impl), torch.randn(T, D)
    experts = 3 * ONE_PRODUCT * (E // K + 0.5 if impl == "dense" else 1)  # dense computes all experts for all tokens
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert counted(lambda: moe(x)) == experts + ROUTER


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("gated", [True, False])
def test_a_block_backward_takes_twice_its_forward(impl, gated):
    moe, x = block(impl, gated=gated), torch.randn(T, D, requires_grad=True)
    forward = (3 if gated else 2) * ONE_PRODUCT + ROUTER
    assert counted(lambda: moe(x).sum().backward()) == 3 * forward


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_a_frozen_expert_takes_less(impl):
    moe, x = block(impl), torch.randn(T, D)
    moe.experts.gate_up_proj.requires_grad_(False)
    # Of the backward: the gradient of h, of the down-projection and of the router's weight.
    assert counted(lambda: moe(x).sum().backward()) == (3 + 2) * ONE_PRODUCT + 2 * ROUTER


@pytest.mark.skipif("cpu" not in IMPLS, reason="no CPU kernels")
@pytest.mark.parametrize("percent", [0, 50, 100])
def test_what_a_backward_computes_again_is_counted(percent):
    moe, x = block("cpu", save_percent=percent), torch.randn(T, D, requires_grad=True)
    again = 2 * (N - N * percent // 100) * D * 2 * INNER
    assert counted(lambda: moe(x).sum().backward()) == 3 * (3 * ONE_PRODUCT + ROUTER) + again


@pytest.mark.parametrize("form", ["int8", "int4", "packed"])
def test_quantised_and_packed_weights(form):
    moe, x = block("auto"), torch.randn(T, D)
    if form == "packed":
        if "cpu" not in IMPLS:
            pytest.skip("no CPU kernels")
        moe.prepack()
    else:
        moe.register_module(
            "experts", QuantizedExperts.from_experts(moe.experts, form, **({"group_size": 32} if form == "int4" else {}))
        )
    with torch.no_grad():
        assert counted(lambda: moe(x)) == 3 * ONE_PRODUCT + ROUTER


def test_adapters_are_counted():
    rank = 4
    moe, x = block("grouped"), torch.randn(T, D)
    plain = counted(lambda: moe(x))
    moe.register_module("experts", LoRAExperts(moe.experts, r=rank))
    assert counted(lambda: moe(x)) == plain + 2 * N * rank * (D + 2 * INNER + INNER + D)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_merged_projections_neurons_and_values(impl):
    inputs = make_merged_inputs(T, D, INNER, E, K, requires_grad=True)
    # The gradient of x and of the weights are sums over one product.
    assert counted(lambda: F.experts_merged(*vars(inputs).values(), impl=impl).sum().backward()) == 3 * ONE_PRODUCT
    table, x = (torch.randn(*shape, requires_grad=True) for shape in ((E, D), (T, D)))
    weights, experts = torch.rand(T, K, requires_grad=True), inputs.experts
    one_row = 2 * N * D
    assert counted(lambda: F.experts_values(experts, weights, table, impl=impl)) == one_row
    assert counted(lambda: F.experts_neurons(x, experts, weights, table, table, impl=impl)) == 2 * one_row
