"""The merged up-projection, every implementation: oracle, plain PyTorch, derivatives, edges, refusals."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import grouped, library, reference
from fusedonemoe.testing import ROUTINGS, assert_within_budget, exact_float64, make_merged_inputs
from tests.strategies import merged_inputs

IMPLS = ("dense", "grouped", "portable")
every_impl = pytest.mark.parametrize("impl", IMPLS)
TENSORS = ("x", "weights", "proj")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = [
    (0, 6, 4, 3, 2),
    (1, 6, 4, 3, 2),
    (9, 6, 4, 3, 1),
    (9, 6, 4, 3, 3),
    (9, 6, 4, 2, 4),
    (9, 6, 4, 1, 1),
    (11, 100, 37, 5, 3),
]
SHAPES += [(5, 1, 1, 3, 2), (4, 6, 4, 50, 2), (450, 3, 2, 2, 1)]


def run(inputs, *leaves, impl):
    """The public function, with ``leaves`` in place of the leading ones of ``TENSORS``."""
    inputs = dataclasses.replace(inputs, **dict(zip(TENSORS, leaves, strict=False)))
    return F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl=impl)


def make(*shape, **options):
    return make_merged_inputs(*shape, **{"dtype": torch.float64, "requires_grad": True, **options})


def leaves_of(inputs):
    return tuple(getattr(inputs, name) for name in TENSORS)


def random_like(tensor, seed=99):
    return torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


def gradients(inputs, impl):
    """The output and the gradient of every tensor."""
    leaves = [getattr(inputs, name).detach().requires_grad_() for name in TENSORS]
    h = run(inputs, *leaves, impl=impl)
    return h, *torch.autograd.grad(h, leaves, random_like(h))


def assert_equals_oracle(inputs, impl):
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()}
    h, *grads = gradients(inputs, impl)
    assert_close(h, torch.from_numpy(reference.experts_merged(**arrays)), **EXACT)
    exact = reference.experts_merged_backward(exact_float64(random_like(h)), **arrays)
    for name, grad in zip(TENSORS, grads, strict=True):
        assert_close(grad, torch.from_numpy(getattr(exact, name)), **EXACT, msg=f"gradient of {name}: ".__add__)


# Values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("routing", ["uniform", "one_expert", "some_empty", "out_of_range"])
@every_impl
def test_every_shape_equals_the_oracle(shape, routing, impl):
    assert_equals_oracle(make(*shape, routing=routing), impl)


@given(merged_inputs(dtype=torch.float64, requires_grad=True), st.sampled_from(IMPLS))
@settings(max_examples=150)
def test_any_inputs_equal_the_oracle(inputs, impl):
    assert_equals_oracle(inputs, impl)


def plain_merged(inputs):
    """One expert after the other, a matmul each, every step rounded to the dtype of x."""
    h = inputs.x.new_zeros(len(inputs.x), inputs.proj.shape[2])
    for e, proj in enumerate(inputs.proj):
        token, choice = (inputs.experts == e).nonzero(as_tuple=True)
        mixed = (inputs.x[token] @ proj) * inputs.weights[token, choice, None]
        h = h.index_add(0, token, mixed.to(h.dtype))
    return h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_low_precision_is_as_good_as_plain_pytorch(dtype, weights_dtype, routing):
    inputs = make(40, 24, 17, 6, 3, dtype=dtype, weights_dtype=weights_dtype, routing=routing)
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()}
    plain = plain_merged(inputs)
    dh = random_like(plain)
    plain_grads = torch.autograd.grad(plain, leaves_of(inputs), dh)
    exact_grads = reference.experts_merged_backward(exact_float64(dh), **arrays)
    for impl in IMPLS:
        h, *grads = gradients(inputs, impl)
        assert_within_budget(h, plain, reference.experts_merged(**arrays), factor=4, name=f"{impl} h")
        for name, grad, plain_grad in zip(TENSORS, grads, plain_grads, strict=True):
            assert_within_budget(grad, plain_grad, getattr(exact_grads, name), factor=4, name=f"{impl} d{name}")


# Expert ids


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("E", [4, 130, 300])
@every_impl
def test_any_integer_dtype_of_ids(dtype, E, impl):
    top = torch.iinfo(dtype).max
    experts = torch.tensor([[0, 3, top], [top, top - 1, 1], [2, 2, 0], [-1 if dtype.is_signed else 200, E % 100, 3]])
    assert_equals_oracle(dataclasses.replace(make(4, 5, 3, E, 3), experts=experts.to(dtype)), impl)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_impl
def test_a_weight_standing_at_an_id_out_of_range_is_never_read(value, impl):
    inputs = make(8, 5, 3, 4, 3, routing="out_of_range", requires_grad=False)
    outside = (inputs.experts < 0) | (inputs.experts >= 4)
    inputs = dataclasses.replace(inputs, weights=torch.where(outside, value, inputs.weights))
    assert_equals_oracle(inputs, impl)
    h, dx, dweights, _ = gradients(inputs, impl)
    assert (h[-1] == 0).all() and (dx[-1] == 0).all() and (dweights[outside] == 0).all() and (dweights[~outside] != 0).all()


@every_impl
def test_no_id_in_range_gives_zeros(impl):
    inputs = dataclasses.replace(make(2, 5, 3, 4, 2), experts=torch.tensor([[-1, 4], [-(2**40), 2**40]]))
    weights = torch.full((2, 2), torch.nan, dtype=torch.float64)
    for tensor in gradients(dataclasses.replace(inputs, weights=weights), impl):
        assert (tensor == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
# dense multiplies by every expert, so only products that overflow are masked there, not weights that are no numbers.
@pytest.mark.parametrize(("impl", "overflow"), [("dense", "product"), ("grouped", "product"), ("grouped", "weights")])
def test_an_expert_that_overflows_poisons_nothing_where_it_is_not_routed(dtype, overflow, impl):
    inputs = make(5, 8, 4, 4, 2, dtype=dtype, requires_grad=False)
    inputs = dataclasses.replace(inputs, experts=torch.tensor([[0, 1], [1, 3], [3, 0], [0, 7], [1, 1]]))
    clean = [tensor.detach().clone() for tensor in gradients(inputs, impl)]
    inputs.proj[2] = torch.inf if overflow == "weights" else torch.finfo(dtype).max * inputs.proj[2].sign()
    for actual, expected in zip(gradients(inputs, impl), clean, strict=True):
        assert torch.isfinite(actual).all()
        assert_close(actual, expected)


# Strides, leading dimensions, dtypes, order


@every_impl
def test_no_argument_need_be_contiguous(impl):
    inputs = make(10, 6, 4, 5, 3, requires_grad=False)
    expected = gradients(inputs, impl)

    def restride(tensor):
        swapped = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.stack((swapped, torch.full_like(swapped, 7)), dim=-1)[..., 0]

    strided = dataclasses.replace(inputs, **{name: restride(getattr(inputs, name)) for name in (*TENSORS, "experts")})
    assert not any(tensor.is_contiguous() for tensor in vars(strided).values())
    for actual, exact in zip(gradients(strided, impl), expected, strict=True):
        assert_close(actual, exact, **EXACT)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0), (0, 4)])
@every_impl
def test_leading_dimensions_are_kept(leading, impl):
    flat = make(torch.Size(leading).numel(), 5, 3, 4, 2, requires_grad=False)
    shaped = {name: getattr(flat, name).reshape(*leading, width) for name, width in (("x", 5), ("experts", 2), ("weights", 2))}
    h, dx, dweights, dproj = gradients(dataclasses.replace(flat, **shaped), impl)
    flat_h = run(flat, impl=impl)
    assert h.shape == (*leading, 3) and torch.equal(h.reshape(-1, 3), flat_h)
    assert dx.shape == (*leading, 5) and dweights.shape == (*leading, 2) and dproj.shape == (4, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_impl
def test_every_gradient_has_the_dtype_of_its_tensor(dtype, weights_dtype, impl):
    inputs = make(5, 8, 4, 3, 2, dtype=dtype, weights_dtype=weights_dtype)
    assert [tensor.dtype for tensor in gradients(inputs, impl)] == [dtype, dtype, weights_dtype, dtype]


@every_impl
def test_autocast_casts_all_but_the_routing(impl):
    inputs = make(8, 16, 8, 4, 2, dtype=torch.float32)
    expected = run(inputs, inputs.x.bfloat16(), inputs.weights, inputs.proj.bfloat16(), impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        h = run(inputs, impl=impl)
    assert h.dtype == torch.bfloat16 and torch.equal(h, expected)
    for actual, exact in zip(*(torch.autograd.grad(v.sum(), leaves_of(inputs)) for v in (h, expected)), strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_impl
def test_equal_inputs_give_equal_bits(dtype, impl):
    inputs = make(65, 32, 24, 8, 3, dtype=dtype, routing="skewed")
    for first, second in zip(gradients(inputs, impl), gradients(inputs, impl), strict=True):
        assert torch.equal(first, second)
    expected = gradients(inputs, impl)[0]
    with torch.no_grad():
        assert torch.equal(run(inputs, impl=impl), expected)


@every_impl
def test_tokens_do_not_see_each_other(impl):
    inputs = make(20, 5, 3, 6, 3, routing="skewed")
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    moved = dataclasses.replace(inputs, **{name: getattr(inputs, name)[order] for name in ("x", "experts", "weights")})
    assert_close(run(moved, impl=impl), run(inputs, impl=impl)[order], **EXACT)


# Derivatives


@every_impl
def test_gradcheck(impl):
    inputs = make(4, 4, 3, 3, 2, routing="out_of_range")
    assert gradcheck(lambda *leaves: run(inputs, *leaves, impl=impl), leaves_of(inputs))
    if impl == "dense":
        assert gradgradcheck(lambda *leaves: run(inputs, *leaves, impl=impl), leaves_of(inputs))


def test_grouped_refuses_a_second_derivative():
    inputs = make(4, 4, 3, 3, 2)
    for grad in torch.autograd.grad(run(inputs, impl="grouped").square().sum(), leaves_of(inputs), create_graph=True):
        with pytest.raises(RuntimeError, match="first derivatives only; impl='dense' has derivatives of every order"):
            grad.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_grouped_refuses_forward_mode_rather_than_dropping_the_tangent(requires_grad):
    inputs = make(4, 4, 3, 3, 2, requires_grad=requires_grad)
    with pytest.raises(RuntimeError, match=r"forward-mode derivatives and torch\.func need impl='dense'"):
        torch.func.jvp(lambda x: run(inputs, x, impl="grouped"), (inputs.x.detach(),), (torch.ones_like(inputs.x),))


def test_dense_under_torch_func():
    inputs = make(4, 4, 3, 3, 2)

    def h(*leaves):
        return run(inputs, *leaves, impl="dense")

    leaves = tuple(leaf.detach() for leaf in leaves_of(inputs))
    expected = torch.autograd.grad(h().square().sum(), leaves_of(inputs))
    for actual, exact in zip(torch.func.grad(lambda *v: h(*v).square().sum(), (0, 1, 2))(*leaves), expected, strict=True):
        assert_close(actual, exact)
    backward, forward = (f(h, (0, 1, 2))(*leaves) for f in (torch.func.jacrev, torch.func.jacfwd))
    for row, column in zip(backward, forward, strict=True):
        assert_close(row, column)
    batch = torch.stack((leaves[0], -leaves[0]))
    assert_close(torch.func.vmap(h)(batch), torch.stack([h(x) for x in batch]))


@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=3)])
def test_frozen_tensors_get_none_and_cost_nothing(needs, monkeypatch):
    products = []
    real = grouped.grouped_outer

    def noted(*arguments):
        products.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(grouped, "grouped_outer", noted)
    inputs = make(6, 5, 4, 3, 2)
    expected = torch.autograd.grad(run(inputs, impl="dense").square().sum(), leaves_of(inputs))
    for impl in IMPLS:
        leaves = [leaf.detach().requires_grad_(needed) for leaf, needed in zip(leaves_of(inputs), needs, strict=True)]
        h = run(inputs, *leaves, impl=impl)
        if any(needs):
            h.square().sum().backward()
        for leaf, needed, exact in zip(leaves, needs, expected, strict=True):
            if needed:
                assert_close(leaf.grad, exact)
            else:
                assert leaf.grad is None
    assert len(products) == needs[2]

    arguments = (inputs.x.detach(), inputs.experts, inputs.weights.detach(), inputs.proj.detach())
    h, order, offsets = torch.ops.fusedonemoe.experts_merged(*arguments, library.BUILD)
    backward = torch.ops.fusedonemoe.experts_merged_backward
    for needed, grad, exact in zip(
        needs, backward(2 * h, order, offsets, *arguments, needs, library.BUILD), expected, strict=True
    ):
        assert torch.allclose(grad, exact) if needed else grad.numel() == 0


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("op", ["experts_merged", "experts_merged_dense"])
def test_opcheck(op, requires_grad):
    inputs = make(4, 4, 3, 3, 2, dtype=torch.float32, requires_grad=requires_grad)
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.proj, library.BUILD)
    torch.library.opcheck(getattr(torch.ops.fusedonemoe, op).default, arguments)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_opcheck_backward(needs):
    inputs = make(4, 4, 3, 3, 2, dtype=torch.float32, requires_grad=False)
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.proj)
    h, order, offsets = torch.ops.fusedonemoe.experts_merged(*arguments, library.BUILD)
    op = torch.ops.fusedonemoe.experts_merged_backward.default
    torch.library.opcheck(op, (random_like(h), order, offsets, *arguments, list(needs), library.BUILD))


# Refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": None}, TypeError, "^x must be a torch[.]Tensor, got NoneType$"),
        ({"proj": [1.0]}, TypeError, "^proj must be a torch[.]Tensor, got list$"),
        ({"experts": torch.zeros(5, 2)}, TypeError, "^experts must have an integer dtype, got torch[.]float32$"),
        ({"weights": torch.zeros(5, 2).int()}, TypeError, "^weights must be float64, .* got torch[.]int32$"),
        (
            {"proj": torch.zeros(3, 6, 4).half()},
            TypeError,
            r"^proj must have the dtype of x \(torch.float32\), got torch.float16$",
        ),
        ({"weights": torch.zeros(5, 3)}, ValueError, r"^weights must have shape \(5, 2\), got \(5, 3\)$"),
        ({"experts": torch.zeros(4, 2).long()}, ValueError, r"^experts must have shape \(5, 2\), got \(4, 2\)$"),
        ({"proj": torch.zeros(6, 4)}, ValueError, r"^proj must have 3 dimensions \[E, D, F\], got shape \(6, 4\)$"),
        ({"proj": torch.zeros(3, 4, 6)}, ValueError, r"^x must have shape \[..., 4\] to fit proj, got \(5, 6\)$"),
        ({"proj": torch.zeros(0, 6, 4)}, ValueError, "^proj must hold at least one expert, got E = 0$"),
        ({"proj": torch.zeros(3, 6, 4, device="meta")}, ValueError, r"^proj must be on the device of x \(cpu\), got meta$"),
        (
            {"impl": "sparse"},
            ValueError,
            r"^impl must be one of \('auto', 'dense', 'grouped', 'cpu', 'triton', 'portable'\), got 'sparse'$",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    given_: dict[str, Any] = {"x": torch.zeros(5, 6), "experts": torch.zeros(5, 2).long(), "weights": torch.zeros(5, 2)}
    with pytest.raises(error, match=message):
        F.experts_merged(**{**given_, "proj": torch.zeros(3, 6, 4), **changes})
