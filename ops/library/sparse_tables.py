"""Single-neuron experts and value memory whose tables get sparse gradients: the rows that were touched, and no others.

How many these are depends on the data, so this serves eager calls and is no operator. Forward and backward are the operators';
the backward is told to write the tables' gradients in slots, one for each touched row. Autocast casts inside, as torch cannot
cast a sparse gradient back: the output's dtype is the one that was computed in.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.library.registration import BUILD, formula_of, recorder
from fusedonemoe.ops.library.rows import Operator
from fusedonemoe.ops.library.table import NEURONS, VALUES
from fusedonemoe.ops.neurons import touched_rows


def _sparse(touched: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        touched[None], rows.to(like.dtype), like.shape, is_coalesced=True, check_invariants=False, device=like.device
    )


def _with_sparse_tables(row: Operator) -> Callable[..., Tensor]:
    """Return the first output of an operator, with coalesced sparse gradients of its tables."""
    assert row.backward is not None
    names, wanted, tables = row.backward.signature.names, row.backward.gradients, row.backward.slotted
    operator, backward = (getattr(torch.ops.fusedonemoe, each.name) for each in (row, row.backward))

    def gradients_of(dy: Tensor, *rest: Any) -> list[Tensor | None]:
        given = dict(zip(names, (dy, *rest), strict=False))
        touched, slots = touched_rows(given["experts"], given[tables[0]].shape[0])
        cast = (value.to(dy.dtype) if name in row.casts else value for name, value in given.items())
        found: list[Tensor | None] = []
        for name, needed, gradient in zip(wanted, given["needs"], backward(*cast, slots, touched.shape[0]), strict=True):
            like = given[name]
            of_argument = _sparse(touched, gradient, like) if needed and name in tables else gradient.to(like.dtype)
            found.append(of_argument if needed else None)
        return found

    record = recorder(row, operator, formula_of(row, row.backward, gradients_of))

    def call(*arguments: Any) -> Tensor:
        *given, impl = arguments
        outputs = record(*given, BUILD, impl)
        return outputs[0] if len(row.results) > 1 else outputs

    def uncompiled(*arguments: Any) -> Tensor:
        # After a graph break torch.compile compiles what the broken frame calls. Dynamo is not imported for that.
        return (torch.compiler.disable(call) if "torch._dynamo" in sys.modules else call)(*arguments)

    return uncompiled


# Called with the operators' arguments and ``impl``.
experts_neurons_sparse: Callable[..., Tensor] = _with_sparse_tables(NEURONS)
experts_values_sparse: Callable[..., Tensor] = _with_sparse_tables(VALUES)
