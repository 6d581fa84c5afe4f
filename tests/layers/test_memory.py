"""What a call allocates at its peak and what it keeps for the backward, counted to the byte."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from fusedonemoe import functional as F
from fusedonemoe.bench.memory import held_bytes
from fusedonemoe.testing import MLPInputs, make_merged_inputs, make_mlp_inputs

T, K = 512, 8
N = T * K


class Allocations(NamedTuple):
    """Bytes allocated during a call: at the worst moment, and still held when it is over."""

    peak: int
    kept: int


def measure(call: Callable[[], Any]) -> Allocations:
    """Replays every allocation and release of the CPU allocator, in order, as the profiler saw them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    changes = []
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        held += change
        peak = max(peak, held)
    del result
    return Allocations(peak, held)


def test_meter_counts_a_known_pattern():
    def call():
        a = torch.empty(1000, dtype=torch.float32)
        b = torch.empty(500, dtype=torch.bfloat16)
        del a
        c = torch.empty(700, dtype=torch.float64)
        d = torch.empty(1, 300, dtype=torch.float32)[:, :10]  # a view holds all of its storage
        del c
        return b, d

    assert measure(call) == Allocations(peak=1000 + 5600 + 1200, kept=1000 + 1200)


def test_meter_sees_temporaries_inside_an_operator():
    a, b = torch.rand(10, 100), torch.rand(100, 10)
    chain = measure(lambda: torch.linalg.multi_dot((a, b, a)))  # (a b) is made and dropped inside
    assert chain == Allocations(peak=400 + 4000, kept=4000)


def test_meter_sees_nothing_where_nothing_is_allocated():
    a = torch.rand(100)
    assert measure(lambda: a.mul_(a)) == Allocations(0, 0)


def mlp_call(inputs: MLPInputs, **options: Any) -> Tensor:
    return F.experts_mlp(
        inputs.x,
        inputs.experts,
        inputs.weights,
        inputs.up_proj,
        inputs.down_proj,
        gate_up_bias=inputs.up_bias,
        down_bias=inputs.down_bias,
        impl="grouped",
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("D", "intermediate", "E", "routing"),
    [
        (128, 512, 32, "distinct"),
        (128, 512, 32, "skewed"),
        (128, 512, 32, "one_expert"),
        (128, 512, 128, "distinct"),
        (128, 512, 128, "skewed"),
        (128, 512, 1024, "distinct"),
        (512, 128, 32, "distinct"),
        (512, 128, 128, "skewed"),
    ],
)
@torch.no_grad()
def test_inference_needs_at_most_three_copies_of_the_routed_rows(D, intermediate, E, routing, dtype):
    inputs = make_mlp_inputs(T, D, intermediate, E, K, dtype=dtype, routing=routing)
    mlp_call(inputs)  # the first call may fill caches of the libraries below
    used = measure(lambda: mlp_call(inputs))
    assert used.kept == inputs.x.nbytes, "nothing but the output outlives the call"
    assert used.peak - used.kept <= 3 * N * (intermediate + D) * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("D", "intermediate", "E"), [(128, 512, 32), (512, 128, 128)])
@torch.no_grad()
def test_merged_inference_needs_at_most_three_copies_of_the_routed_rows(D, intermediate, E, dtype):
    inputs = make_merged_inputs(T, D, intermediate, E, K, dtype=dtype, routing="distinct")

    def call():
        return F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl="grouped")

    call()
    used = measure(call)
    assert used.kept == T * intermediate * dtype.itemsize
    assert used.peak - used.kept <= 3 * N * (intermediate + D) * dtype.itemsize


def test_saved_bytes_count_a_storage_once_and_parameters_never():
    w, x = torch.rand(100, requires_grad=True), torch.rand(100, requires_grad=True)
    assert held_bytes(lambda: (w * x) * x[:50].repeat(2), [w])[0] == 3 * 400  # x, w * x and the repeated half


@pytest.mark.parametrize("save_percent", [0, 1, 50, 99, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_backward_keeps_x_routing_and_the_chosen_share_of_pre_activations(bias, gated, dtype, save_percent):
    D, intermediate, E = 64, 96, 32
    inputs = make_mlp_inputs(
        T, D, intermediate, E, K, dtype=dtype, gated=gated, bias=bias, routing="distinct", requires_grad=True
    )
    parameters = [p for p in (inputs.up_proj, inputs.down_proj, inputs.up_bias, inputs.down_bias) if p is not None]
    saved, _ = held_bytes(lambda: mlp_call(inputs, gated=gated, save_percent=save_percent), parameters)
    routing = inputs.experts.nbytes + inputs.weights.nbytes + 4 * N + 4 * (E + 1)  # ids, weights, order and offsets
    pre_activations = N * save_percent // 100 * (2 if gated else 1) * intermediate * dtype.itemsize
    assert saved == pytest.approx(inputs.x.nbytes + routing + pre_activations, rel=0.02)


def test_merged_backward_keeps_x_and_routing_only():
    inputs = make_merged_inputs(T, 64, 96, 32, K, routing="distinct", requires_grad=True)
    saved, _ = held_bytes(
        lambda: F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl="grouped"), [inputs.proj]
    )
    assert saved == pytest.approx(inputs.x.nbytes + inputs.experts.nbytes + inputs.weights.nbytes + 4 * N + 4 * 33, rel=0.02)


def test_recorded_forward_without_any_gradient_keeps_nothing():
    inputs = make_mlp_inputs(T, 64, 96, 32, K, routing="distinct")
    assert held_bytes(lambda: mlp_call(inputs), [])[0] == 0


@pytest.mark.parametrize("save_percent", [0, 100])
def test_backward_frees_what_the_forward_saved(save_percent):
    inputs = make_mlp_inputs(T, 64, 96, 32, K, routing="distinct", requires_grad=True)
    leaves = [inputs.x, inputs.weights, inputs.up_proj, inputs.down_proj]

    def call():
        y = mlp_call(inputs, save_percent=save_percent)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    call()
    assert measure(call).kept == sum(leaf.nbytes for leaf in leaves), "the gradients and nothing else"
