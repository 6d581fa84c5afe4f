"""A call's sizes, dtypes and gradients in one integer, which ranks exchange before they exchange rows.

A backend trusts the sizes that each rank computes: where two ranks differ, gloo ends one process and leaves the other's memory
unwritten. The backward exchanges the gradients of what requires them, so that ranks have to agree about that too. So each rank
tells the others the form of its rows first, in a message that has the same size in every rank.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fusedonemoe.agreement import differences
from fusedonemoe.integrations.distributed.collectives import all_to_all

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The fields from the lowest bits on, and their widths.
_BITS = {"x.dtype": 2, "weights.dtype": 2, "K": 13, "num_experts": 21, "D": 20}
_FORM = 1 << sum(_BITS.values())  # above the form, one bit for each kind of gradient
_NO_GRAD = _FORM << 3
REFUSED = _FORM << 4  # bit 62: the rank's own checks have refused its arguments


class Gradients(NamedTuple):
    """The gradients that a backward pass exchanges.

    Attributes:
        x: that of the rows.
        weights: that of the routing weights.
        parameters: any of the experts' own.
    """

    x: bool
    weights: bool
    parameters: bool


def gradients_of(x: Tensor, weights: Tensor, trained: bool) -> Gradients:
    """The gradients that this rank asks for by itself."""
    enabled = torch.is_grad_enabled()
    return Gradients(enabled and x.requires_grad, enabled and weights.requires_grad, enabled and trained)


def joined(tensor: Tensor, needed: bool) -> Tensor:
    """The tensor, with a gradient that goes nowhere if only other ranks need one."""
    return tensor.detach().requires_grad_() if needed and not tensor.requires_grad else tensor


def _sizes(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> dict[str, int]:
    return {"K": experts_TK.shape[1], "num_experts": num_experts, "D": x_TD.shape[1]}


def check_sizes(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> None:
    """Raise where a size does not fit into its field of the signature, in which it would look like another one."""
    for name, size in _sizes(x_TD, experts_TK, num_experts).items():
        if size >= 1 << _BITS[name]:
            raise ValueError(f"{name} must be below {1 << _BITS[name]} to be exchanged between ranks, got {size}")


def signature_of(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int, gradients: Gradients) -> int:
    """The form of a rank's rows and its gradients; the number of tokens is no part of it."""
    dtypes = {"x.dtype": _DTYPES.index(x_TD.dtype), "weights.dtype": _DTYPES.index(weights_TK.dtype)}
    values = dtypes | _sizes(x_TD, experts_TK, num_experts)
    packed, place = 0, 1
    for name, bits in _BITS.items():
        packed = packed + values[name] * place
        place <<= bits
    for asked in gradients:
        packed = packed + asked * place
        place <<= 1
    # A compiled graph compares for equality, so that it says only what its backward needs.
    off = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return packed + off * _NO_GRAD


def _fields_of(signature: int) -> dict[str, str]:
    fields = {}
    for name, bits in _BITS.items():
        value = signature % (1 << bits)
        fields[name] = str(_DTYPES[value]) if name.endswith("dtype") else str(value)
        signature >>= bits
    return fields


def _gradients_in(signature: int) -> str:
    if signature & _NO_GRAD:
        return "off (torch.no_grad)"
    asked = [name for place, name in enumerate(Gradients._fields) if signature & _FORM << place]
    return f"on for {' and '.join(asked)}" if asked else "on"


def check_signatures(
    signatures: list[int],
    group: ProcessGroup,
    rows: list[int] | None = None,
    *,
    parallelism: str = "expert",
    row_name: str = "rows for each rank",
    advice: str = "with a capacity_factor every rank must have the same number of tokens: give capacity= instead",
) -> Gradients:
    """Compare the signatures of all ranks, in the order of the group.

    Args:
        signatures: one of each rank.
        group: the process group.
        rows: where ranks must have equally many: the number that each of them has.
        parallelism: the kind of parallelism, for messages.
        row_name: the name of ``rows`` in messages.
        advice: the end of a message about ``rows``.

    Returns:
        The gradients that any rank asks for, which all of them exchange.

    Raises:
        RuntimeError: a rank has refused its arguments.
        ValueError: the ranks' arguments differ, or a rank records no gradients that others need.
    """
    rows = rows or [0] * len(signatures)
    every = 0
    for signature in signatures:
        every |= signature
    ranks = dist.get_process_group_ranks(group)
    if every & REFUSED:
        refused = [rank for rank, signature in zip(ranks, signatures, strict=True) if signature & REFUSED]
        raise RuntimeError(f"{parallelism} parallelism stopped: the arguments were refused on ranks {refused}, which say why")
    gradients = Gradients(*(bool(every & _FORM << place) for place in range(3)))
    torn = any(gradients) and bool(every & _NO_GRAD)
    uneven = len(set(rows)) > 1
    if len({signature % _FORM for signature in signatures}) == 1 and not uneven and not torn:
        return gradients
    fields = {rank: _fields_of(signature) for rank, signature in zip(ranks, signatures, strict=True)}
    for rank, signature, count in zip(ranks, signatures, rows, strict=True):
        fields[rank] |= {row_name: str(count), "gradients": _gradients_in(signature) if torn else ""}
    ending = "a rank without gradients has no backward, for which the others would wait" if torn else advice if uneven else ""
    needs = "needs gradients on every rank or on none" if torn else "needs the same D, K and dtypes on every rank"
    raise ValueError(f"{parallelism} parallelism {needs}, got {differences(fields)}{'; ' if ending else ''}{ending}")


def exchange_signatures(signature: int, rows: int, group: ProcessGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Send this rank's signature and its number of rows to every rank: what was sent and received, ``[W, 2]`` int64."""
    W = group.size()
    own_W2 = torch.stack([torch.full((W,), value, dtype=torch.int64, device=device) for value in (signature, rows)], 1)
    return own_W2, all_to_all(own_W2, [1] * W, [1] * W, group)


def compare_signatures(
    signature: int, rows: int, group: ProcessGroup, device: torch.device, asked: Gradients, **texts: str
) -> Gradients:
    """Exchange signatures in a message of their own, and compare them as :func:`check_signatures` does."""
    own_W2, received_W2 = exchange_signatures(signature, rows, group, device)
    if torch.compiler.is_compiling():
        assert_equal_signatures(received_W2, own_W2)
        return asked
    if torch.equal(received_W2, own_W2):
        return asked
    signatures, counts = received_W2.T.tolist()
    return check_signatures(signatures, group, counts, **texts)


def assert_equal_signatures(received: Tensor, own: Tensor | int) -> None:
    """The check inside a compiled graph, where nothing may be read: it fails on the device."""
    equal = (received & ~_NO_GRAD == own).all()
    torch._assert_async(equal, "parallel experts need the same D, K, dtypes, gradients, experts and capacity on every rank")
