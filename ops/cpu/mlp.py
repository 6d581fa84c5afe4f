"""The CPU kernels of experts that are MLPs as functions of a call: one forward and one backward for every weight format."""

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.formats import INT4, INT8, PANELS, PLAIN, TRANSPOSED, QuantizedWeight
from fusedonemoe.ops.formats.panels import PanelHome, check_panels
from fusedonemoe.ops.grouped import saved_rows
from fusedonemoe.ops.operands import MOST_ROWS, check_percent
from fusedonemoe.ops.records import ACTIVATIONS, ExpertsCall, ExpertsGradients, ExpertsNeeds, SavedRows
from fusedonemoe.ops.records import PLAIN as WITHOUT_GATE

# The number of each format in native/formats.h. Both strides of plain weights have one: the kernels read contiguous ones, and a
# dimension of size 1 may have any stride.
NUMBERS = {PLAIN.name: 0, TRANSPOSED.name: 0, PANELS.name: 1, INT8.name: 2, INT4.name: 3}


def _block(call: ExpertsCall) -> tuple[tuple[Tensor | None, ...], int, tuple[int, ...]]:
    """Return the parts that both argument blocks have: the tensors of the weights, threads, and sizes as in native/mlp.h.

    A weight has values, scales and zeros, each contiguous, and None where it has none.
    """
    up, down, act = call.form
    (E, G, D), F, group = up.shape, down.shape[2], 0
    T, K = call.experts.shape
    if len(up.tensors) == 1:
        weights: tuple[Tensor | None, ...] = (up.tensors[0], None, None, down.tensors[0], None, None)
    else:
        weights = (*up.tensors, *down.tensors)
        group = QuantizedWeight(*up.tensors).group_size
    # Of a few tokens, Python is a large share of the time: no function is called that is not needed.
    threads = 1 if T * K * G * D < 2 * native.PRODUCTS_PER_THREAD else native.threads(T * K, G, D)
    kind = ACTIVATIONS.index(act.name), NUMBERS[up.format.name], group
    return weights, threads, (T, K, E, D, F, G, *native.gate_up_rows(act.layout, F), *kind)


def _run_forward(
    call: ExpertsCall, y_TD: Tensor | None, z: Tensor | None, order: int, offsets: int, first_row: int, last_row: int
) -> None:
    x_TD, ids, weights_TK, (up, down, act) = call
    x_TD, up_bias_EG, down_bias_ED = x_TD.contiguous(), up.bias, down.bias
    if ids.dtype is not torch.int64 or not ids.is_contiguous():
        ids = native.read_as(ids, torch.int64)
    if weights_TK.dtype is not torch.float32 or not weights_TK.is_contiguous():
        weights_TK = native.read_as(weights_TK, torch.float32)
    if up_bias_EG is not None:
        up_bias_EG = up_bias_EG.contiguous()
    if down_bias_ED is not None:
        down_bias_ED = down_bias_ED.contiguous()
    weights, threads, sizes = _block(call)
    native.call(
        "mlp_forward",
        x_TD.dtype,
        (
            *native.addresses(x_TD, *weights, up_bias_EG, down_bias_ED, ids, weights_TK, y_TD, z),
            *(order, offsets, first_row, last_row, threads),
            *sizes,
        ),
        (act.alpha, act.limit),
    )


