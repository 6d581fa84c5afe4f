"""How far a NaN or an infinity reaches, forward and backward: its own token, its experts, and nothing else."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops.choice import LACKING

T, D, INNER, E, K = 6, 8, 12, 5, 2
BAD = 2  # the token that holds no numbers, or the expert
IMPLS = ("dense", "grouped", "cpu", "portable")
LAYERS = ("experts_mlp", "experts_mlp_lora", "experts_mlp_quantized", "experts_merged", "experts_neurons", "experts_values")
CASES = [(layer, impl) for layer in LAYERS for impl in IMPLS if (impl, layer) not in LACKING]
# For single-neuron experts and values, dense multiplies every row of the last table, by zero if it was not chosen.
ISOLATED = [case for case in CASES if case[1] != "dense" or case[0] not in ("experts_neurons", "experts_values")]
EXPERTS = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 4], [4, -1], [E, 7]])
of_each = pytest.mark.parametrize(("layer", "impl"), ISOLATED)
of_all = pytest.mark.parametrize(("layer", "impl"), CASES)
each_value = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_leaves(layer):
    """Everything that has a gradient, x and the routing weights first."""
    leaves = {"x": draw(T, D, seed=1), "weights": draw(T, K, seed=2).abs() + 0.1}
    if layer.startswith("experts_mlp"):
        leaves |= {"gate_up_bias": draw(E, 2 * INNER, seed=5), "down_bias": draw(E, D, seed=6)}
    if layer in ("experts_mlp", "experts_mlp_lora"):
        leaves |= {"gate_up_proj": draw(E, 2 * INNER, D, seed=3), "down_proj": draw(E, D, INNER, seed=4)}
    if layer == "experts_mlp_lora":
        leaves |= {"gate_up_A": draw(E, 3, D, seed=7), "gate_up_B": draw(E, 2 * INNER, 3, seed=8)}
        leaves |= {"down_A": draw(E, 3, INNER, seed=9), "down_B": draw(E, D, 3, seed=10)}
    tables = {"experts_merged": ("proj",), "experts_neurons": ("down_table", "up_table"), "experts_values": ("table",)}
    shape = (E, D, INNER) if layer == "experts_merged" else (E, D)
    return leaves | {name: draw(*shape, seed=11 + i) for i, name in enumerate(tables.get(layer, ()))}


def call(layer, impl, experts, x, weights, **parameters):
    if layer == "experts_mlp_quantized":
        weights_of_experts = draw(E, 2 * INNER, D, seed=3), draw(E, D, INNER, seed=4)
        up, down = (F.quantize_weight(weight.to(experts.device)) for weight in weights_of_experts)
        return F.experts_mlp_quantized(x, experts, weights, up, down, **parameters, impl=impl)
    if layer in ("experts_mlp", "experts_mlp_lora"):
        return getattr(F, layer)(x, experts, weights, impl=impl, **parameters)
    if layer == "experts_values":
        return F.experts_values(experts, weights, *parameters.values(), impl=impl)
    return getattr(F, layer)(x, experts, weights, *parameters.values(), impl=impl)


def run(layer, impl, leaves, experts=EXPERTS):
    """The output and the gradient of the sum of its squares, which a NaN in the output enters."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    y = call(layer, impl, experts.to(leaves["weights"].device), **leaves)
    # Of an infinite output the square's slope is infinite, and that of a finite one is what it is.
    grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
    return {"y": y.detach(), **{name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}}


def assert_as_clean(name, found, expected):
    """Equal up to the order of a sum."""
    assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item(), msg=lambda text: f"{name}: {text}")


def assert_equal_outside(found, clean, tokens, experts):
    """All but these tokens' rows and these experts' gradients are as if the bad numbers were not there."""
    for name, expected in clean.items():
        own = tokens if name in ("y", "x", "weights") else experts
        others = [i for i in range(len(expected)) if i not in own]
        assert expected[others].isfinite().all()
        assert_as_clean(name, found[name][others], expected[others])


