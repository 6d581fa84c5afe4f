"""Draws, gradients and choices for tests against plain loops in float64."""

import torch

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def randn(*shape, seed=0, dtype=torch.float64):
    """Drawn in float64, whatever the dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(y, leaves, retain_graph=True, *, materialize_grads=False):
    """Of the leaves, for a drawn gradient of y."""
    dy = randn(*y.shape, seed=9).to(y.dtype)
    return torch.autograd.grad(y, leaves, dy, retain_graph=retain_graph, materialize_grads=materialize_grads)


def best(row, count):
    """Ids of the largest, descending, ties to the lower id."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:count]
