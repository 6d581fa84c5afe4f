"""The product-key kernels against the same function in tensor arithmetic: ids exactly, weights and gradients in a budget."""

import pytest
import torch
from torch.testing import assert_close

from fusedonemoe.ops import product_keys as tensors
from fusedonemoe.ops.triton import product_keys
from fusedonemoe.testing import assert_within_budget, make_logits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (2, 3), (3, 1), (3, 9), (5, 7), (10, 16), (7, 49), (40, 34), (64, 16)]  # G, K
every_norm = pytest.mark.parametrize("norm", [False, True])


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(logits, K, norm, device):
    """Route and differentiate in both formulations, compare with float64."""
    weights, experts = (v.cpu() for v in product_keys.route_product_key(logits.to(device), K, norm))
    plain, plain_experts = tensors.route_product_key(logits, K, norm)
    exact, exact_experts = tensors.route_product_key(logits.double(), K, norm)
    assert experts.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(experts, plain_experts) and torch.equal(experts, exact_experts)
    assert_within_budget(weights, plain, exact, name="weights")

    dweights = random(*weights.shape)
    dlogits = product_keys.route_product_key_backward(dweights.to(device), logits.to(device), experts.to(device), norm).cpu()
    exact = tensors.route_product_key_backward(dweights.double(), logits.double(), experts, norm)
    if exact.numel() == 0 or exact.abs().max() > 1e-6:
        plain = tensors.route_product_key_backward(dweights, logits, experts, norm)
        assert_within_budget(dlogits, plain, exact, slack=4.0, name="dlogits")
    else:  # one key, or one normalised expert: the weight is constant
        assert dlogits.dtype == logits.dtype and dlogits.shape == logits.shape and dlogits.abs().max() < 1e-6


@every_norm
@pytest.mark.parametrize(("G", "K"), SHAPES)
def test_every_shape(device, G, K, norm):
    check(2 * random(13, 2, G), K, norm, device)


@every_norm
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [0, 1, 37])
def test_every_dtype_and_number_of_tokens(device, dtype, T, norm):
    check(2 * random(T, 2, 12).to(dtype), 5, norm, device)


# Order


@pytest.mark.parametrize(("G", "K"), [(4, 16), (9, 6), (20, 33), (40, 40)])
def test_ties_go_to_the_lower_id(device, G, K):
    logits = make_logits(24, G, ties=True).reshape(12, 2, G)
    logits[::2] *= -1.0  # -0.0 beside 0.0
    _, experts = product_keys.route_product_key(logits.to(device), K, False)
    sums = (logits[:, 0, :, None] + logits[:, 1, None, :]).flatten(1)
    assert torch.equal(experts.cpu(), sums.sort(descending=True, stable=True).indices[:, :K])


def test_sums_that_round_to_one_float_are_still_ordered(device):
    tiny = torch.finfo(torch.float32).eps / 8
    logits = torch.tensor([[[1.0, 1.0 + 16 * tiny, 1.0], [0.0, tiny, 2 * tiny]]])
    logits = torch.cat((logits, logits.flip(1), -logits))
    experts = product_keys.route_product_key(logits.to(device), 9, False)[1].cpu()
    assert torch.equal(experts, tensors.route_product_key(logits.double(), 9, False)[1])
    assert experts[0].tolist() == [5, 4, 3, 2, 8, 1, 7, 0, 6]


@pytest.mark.parametrize(("G", "K"), [(10, 16), (33, 40)])
def test_sums_of_all_magnitudes_are_ordered_as_real_numbers(device, G, K):
    generator = torch.Generator().manual_seed(0)
    shape = (40, 2, G)
    logits = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-12, 12, shape, generator=generator)
    experts = product_keys.route_product_key(logits.to(device), K, False)[1].cpu()
    assert torch.equal(experts, tensors.route_product_key(logits.double(), K, False)[1])


@pytest.mark.parametrize(("G", "K"), [(12, 7), (6, 36)])
def test_rounds_and_sort_are_one_selection(device, G, K, monkeypatch):
    logits = make_logits(10, G, ties=True).reshape(5, 2, G)
    logits[1, :, ::2] = -torch.inf
    by_rounds = product_keys.route_product_key(logits.to(device), K, False)
    monkeypatch.setattr(product_keys, "MAX_ROUNDS", 0)
    by_sort = product_keys.route_product_key(logits.to(device), K, False)
    for rounds, sort in zip(by_rounds, by_sort, strict=True):
        assert torch.equal(rounds, sort)
    assert torch.equal(by_sort[1].cpu(), tensors.route_product_key(logits, K, False)[1])


# Edges


@every_norm
@pytest.mark.parametrize("K", [1, 3, 5, 16])
def test_infinities_and_the_greatest_numbers(device, norm, K):
    inf, big = torch.inf, torch.finfo(torch.float32).max
    logits = torch.tensor(
        [
            [[0.0, -inf, 1.0, -inf], [2.0, -inf, 0.0, 1.0]],
            [[-inf, -inf, 3.0, -inf], [1.0, 2.0, 0.0, 4.0]],
            [[0.0, -big, 1.0, -big], [2.0, -big, 0.0, -inf]],
            [[big, -big, 1.0, 0.0], [big, big, 0.0, 1.0]],
            [[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0]],
        ]
    )
    weights, experts = product_keys.route_product_key(logits.to(device), K, norm)
    exact, exact_experts = tensors.route_product_key(logits.double(), K, norm)
    assert torch.equal(experts.cpu(), exact_experts)
    assert_close(weights.cpu(), exact.float(), rtol=1e-5, atol=0)
    dweights = random(*weights.shape)
    dlogits = product_keys.route_product_key_backward(dweights.to(device), logits.to(device), experts, norm)
    exact = tensors.route_product_key_backward(dweights.double(), logits.double(), exact_experts, norm)
    assert_close(dlogits.cpu(), exact.float(), rtol=1e-4, atol=1e-6)


@every_norm
def test_nothing_need_be_contiguous(device, norm):
    base = random(12, 2, 8).to(device)
    for logits in (base[::2, :, 1:6], base.transpose(0, 2)[:, :, :5], base[:, :1].expand(12, 2, 8), base.transpose(1, 2)[:, :2]):
        weights, experts = product_keys.route_product_key(logits, 3, norm)
        packed = logits.clone(memory_format=torch.contiguous_format)
        for strided, contiguous in zip((weights, experts), product_keys.route_product_key(packed, 3, norm), strict=True):
            assert torch.equal(strided, contiguous)
        dweights = random(1, 3).to(device).expand_as(weights)
        dlogits = product_keys.route_product_key_backward(dweights, logits, experts.t().contiguous().t(), norm)
        assert dlogits.is_contiguous()
        expected = product_keys.route_product_key_backward(dweights.contiguous(), packed, experts, norm)
        assert torch.equal(dlogits, expected)


def test_what_the_kernels_cannot_take_is_named():
    assert all(product_keys.refusal(dtype, 320, 128) is None for dtype in FLOATS)
    assert "float64" in (product_keys.refusal(torch.float64, 8) or "")
    assert "4097" in (product_keys.refusal(torch.float32, 4097) or "")
    assert "top_k=512 of 320 keys" in (product_keys.refusal(torch.float32, 320, 512) or "")
    assert product_keys.refusal(torch.float32, 320) is None


@pytest.mark.parametrize(("G", "K"), [(10, 16), (3, 2), (320, 128), (1, 1), (4, 16)])
def test_the_candidates_are_those_of_the_tensor_formulation(G, K):
    assert product_keys.count_candidates(K, G) == len(tensors.candidates(K, G, torch.device("cpu"))[0])
