"""The merged up-projection, values and gradients, against the oracle."""

import itertools

import numpy as np
import pytest
import torch

from fusedonemoe.ops import grouped, reference
from fusedonemoe.ops.triton import merged
from fusedonemoe.testing import assert_within_budget, exact_float64, make_merged_inputs

ALL = grouped.MergedNeeds(True, True, True)
SHAPES = [(1, 16, 16, 4, 1), (9, 20, 33, 5, 3), (40, 37, 16, 3, 2), (6, 48, 24, 12, 8)]


def problem(*shape, transposed=False, **options):
    made = make_merged_inputs(*shape, **options)
    proj = made.proj.transpose(1, 2).contiguous().transpose(1, 2) if transposed else made.proj
    return made.x, made.experts, made.weights, proj


def random_dh(x, proj):
    values = torch.randn(x.shape[0], proj.shape[2], generator=torch.Generator().manual_seed(7))
    return values.to(x.device, x.dtype)


def on_cpu(arguments):
    return tuple(a.cpu() for a in arguments)


def backward(arguments, needs=ALL):
    x, _, _, proj = arguments
    _, order, offsets = merged.experts_merged(*arguments)
    return merged.experts_merged_backward(random_dh(x, proj), order, offsets, *arguments, needs)


def assert_right(arguments):
    """Values and all gradients; returns the gradients."""
    x, _, _, proj = arguments
    exact = exact_float64(*arguments)
    h, order, offsets = merged.experts_merged(*arguments)
    plain_h, plain_order, plain_offsets = grouped.experts_merged(*on_cpu(arguments))
    assert_within_budget(h.cpu(), plain_h, reference.experts_merged(*exact), name="h")
    assert torch.equal(order.cpu(), plain_order) and torch.equal(offsets.cpu(), plain_offsets)

    dh = random_dh(x, proj)
    grads = merged.experts_merged_backward(dh, order, offsets, *arguments, ALL)
    plain = grouped.experts_merged_backward(dh.cpu(), plain_order, plain_offsets, *on_cpu(arguments), ALL)
    expected = reference.experts_merged_backward(exact_float64(dh), *exact)
    for name, grad, yardstick in zip(("x", "weights", "proj"), grads, plain, strict=True):
        assert_within_budget(grad.cpu(), yardstick, getattr(expected, name), name=name)
    return grads


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, transposed, device):
    assert_right(problem(*shape, transposed=transposed, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision(dtype, transposed, device):
    assert_right(problem(12, 40, 24, 4, 2, dtype=dtype, transposed=transposed, device=device))


def test_routing_weights_in_half_precision(device):
    arguments = problem(12, 40, 24, 4, 2, dtype=torch.bfloat16, weights_dtype=torch.bfloat16, device=device)
    assert assert_right(arguments)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("routing", ["one_expert", "some_empty", "skewed"])
def test_every_routing(routing, device):
    assert_right(problem(20, 24, 20, 4, 2, routing=routing, device=device))


def test_ids_out_of_range_add_nothing_and_get_no_gradient(device):
    x, experts, weights, proj = problem(9, 24, 20, 4, 3, routing="out_of_range", device=device)
    outside = (experts < 0) | (experts >= 4)
    clean = assert_right((x, experts, weights, proj))
    h = merged.experts_merged(x, experts, weights, proj)[0]
    spoiled = (x, experts, weights.masked_fill(outside, float("nan")), proj)
    assert torch.equal(merged.experts_merged(*spoiled)[0], h)
    for grad, expected in zip(backward(spoiled), clean, strict=True):
        assert torch.equal(grad, expected)
    assert not clean[1][outside].any() and clean[1][~outside].all()
    assert not clean[0][-1].any()


def test_an_expert_without_rows_gets_zeros_from_memory_full_of_nan(device, monkeypatch):
    arguments = problem(10, 24, 20, 6, 2, routing="some_empty", device=device)
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def spoil(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(2**30)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: spoil(new_empty(*a, **k)))
    h = merged.experts_merged(*arguments)[0]
    dx, dweights, dproj = backward(arguments)
    monkeypatch.undo()
    assert all(torch.isfinite(t).all() for t in (h, dx, dweights, dproj))
    assert not dproj[0::2].any() and dproj[1].any()


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_the_gradients_wanted_are_computed(wanted, device, monkeypatch):
    arguments = problem(6, 24, 20, 4, 2, device=device)
    full = backward(arguments)
    launched: list[str] = []

    def noting(what, body):
        def noted(*args, **options):
            launched.append(what)
            return body(*args, **options)

        return noted

    for name, what in (("routing_gradient", "dweights"), ("grouped_rows", "q"), ("grouped_outer", "dproj")):
        monkeypatch.setattr(merged, name, noting(what, getattr(merged, name)))
    x, _, _, proj = arguments
    _, order, offsets = grouped.experts_merged(*on_cpu(arguments))
    launched.clear()
    grads = merged.experts_merged_backward(
        random_dh(x, proj), order.to(device), offsets.to(device), *arguments, grouped.MergedNeeds(*wanted)
    )
    for want, grad, expected in zip(wanted, grads, full, strict=True):
        assert torch.equal(grad, expected) if want else grad.numel() == 0
    assert ("q" in launched) == (wanted[0] or wanted[1])
    assert ("dweights" in launched) == wanted[1]
    assert ("dproj" in launched) == wanted[2]


def test_no_token(device):
    arguments = problem(0, 16, 20, 4, 2, device=device)
    assert merged.experts_merged(*arguments)[0].shape == (0, 20)
    dx, dweights, dproj = backward(arguments)
    assert dx.shape == (0, 16) and dweights.shape == (0, 2)
    assert dproj.shape == (4, 16, 20) and not dproj.any()


def test_strided_arguments(device):
    x, experts, weights, proj = problem(7, 24, 20, 4, 2, device=device)
    wide = x.new_full((7, 48), float("nan"))
    wide[:, ::2] = x
    assert_right((wide[:, ::2], experts.t().contiguous().t(), weights.t().contiguous().t(), proj))


def test_equal_calls_give_equal_bits(device):
    arguments = problem(20, 40, 24, 4, 3, dtype=torch.bfloat16, device=device)
    assert torch.equal(merged.experts_merged(*arguments)[0], merged.experts_merged(*arguments)[0])
    for first, second in zip(backward(arguments), backward(arguments), strict=True):
        assert torch.equal(first, second) and np.isfinite(exact_float64(first)).all()
