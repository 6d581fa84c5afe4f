"""Product keys against a full sort in rational arithmetic: ids, values, gradients, a million rows, the module, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fusedonemoe import ProductKeyRouter
from fusedonemoe import functional as F
from fusedonemoe.ops import library, product_keys
from fusedonemoe.ops import reference_product_keys as reference
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


# Order


def is_the_full_sort(logits, experts):
    """Whether each row of ``experts`` is the beginning of a full sort of all pairs by (exact sum, lower id).

    Equivalent, without the sort: the picks are in strictly descending order, and no more pairs than K stand at or before the
    last one. A float64 sum of two float32 is monotone in the real sum; where two are equal, the errors of the additions
    decide, and then the ids.
    """
    G = logits.shape[-1]
    K = experts.shape[1]
    a, b = logits.double().unbind(1)

    def key(x, y):
        total = x + y
        from_y = total - x
        return total, (x - (total - from_y)) + (y - from_y)

    def before(first, second):
        (s, e, i), (t, f, j) = first, second
        return (s > t) | ((s == t) & ((e > f) | ((e == f) & (i <= j))))

    picked = (*key(a.gather(1, experts // G), b.gather(1, experts % G)), experts)
    descending = before([v[:, :-1] for v in picked], [v[:, 1:] for v in picked]).all(1)
    descending &= (experts[:, 1:] != experts[:, :-1]).all(1)
    last = [v[:, -1] for v in picked]
    sums = (a[:, :, None] + b[:, None, :]).flatten(1)
    at_or_before = (sums > last[0][:, None]).sum(1)
    row, expert = (sums == last[0][:, None]).nonzero().unbind(1)
    tied = (*key(a[row, expert // G], b[row, expert % G]), expert)
    at_or_before.index_add_(0, row, before(tied, [v[row] for v in last]).long())
    return descending & (at_or_before == K)


KINDS = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "integers": lambda shape, g: torch.randint(-4, 5, shape, generator=g).float(),
    "duplicated": lambda shape, g: torch.randn(shape, generator=g)[..., torch.randint(shape[-1], (shape[-1],), generator=g)],
    "bfloat16": lambda shape, g: torch.randn(shape, generator=g).bfloat16().float(),
    "magnitudes": lambda shape, g: torch.randn(shape, generator=g) * 10.0 ** torch.randint(-20, 20, shape, generator=g),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("G", "rows", "chunk", "ks"),
    [
        (1, 20_000, 20_000, [1]),
        (3, 80_000, 10_000, [1, 2, 4, 9]),
        (10, 93_600, 7_800, [1, 8, 16, 100]),
        (128, 4_800, 240, [16, 64]),
        (320, 1_600, 40, [1, 32, 128]),
    ],
)
def test_a_million_rows_are_those_of_a_full_sort(G, rows, chunk, ks, kind):
    # Five kinds of 200,000 rows.
    generator = torch.Generator().manual_seed(G)
    for n in range(rows // chunk):
        logits, K = KINDS[kind]((chunk, 2, G), generator), ks[n % len(ks)]
        assert is_the_full_sort(logits, F.route_product_key(logits, K)[1]).all()


def test_the_check_above_sees_a_wrong_selection():
    logits = halves(50, 6, ties=True)
    _, experts = F.route_product_key(logits, 8)
    assert is_the_full_sort(logits, experts).all()
    for wrong in (experts[:, torch.tensor([0, 1, 2, 3, 4, 5, 7, 6])], experts.clamp(max=30), experts[:, 1:]):
        assert not is_the_full_sort(logits, wrong).all()


def test_the_check_above_is_the_oracle():
    logits = KINDS["magnitudes"]((200, 2, 5), torch.Generator().manual_seed(1))
    _, exact = reference.route_product_key(exact_float64(logits), 7)
    assert is_the_full_sort(logits, torch.from_numpy(exact)).all()


@every_impl
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_that_round_to_one_float_are_still_ordered(impl, dtype):
    tiny = torch.finfo(dtype).eps / 8
    # 1 + tiny * n are all 1 in floating point; the last two pairs differ in the other half.
    logits = torch.tensor([[[1.0, 1.0 + 16 * tiny, 1.0], [0.0, tiny, 2 * tiny]]], dtype=dtype)
    logits = torch.cat((logits, logits.flip(1), -logits))
    _, experts = F.route_product_key(logits, 9, impl=impl)
    np.testing.assert_array_equal(experts, reference.route_product_key(logits, 9)[1])
    assert experts[0].tolist() == [5, 4, 3, 2, 8, 1, 7, 0, 6]


@every_impl
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_the_greatest_numbers(impl, dtype):
    inf, big = torch.inf, torch.finfo(dtype).max
    logits = torch.tensor(
        [
            [[0.0, -inf, 1.0, -inf], [2.0, -inf, 0.0, 1.0]],
            [[-inf, -inf, 3.0, -inf], [1.0, 2.0, 0.0, 4.0]],
            [[0.0, -big, 1.0, -big], [2.0, -big, 0.0, -inf]],
            [[big, -big, 1.0, 0.0], [big, big, 0.0, 1.0]],
            [[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0]],
        ],
        dtype=dtype,
    ).requires_grad_()
    for K in (1, 3, 5, 16):
        weights, experts = F.route_product_key(logits, K, impl=impl)
        exact_weights, exact = reference.route_product_key(exact_float64(logits), K)
        np.testing.assert_array_equal(experts, exact)
        assert_close(weights.double(), torch.from_numpy(exact_weights), rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        assert torch.isfinite(grad).all()


def test_ids_are_exact_where_a_float32_is_not():
    # 4097 ** 2 > 2 ** 24: rounded to float32, neighbouring ids would be equal.
    G = 4097
    logits = torch.zeros(1, 2, G)
    logits[0, :, -3:] = 1.0
    expected = [(G - 3 + i) * G + G - 3 + j for i in range(3) for j in range(3)]
    for impl in IMPLS:
        assert F.route_product_key(logits, 9, impl=impl)[1].tolist() == [expected]


@pytest.mark.parametrize(("K", "count"), [(8, 20), (16, 50), (32, 119), (64, 280), (128, 645)])
def test_the_candidates_are_as_few_as_the_rule_says(K, count):
    first, second = (ranks.tolist() for ranks in product_keys.candidates(K, 1000, torch.device("cpu")))
    expected = {(r, s) for r in range(K) for s in range(K) if (r + 1) * (s + 1) <= K}
    assert set(zip(first, second, strict=True)) == expected
    assert len(first) == count
    assert len(product_keys.candidates(K, 3, torch.device("cpu"))[0]) <= 9


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


# The module


@pytest.mark.parametrize("input_norm", [None, "batch", "rms"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_router_is_its_formula(input_norm, bias, dtype):
    torch.manual_seed(0)
    D, G, K, H = 12, 5, 3, 2
    router = ProductKeyRouter(D, G, K, num_heads=H, input_norm=input_norm, bias=bias, norm_topk_prob=True, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if router.norm is not None:
        torch.nn.init.normal_(router.norm.weight)
    x = torch.randn(2, 7, D).to(dtype)
    for training in (True, False):
        router.train(training)
        flat = x.to(wide).reshape(-1, D)
        norm: Any = router.norm
        if input_norm == "batch":
            mean = flat.mean(0) if training else norm.running_mean.to(wide)
            variance = flat.var(0, unbiased=False) if training else norm.running_var.to(wide)
            before = norm.running_mean.clone()
            flat = (flat - mean) / (variance + norm.eps).sqrt() * norm.weight.to(wide) + norm.bias.to(wide)
        elif input_norm == "rms":
            flat = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.to(wide)
        expected = flat @ router.weight.to(wide).t() + (0 if router.bias is None else router.bias.to(wide))
        logits, weights, experts = router(x)
        assert logits.shape == (2, 7, H, 2, G) and weights.shape == experts.shape == (2, 7, H * K)
        assert_close(logits, expected.reshape(logits.shape))
        assert logits.dtype == weights.dtype == wide
        per_head, ids = F.route_product_key(logits, K, norm_topk_prob=True)
        assert torch.equal(weights, per_head.flatten(-2)) and torch.equal(experts, ids.flatten(-2))
        if input_norm == "batch":
            if training:
                updated = (0.9 * before.to(wide) + 0.1 * mean).to(dtype)
                assert_close(norm.running_mean, updated)
                assert norm.num_batches_tracked.item() == 1
            else:
                assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("input_norm", [None, "batch", "rms"])
def test_every_parameter_of_the_router_gets_a_gradient(input_norm):
    torch.manual_seed(0)
    router = ProductKeyRouter(8, 6, 4, input_norm=input_norm, bias=True)
    x = torch.randn(9, 8, requires_grad=True)
    (router(x).weights * torch.randn(9, 4)).sum().backward()
    for name, parameter in [("x", x), *router.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("input_norm", [None, "batch", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_compiles(input_norm, dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    routers = [ProductKeyRouter(8, 6, 4, num_heads=2, input_norm=input_norm, dtype=dtype) for _ in range(2)]
    routers[1].load_state_dict(routers[0].state_dict())
    compiled = torch.compile(routers[1], fullgraph=True, dynamic=True)
    for T in (9, 4):
        x = torch.randn(T, 8).to(dtype)
        eager, fast = routers[0](x), compiled(x)
        assert torch.equal(eager.experts, fast.experts)
        assert_close(eager.weights, fast.weights)
    for name, value in routers[0].state_dict().items():
        assert_close(routers[1].state_dict()[name], value, msg=name)


def test_the_router_under_autocast_stays_in_float32():
    torch.manual_seed(0)
    router, x = ProductKeyRouter(8, 6, 4, input_norm="batch").eval(), torch.randn(9, 8)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        for got, value in zip(router(x), expected, strict=True):
            assert torch.equal(got, value)


@pytest.mark.parametrize("input_norm", [None, "batch", "rms"])
def test_no_token_leaves_the_statistics_alone(input_norm):
    router = ProductKeyRouter(8, 6, 4, input_norm=input_norm)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    assert router(torch.empty(0, 8)).experts.shape == (0, 4)
    for name, value in router.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_router_names_its_sizes():
    assert "hidden_size=8, num_keys=6, top_k=4, num_heads=2" in repr(ProductKeyRouter(8, 6, 4, num_heads=2))


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


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, r"^hidden_size must be at least 1, got 0$"),
        ({"num_keys": 2.0}, TypeError, r"^num_keys must be an integer, got 2.0$"),
        ({"num_heads": 0}, ValueError, r"^num_heads must be at least 1, got 0$"),
        ({"top_k": 10}, ValueError, r"^top_k must be at most 9, the pairs of 3 keys, got 10$"),
        ({"input_norm": "layer"}, ValueError, r"^input_norm must be None, 'batch' or 'rms', got 'layer'$"),
    ],
)
def test_a_bad_router_is_refused(changes, error, message):
    arguments: dict[str, Any] = {"hidden_size": 4, "num_keys": 3, "top_k": 2, **changes}
    with pytest.raises(error, match=message):
        ProductKeyRouter(**arguments)
