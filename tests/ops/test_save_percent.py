"""The memory dial: what is held between forward and backward, eager, compiled and checkpointed, and that gradients stay."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedonemoe import MoE
from fusedonemoe import functional as F
from fusedonemoe.bench.memory import held_bytes
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import MLPInputs, make_merged_inputs, make_mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
CPU = pytest.param("cpu", marks=pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}"))
each_impl = pytest.mark.parametrize("impl", ["grouped", CPU])
PERCENTS = (0, 1, 37, 50, 99, 100)
# What no sum of x and the routing comes to by chance: N = 321 is no multiple of anything here, and 2 F is not D.
T, D, INNER, E, K = 107, 48, 40, 8, 3


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(**options) -> MLPInputs:
    return make_mlp_inputs(T, D, INNER, E, K, **{"routing": "distinct", "requires_grad": True, **options})


def parameters_of(inputs: MLPInputs):
    return [inputs.up_proj, inputs.down_proj, inputs.up_bias, inputs.down_bias]


def leaves_of(inputs: MLPInputs):
    return [t for t in (inputs.x, inputs.weights, *parameters_of(inputs)) if t is not None]


def layer(inputs: MLPInputs, **options):
    """The public function of x, ids, weights and parameters, without options."""

    def call(x, experts, weights, up_proj, down_proj, up_bias, down_bias):
        return F.experts_mlp(x, experts, weights, up_proj, down_proj, gate_up_bias=up_bias, down_bias=down_bias, **options)

    arguments = (inputs.x, inputs.experts, inputs.weights, *parameters_of(inputs))
    return call, arguments


def formula(inputs: MLPInputs, save_percent: int) -> int:
    """x, ids, weights, int32 order and offsets, and the kept rows of the pre-activations."""
    N, G = T * K, inputs.up_proj.shape[1]
    routing = inputs.experts.nbytes + inputs.weights.nbytes + 4 * N + 4 * (E + 1)
    return inputs.x.nbytes + routing + N * save_percent // 100 * G * inputs.x.element_size()


def gradients(y, inputs: MLPInputs, *, again=False):
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).view(y.shape).to(y.dtype)
    found = torch.autograd.grad(y, leaves_of(inputs), dy, retain_graph=again)
    assert all(g.abs().max() > 0 for g in found)
    return found


def assert_close(actual, expected, dtype):
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}[dtype]
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def test_the_meter_counts_a_view_as_all_of_its_storage():
    x = torch.rand(100, requires_grad=True)
    size, y = held_bytes(lambda: (x * 2).exp()[:10] * x[:10], [])
    assert size == 2 * 400 and y.shape == (10,)  # x, and the result of exp, of which the product needs ten values


@each_impl
@pytest.mark.parametrize("save_percent", PERCENTS)
@pytest.mark.parametrize("routing", ["distinct", "one_expert", "out_of_range"])
@pytest.mark.parametrize(
    ("gated", "bias", "dtype"), [(True, False, torch.float32), (True, True, torch.bfloat16), (False, True, torch.float32)]
)
def test_what_is_held_is_the_formula(gated, bias, dtype, routing, save_percent, impl):
    inputs = make(gated=gated, bias=bias, dtype=dtype, routing=routing)
    call, arguments = layer(inputs, gated=gated, save_percent=save_percent, impl=impl)
    size, _ = held_bytes(lambda: call(*arguments), parameters_of(inputs))
    assert size == formula(inputs, save_percent)


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_the_same_for_every_setting(dtype, impl):
    inputs = make(bias=True, dtype=dtype)
    results = []
    for save_percent in PERCENTS:
        call, arguments = layer(inputs, save_percent=save_percent, impl=impl)
        y = call(*arguments)
        results.append([y.detach(), *gradients(y, inputs, again=True)])
        assert all(map(torch.equal, gradients(y, inputs), results[-1][1:])), "a second backward finds what the first found"
    for result in results:
        if impl == "cpu":
            assert all(map(torch.equal, result, results[-1]))
        # Not bit for bit: fewer rows at once may take another path through the grouped product.
        assert_close(result, results[-1], dtype)


COMPILED = [
    ("aot_eager", True, {"bias": True}),
    ("aot_eager", False, {"gated": False, "activation": "gelu"}),
    ("inductor", False, {"activation": "swiglu_oai", "gate_up_layout": "interleaved"}),
]


@each_impl
@pytest.mark.parametrize("save_percent", [0, 37, 100])
@pytest.mark.parametrize(("backend", "dynamic", "options"), COMPILED)
def test_compiled_holds_what_eager_holds(backend, dynamic, options, save_percent, impl):
    # The partitioner is free to keep any value of the forward that the backward names: gathered rows, or all of z.
    gated, bias = options.get("gated", True), options.get("bias", False)
    inputs = make(gated=gated, bias=bias)
    form = {name: value for name, value in options.items() if name != "bias"}
    call, arguments = layer(inputs, **form, save_percent=save_percent, impl=impl)
    size, y = held_bytes(lambda: call(*arguments), parameters_of(inputs))
    fast = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)
    fast_size, fast_y = held_bytes(lambda: fast(*arguments), parameters_of(inputs))
    assert size == formula(inputs, save_percent)
    assert 0.9 * size < fast_size <= 1.005 * size + (8 * T * K if bias and save_percent == 100 else 0)
    assert_close([fast_y, *gradients(fast_y, inputs)], [y, *gradients(y, inputs)], torch.float32)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_compiled_merged_projection_holds_no_gathered_rows(backend):
    inputs = make_merged_inputs(T, D, INNER, E, K, routing="distinct", requires_grad=True)

    def call():
        return F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl="grouped")

    size, y = held_bytes(call, [inputs.proj])
    fast_size, fast_y = held_bytes(torch.compile(call, fullgraph=True, backend=backend), [inputs.proj])
    assert 0.9 * size < fast_size <= 1.005 * size
    leaves = [inputs.x, inputs.weights, inputs.proj]
    ours, plain = (torch.autograd.grad(result, leaves, torch.ones_like(result)) for result in (fast_y, y))
    assert_close(ours, plain, torch.float32)


@each_impl
def test_a_compiled_block_holds_less_by_exactly_the_rows_not_kept(impl):
    sizes = {}
    for save_percent in (0, 37, 100):
        torch.manual_seed(0)
        block = MoE(hidden_size=D, intermediate_size=INNER, num_experts=E, top_k=K, save_percent=save_percent, impl=impl)
        x = torch.randn(T, D, requires_grad=True)
        fast = torch.compile(block, fullgraph=True, backend="aot_eager")
        sizes[save_percent], _ = held_bytes(functools.partial(fast, x), list(block.parameters()))
    row = 2 * INNER * 4
    assert sizes[37] - sizes[0] == T * K * 37 // 100 * row
    assert sizes[100] - sizes[0] == T * K * row


@each_impl
@pytest.mark.parametrize("save_percent", [0, 37, 100])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_holds_the_arguments_and_gives_the_same_bits(use_reentrant, save_percent, impl):
    inputs = make(bias=True)
    call, arguments = layer(inputs, save_percent=save_percent, impl=impl)
    size, y = held_bytes(lambda: checkpoint(call, *arguments, use_reentrant=use_reentrant), parameters_of(inputs))
    assert size <= inputs.x.nbytes + inputs.experts.nbytes + inputs.weights.nbytes
    leaves = leaves_of(inputs)
    found = []
    for result in (y, call(*arguments)):
        for leaf in leaves:
            leaf.grad = None
        result.square().sum().backward()  # as reentrant checkpointing wants it
        found.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *found)) and all(g.abs().max() > 0 for g in found[0])


@each_impl
@pytest.mark.parametrize("save_percent", [0, 37])
def test_a_checkpoint_inside_a_compiled_graph(save_percent, impl):
    inputs = make()
    call, arguments = layer(inputs, save_percent=save_percent, impl=impl)
    fast = torch.compile(lambda *a: checkpoint(call, *a, use_reentrant=False), fullgraph=True, backend="aot_eager")
    size, y = held_bytes(lambda: fast(*arguments), parameters_of(inputs))
    assert size <= formula(inputs, 0)
    plain = call(*arguments)
    assert_close([y, *gradients(y, inputs)], [plain, *gradients(plain, inputs)], torch.float32)
