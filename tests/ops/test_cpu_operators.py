"""The compiled CPU kernels as torch operators: registration, compilation, export, autocast, and the memory they return."""

import copy
import gc
import io
import mmap
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.ops import library
from fusedonemoe.ops.cpu import build, native
from fusedonemoe.testing import MLPInputs, make_merged_inputs, make_mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")

ACT = ("silu", "gate_up", 1.702, 7.0)
MAKERS = pytest.mark.parametrize("make", [make_mlp_inputs, make_merged_inputs])
_ops = torch.ops.fusedonemoe


def tensors_of(inputs):
    return tuple(vars(inputs).values())


def run(inputs, impl="cpu"):
    """The public function on a set of inputs."""
    if not isinstance(inputs, MLPInputs):
        return F.experts_merged(*tensors_of(inputs), impl=impl)
    *arguments, up_bias, down_bias = tensors_of(inputs)
    return F.experts_mlp(*arguments, gate_up_bias=up_bias, down_bias=down_bias, impl=impl)


def leaves_of(inputs):
    return [tensor for tensor in tensors_of(inputs) if tensor is not None and tensor.requires_grad]


def random_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)).to(tensor.dtype)


# Registration. An operator's z has rows of no expert at its end, which nobody writes: hence ids in range.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_mlp(dtype, bias):
    arguments = tensors_of(make_mlp_inputs(6, 9, 7, 3, 2, dtype=dtype, bias=bias))
    for save_percent in (0, 37, 100):
        torch.library.opcheck(_ops.experts_mlp_cpu.default, (*arguments, *ACT, save_percent))
        y, *saved = _ops.experts_mlp_cpu(*arguments, *ACT, save_percent)
        for needs in ([True] * 6, [True, False, False, True, False, False]):
            torch.library.opcheck(_ops.experts_mlp_cpu_backward.default, (random_like(y), *saved, *arguments, *ACT, needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_merged(dtype):
    arguments = tensors_of(make_merged_inputs(6, 9, 7, 3, 2, dtype=dtype))
    torch.library.opcheck(_ops.experts_merged_cpu.default, arguments)
    h, *saved = _ops.experts_merged_cpu(*arguments)
    for needs in ([True, True, True], [False, True, False], [True, False, True]):
        torch.library.opcheck(_ops.experts_merged_cpu_backward.default, (random_like(h), *saved, *arguments, needs))


@pytest.mark.parametrize("requires_grad", [True, False])
@MAKERS
def test_opcheck_of_the_operators_above(make, requires_grad):
    arguments = tensors_of(make(6, 9, 7, 3, 2, requires_grad=requires_grad))
    name, rest = ("experts_mlp", (*ACT, 37)) if make is make_mlp_inputs else ("experts_merged", ())
    torch.library.opcheck(getattr(_ops, name).default, (*arguments, *rest, library.BUILD, "cpu"))


def test_a_gradient_that_is_not_needed_is_empty_and_no_two_share_memory():
    arguments = tensors_of(make_mlp_inputs(6, 9, 7, 3, 2, bias=True))
    y, *saved = _ops.experts_mlp_cpu(*arguments, *ACT, 100)
    grads = _ops.experts_mlp_cpu_backward(y, *saved, *arguments, *ACT, [False] * 6)
    assert [grad.numel() for grad in grads] == [0] * 6
    grads = _ops.experts_mlp_cpu_backward(y, *saved, *arguments, *ACT, [True] * 6)
    assert len({grad.data_ptr() for grad in grads}) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@MAKERS
def test_nothing_is_read_before_it_is_written(make, dtype, monkeypatch):
    inputs = make(21, 9, 7, 4, 2, dtype=dtype, routing="out_of_range", requires_grad=True)

    def results():
        y = run(inputs)
        return [y, *torch.autograd.grad(y, leaves_of(inputs), random_like(y))]

    expected = results()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# Compilation and export


@pytest.mark.parametrize("impl", ["cpu", "auto"])
@pytest.mark.parametrize("training", [True, False])
@MAKERS
def test_compiled_for_several_numbers_of_tokens_the_bits_are_the_same(make, training, impl):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for T in (5, 33, 16, 2):
        inputs = make(T, 9, 7, 3, 2, requires_grad=training, routing="out_of_range")
        y, expected = compiled(inputs, impl), run(inputs)
        assert torch.equal(y, expected)
        if training:
            grads = (torch.autograd.grad(v, leaves_of(inputs), random_like(expected)) for v in (y, expected))
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(graphs) <= 2  # the second is for any number of tokens


@MAKERS
def test_what_is_exported_runs_on_any_machine(make):
    class Layer(torch.nn.Module):
        def forward(self, inputs):
            return run(make_inputs(*inputs), impl="auto")

    inputs = make(6, 9, 7, 3, 2)
    make_inputs = type(inputs)
    with torch.no_grad():
        program = torch.export.export(Layer(), (tensors_of(inputs),))
    for graph in (program, program.run_decompositions({})):
        text = str(graph.graph)
        assert "fusedonemoe" in text and "_cpu" not in text and "'cpu'" not in text.replace("device(type='cpu')", "")
        assert torch.equal(graph.module()(tensors_of(inputs)), run(inputs, impl="grouped"))


@MAKERS
def test_autocast_runs_the_kernels_in_bfloat16(make):
    inputs = make(8, 9, 7, 4, 2, requires_grad=True)
    floats = {
        name: tensor.bfloat16()
        for name, tensor in vars(inputs).items()
        if name not in ("experts", "weights") and tensor is not None
    }
    expected = run(replace(inputs, **floats))
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        y = run(inputs, impl="auto")
    assert any(event.key.endswith("_cpu") and "experts_m" in event.key for event in profile.key_averages())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    for actual, exact in zip(*(torch.autograd.grad(v, leaves_of(inputs), random_like(y)) for v in (y, expected)), strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, exact)


@pytest.mark.parametrize("impl", ["cpu", "auto"])
@MAKERS
def test_a_second_derivative_is_refused(make, impl):
    inputs = make(4, 9, 7, 3, 2, requires_grad=True)
    for grad in torch.autograd.grad(run(inputs, impl).square().sum(), leaves_of(inputs), create_graph=True):
        with pytest.raises(RuntimeError, match=r"first derivatives only; impl='dense' has derivatives of every order"):
            grad.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"forward-mode derivatives and torch\.func need impl='dense'"):
        torch.func.jvp(lambda x: run(replace(inputs, x=x), impl), (inputs.x.detach(),), (torch.ones_like(inputs.x),))


@MAKERS
def test_a_second_pass_over_one_graph_gives_the_same_bits(make):
    inputs = make(20, 9, 7, 3, 2, requires_grad=True)
    y = run(inputs)
    first, second = (torch.autograd.grad(y, leaves_of(inputs), random_like(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Memory


@pytest.fixture
def pooled(monkeypatch, small_thresholds):
    """Takes every output from the pool, which is empty at the start."""
    monkeypatch.setattr(native, "POOLED_BYTES", 1)
    gc.collect()
    build.load().fusedonemoe_trim()


def new(*shape, dtype=torch.float32):
    """A tensor of the pool that holds 0, 1, 2, ..."""
    tensor = native.new(shape, dtype)
    return tensor.copy_(torch.arange(tensor.numel()).view(shape) % 251)


def counting(*shape, dtype=torch.float32):
    return (torch.arange(torch.Size(shape).numel()).view(shape) % 251).to(dtype)


def test_memory_comes_back_when_the_tensor_dies(pooled):
    tensor = new(300, 1000)
    at = tensor.data_ptr()
    assert new(300, 1000).data_ptr() != at
    view = tensor[5:].t()
    del tensor
    assert new(300, 1000).data_ptr() != at
    assert torch.equal(view, counting(300, 1000)[5:].t())
    del view
    again = [new(300, 1000) for _ in range(2)]
    assert at in [tensor.data_ptr() for tensor in again]


def test_a_loop_gets_the_same_memory_every_time(pooled):
    assert len({new(1000, 600).data_ptr() for _ in range(50)}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_lies_idle_than_was_in_use_at_once(pooled):
    def mapped_mib():
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE >> 20

    before = mapped_mib()
    for mib in (8, 32, 128, 512):  # none is good for the next, and never touched they cost nothing
        tensor = native.new((mib << 20,), torch.uint8)
        assert mapped_mib() - before >= mib
        del tensor
    assert mapped_mib() - before < 600
    build.load().fusedonemoe_trim()
    assert mapped_mib() - before < 100


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_tensors_may_die_in_any_order(pooled, order):
    sizes = (700, 100, 1300, 701)
    for _ in range(3):
        tensors: list[torch.Tensor | None] = [new(size, 500) for size in sizes]
        for i in order:
            assert torch.equal(tensors[i], counting(sizes[i], 500))
            tensors[i] = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pooled_tensor_is_a_tensor_like_any_other(pooled, dtype):
    exact = counting(300, 1000, dtype=dtype)
    tensor = new(300, 1000, dtype=dtype)
    assert tensor.is_contiguous() and tensor.dtype == dtype and tensor.data_ptr() % 64 == 0
    copies = [tensor.clone(), copy.deepcopy(tensor), tensor.detach(), tensor.numpy() if dtype == torch.float32 else tensor]
    file = io.BytesIO()
    torch.save(tensor, file)
    copies.append(torch.load(io.BytesIO(file.getvalue())))
    assert len(file.getvalue()) < tensor.nbytes + 4096
    other = torch.empty(0, dtype=dtype)
    other.set_(tensor.untyped_storage(), 0, tensor.shape, tensor.stride())
    del tensor
    gc.collect()
    new(300, 1000, dtype=dtype).zero_()
    for each in (*copies, other):
        assert torch.equal(torch.as_tensor(each), exact)
    other += 1
    assert torch.equal(other, exact + 1)
    other.resize_(10, 10)
    assert torch.equal(other, (exact + 1).view(-1)[:100].view(10, 10))
    other.set_(torch.zeros(7, dtype=dtype).untyped_storage())
    assert torch.equal(other, torch.zeros(7, dtype=dtype))
    shared = new(300, 1000, dtype=dtype).share_memory_()
    assert shared.is_shared() and torch.equal(shared, exact)


@MAKERS
def test_outputs_and_gradients_of_the_pool_can_be_written_to(pooled, make):
    inputs = make(20, 9, 7, 3, 2, requires_grad=True)
    y = run(inputs)
    expected = [grad.clone() for grad in torch.autograd.grad(2 * y, leaves_of(inputs), random_like(y), retain_graph=True)]
    y *= 2
    y.backward(random_like(y))
    for leaf, exact in zip(leaves_of(inputs), expected, strict=True):
        assert torch.equal(leaf.grad, exact)
        leaf.grad.zero_()
    with torch.inference_mode():
        h = run(inputs)
        assert torch.equal(h.add_(h), y)


def test_the_parameters_of_an_optimizer_survive_their_pooled_gradients(pooled):
    inputs = make_mlp_inputs(20, 9, 7, 3, 2, requires_grad=True)
    mine, theirs = (copy.deepcopy(inputs) for _ in range(2))
    for each, impl in ((mine, "cpu"), (theirs, "grouped")):
        optimizer = torch.optim.AdamW(leaves_of(each), lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            run(each, impl).square().mean().backward()
            optimizer.step()
    for a, b in zip(leaves_of(mine), leaves_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@MAKERS
def test_threads_may_call_at_the_same_time(pooled, make):
    cases = [make(20 + 5 * i, 33, 65, 5, 2, seed=i, requires_grad=True) for i in range(4)]

    def results(inputs):
        y = run(inputs)
        return [y.detach(), *torch.autograd.grad(y, leaves_of(inputs), random_like(y))]

    expected = [[tensor.clone() for tensor in results(inputs)] for inputs in cases]

    def right(i):
        return all(torch.equal(a, b) for _ in range(20) for a, b in zip(results(cases[i]), expected[i], strict=True))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, range(4)))


FORKING = """
    import ctypes, os, sys, torch
    from fusedonemoe import functional as F
    from fusedonemoe.ops.cpu import build
    from fusedonemoe.testing import make_merged_inputs

    build.load()
    for name, kind in (("fusedonemoe_products_per_thread", ctypes.c_double), ("fusedonemoe_pooled_from", ctypes.c_int64)):
        kind.in_dll(build.library, name).value = 1
    torch.set_num_threads(2)
    inputs = make_merged_inputs(50, 33, 65, 4, 2)
    expected = F.experts_merged(*vars(inputs).values(), impl="cpu")
    child = os.fork()
    if child == 0:
        del expected  # back to the pool, in the child
        if "call" in sys.argv:
            torch.set_num_threads(1)  # as a worker of a DataLoader does
            F.experts_merged(*vars(inputs).values(), impl="cpu")
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert torch.equal(F.experts_merged(*vars(inputs).values(), impl="cpu"), expected)
"""


@pytest.mark.parametrize("what", ["idle", "call"])
def test_a_forked_worker_exits_in_peace(what):
    subprocess.run([sys.executable, "-c", textwrap.dedent(FORKING), what], check=True, timeout=120)
