"""The CPU kernels of single-neuron experts and of value memory as functions of tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.operands import INTEGERS, Reader, reader_of
from fusedonemoe.ops.records import ACTIVATIONS


def _sizes(experts_TK: Tensor, table_ED: Tensor, activation: str) -> tuple[int, ...]:
    E, D = table_ED.shape
    return (*experts_TK.shape, E, D, native.threads(experts_TK.numel(), D), ACTIVATIONS.index(activation))


def _read(
    x_TD: Tensor | None, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor | None, up_ED: Tensor
) -> tuple[Reader, tuple[Any, ...]]:
    """The operands; without x and the first table, those of value memory."""
    reader = reader_of(up_ED, "up" if down_ED is not None else "table")
    experts_TK, weights_TK = reader.routing(experts_TK, weights_TK)
    T, (E, D) = experts_TK.shape[0], up_ED.shape
    return reader, (
        reader.read_optional("x", x_TD, (T, D)),
        experts_TK,
        weights_TK,
        reader.read_optional("down", down_ED, (E, D)),
        reader.read("up" if down_ED is not None else "table", up_ED, (E, D)),
    )


def experts_neurons_checked(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """:func:`experts_neurons` of operands that nobody has looked at."""
    _, (x_TD, experts_TK, weights_TK, down_ED, up_ED) = _read(x_TD, experts_TK, weights_TK, down_ED, up_ED)
    return experts_neurons(x_TD, experts_TK, weights_TK, down_ED, up_ED, activation)


def experts_values_checked(experts_TK: Tensor, weights_TK: Tensor, table_ED: Tensor) -> Tensor:
    """:func:`experts_values` of operands that nobody has looked at."""
    _, experts_TK, weights_TK, _, table_ED = _read(None, experts_TK, weights_TK, None, table_ED)[1]
    return experts_values(experts_TK, weights_TK, table_ED)


def _forward(
    x_TD: Tensor | None,
    experts_TK: Tensor,
    weights_TK: Tensor,
    down_ED: Tensor | None,
    up_ED: Tensor,
    activation: str,
    s_TK: Tensor | None,
) -> Tensor:
    ids, weights_TK = native.as_ids(experts_TK), native.as_float_weights(weights_TK)
    x_TD = None if x_TD is None else x_TD.contiguous()
    y_TD = native.new((ids.shape[0], up_ED.shape[1]), up_ED.dtype)
    if ids.shape[0]:
        addresses = native.addresses(x_TD, down_ED, up_ED, ids, weights_TK, y_TD, s_TK)
        native.call("neurons_forward", up_ED.dtype, (*addresses, *_sizes(ids, up_ED, activation)))
    return y_TD


def experts_neurons(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.neurons.experts_neurons` in one kernel."""
    s_TK = torch.empty(experts_TK.shape, dtype=torch.float32, device="cpu")
    return _forward(x_TD, experts_TK, weights_TK, down_ED, up_ED, activation, s_TK), s_TK


def experts_neurons_output(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str
) -> Tensor:
    """The first output of :func:`experts_neurons`, for who needs no backward."""
    return _forward(x_TD, experts_TK, weights_TK, down_ED, up_ED, activation, None)


def experts_values(experts_TK: Tensor, weights_TK: Tensor, table_ED: Tensor) -> Tensor:
    """Run :func:`fusedonemoe.ops.neurons.experts_values` in one kernel."""
    return _forward(None, experts_TK, weights_TK, None, table_ED, "identity", None)


def _backward(
    dy_TD: Tensor,
    s_TK: Tensor | None,
    x_TD: Tensor | None,
    experts_TK: Tensor,
    weights_TK: Tensor,
    down_ED: Tensor | None,
    up_ED: Tensor,
    activation: str,
    needs: Sequence[bool],
    slots_TK: Tensor | None,
    num_slots: int,
) -> tuple[Tensor, ...]:
    reader, (x_TD, experts_TK, weights_TK, down_ED, up_ED) = _read(x_TD, experts_TK, weights_TK, down_ED, up_ED)
    dy_TD = reader.read("dy", dy_TD, (experts_TK.shape[0], up_ED.shape[1]))
    if s_TK is not None:
        s_TK = reader.read("s", s_TK, experts_TK.shape, (torch.float32,))
    if slots_TK is not None:
        slots_TK = native.as_ids(reader.read("slots", slots_TK, experts_TK.shape, INTEGERS))
    if num_slots < 0:
        raise ValueError(f"num_slots must be at least 0, got {num_slots}")
    ids, float_weights = native.as_ids(experts_TK), native.as_float_weights(weights_TK)
    likes = (x_TD, float_weights, down_ED, up_ED)
    shapes = [None if like is None else tuple(like.shape) for like in likes]
    if slots_TK is not None:
        shapes[2:] = [(num_slots, up_ED.shape[1])] * 2
    gradients = [
        native.new(shape, like.dtype) if needed and like is not None and shape is not None else None
        for needed, like, shape in zip(needs, likes, shapes, strict=True)
    ]
    if ids.shape[0]:
        # No slot at all: there is no row to write.
        written = gradients if slots_TK is None or num_slots else (*gradients[:2], None, None)
        addresses = native.addresses(dy_TD, s_TK, x_TD, down_ED, up_ED, ids, float_weights, *written, slots_TK)
        native.call("neurons_backward", up_ED.dtype, (*addresses, *_sizes(ids, up_ED, activation), max(num_slots, 1)))
    else:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    return native.returned(gradients, up_ED, weights_TK.dtype)


def experts_neurons_backward(
    dy_TD: Tensor,
    s_TK: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    needs: Sequence[bool],
    slots_TK: Tensor | None = None,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.neurons.experts_neurons_backward` in one kernel."""
    arguments = (dy_TD, s_TK, x_TD, experts_TK, weights_TK, down_ED, up_ED, activation, needs)
    return _backward(*arguments, slots_TK, num_slots)  # type: ignore[return-value]


def experts_values_backward(
    dy_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    table_ED: Tensor,
    needs: Sequence[bool],
    slots_TK: Tensor | None = None,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.neurons.experts_values_backward` in one kernel."""
    of_neurons = (False, needs[0], False, needs[1])
    arguments = (dy_TD, None, None, experts_TK, weights_TK, None, table_ED, "identity", of_neurons)
    _, dweights, _, dtable = _backward(*arguments, slots_TK, num_slots)
    return dweights, dtable
