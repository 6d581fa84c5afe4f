"""The router of product keys: its formula, input norms, gradients, compilation, autocast, refusals."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fusedonemoe import ProductKeyRouter
from fusedonemoe import functional as F


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
                updated = 0.9 * before + 0.1 * mean  # kept in the routing dtype, whatever that of the parameters
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
