"""What only a GPU can show: CUDA graphs, offsets past 2^31, the sanitizer, equal bits, and the choice that auto makes."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from fusedonemoe import MoE, explain
from fusedonemoe import functional as F
from fusedonemoe.testing import make_merged_inputs, make_mlp_inputs

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 256, "intermediate_size": 128, "num_experts": 16, "top_k": 4}


def block_and_input(T, *, dtype=torch.bfloat16, **fields):
    torch.manual_seed(0)
    block = MoE(**SIZES, **fields).to("cuda", dtype)
    return block, torch.randn(T, SIZES["hidden_size"], device="cuda", dtype=dtype)


def test_auto_takes_the_kernels():
    block, x = block_and_input(8)
    told = explain(block, x)
    assert told.impl == "triton" and told.configuration.startswith("sm")


def captured(call):
    """A CUDA graph of ``call``, warmed up on a stream of its own as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@pytest.mark.parametrize("T", [1, 7, 500])
def test_a_captured_forward_follows_the_routing(T):
    block, x = block_and_input(T)
    with torch.no_grad():
        graph, y = captured(lambda: block(x))
        for seed in range(4):
            x.copy_(torch.randn(T, SIZES["hidden_size"], generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(y, block(x))


@pytest.mark.parametrize("save_percent", [0, 100])
def test_a_captured_training_step_follows_the_routing(save_percent):
    block, x = block_and_input(300, save_percent=save_percent)
    x.requires_grad_()
    dy = torch.randn_like(x)
    leaves = [x, *block.parameters()]

    def step():
        return torch.autograd.grad(block(x), leaves, dy)

    graph, gradients = captured(step)
    for seed in range(4):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            if seed == 3:  # every token on the same experts: most experts empty, the others full
                x.copy_(x[:1].expand_as(x))
        graph.replay()
        assert all(map(torch.equal, gradients, step()))


def test_no_call_waits_for_the_device():
    block, x = block_and_input(300)
    x.requires_grad_()
    block(x).sum().backward()  # compiles the kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x).sum().backward()
        with torch.no_grad():
            block(x[:1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_equal_bits_in_twenty_calls():
    block, x = block_and_input(1000)
    leaves = [x.requires_grad_(), *block.parameters()]
    dy = torch.randn_like(x)
    first = torch.autograd.grad(block(x), leaves, dy)
    for _ in range(20):
        assert all(map(torch.equal, torch.autograd.grad(block(x), leaves, dy), first))


def memory_for(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free device memory")


def test_weights_past_two_to_the_31_elements():
    # The last experts begin past element 2^31 of the up-projection, and past 2^32 bytes of the down-projection.
    memory_for(30)
    E, D, F_ = 260, 4096, 1024
    up = torch.zeros(E, 2 * F_, D, device="cuda", dtype=torch.bfloat16)
    down = torch.zeros(E, D, F_, device="cuda", dtype=torch.bfloat16)
    small = make_mlp_inputs(64, D, F_, 1, 1, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    up[-1], down[-1] = small.up_proj.detach()[0], small.down_proj.detach()[0]
    assert (E - 1) * 2 * F_ * D > 2**31
    up.requires_grad_()
    y = F.experts_mlp(small.x, torch.full_like(small.experts, E - 1), small.weights, up, down, impl="triton")
    expected = F.experts_mlp(small.x, small.experts, small.weights, small.up_proj, small.down_proj, impl="triton")
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    dx, dup = torch.autograd.grad(y, [small.x, up], dy)
    expected_dx, expected_dup = torch.autograd.grad(expected, [small.x, small.up_proj], dy)
    assert torch.equal(dx, expected_dx) and torch.equal(dup[-1], expected_dup[0])
    assert not dup[:-1].any()


def test_rows_past_two_to_the_31_elements():
    memory_for(60)
    T, K, D, F_, E = 140_000, 8, 2048, 64, 4  # N * D = 2.3e9
    inputs = make_mlp_inputs(1000, D, F_, E, K, dtype=torch.bfloat16, device="cuda")
    assert T * K * D > 2**31
    x, experts, weights = (t.repeat(T // 1000, 1) for t in (inputs.x, inputs.experts, inputs.weights))
    with torch.no_grad():
        y = F.experts_mlp(x, experts, weights, inputs.up_proj, inputs.down_proj, impl="triton").view(T // 1000, 1000, D)
        assert torch.equal(y[0], y[-1])
        once = F.experts_mlp(inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj, impl="dense")
        torch.testing.assert_close(y[-1], once, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("T", [1, 100])
def test_compiled_equals_eager(T):
    block, x = block_and_input(T, dtype=torch.float32)
    x.requires_grad_()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    leaves, dy = [x, *block.parameters()], torch.randn_like(x)
    ours = [compiled(x), *torch.autograd.grad(compiled(x), leaves, dy)]
    for a, b in zip(ours, [block(x), *torch.autograd.grad(block(x), leaves, dy)], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


SANITIZED = """
import torch
from fusedonemoe import functional as F
from fusedonemoe.testing import make_mlp_inputs
for T, D, F_, E, K in ((37, 72, 40, 5, 3), (1, 64, 32, 8, 2)):
    kind = {"dtype": torch.bfloat16, "device": "cuda", "bias": True, "routing": "out_of_range", "requires_grad": True}
    i = make_mlp_inputs(T, D, F_, E, K, **kind)
    tensors, biases = (i.x, i.experts, i.weights, i.up_proj, i.down_proj), {"gate_up_bias": i.up_bias, "down_bias": i.down_bias}
    F.experts_mlp(*tensors, **biases, impl="triton").sum().backward()
    with torch.no_grad():
        F.experts_mlp(*tensors, **biases, impl="triton")
    weights, experts = F.route(torch.randn(T, E, device="cuda"), K)
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_the_merged_projection_in_a_graph():
    inputs = make_merged_inputs(50, 64, 96, 8, 2, device="cuda")
    graph, h = captured(lambda: F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl="triton"))
    inputs.experts.copy_(inputs.experts.roll(1, 0))
    graph.replay()
    assert torch.equal(h, F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl="triton"))
