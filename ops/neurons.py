"""Experts of one neuron, and of none (value memory): torch formulations, forward and hand-written backward.

Static graphs of PyTorch's own bags of embeddings, which read table rows in place: no gathered copy exists. Half precision is
computed on float32 copies of the tables, so that it rounds once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.ops.activation import activate, activate_backward
from fusedonemoe.ops.dense import routing_masks
from fusedonemoe.ops.plan import in_range
from fusedonemoe.ops.records import PLAIN, Activation

_SUM = 0  # embedding_bag's mode


class NeuronNeeds(NamedTuple):
    """The gradients of :func:`experts_neurons` that are wanted; one that is not wanted costs nothing."""

    x: bool
    weights: bool
    down: bool
    up: bool


class ValueNeeds(NamedTuple):
    """The gradients of :func:`experts_values` that are wanted."""

    weights: bool
    table: bool


class _Bags:
    """A routing as bags of table rows: one bag a token.

    An id out of range becomes the token's first in range (0, if it has none) with weight 0, so the token reads no other row.
    """

    def __init__(self, experts_TK: Tensor, num_experts: int) -> None:
        T, K = experts_TK.shape
        self.num_experts = num_experts
        self.routed_TK = in_range(experts_TK, num_experts)
        first_T1 = self.routed_TK.to(torch.int32).argmax(1, keepdim=True)
        own_TK = experts_TK.to(torch.int64)
        stand_in_T1 = own_TK.gather(1, first_T1)
        self.any_T1 = self.routed_TK.gather(1, first_T1)
        ids_TK = torch.where(self.routed_TK, own_TK, torch.where(self.any_T1, stand_in_T1, 0))
        self.ids = ids_TK.reshape(-1)
        self.offsets = torch.arange(T, device=experts_TK.device) * K
        self.token = torch.arange(T * K, device=experts_TK.device) // K

    def masked(self, values_TK: Tensor) -> Tensor:
        """``[T, K]`` with zeros where there is no expert, whatever stands there."""
        return torch.where(self.routed_TK, values_TK, 0)

    def sums(self, coefficients_TK: Tensor, table_ED: Tensor) -> Tensor:
        """``out_t = sum_j c_tj table_e``; zeros for a token without experts. ``[T, D]``."""
        if self.ids.shape[0] == 0:
            return table_ED.new_zeros(self.offsets.shape[0], table_ED.shape[1])
        coefficients = self.masked(coefficients_TK).to(table_ED.dtype).reshape(-1)
        out_TD = torch.ops.aten._embedding_bag_forward_only(table_ED, self.ids, self.offsets, False, _SUM, False, coefficients)[0]
        return torch.where(self.any_T1, out_TD, 0)

    def dots(self, rows_TD: Tensor, table_ED: Tensor) -> Tensor:
        """``out_tj = <rows_t, table_e>``. ``[T, K]``."""
        if self.ids.shape[0] == 0:
            return rows_TD.new_zeros(self.routed_TK.shape)
        gradient = torch.ops.aten._embedding_bag_per_sample_weights_backward
        out = gradient(rows_TD, table_ED, self.ids, self.offsets, self.token, _SUM)
        return self.masked(out.view(self.routed_TK.shape))

    def table_gradient(self, coefficients_TK: Tensor, rows_TD: Tensor) -> Tensor:
        """``out_e = sum c_tj rows_t`` over the rows of ``e``. ``[E, D]``."""
        if self.ids.shape[0] == 0 or self.num_experts == 0:
            return rows_TD.new_zeros(self.num_experts, rows_TD.shape[1])
        coefficients = self.masked(coefficients_TK).to(rows_TD.dtype)
        rows_TD = torch.where(self.any_T1, rows_TD, 0)  # 0 * inf would be NaN in row 0, which stands in
        bag_size = torch.full_like(self.offsets, self.routed_TK.shape[1])
        empty = self.offsets.new_empty(0)
        return torch.ops.aten._embedding_bag_dense_backward(
            rows_TD, self.ids, self.token, bag_size, empty, self.num_experts, False, _SUM, coefficients.reshape(-1)
        )


def touched_rows(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the table rows that a routing reads, for gradients of these alone: as many as the data says.

    Their ids, ascending, ``[U]``, and slots ``[T, K]``: the place of every id among them, -1 where it is out of range.
    """
    routed_TK = in_range(experts_TK, num_experts)
    touched, places = torch.unique(experts_TK.to(torch.int64)[routed_TK], sorted=True, return_inverse=True)
    slots_TK = torch.full(experts_TK.shape, -1, dtype=torch.int64, device=experts_TK.device)
    slots_TK[routed_TK] = places
    return touched, slots_TK


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _act(activation: str) -> Activation:
    return Activation(activation, PLAIN, 0.0, 0.0)


