"""The CPU kernels of the MLP over quantised weights as functions of tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.formats import GROUP_SIZES, QuantizedWeight
from fusedonemoe.ops.grouped import saved_rows
from fusedonemoe.ops.operands import Reader, check_dim, check_percent, reader_of
from fusedonemoe.ops.records import ACTIVATIONS, Activation, check_widths


def _new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on CPU one of the kernels' pool, whose large pages are read faster than torch's small ones."""
    if device.type != "cpu" or native.refusal(torch.float32, True) is not None:
        return torch.empty(shape, dtype=dtype, device=device)
    return native.new(shape, dtype)


def new_weight(
    shape: tuple[int, int, int], dtype: str, group_size: int, symmetric: bool, device: torch.device
) -> QuantizedWeight:
    """The tensors of a weight ``[E, O, I]``, uninitialised."""
    *rows, width = shape
    if dtype == "int8":
        return QuantizedWeight(_new(shape, torch.int8, device), _new((*rows,), torch.float32, device))
    groups = (*rows, width // group_size)
    zero_point = None if symmetric else _new(groups, torch.uint8, device)
    return QuantizedWeight(_new((*rows, width // 2), torch.uint8, device), _new(groups, torch.float32, device), zero_point)


def _read_weight(reader: Reader, name: str, weight: QuantizedWeight, shape: tuple[int, int, int]) -> QuantizedWeight:
    *rows, width = shape
    if weight.bits == 8:
        values, scale = reader.read(name, weight.values, shape, (torch.int8,)), (*rows,)
        return QuantizedWeight(values, reader.read(f"{name}_scale", weight.scale, scale, (torch.float32,)))
    group = weight.group_size
    if group not in GROUP_SIZES or width % group:
        raise ValueError(f"{name}_scale must have a scale for {GROUP_SIZES} inputs, got shape {tuple(weight.scale.shape)}")
    zero, groups = weight.zero_point, (*rows, width // group)
    return QuantizedWeight(
        reader.read(name, weight.values, (*rows, width // 2), (torch.uint8,)),
        reader.read(f"{name}_scale", weight.scale, groups, (torch.float32,)),
        None if zero is None else reader.read(f"{name}_zero", zero, groups, (torch.uint8,)),
    )


def _read(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
) -> tuple[Reader, tuple[Any, ...]]:
    reader = reader_of(x_TD)
    for name, weight in (("up", up), ("down", down)):
        check_dim(name, weight.values, 3)
        check_dim(f"{name}_scale", weight.scale, 2 if weight.bits == 8 else 3)
    (T, D), (E, G, _), F = x_TD.shape, up.shape, down.shape[2]
    check_widths(G, F, act)
    if _width_of_bits(up)[0] != down.bits or (down.bits == 4 and up.group_size != down.group_size):
        raise ValueError("down must have the bits and the group size of up")
    experts_TK, weights_TK = reader.routing(experts_TK, weights_TK, T)
    return reader, (
        reader.read("x", x_TD, (T, D)),
        experts_TK,
        weights_TK,
        _read_weight(reader, "up", up, (E, G, D)),
        _read_weight(reader, "down", down, (E, D, F)),
        reader.read_optional("up_bias", up_bias_EG, (E, G)),
        reader.read_optional("down_bias", down_bias_ED, (E, D)),
    )


def experts_mlp_checked(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`experts_mlp` of operands that nobody has looked at: the tensors, the activation and the percentage."""
    check_percent(args[8])
    return experts_mlp(*_read(*args[:8])[1], *args[7:])


def _sizes(experts_TK: Tensor, up: QuantizedWeight, down: QuantizedWeight, act: Activation) -> tuple[int, ...]:
    E, G, D = up.shape
    F = down.shape[2]
    return (*experts_TK.shape, E, D, F, G, *native.gate_up_rows(act, F))


def _width_of_bits(up: QuantizedWeight) -> tuple[int, int]:
    return up.bits, up.group_size


def experts_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    save_percent: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fusedonemoe.ops.quantized.experts_mlp`, in one kernel."""
    N, (E, G, _) = experts_TK.numel(), up.shape
    y_TD = native.new(x_TD.shape, x_TD.dtype)
    kept = saved_rows(N, save_percent)
    z = native.new((kept, G), x_TD.dtype)
    order, offsets = torch.empty(N, dtype=torch.int32, device="cpu"), torch.empty(E + 1, dtype=torch.int32, device="cpu")
    if N == 0:
        return y_TD, z, order, offsets.zero_()
    _run_forward(x_TD, experts_TK, weights_TK, up, down, up_bias_EG, down_bias_ED, act, y_TD, z, order, offsets, (0, kept))
    return y_TD, z, order, offsets


def _run_forward(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    y_TD: Tensor | None,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    rows: tuple[int, int],
) -> None:
    x_TD, ids, weights_TK = x_TD.contiguous(), native.as_ids(experts_TK), native.as_float_weights(weights_TK)
    up_bias_EG, down_bias_ED = native.as_bias(up_bias_EG), native.as_bias(down_bias_ED)
    native.call(
        "quantized_forward",
        x_TD.dtype,
        (
            *native.addresses(x_TD, *up, *down, up_bias_EG, down_bias_ED, ids, weights_TK, y_TD, z, order, offsets),
            *_sizes(experts_TK, up, down, act),
            *(*rows, native.threads(experts_TK.numel(), *up.shape[1:]), ACTIVATIONS.index(act.name), *_width_of_bits(up)),
        ),
        (act.alpha, act.limit),
    )


def experts_mlp_backward(
    dy_TD: Tensor,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    act: Activation,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fusedonemoe.ops.quantized.experts_mlp_backward`, in one kernel (two where rows of z were not kept)."""
    reader, operands = _read(x_TD, experts_TK, weights_TK, up, down, up_bias_EG, down_bias_ED, act)
    x_TD, experts_TK, weights_TK, up, down, up_bias_EG, down_bias_ED = operands
    dtype, N = x_TD.dtype, experts_TK.numel()
    z = reader.saved(z, N, up.shape[1])
    dy_TD = reader.read("dy", dy_TD, x_TD.shape)
    order, offsets = reader.plan(order, offsets, experts_TK, up.shape[0])
    if z.shape[0] != N:
        full = native.new((N, up.shape[1]), dtype)
        full[: z.shape[0]] = z
        rows = (z.shape[0], N)
        _run_forward(x_TD, experts_TK, weights_TK, up, down, up_bias_EG, down_bias_ED, act, None, full, order, offsets, rows)
        z = full
    ids, float_weights = native.as_ids(experts_TK), native.as_float_weights(weights_TK)
    gradients = native.new_gradients(needs, x_TD, weights_TK, up_bias_EG, down_bias_ED)
    native.call(
        "quantized_backward",
        dtype,
        (
            *native.addresses(dy_TD, z, *up, *down, down_bias_ED, ids, float_weights, order, offsets, *gradients),
            *_sizes(experts_TK, up, down, act),
            *(native.threads(N, *up.shape[1:]), ACTIVATIONS.index(act.name), *_width_of_bits(up)),
        ),
        (act.alpha, act.limit),
    )
    return native.returned(gradients, x_TD, weights_TK.dtype)  # type: ignore[return-value]
