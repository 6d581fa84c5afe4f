"""Single-neuron experts and value memory whose tables get sparse gradients: the rows that were touched, and no others.

How many these are depends on the data, so this is a ``torch.autograd.Function`` for eager calls and no operator. Forward and
backward are the operators'; the backward is told to write the tables' gradients in slots, one for each touched row. Autocast
casts inside, as torch cannot cast a sparse gradient back: the output's dtype is the one that was computed in.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.library.registration import BUILD
from fusedonemoe.ops.neurons import touched_rows

_ops = torch.ops.fusedonemoe


def _sparse(touched: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        touched[None], rows.to(like.dtype), like.shape, is_coalesced=True, check_invariants=False, device=like.device
    )


def _uncompiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep a function from torch.compile, which after a graph break compiles what the broken frame calls.

    Dynamo is not imported for that.
    """
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


class _SparseNeurons(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str, impl: str
    ) -> Tensor:
        y: Tensor
        y, s = _ops.experts_neurons(x, experts, weights, down, up, activation, BUILD, impl)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, x, experts, weights, down, up)
        ctx.activation, ctx.impl = activation, impl
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 7
        s, x, experts, weights, down, up = ctx.saved_tensors
        touched, slots = touched_rows(experts, up.shape[0])
        x_needed, _, *needed, _, _ = ctx.needs_input_grad
        needs = (x_needed, *needed)
        rule = (ctx.activation, needs, BUILD, ctx.impl, slots, touched.shape[0])
        cast = (s, x.to(dy.dtype), experts, weights, down.to(dy.dtype), up.to(dy.dtype))
        dx, dweights, ddown, dup = _ops.experts_neurons_backward(dy, *cast, *rule)
        return (
            dx.to(x.dtype) if needs[0] else None,
            None,
            dweights if needs[1] else None,
            _sparse(touched, ddown, down) if needs[2] else None,
            _sparse(touched, dup, up) if needs[3] else None,
            None,
            None,
        )


class _SparseValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts: Tensor, weights: Tensor, table: Tensor, impl: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(experts, weights, table)
        ctx.impl = impl
        y: Tensor = _ops.experts_values(experts, weights, table, BUILD, impl)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 4
        experts, weights, table = ctx.saved_tensors
        touched, slots = touched_rows(experts, table.shape[0])
        _, *needs, _ = ctx.needs_input_grad
        rule = (needs, BUILD, ctx.impl, slots, touched.shape[0])
        dweights, dtable = _ops.experts_values_backward(dy, experts, weights, table.to(dy.dtype), *rule)
        return None, dweights if needs[0] else None, _sparse(touched, dtable, table) if needs[1] else None, None


def experts_neurons_sparse(
    x: Tensor, experts: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str, impl: str
) -> Tensor:
    """The first output of the operator ``experts_neurons``; the gradients of ``down`` and ``up`` are coalesced sparse tensors."""
    return _uncompiled(_SparseNeurons.apply)(x, experts, weights, down, up, activation, impl)


def experts_values_sparse(experts: Tensor, weights: Tensor, table: Tensor, impl: str) -> Tensor:
    """The output of the operator ``experts_values``; the gradient of ``table`` is a coalesced sparse tensor."""
    return _uncompiled(_SparseValues.apply)(experts, weights, table, impl)
