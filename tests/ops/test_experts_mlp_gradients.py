"""Derivatives of the MLP experts: finite differences, higher orders, torch.func, frozen tensors, what is saved."""

import dataclasses
import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import grouped, library, reference
from fusedonemoe.testing import make_mlp_inputs

IMPLS = ("dense", "grouped")
every_impl = pytest.mark.parametrize("impl", IMPLS)
TENSORS = ("x", "weights", "up_proj", "down_proj", "up_bias", "down_bias")
ACT = ("silu", "gate_up", 1.702, 7.0)
FORMS = [
    *((name, True, "interleaved") for name in reference.GATED_ACTIVATIONS),
    ("silu", True, "gate_up"),
    ("silu", True, "up_gate"),
    *((name, False, "gate_up") for name in reference.ACTIVATIONS),
]


def call(inputs, *leaves, **options):
    """The public function with ``leaves`` in place of the leading ones of ``TENSORS``."""
    inputs = dataclasses.replace(inputs, **dict(zip(TENSORS, leaves, strict=False)))
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
    return F.experts_mlp(*arguments, gate_up_bias=inputs.up_bias, down_bias=inputs.down_bias, **options)


def leaves_of(inputs):
    return tuple(getattr(inputs, name) for name in TENSORS if getattr(inputs, name) is not None)


def make(T=3, D=4, F_=3, E=3, K=2, **options):
    options = {"dtype": torch.float64, "bias": True, "requires_grad": True, "routing": "out_of_range", **options}
    return make_mlp_inputs(T, D, F_, E, K, **options)


def random_like(tensor):
    return torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(tensor.dtype)


@pytest.mark.parametrize(("activation", "gated", "layout"), FORMS)
@pytest.mark.parametrize("bias", [True, False])
@every_impl
def test_gradcheck(activation, gated, layout, bias, impl):
    inputs = make(gated=gated, bias=bias)
    form = {"activation": activation, "gated": gated, "gate_up_layout": layout, "swiglu_limit": 0.8, "save_percent": 30}
    assert gradcheck(lambda *leaves: call(inputs, *leaves, **form, impl=impl), leaves_of(inputs), fast_mode=True)


@every_impl
def test_gradcheck_of_every_element(impl):
    inputs = make()
    assert gradcheck(lambda *leaves: call(inputs, *leaves, impl=impl), leaves_of(inputs))


@every_impl
def test_gradcheck_through_the_routing(impl):
    inputs, logits = (
        make(K=2),
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(),
    )

    def block(x, logits):
        weights, experts = F.route(logits, 2, norm_topk_prob=False, impl="dense" if impl == "dense" else "auto")
        return call(dataclasses.replace(inputs, experts=experts), x, weights, impl=impl)

    assert gradcheck(block, (inputs.x, logits))
    if impl == "dense":
        assert gradgradcheck(block, (inputs.x, logits))


@pytest.mark.parametrize(("activation", "gated", "layout"), FORMS)
def test_dense_has_second_derivatives(activation, gated, layout):
    inputs = make(gated=gated)
    form = {"activation": activation, "gated": gated, "gate_up_layout": layout, "swiglu_limit": 0.8}
    assert gradgradcheck(lambda *leaves: call(inputs, *leaves, **form, impl="dense"), leaves_of(inputs), fast_mode=True)


@pytest.mark.parametrize("save_percent", [0, 100])
def test_grouped_refuses_a_second_derivative(save_percent):
    inputs = make()
    y = call(inputs, impl="grouped", save_percent=save_percent)
    grads = torch.autograd.grad(y.square().sum(), leaves_of(inputs), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="first derivatives only; impl='dense' has derivatives of every order"):
            grad.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_grouped_refuses_forward_mode_rather_than_dropping_the_tangent(requires_grad):
    inputs = make(requires_grad=requires_grad)
    with pytest.raises(RuntimeError, match=r"forward-mode derivatives and torch\.func need impl='dense'"):
        torch.func.jvp(lambda x: call(inputs, x, impl="grouped"), (inputs.x.detach(),), (torch.ones_like(inputs.x),))


def test_grouped_refuses_a_transformed_gradient():
    inputs = make(requires_grad=False)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: call(inputs, x, impl="grouped").sum())(inputs.x)


@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu", False), ("swiglu_oai", True)])
def test_dense_under_torch_func(activation, gated):
    inputs = make(gated=gated, requires_grad=False)

    def y(*leaves):
        return call(inputs, *leaves, activation=activation, gated=gated, swiglu_limit=0.8, impl="dense")

    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves_of(inputs))
    positions = tuple(range(len(leaves)))
    expected = torch.autograd.grad(y(*leaves).square().sum(), leaves)
    for actual, exact in zip(
        torch.func.grad(lambda *v: y(*v).square().sum(), positions)(*leaves_of(inputs)), expected, strict=True
    ):
        assert_close(actual, exact)
    backward, forward = (f(y, positions)(*leaves_of(inputs)) for f in (torch.func.jacrev, torch.func.jacfwd))
    for row, column in zip(backward, forward, strict=True):
        assert_close(row, column)
    batch = torch.stack((inputs.x, -inputs.x, 2 * inputs.x))
    assert_close(torch.func.vmap(y)(batch), torch.stack([y(x) for x in batch]))
    per_sample = torch.func.vmap(torch.func.grad(lambda x: y(x).square().sum()))(batch)
    assert_close(per_sample[0], expected[0])


