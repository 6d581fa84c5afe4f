"""The routing of product keys: ids, values and gradients against the oracle, edges, derivatives, compilation, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import library, product_keys
from fusedonemoe.ops.reference import product_keys as reference
from fusedonemoe.testing import assert_within_budget, exact_float64, make_logits

IMPLS = ("auto", "dense", "portable")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (2, 1), (2, 4), (3, 2), (3, 9), (5, 7), (10, 1), (10, 16), (7, 49), (40, 30)]  # G, K
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_shape = pytest.mark.parametrize(("G", "K"), SHAPES)
every_norm = pytest.mark.parametrize("norm", [False, True])


def halves(T, G, dtype=torch.float32, ties=False, seed=0, requires_grad=False):
    logits = make_logits(2 * T, G, dtype=torch.float64, ties=ties, seed=seed).reshape(T, 2, G)
    # Without ties, evenly spaced logits would still give equal sums.
    return (logits if ties else logits**3 / 9).to(dtype).requires_grad_(requires_grad)


def random_like(tensor, seed=1):
    return torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


@every_shape
@every_norm
@every_impl
@pytest.mark.parametrize("ties", [False, True])
def test_values_and_gradient_equal_the_oracle(G, K, norm, impl, ties):
    logits = halves(6, G, torch.float64, ties, requires_grad=True)
    weights, experts = F.route_product_key(logits, K, norm_topk_prob=norm, impl=impl)
    exact_weights, exact_experts = reference.route_product_key(exact_float64(logits), K, norm_topk_prob=norm)
    np.testing.assert_array_equal(experts, exact_experts)
    assert experts.dtype == torch.int64
    assert_close(weights, torch.from_numpy(exact_weights), rtol=1e-12, atol=0)

    dweights = random_like(weights)
    (dlogits,) = torch.autograd.grad(weights, logits, dweights)
    exact = reference.route_product_key_backward(
        exact_float64(dweights), exact_float64(logits), exact_experts, norm_topk_prob=norm
    )
    assert np.abs(exact).max() > 1e-3 or G == 1 or (norm and K == 1)
    assert_close(dlogits, torch.from_numpy(exact), rtol=1e-10, atol=1e-13)


def plain_route(logits, K, norm):
    """The formula in PyTorch over all G * G scores, arithmetic in float32; no order is in doubt in the first K."""
    la, lb = logits.float().log_softmax(-1).unbind(1)
    weights = (la[:, :, None] + lb[:, None, :]).flatten(1).topk(K).values.exp()
    return weights / weights.sum(-1, keepdim=True) if norm else weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_norm
def test_low_precision_is_as_good_as_plain_pytorch(dtype, norm):
    G, K = 12, 5
    logits = (torch.randn(40, 2, G, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    plain = plain_route(logits, K, norm)
    exact, exact_experts = reference.route_product_key(exact_float64(logits), K, norm_topk_prob=norm)
    dweights = random_like(plain)
    (plain_grad,) = torch.autograd.grad(plain, logits, dweights)
    exact_grad = reference.route_product_key_backward(
        exact_float64(dweights), exact_float64(logits), exact_experts, norm_topk_prob=norm
    )
    for impl in IMPLS:
        weights, experts = F.route_product_key(logits, K, norm_topk_prob=norm, impl=impl)
        np.testing.assert_array_equal(experts, exact_experts)
        assert_within_budget(weights, plain, exact, name=f"{impl} weights")
        (grad,) = torch.autograd.grad(weights, logits, dweights)
        if torch.equal(experts, plain_experts(logits, K)):  # else equal scores got each other's dweights
            assert_within_budget(grad, plain_grad, exact_grad, slack=4.0, name=f"{impl} gradient")
        else:
            assert dtype != torch.float32
            assert_close(grad, torch.from_numpy(exact_grad).to(dtype), rtol=0.02, atol=0.02)


def plain_experts(logits, K):
    la, lb = logits.float().log_softmax(-1).unbind(1)
    return (la[:, :, None] + lb[:, None, :]).flatten(1).topk(K).indices


# Shapes, dtypes, edges


@pytest.mark.parametrize("leading", [(0,), (1,), (), (2, 3), (2, 0), (5,)])
@pytest.mark.parametrize("K", [1, 4, 16])
@every_impl
def test_leading_dimensions_are_kept(leading, K, impl):
    logits = torch.randn(*leading, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, experts = F.route_product_key(logits, K, impl=impl)
    assert weights.shape == experts.shape == (*leading, K)
    flat_weights, flat_experts = reference.route_product_key(exact_float64(logits).reshape(-1, 2, 4), K)
    np.testing.assert_array_equal(experts.reshape(-1, K), flat_experts)
    np.testing.assert_allclose(weights.detach().reshape(-1, K), flat_weights, rtol=1e-5)
    weights.sum().backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", FLOATS)
@every_impl
def test_weights_are_float32_and_the_gradient_has_the_dtype_of_the_logits(dtype, impl):
    logits = halves(3, 5, dtype, requires_grad=True)
    weights, _ = F.route_product_key(logits, 2, impl=impl)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weights.square().sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


@every_impl
def test_logits_need_not_be_contiguous(impl):
    base = halves(6, 8)
    for logits in (base[::2, :, 1:6], base.transpose(0, 2)[:, :, :5], base[:, :1].expand(6, 2, 8), base.flip(1)):
        results = []
        for v in (logits, logits.contiguous()):
            leaf = v.detach().requires_grad_()
            weights, experts = F.route_product_key(leaf, 3, impl=impl)
            results.append((weights, experts, torch.autograd.grad(weights.square().sum(), leaf)[0]))
        for strided, contiguous in zip(*results, strict=True):
            assert torch.equal(strided, contiguous)


def test_autocast_leaves_routing_in_float32():
    logits = halves(5, 6)
    expected = F.route_product_key(logits, 4)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for impl in IMPLS:
            weights, _ = F.route_product_key(logits, 4, impl=impl)
            assert weights.dtype == torch.float32
            assert_close(weights, expected, rtol=1e-6, atol=0)


def test_equal_inputs_give_equal_bits():
    logits = halves(50, 64, ties=True, requires_grad=True)

    def run():
        weights, experts = F.route_product_key(logits, 8)
        return weights, experts, torch.autograd.grad(weights.square().sum(), logits)[0]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@every_norm
def test_sums_over_masks_are_gathers_and_scatters(norm, monkeypatch):
    # Off the CPU, where scattering would add with atomics, the formulation compares instead; here it is made to.
    logits = halves(6, 7, torch.float64, ties=True)
    logits[0, 0, :3] = -torch.inf
    weights, experts = product_keys.route_product_key(logits, 9, norm)
    dlogits = product_keys.route_product_key_backward(random_like(weights), logits, experts, norm)
    monkeypatch.setattr(product_keys, "SCATTERS", ())
    assert_close(product_keys.route_product_key(logits, 9, norm), (weights, experts))
    assert_close(product_keys.route_product_key_backward(random_like(weights), logits, experts, norm), dlogits)


# Derivatives


@every_norm
def test_gradcheck(norm):
    logits = halves(3, 6, torch.float64, requires_grad=True)
    for impl in IMPLS:
        assert gradcheck(lambda v, impl=impl: F.route_product_key(v, 7, norm_topk_prob=norm, impl=impl)[0], logits)


@every_norm
def test_dense_has_second_derivatives(norm):
    logits = halves(2, 5, torch.float64, requires_grad=True)
    assert gradgradcheck(lambda v: F.route_product_key(v, 4, norm_topk_prob=norm, impl="dense")[0], logits)


def test_the_operator_refuses_a_second_derivative():
    logits = halves(3, 5, torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(F.route_product_key(logits, 2)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only; impl='dense' has derivatives of every order"):
        grad.square().sum().backward()


def test_the_operator_refuses_forward_mode_rather_than_dropping_the_tangent():
    logits = halves(3, 5)
    with pytest.raises(RuntimeError, match=r"forward-mode derivatives and torch\.func need impl='dense'"):
        torch.func.jvp(lambda v: F.route_product_key(v, 2)[0], (logits,), (torch.ones_like(logits),))


@every_norm
def test_dense_under_torch_func(norm):
    logits = halves(4, 6, torch.float64)

    def weights(v):
        return F.route_product_key(v, 5, norm_topk_prob=norm, impl="dense")[0]

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(weights(leaf).square().sum(), leaf)
    assert_close(torch.func.grad(lambda v: weights(v).square().sum())(logits), expected)
    assert_close(torch.func.jacrev(weights)(logits), torch.func.jacfwd(weights)(logits))
    batch = torch.stack((logits, logits.flip(0), 2 * logits))
    assert_close(torch.func.vmap(weights)(batch), torch.stack([weights(v) for v in batch]))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("op", ["route_product_key", "route_product_key_dense"])
def test_opcheck(op, requires_grad):
    logits = halves(3, 6, requires_grad=requires_grad)
    torch.library.opcheck(getattr(torch.ops.fusedonemoe, op).default, (logits, 4, False, library.BUILD))


@every_norm
def test_opcheck_backward(norm):
    logits = halves(3, 6)
    _, experts = torch.ops.fusedonemoe.route_product_key(logits, 4, norm, library.BUILD)
    op = torch.ops.fusedonemoe.route_product_key_backward.default
    torch.library.opcheck(op, (torch.randn(3, 4), logits, experts, norm, library.BUILD))


def test_opcheck_selection():
    torch.library.opcheck(torch.ops.fusedonemoe.select_product_keys.default, (halves(3, 6, ties=True), 4))


# Compilation


@every_norm
@every_impl
def test_compiles_for_any_number_of_tokens(norm, impl):
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: F.route_product_key(v, 9, norm_topk_prob=norm, impl=impl), fullgraph=True, dynamic=True)
    for T, ties in ((5, False), (12, True)):
        logits = halves(T, 7, ties=ties, seed=T)
        results = []
        for call in (lambda v: F.route_product_key(v, 9, norm_topk_prob=norm, impl=impl), compiled):
            leaf = logits.clone().requires_grad_()
            weights, experts = call(leaf)
            results.append((experts, weights, torch.autograd.grad(weights.square().sum(), leaf)[0]))
        assert torch.equal(results[0][0], results[1][0])
        assert_close(results[0][1:], results[1][1:])


def test_the_compiled_formulation_keeps_the_rounding_errors():
    # A compiler that simplified the additions of floats would lose what orders these sums.
    torch._dynamo.reset()
    tiny = torch.finfo(torch.float32).eps / 8
    logits = torch.tensor([[[1.0, 1.0 + 16 * tiny, 1.0], [0.0, tiny, 2 * tiny]]])
    _, experts = torch.compile(lambda v: F.route_product_key(v, 9, impl="dense"), fullgraph=True)(logits)
    assert experts.tolist() == [[5, 4, 3, 2, 8, 1, 7, 0, 6]]


def test_an_exported_graph_keeps_to_operators_of_torch_and_the_routing():
    class Route(torch.nn.Module):
        def forward(self, logits):
            return F.route_product_key(logits, 4)

    logits = halves(5, 6, ties=True)
    exported = torch.export.export(Route(), (logits,), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
    lowered = exported.run_decompositions()
    assert "select_product_keys" not in str(lowered.graph) and "select_experts" not in str(lowered.graph)
    other = halves(8, 6, seed=3)
    for got, expected in zip(lowered.module()(other), F.route_product_key(other, 4), strict=True):
        assert_close(got, expected)


# Refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, r"^logits must be a torch.Tensor, got list$"),
        ({"logits": torch.zeros(2, 6).long()}, TypeError, r"^logits must be float64, .* or float16, got torch.int64$"),
        ({"logits": torch.zeros(6)}, ValueError, r"^logits must have shape \[..., 2, G\] with G >= 1, got \(6,\)$"),
        ({"logits": torch.zeros(4, 3, 6)}, ValueError, r"^logits must have shape \[..., 2, G\] with G >= 1, got \(4, 3, 6\)$"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"^logits must have shape \[..., 2, G\] with G >= 1, got \(2, 0\)$"),
        ({"top_k": 0}, ValueError, r"^top_k must be from 1 to 9, the pairs of 3 keys, got 0$"),
        ({"top_k": 10}, ValueError, r"^top_k must be from 1 to 9, the pairs of 3 keys, got 10$"),
        ({"top_k": 2.0}, TypeError, r"^top_k must be an integer, got 2.0$"),
        ({"top_k": True}, TypeError, r"^top_k must be an integer, got True$"),
        ({"impl": "cpu"}, ValueError, r"^impl must be one of \('auto', 'dense', 'portable'\), got 'cpu'$"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 3), "top_k": 2, **changes}
    with pytest.raises(error, match=message):
        F.route_product_key(**arguments)
