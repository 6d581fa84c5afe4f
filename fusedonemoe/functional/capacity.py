"""Expert capacity: a bound on the rows of an expert, and the dropping of what exceeds it."""

import math

import torch
from torch import Tensor

from fusedonemoe.checks import check_choices, check_count, check_float, check_number, check_same_device, check_shape
from fusedonemoe.ops.plan import in_range, inverse_order, make_plan

# 1.1 * 110 is 121 and a bit in floating point: a part as small as this of the whole is rounding, and makes no further row.
_ROUNDING = 1e-9


def apply_capacity(experts: Tensor, weights: Tensor, num_experts: int, capacity_factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the routed rows that exceed an expert's capacity.

    ``C = ceil(capacity_factor * T * K / E)``; of the rows of an expert, in the order of the tokens and of the choices within
    a token, those from the ``C``-th on get weight 0 and id -1. The gradient of a dropped weight is 0.

    Args:
        experts: ``[..., K]`` ids of any integer dtype; those outside ``[0, num_experts)`` are left as they are.
        weights: ``[..., K]``, floating.
        num_experts: ``E``.
        capacity_factor: above 0; 1 is enough at perfect balance. 1.1 and 2 / 3 mean just that, not their binary neighbours.

    Returns:
        ``experts`` in their dtype (int64 for an unsigned one, which has no -1), ``weights`` in theirs, and ``dropped``, how
        many rows that were, a 0-dimensional int64 tensor. Nothing waits for it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or number that does not fit, naming the argument.

    Source:
        GShard (arXiv 2006.16668) section 2.2; Switch Transformers (arXiv 2101.03961) section 2.2.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> experts, weights = torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1)
        >>> experts, weights, dropped = F.apply_capacity(experts, weights, num_experts=2, capacity_factor=1.0)
        >>> experts.flatten(), weights.flatten(), dropped
        (tensor([ 0,  0, -1,  1]), tensor([1., 1., 0., 1.]), tensor(1))
    """
    check_choices(experts)
    check_float("weights", weights)
    check_count("num_experts", num_experts)
    check_shape("weights", weights, tuple(experts.shape))
    check_same_device("weights", weights, "experts", experts.device)
    check_number("capacity_factor", capacity_factor)
    if not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor must be above 0 and finite, got {capacity_factor}")
    capacity = math.ceil(capacity_factor * experts.numel() / num_experts * (1 - _ROUNDING))

    order, offsets = make_plan(experts, num_experts)
    routed = in_range(experts, num_experts)
    ids = torch.where(routed, experts.to(torch.int64), 0)
    place = inverse_order(order).reshape(experts.shape) - offsets[ids]
    beyond = routed & (place >= capacity)
    signed = experts if experts.dtype.is_signed else experts.to(torch.int64)
    return torch.where(beyond, -1, signed), torch.where(beyond, 0.0, weights), beyond.sum()