def experts_mlp_checked(call: ExpertsCall, save_percent: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`experts_mlp` of a call that nothing has checked."""
    check_percent(save_percent)
    _, call = call.read()
    return experts_mlp(call, save_percent)


def experts_mlp(call: ExpertsCall, save_percent: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`fusedonemoe.ops.mlp.experts_mlp` in one kernel."""
    x_TD, N, (E, G, _) = call.x, call.experts.numel(), call.form.up.shape
    y_TD = native.new(x_TD.shape, x_TD.dtype)
    kept = N if save_percent == 100 else saved_rows(N, save_percent)
    z = native.new((kept, G), x_TD.dtype)
    order = torch.empty(N, dtype=torch.int32, device="cpu")
    offsets = torch.empty(E + 1, dtype=torch.int32, device="cpu")
    if N == 0:
        return y_TD, z, order, offsets.zero_()
    _run_forward(call, y_TD, z, order.data_ptr(), offsets.data_ptr(), 0, kept)
    return y_TD, z, order, offsets


def experts_mlp_output(call: ExpertsCall) -> Tensor:
    """Return the first output of :func:`experts_mlp`, for calls that need no backward."""
    x_TD, N, E = call.x, call.experts.numel(), call.form.up.shape[0]
    y_TD = native.new(x_TD.shape, x_TD.dtype)
    if N:
        order_and_offsets = torch.empty(N + E + 1, dtype=torch.int32, device="cpu")
        address = order_and_offsets.data_ptr()
        _run_forward(call, y_TD, None, address, address + 4 * N, 0, 0)
    return y_TD


def experts_mlp_packed(call: ExpertsCall) -> Tensor:
    """:func:`experts_mlp_output` of panels that nothing has checked."""
    x_TD, _, _, (up, down, act) = call
    E, G, D = up.shape
    for name, panels, home in (
        ("packed_up", up.floats, PanelHome(G, D, act.layout)),
        ("packed_down", down.floats, PanelHome(D, down.shape[2], WITHOUT_GATE)),
    ):
        if panels.dtype != x_TD.dtype:
            raise TypeError(f"{name} must have the dtype of x ({x_TD.dtype}), got {panels.dtype}")
        check_panels(name, panels, home)
    if down.floats.shape[0] != E:
        raise ValueError(f"packed_down must have as many experts as packed_up ({E}), got {down.floats.shape[0]}")
    return experts_mlp_output(call)


def _new_gradients(call: ExpertsCall, needs: ExpertsNeeds) -> ExpertsGradients:
    """Return an uninitialised tensor for each gradient that is wanted, in the dtype of x; of the weights in float32."""
    up, down, _ = call.form
    dtype, made = call.x.dtype, list(ExpertsGradients())
    shapes = (call.x.shape, call.weights.shape, up.shape, down.shape, up.shape[:2], down.shape[:2])
    present = (True, True, True, True, up.bias is not None, down.bias is not None)
    for place, (shape, is_present) in enumerate(zip(shapes, present, strict=True)):
        if needs[place] and is_present:
            made[place] = native.new(tuple(shape), torch.float32 if place == 1 else dtype)
    return tuple.__new__(ExpertsGradients, made)


def _is_as_saved(dy_TD: Tensor, saved: SavedRows, call: ExpertsCall) -> bool:
    """Return whether a backward got what a forward with plain weights saved, in full: most do, and have nothing to read."""
    x_TD, experts_TK, weights_TK, (up, down, act) = call
    (z, order, offsets), dtype = saved, x_TD.dtype
    if x_TD.dim() != 2 or experts_TK.dim() != 2 or up.format is not PLAIN or down.format is not PLAIN:
        return False
    (T, D), K, (E, G, _), F = x_TD.shape, experts_TK.shape[1], up.shape, down.shape[2]
    if K < 1 or T * K > MOST_ROWS or (F if act.layout == WITHOUT_GATE else 2 * F) != G:
        return False
    return native.as_saved(
        dtype,
        (
            (dy_TD, dtype, (T, D)),
            (z, dtype, (T * K, G)),
            (order, torch.int32, (T * K,)),
            (offsets, torch.int32, (E + 1,)),
            (x_TD, dtype, (T, D)),
            (experts_TK, torch.int64, (T, K)),
            (weights_TK, torch.float32, (T, K)),
            (up.tensors[0], dtype, (E, G, D)),
            (down.tensors[0], dtype, (E, D, F)),
            (up.bias, dtype, (E, G)),
            (down.bias, dtype, (E, D)),
        ),
    )


def experts_mlp_backward(dy_TD: Tensor, saved: SavedRows, call: ExpertsCall, needs: ExpertsNeeds) -> ExpertsGradients:
    """Run :func:`fusedonemoe.ops.mlp.experts_mlp_backward` in one kernel (two where rows of z were not kept).

    Autograd may have kept the tensors in other strides, and nothing has checked them.
    """
    weights_dtype, dy_TD = call.weights.dtype, dy_TD.contiguous()  # that of a sum is expanded
    if not _is_as_saved(dy_TD, saved, call):
        dy_TD, saved, call = _read(dy_TD, saved, call)
    (z, order, offsets), (x_TD, ids, weights_TK, (_, down, act)) = saved, call
    gradients = _new_gradients(call, needs)
    dx, dweights, dup, ddown, dup_bias, ddown_bias, *_ = gradients
    weights, threads, sizes = _block(call)
    addresses = native.addresses(
        *(dy_TD, z, x_TD, *weights, down.bias, ids, weights_TK, order, offsets),
        *(dx, dweights, dup, ddown, dup_bias, ddown_bias),
    )
    native.call("mlp_backward", x_TD.dtype, (*addresses, threads, *sizes), (act.alpha, act.limit))
    if dweights is not None and weights_dtype is not torch.float32:
        return gradients._replace(weights=dweights.to(weights_dtype))
    return gradients


def _read(dy_TD: Tensor, saved: SavedRows, call: ExpertsCall) -> tuple[Tensor, SavedRows, ExpertsCall]:
    """Check the operands of a backward, and return them as its kernel reads them, with all rows of z."""
    reader, call = call.read()
    x_TD, experts_TK, weights_TK, form = call
    (_, G, _), N = form.up.shape, experts_TK.numel()
    z, order, offsets = reader.rows(*saved, experts_TK, form.up.shape)
    dy_TD = reader.read("dy", dy_TD, x_TD.shape)
    if z.shape[0] != N:
        full = native.new((N, G), x_TD.dtype)
        full[: z.shape[0]] = z
        _run_forward(call, None, full, order.data_ptr(), offsets.data_ptr(), z.shape[0], N)
        z = full
    ids, float_weights = native.read_as(experts_TK, torch.int64), native.read_as(weights_TK, torch.float32)
    return dy_TD, SavedRows(z, order, offsets), ExpertsCall(x_TD, ids, float_weights, form)
