"""From a routing to the expert-sorted order of its rows: static shapes, no host synchronisation.

Row ``n = t * K + j`` is token ``t``'s ``j``-th choice. The sort of the ``N = T * K`` rows is stable, ids outside ``[0, E)`` last.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """The expert-sorted order of a routing.

    Attributes:
        order: ``[N]`` int32, ``order[i]`` is the flattened row ``t * K + j`` that stands at sorted position ``i``.
        offsets: ``[E + 1]`` int32, expert ``e`` owns sorted positions ``offsets[e]`` to ``offsets[e + 1]``;
            ``offsets[E]`` counts the rows whose id lies in ``[0, E)``.
    """

    order: Tensor
    offsets: Tensor


def in_range(experts: Tensor, num_experts: int) -> Tensor:
    """Mask of the ids that name an expert, shaped like ``experts``."""
    ids = experts.to(torch.int64)  # num_experts may not fit a narrow id dtype, and torch compares no unsigned ones
    return (ids >= 0) & (ids < num_experts)


def _expert_or_end(experts: Tensor, num_experts: int) -> Tensor:
    """Return ids as int64, those outside ``[0, E)`` replaced by ``E``: such rows sort to the end and count nowhere."""
    ids = experts.reshape(-1).to(torch.int64)
    return torch.where(in_range(ids, num_experts), ids, num_experts)


def make_plan(experts_TK: Tensor, num_experts: int) -> Plan:
    """Sort the rows of a routing by expert; ids of any integer type outside ``[0, num_experts)`` are kept out of every expert."""
    sorted_ids, order = torch.sort(_expert_or_end(experts_TK, num_experts), stable=True)
    bounds = torch.arange(num_experts + 1, device=experts_TK.device)
    offsets = torch.searchsorted(sorted_ids, bounds, out_int32=True)
    return Plan(order.to(torch.int32), offsets)


def inverse_order(order: Tensor) -> Tensor:
    """``inverse[order[i]] = i``: where each flattened row stands in sorted order. ``[N]`` int32."""
    positions = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    return torch.empty_like(order).scatter(0, order.to(torch.int64), positions)


def tokens_per_expert(experts: Tensor, num_experts: int) -> Tensor:
    """Count the routed rows of every expert: ``c_e = #{(t, j): experts_tj = e}``, ``[E]`` int64, without ids out of range."""
    ids = _expert_or_end(experts, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return counts.scatter_add(0, ids, torch.ones_like(ids))[:num_experts]