@each_value
@of_each
def test_a_token_reaches_its_own_experts(layer, impl, value):
    leaves = make_leaves(layer)
    bad = {name: leaf.clone() for name, leaf in leaves.items()}
    bad["weights" if layer == "experts_values" else "x"][BAD, 1] = value
    nowhere = EXPERTS.clone()
    nowhere[BAD] = -1
    found, clean = run(layer, impl, bad), run(layer, impl, leaves, nowhere)
    assert_equal_outside(found, clean, [BAD], EXPERTS[BAD].tolist())
    assert not found["y"][BAD].isfinite().all()
    reached = [name for name in found if name not in ("y", "x", "weights")]
    assert any(not found[name][e].isfinite().all() for name in reached for e in EXPERTS[BAD].tolist())


@each_value
@pytest.mark.parametrize("nowhere", [-1, E, 1 << 40, -(1 << 40)])
@of_all
def test_a_token_without_experts_reaches_nothing(layer, impl, nowhere, value):
    leaves = make_leaves(layer)
    experts = EXPERTS.clone()
    experts[BAD] = nowhere
    bad = {name: leaf.clone() for name, leaf in leaves.items()}
    bad["weights"][BAD] = value
    bad["weights"][-1] = value
    if (layer, impl) in ISOLATED:
        bad["x"][BAD] = value
    found, clean = run(layer, impl, bad, experts), run(layer, impl, leaves, experts)
    for name, expected in clean.items():
        assert_as_clean(name, found[name], expected)
    assert (found["y"][BAD] == 0).all() and (found["weights"][BAD] == 0).all()


@each_value
@pytest.mark.parametrize("expert", [BAD, 4], ids=["without tokens", "with tokens"])
@of_each
def test_an_expert_reaches_the_tokens_routed_to_it(layer, impl, expert, value):
    leaves = make_leaves(layer)
    bad = {name: leaf.clone() for name, leaf in leaves.items()}
    for name, leaf in bad.items():
        if name not in ("x", "weights"):
            leaf[expert] = value
    experts = torch.where(expert == EXPERTS, -1, EXPERTS)
    found, clean = run(layer, impl, bad), run(layer, impl, leaves, experts)
    routed = (expert == EXPERTS).any(1).nonzero().flatten().tolist()
    touched = {expert} | {e for t in routed for e in EXPERTS[t].tolist() if 0 <= e < E} if routed else set()
    assert_equal_outside(found, clean, routed, sorted(touched))
    assert all(not found["y"][t].isfinite().all() for t in routed)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@of_all
def test_everything_is_float64_beside_a_float64_x(layer, impl, weights_dtype):
    if impl == "cpu":
        pytest.skip("the CPU kernels have no float64")
    leaves = {name: leaf.double() for name, leaf in make_leaves(layer).items()}
    leaves["weights"] = leaves["weights"].to(weights_dtype)
    wide = {**leaves, "weights": leaves["weights"].double()}
    found, exact = run(layer, impl, leaves), run(layer, "dense", wide)
    for name, expected in exact.items():
        eps = torch.finfo(weights_dtype).eps if name == "weights" else 1e-12
        assert_close(found[name].double(), expected, rtol=eps, atol=1e-12, msg=partial("{}: {}".format, name))


def test_merged_experts_that_every_token_takes_are_float64_too():
    x, weights, proj = draw(T, D, seed=1).double(), draw(T, K, seed=2), draw(K, D, INNER, seed=3).double()
    experts = torch.arange(K).expand(T, K)
    exact = torch.einsum("tk,td,kdf->tf", weights.double(), x, proj)
    exact = torch.einsum("tk,td,kdf->tf", weights.double(), x, proj)
    assert_close(F.experts_merged(x, experts, weights, proj), exact, rtol=1e-13, atol=1e-13)