def experts_neurons(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """``s_tj = <x_t, down_e>``, ``y_t = sum_j act(s_tj) w_tj up_e``.

    Returns ``y_TD`` and ``s_TK`` in float32 (float64 for float64), 0 where an id is out of range.
    """
    bags = _Bags(experts_TK, up_ED.shape[0])
    s_TK = bags.dots(_wide(x_TD), _wide(down_ED))
    c_TK = activate(s_TK, _act(activation)) * weights_TK.to(s_TK.dtype)
    return bags.sums(c_TK, _wide(up_ED)).to(x_TD.dtype), s_TK


def experts_neurons_backward(
    dy_TD: Tensor,
    s_TK: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    needs: NeuronNeeds,
    slots_TK: Tensor | None = None,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that are needed; the others come back as tensors of size zero.

    With ``q = <dy, up_e>``: ``dw = q act(s)``, ``ds = q w act'(s)``, ``dx = sum_j ds down_e``, ``ddown_e = sum ds x`` and ``dup_e
    = sum w act(s) dy``. The tables' have a row for every expert, or for every slot of :func:`touched_rows`.
    """
    bags, act = _Bags(experts_TK, up_ED.shape[0]), _act(activation)
    owners = bags if slots_TK is None else _Bags(slots_TK, num_slots)
    dx, dweights, ddown, dup = (x_TD.new_empty(0) for _ in range(4))
    dy_TD, w_TK = _wide(dy_TD), weights_TK.to(s_TK.dtype)
    h_TK = activate(s_TK, act)
    if needs.x or needs.weights or needs.down:
        q_TK = bags.dots(dy_TD, _wide(up_ED))
        ds_TK = activate_backward(q_TK * w_TK, s_TK, act)
        if needs.weights:
            dweights = bags.masked(q_TK * h_TK).to(weights_TK.dtype)
        if needs.x:
            dx = bags.sums(ds_TK, _wide(down_ED)).to(x_TD.dtype)
        if needs.down:
            ddown = owners.table_gradient(ds_TK, _wide(x_TD)).to(down_ED.dtype)
    if needs.up:
        dup = owners.table_gradient(w_TK * h_TK, dy_TD).to(up_ED.dtype)
    return dx, dweights, ddown, dup


def experts_values(experts_TK: Tensor, weights_TK: Tensor, table_ED: Tensor) -> Tensor:
    """``y_t = sum_j w_tj table_e``. ``[T, D]`` in the dtype of the table."""
    return _Bags(experts_TK, table_ED.shape[0]).sums(weights_TK, _wide(table_ED)).to(table_ED.dtype)


def experts_values_backward(
    dy_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    table_ED: Tensor,
    needs: ValueNeeds,
    slots_TK: Tensor | None = None,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor]:
    """``dw = <dy, table_e>`` and ``dtable_e = sum w dy``, or tensors of size zero; slots as in the other backward."""
    bags = _Bags(experts_TK, table_ED.shape[0])
    dweights, dtable = dy_TD.new_empty(0), dy_TD.new_empty(0)
    dy_TD = _wide(dy_TD)
    if needs.weights:
        dweights = bags.dots(dy_TD, _wide(table_ED)).to(weights_TK.dtype)
    if needs.table:
        owners = bags if slots_TK is None else _Bags(slots_TK, num_slots)
        dtable = owners.table_gradient(weights_TK, dy_TD).to(table_ED.dtype)
    return dweights, dtable


def experts_neurons_dense(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str
) -> Tensor:
    """Compute :func:`experts_neurons` with every expert for every token, ``[T, K, E]`` masks and all: for small E.

    Tokens are zeros where they were not routed: zero times NaN is NaN, in the gradient of a row too.
    """
    x_wide = _wide(x_TD)
    weights_TE, routed_TE = routing_masks(experts_TK, weights_TK.to(x_wide.dtype), up_ED.shape[0])
    x_TED = torch.where(routed_TE[:, :, None], x_wide[:, None, :], 0)
    s_TE = torch.where(routed_TE, torch.einsum("ted,ed->te", x_TED, _wide(down_ED)), 0)
    return ((activate(s_TE, _act(activation)) * weights_TE) @ _wide(up_ED)).to(x_TD.dtype)


def experts_values_dense(experts_TK: Tensor, weights_TK: Tensor, table_ED: Tensor) -> Tensor:
    """Compute :func:`experts_values` as one product of all weights with the table."""
    table = _wide(table_ED)
    weights_TE, _ = routing_masks(experts_TK, weights_TK.to(table.dtype), table_ED.shape[0])
    return (weights_TE @ table).to(table_ED.dtype)