@pytest.mark.parametrize("wanted", [*itertools.combinations(TENSORS, 1), *itertools.combinations(TENSORS, 5), ("up_proj", "x")])
@every_impl
def test_frozen_tensors_get_none_and_the_others_their_gradient(wanted, impl):
    inputs = make(T=6)
    expected = dict(zip(TENSORS, torch.autograd.grad(call(inputs, impl="dense").square().sum(), leaves_of(inputs)), strict=True))
    for save_percent in (100, 40):
        leaves = {name: getattr(inputs, name).detach().clone().requires_grad_(name in wanted) for name in TENSORS}
        call(dataclasses.replace(inputs, **leaves), impl=impl, save_percent=save_percent).square().sum().backward()
        for name, leaf in leaves.items():
            if name in wanted:
                assert_close(leaf.grad, expected[name])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=6)][::5])
def test_the_backward_operator_returns_nothing_for_what_is_not_needed(needs):
    inputs = make(T=6, requires_grad=False)
    arguments = (inputs.x, inputs.experts, *leaves_of(inputs)[1:])
    dy = random_like(inputs.x)
    _, z, order, offsets = torch.ops.fusedonemoe.experts_mlp(*arguments, *ACT, 100, library.BUILD)
    backward = torch.ops.fusedonemoe.experts_mlp_backward
    everything = backward(dy, z, order, offsets, *arguments, *ACT, 100, [True] * 6, library.BUILD)
    some = backward(dy, z, order, offsets, *arguments, *ACT, 100, needs, library.BUILD)
    for needed, grad, full in zip(needs, some, everything, strict=True):
        assert torch.equal(grad, full) if needed else grad.numel() == 0


@pytest.mark.parametrize(
    ("frozen", "outer", "mm"), [((), 4, 4), (("up_proj", "down_proj", "up_bias", "down_bias"), 0, 4), (("x",), 4, 3)]
)
def test_frozen_tensors_cost_no_products(frozen, outer, mm, monkeypatch):
    calls = {"grouped_mm": 0, "grouped_outer": 0}
    for name in calls:
        real = getattr(grouped, name)

        def counted(*arguments, real=real, name=name):
            calls[name] += 1
            return real(*arguments)

        monkeypatch.setattr(grouped, name, counted)
    inputs = make(T=6)
    leaves = {name: getattr(inputs, name).detach() for name in frozen}
    call(dataclasses.replace(inputs, **leaves), impl="grouped").square().sum().backward()
    assert (calls["grouped_outer"], calls["grouped_mm"]) == (outer, mm)


@pytest.mark.parametrize(("activation", "gated", "layout"), FORMS)
def test_save_percent_changes_no_gradient(activation, gated, layout):
    inputs = make(T=50, D=6, F_=5, E=4, K=3, gated=gated)
    form = {"activation": activation, "gated": gated, "gate_up_layout": layout, "swiglu_limit": 0.8, "impl": "grouped"}
    dy = random_like(inputs.x)
    full = call(inputs, **form)
    expected = torch.autograd.grad(full, leaves_of(inputs), dy)
    for save_percent in (0, 1, 37, 99):
        y = call(inputs, **form, save_percent=save_percent)
        assert torch.equal(y, full)
        for actual, exact in zip(torch.autograd.grad(y, leaves_of(inputs), dy), expected, strict=True):
            assert_close(actual, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("save_percent", [0, 1, 37, 99, 100])
def test_save_percent_is_the_share_of_rows_kept(save_percent):
    inputs = make(T=50, K=3)
    arguments = (inputs.x, inputs.experts, *leaves_of(inputs)[1:], *ACT, save_percent, library.BUILD)
    assert torch.ops.fusedonemoe.experts_mlp(*arguments)[1].shape == (150 * save_percent // 100, 6)


def test_only_the_output_is_differentiable():
    inputs = make()
    arguments = (inputs.x, inputs.experts, *leaves_of(inputs)[1:], *ACT, 100, library.BUILD)
    assert [tensor.requires_grad for tensor in torch.ops.fusedonemoe.experts_mlp(*arguments)] == [True, False, False, False]


def test_a_second_pass_over_one_graph_gives_the_same_bits():
    inputs = make(T=20)
    y = call(inputs, impl="grouped", save_percent=50)
    dy = random_like(y)
    first, second = (torch.autograd.grad(y, leaves_of(inputs), dy, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@every_impl
def test_without_gradients_the_values_have_the_same_bits(impl):
    inputs = make(T=20)
    y = call(inputs, impl=impl)
    with torch.no_grad():
        assert torch.equal(call(inputs, impl=impl), y)
    with torch.inference_mode():
        assert torch.equal(call(inputs, impl=impl), y)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("op", ["experts_mlp", "experts_mlp_dense"])
def test_opcheck(op, requires_grad):
    inputs = make(T=4, dtype=torch.float32, requires_grad=requires_grad)
    kept = [37] if op == "experts_mlp" else []
    arguments = (inputs.x, inputs.experts, *leaves_of(inputs)[1:], *ACT, *kept, library.BUILD)
    # The last and slowest of opcheck's four tests traces the backward, so one run of it is enough.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")[
        : 4 if requires_grad else 3
    ]
    torch.library.opcheck(getattr(torch.ops.fusedonemoe, op).default, arguments, test_utils=tests)


@pytest.mark.parametrize(("needs", "save_percent"), [([True] * 6, 37), ([True, False, False, True, False, False], 100)])
def test_opcheck_backward(needs, save_percent):
    inputs = make(T=4, dtype=torch.float32, requires_grad=False)
    arguments = (inputs.x, inputs.experts, *leaves_of(inputs)[1:])
    _, *saved = torch.ops.fusedonemoe.experts_mlp(*arguments, *ACT, save_percent, library.BUILD)
    op = torch.ops.fusedonemoe.experts_mlp_backward.default
    torch.library.opcheck(op, (random_like(inputs.x), *saved, *arguments, *ACT, save_percent, needs, library.BUILD))
