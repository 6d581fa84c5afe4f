"""float16: an expert's row, or its gradient, may pass the largest float16, though what is returned does not."""

import pytest
import torch

from fusedonemoe import functional as F
from fusedonemoe.ops.choice import LACKING

T, D, INNER, E, K = 5, 16, 32, 4, 2
IMPLS = ("dense", "grouped", "cpu", "portable")
LAYERS = ("experts_mlp", "experts_mlp_lora", "experts_mlp_quantized", "experts_merged", "experts_neurons", "experts_values")
CASES = [(layer, impl) for layer in LAYERS for impl in IMPLS if (impl, layer) not in LACKING]
every_case = pytest.mark.parametrize(("layer", "impl"), CASES)


def draw(*shape, seed, scale=1.0):
    values = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.clamp(-6e4, 6e4)


def case(layer, size, weight, device="cpu"):
    """Arguments whose expert rows are ``size`` large, at routing weights of about ``weight``: leaves, and the call of them."""
    x, down = draw(T, D, seed=1), draw(E, D, INNER, seed=3, scale=size / INNER)
    experts = torch.tensor([[0, 1], [1, 2], [3, 0], [2, -1], [2, 3]], device=device)
    leaves = {"x": x, "weights": weight * (1 + draw(T, K, seed=4) / 10)}
    if layer in ("experts_mlp", "experts_mlp_lora"):
        leaves |= {"gate_up_proj": draw(E, 2 * INNER, D, seed=2, scale=0.5), "down_proj": down}
        leaves |= {"gate_up_bias": draw(E, 2 * INNER, seed=5), "down_bias": draw(E, D, seed=6, scale=size / 20)}
    if layer == "experts_mlp_lora":
        leaves |= {"gate_up_A": draw(E, 3, D, seed=7), "gate_up_B": draw(E, 2 * INNER, 3, seed=8, scale=0.2)}
        leaves |= {"down_A": draw(E, 3, INNER, seed=9), "down_B": draw(E, D, 3, seed=10, scale=size / 50)}
    if layer == "experts_mlp_quantized":
        leaves |= {"gate_up_bias": draw(E, 2 * INNER, seed=5), "down_bias": draw(E, D, seed=6, scale=size / 20)}
        up = F.quantize_weight(draw(E, 2 * INNER, D, seed=2, scale=0.5).float().to(device))
        down = F.quantize_weight(down.float().to(device))
        return leaves, lambda x, weights, impl, **rest: F.experts_mlp_quantized(x, experts, weights, up, down, **rest, impl=impl)
    if layer == "experts_merged":
        leaves["proj"] = draw(E, D, INNER, seed=2, scale=size / 5)
    if layer == "experts_neurons":
        leaves |= {"down_table": draw(E, D, seed=2), "up_table": draw(E, D, seed=3, scale=size / 50)}
    if layer == "experts_values":
        del leaves["x"]
        leaves["table"] = draw(E, D, seed=3, scale=6e4)
        leaves["weights"] *= 3 / K
        leaves["weights"][:, 1] -= 2.7 * weight
        return leaves, lambda weights, impl, **rest: F.experts_values(experts, weights, *rest.values(), impl=impl)
    operator = getattr(F, layer)
    if layer in ("experts_merged", "experts_neurons"):
        return leaves, lambda x, weights, impl, **rest: operator(x, experts, weights, *rest.values(), impl=impl)
    return leaves, lambda x, weights, impl, **rest: operator(x, experts, weights, impl=impl, **rest)


def run(layer, impl, size, weight, weights_dtype, upstream, device="cpu"):
    """Output and gradients in float16, and those of the same numbers in float64."""
    leaves, call = case(layer, size, weight, device)
    results = []
    for wide in (False, True):
        own = {name: leaf.to(weights_dtype if name == "weights" else torch.float16) for name, leaf in leaves.items()}
        own = {name: (leaf.double() if wide else leaf).to(device).requires_grad_() for name, leaf in own.items()}
        y = call(**own, impl="dense" if wide else impl)
        dy = (upstream * torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view_as(y)).half().to(y.dtype)
        results.append({"y": y, **dict(zip(own, torch.autograd.grad(y, list(own.values()), dy), strict=True))})
    return results


def assert_fits(results):
    found, exact = results
    for name, value in found.items():
        fits = exact[name].abs() < 6.5e4
        assert value.isfinite()[fits].all(), name
        largest = exact[name].abs()[fits].max().item() if fits.any() else 0.0
        close = (value.double() - exact[name]).abs() <= 0.02 * exact[name].abs() + 0.01 * largest
        assert close[fits].all(), name


@every_case
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_may_pass_the_largest_float16(layer, impl, weights_dtype):
    results = run(layer, impl, 2e5, 0.05, weights_dtype, 1e-4)
    assert (results[1]["y"].abs() < 6.5e4).all() or layer == "experts_values"
    assert_fits(results)


@every_case
def test_a_gradient_of_a_row_may_pass_it(layer, impl):
    # dy Wdown^T alone is beyond the largest float16: times the weight, and times act', it is not.
    assert_fits(run(layer, impl, 200.0, 1e-3, torch.float32, 2000.0))


@every_case
def test_weights_above_one_may_pass_it(layer, impl):
    # w h and w x are beyond the largest float16, what they are multiplied with is small.
    leaves, call = case(layer, 1e-3, 1.0)
    leaves = {name: leaf.half() for name, leaf in leaves.items()}
    leaves["weights"] = torch.full((T, K), 1e5)
    half = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    results = []
    for own, name in ((half, impl), (wide, "dense")):
        y = call(**own, impl=name)
        gradients = torch.autograd.grad(y, list(own.values()), torch.full_like(y, 1e-4))
        results.append({"y": y, **dict(zip(own, gradients, strict=True))})
    assert_fits(results)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_beyond_it_may_cancel(impl):
    # 120,000 / 4 is 30,000, and 120,000 - 120,000 is 0.
    x, experts = torch.ones(2, 2, dtype=torch.float16), torch.tensor([[0, 0], [0, 1]])
    weights = torch.tensor([[0.125, 0.125], [1.0, 1.0]])
    up = torch.ones(2, 2, 2, dtype=torch.float16)
    down = torch.tensor([30000.0, -30000.0], dtype=torch.float16)[:, None, None].expand(2, 2, 2).contiguous()
    y = F.experts_mlp(x, experts, weights, up, down, activation="identity", gated=False, impl=impl)
    assert y.tolist() == [[30000.0, 30000.0], [0.0, 0.0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bias_may_bring_a_pre_activation_back(impl):
    x, up = torch.full((1, 1), 300.0, dtype=torch.float16), torch.full((1, 1, 1), 300.0, dtype=torch.float16)
    bias, ones = torch.full((1, 1), -60000.0, dtype=torch.float16), torch.ones(1, 1, 1, dtype=torch.float16)
    experts, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    y = F.experts_mlp(x, experts, weights, up, ones, gate_up_bias=bias, activation="identity", gated=False, impl=impl)
    assert y.item() == 30000.0
