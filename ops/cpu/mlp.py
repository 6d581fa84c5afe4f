"""The CPU kernels of experts that are MLPs as functions of a call: one forward and one backward for every weight format."""

import torch
from torch import Tensor

from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.formats import INT4, INT8, PANELS, PLAIN, TRANSPOSED, QuantizedWeight
from fusedonemoe.ops.formats.panels import PanelHome, check_panels
from fusedonemoe.ops.grouped import saved_rows
from fusedonemoe.ops.operands import check_percent
from fusedonemoe.ops.records import ACTIVATIONS, ExpertsCall, ExpertsForm, ExpertsGradients, ExpertsNeeds, SavedRows
from fusedonemoe.ops.records import PLAIN as WITHOUT_GATE

# The number of each format in native/formats.h. Both strides of plain weights have one: the kernels read contiguous ones, and a
# dimension of size 1 may have any stride.
NUMBERS = {PLAIN.name: 0, TRANSPOSED.name: 0, PANELS.name: 1, INT8.name: 2, INT4.name: 3}


def _weights(form: ExpertsForm) -> tuple[Tensor | None, ...]:
    """Return the tensors of both weights, which must be contiguous: values, scales and zeros of each, None where it has none."""
    up, down = form.up.tensors, form.down.tensors
    if len(up) == 1:
        return (up[0], None, None, down[0], None, None)
    return (*up, *down)


def _sizes(call: ExpertsCall) -> tuple[int, ...]:
    """Return the sizes of an MLP as native/mlp.h has them."""
    up, down, act = call.form
    (E, G, D), F, name = up.shape, down.shape[2], up.format.name
    group = QuantizedWeight(*up.tensors).group_size if len(up.tensors) > 1 else 0  # type: ignore[arg-type]
    kind = ACTIVATIONS.index(act.name), NUMBERS[name], group
    return (*call.experts.shape, E, D, F, G, *native.gate_up_rows(act.layout, F), *kind)


def _run_forward(
    call: ExpertsCall, y_TD: Tensor | None, z: Tensor | None, order: int, offsets: int, first_row: int, last_row: int
) -> None:
    x_TD, experts_TK, weights_TK, form = call
    x_TD, ids = x_TD.contiguous(), native.read_as(experts_TK, torch.int64)
    weights_TK = native.read_as(weights_TK, torch.float32)
    up, down, act = form
    up_bias_EG = None if up.bias is None else up.bias.contiguous()
    down_bias_ED = None if down.bias is None else down.bias.contiguous()
    _, G, D = up.shape
    native.call(
        "mlp_forward",
        x_TD.dtype,
        (
            *native.addresses(x_TD, *_weights(form), up_bias_EG, down_bias_ED, ids, weights_TK, y_TD, z),
            *(order, offsets, first_row, last_row, native.threads(experts_TK.numel(), G, D)),
            *_sizes(call),
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
    kept = saved_rows(N, save_percent)
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
    dtype = call.x.dtype

    def new(needed: bool, shape: tuple[int, ...], dtype: torch.dtype = dtype) -> Tensor | None:
        return native.new(tuple(shape), dtype) if needed else None

    return ExpertsGradients(
        new(needs.x, call.x.shape),
        new(needs.weights, call.weights.shape, torch.float32),
        new(needs.up, up.shape),
        new(needs.down, down.shape),
        new(needs.up_bias and up.bias is not None, up.shape[:2]),
        new(needs.down_bias and down.bias is not None, down.shape[:2]),
    )


def experts_mlp_backward(dy_TD: Tensor, saved: SavedRows, call: ExpertsCall, needs: ExpertsNeeds) -> ExpertsGradients:
    """Run :func:`fusedonemoe.ops.mlp.experts_mlp_backward` in one kernel (two where rows of z were not kept).

    Autograd may have kept the tensors in other strides, and nothing has checked them.
    """
    reader, call = call.read()
    x_TD, experts_TK, weights_TK, form = call
    up, down, act = form
    (_, G, D), N = up.shape, experts_TK.numel()
    z, order, offsets = reader.rows(*saved, experts_TK, up.shape)
    dy_TD = reader.read("dy", dy_TD, x_TD.shape)
    if z.shape[0] != N:
        full = native.new((N, G), x_TD.dtype)
        full[: z.shape[0]] = z
        _run_forward(call, None, full, order.data_ptr(), offsets.data_ptr(), z.shape[0], N)
        z = full
    ids, float_weights = native.read_as(experts_TK, torch.int64), native.read_as(weights_TK, torch.float32)
    gradients = _new_gradients(call, needs)
    dx, dweights, dup, ddown, dup_bias, ddown_bias, *_ = gradients
    native.call(
        "mlp_backward",
        x_TD.dtype,
        (
            *native.addresses(dy_TD, z, x_TD, *_weights(form), down.bias, ids, float_weights, order, offsets),
            *native.addresses(dx, dweights, dup, ddown, dup_bias, ddown_bias),
            native.threads(N, G, D),
            *_sizes(call),
        ),
        (act.alpha, act.limit),
    )
    return gradients if dweights is None else gradients._replace(weights=dweights.to(weights_TK.dtype))
