"""The formulation for export: operators of torch that have a form in ONNX and in AOTInductor's C++, and none of ours.

Grouped products are in neither, so experts are batches of ordinary ones. ``N = T * K`` routed rows go one of two ways:

- Few rows, ``2 N <= E``: each row brings its expert's weights, a gathered copy of at most half of them all.
- More: every expert is a batch of ``C = max(2, rows of the fullest expert)`` rows. C alone is read from the data.

The number of tokens may be a symbol of the graph, which then holds both ways. Autograd differentiates all of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.dense import experts_merged_dense
from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.plan import in_range
from fusedonemoe.ops.precision import row_dtype, sum_dtype
from fusedonemoe.ops.records import PLAIN, Activation, ExpertsCall


def few_rows(rows: int, num_experts: int) -> bool:
    """Return whether ``rows = T * K`` rows bring their experts' weights; a condition of the graph where rows is a symbol."""
    return 2 * rows <= num_experts


def _make_slots(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Lay every expert's rows side by side, with room in each for those of the fullest: C rows.

    Returns the token of each slot, T for an empty one, ``[E * C]``, and each flattened row's slot, ``E * C`` if out of range.
    """
    (T, K), device = experts_TK.shape, experts_TK.device
    N = T * K
    ids = torch.where(in_range(experts_TK, num_experts), experts_TK.to(torch.int64), num_experts).reshape(-1)
    position = torch.arange(N, device=device)
    # No two of these keys are equal, so the sort need not be stable: ONNX has no form for one that is.
    order = torch.sort(ids * N + position).indices
    sorted_ids = ids.index_select(0, order)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add(0, ids, torch.ones_like(ids))
    starts = counts.cumsum(0) - counts
    # Two at least: compilers ask of a size whether it is 1, and of this one they can know it.
    capacity: Any = counts[:num_experts].max().clamp(min=2).item()  # a symbol while it is traced
    torch._check(capacity >= 2)
    sorted_slot = sorted_ids * capacity + position - starts.index_select(0, sorted_ids)
    end = num_experts * capacity
    sorted_slot = torch.where(sorted_ids < num_experts, sorted_slot, end)
    token = torch.full((end + 1,), T, dtype=torch.int64, device=device).scatter(0, sorted_slot, order // K)
    return token[:-1], torch.zeros_like(order).scatter(0, order, sorted_slot)


def _with_zero_row(rows: Tensor) -> Tensor:
    """Zeros beyond the end, for empty slots."""
    return torch.cat((rows, rows.new_zeros(1, rows.shape[1])))


def _summed(out_TKD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """``sum_j w_tj out_tj``, in float32 at least, over the ids in range."""
    wide = sum_dtype(weights_TK.dtype, dtype)
    weights_TK1 = weights_TK[:, :, None].to(wide)
    routed_TK1 = in_range(experts_TK, num_experts)[:, :, None]
    # Both factors are masked: each is the gradient of the other.
    return (torch.where(routed_TK1, weights_TK1, 0) * torch.where(routed_TK1, out_TKD.to(wide), 0)).sum(1).to(dtype)


def _mix(
    apply: Callable[..., Tensor], x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, parameters: tuple[Tensor, ...]
) -> Tensor:
    """``sum_j w_tj apply(x_t, parameters of expert e_tj)`` with parameters ``[E, ...]``.

    ``apply`` takes rows ``[B, C, D]``, zero where not routed, the mask ``[B, C, 1]`` of the routed, and B experts' parameters.
    """
    E, dtype = parameters[0].shape[0], row_dtype(x_TD.dtype)

    def few(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *parameters: Tensor) -> Tensor:
        routed_TK = in_range(experts_TK, E)
        ids = torch.where(routed_TK, experts_TK.to(torch.int64), 0).reshape(-1)
        rows_TKD = torch.where(routed_TK[:, :, None], x_TD.to(dtype)[:, None, :], 0)
        rows_N1D, routed_N11 = rows_TKD.reshape(-1, 1, x_TD.shape[1]), routed_TK.reshape(-1, 1, 1)
        out_N1D = apply(rows_N1D, routed_N11, *(parameter.index_select(0, ids).to(dtype) for parameter in parameters))
        out_TKD = out_N1D.reshape(*experts_TK.shape, out_N1D.shape[2])
        return _summed(out_TKD, experts_TK, weights_TK, E, x_TD.dtype)

    def many(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *parameters: Tensor) -> Tensor:
        token, slot = _make_slots(experts_TK, E)
        rows_ECD = _with_zero_row(x_TD.to(dtype)).index_select(0, token).reshape(E, -1, x_TD.shape[1])
        routed_EC1 = (token < x_TD.shape[0]).reshape(E, -1, 1)
        out_ECD = apply(rows_ECD, routed_EC1, *(parameter.to(dtype) for parameter in parameters))
        out_SD = _with_zero_row(out_ECD.reshape(-1, out_ECD.shape[2]))
        out_TKD = out_SD.index_select(0, slot).reshape(*experts_TK.shape, out_SD.shape[1])
        return _summed(out_TKD, experts_TK, weights_TK, E, x_TD.dtype)

    operands = (x_TD, experts_TK, weights_TK, *parameters)
    are_few = few_rows(experts_TK.shape[0] * experts_TK.shape[1], E)
    if is_exporting() and (torch.compiler.is_dynamo_compiling() or not isinstance(are_few, bool)):
        result: Tensor = torch.cond(are_few, few, many, operands)
        return result
    return few(*operands) if are_few else many(*operands)


def experts_mlp_portable(call: ExpertsCall) -> Tensor:
    """``y_t = sum_j w_tj down_e(act(up_e(x_t)))``, ``e = experts_tj``, of experts of floats. ``[T, D]`` in the dtype of x.

    Pre-activations are 0 where nothing is routed, as in :mod:`fusedonemoe.ops.dense`.
    """
    x_TD, experts_TK, weights_TK, (up, down, act) = call
    has_up_bias, has_down_bias = up.bias is not None, down.bias is not None

    def apply(rows_BCD: Tensor, routed_BC1: Tensor, up_BGD: Tensor, down_BDF: Tensor, *biases: Tensor) -> Tensor:
        z_BCG = torch.bmm(rows_BCD, up_BGD.transpose(1, 2))
        if has_up_bias:
            z_BCG = z_BCG + biases[0][:, None, :]
        z_BCG = torch.where(routed_BC1, z_BCG, 0)
        out_BCD = torch.bmm(activate(z_BCG, act).to(rows_BCD.dtype), down_BDF.transpose(1, 2))
        return out_BCD + biases[-1][:, None, :] if has_down_bias else out_BCD

    biases = tuple(bias for bias in (up.bias, down.bias) if bias is not None)
    return _mix(apply, x_TD, experts_TK, weights_TK, (up.floats, down.floats, *biases))


def experts_merged_portable(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, proj_EDF: Tensor) -> Tensor:
    """``h_t = sum_j w_tj (x_t W_e)``. ``[T, F]``; one plain product where a token takes all experts."""
    if proj_EDF.shape[0] <= experts_TK.shape[1]:
        return experts_merged_dense(x_TD, experts_TK, weights_TK, proj_EDF)

    return _mix(lambda rows, _, proj: torch.bmm(rows, proj), x_TD, experts_TK, weights_TK, (proj_EDF,))


def _table_rows(experts_TK: Tensor, table_ED: Tensor) -> Tensor:
    """``[T, K, D]`` in float32 at least; zeros where an id is out of range, whatever stands in row 0."""
    routed_TK = in_range(experts_TK, table_ED.shape[0])
    ids = torch.where(routed_TK, experts_TK.to(torch.int64), 0).reshape(-1)
    rows_TKD = table_ED.index_select(0, ids).reshape(*experts_TK.shape, table_ED.shape[1])
    return torch.where(routed_TK[:, :, None], rows_TKD, 0).to(sum_dtype(table_ED.dtype))


def experts_neurons_portable(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str
) -> Tensor:
    """``y_t = sum_j act(<x_t, d_e>) w_tj u_e``, from gathered copies of the rows, ``[T, K, D]`` of each table."""
    down_TKD = _table_rows(experts_TK, down_ED)
    routed_TK = in_range(experts_TK, up_ED.shape[0])
    s_TK = torch.where(routed_TK, torch.bmm(down_TKD, x_TD.to(down_TKD.dtype)[:, :, None])[:, :, 0], 0)
    h_TK = activate(s_TK, Activation(activation, PLAIN, 0.0, 0.0))
    weights_TK = torch.where(routed_TK, weights_TK, 0).to(h_TK.dtype)
    return _weighted_rows(h_TK * weights_TK, experts_TK, up_ED).to(x_TD.dtype)


def experts_values_portable(experts_TK: Tensor, weights_TK: Tensor, table_ED: Tensor) -> Tensor:
    """``y_t = sum_j w_tj v_e``, from a gathered copy of the rows."""
    weights_TK = torch.where(in_range(experts_TK, table_ED.shape[0]), weights_TK, 0)
    return _weighted_rows(weights_TK, experts_TK, table_ED).to(table_ED.dtype)


def _weighted_rows(coefficients_TK: Tensor, experts_TK: Tensor, table_ED: Tensor) -> Tensor:
    rows_TKD = _table_rows(experts_TK, table_ED)
    return torch.bmm(coefficients_TK.to(rows_TKD.dtype)[:, None, :], rows_TKD)[:, 0]
