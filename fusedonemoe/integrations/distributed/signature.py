"""A call's sizes, dtypes and gradients in one integer, which ranks exchange before they exchange rows.

A backend trusts the sizes that each rank computes: where two ranks differ, gloo ends one process and leaves the other's memory
unwritten. The backward exchanges the gradients of what requires them, so that ranks have to agree about that too. So each rank
tells the others the form of its rows first, in a message that has the same size in every rank.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

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
    """The gradients that a backward pass exchanges: of the rows, of the routing weights, and any of the experts' own."""

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


def signature_of(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int, gradients: Gradients) -> int:
    """The form of a rank's rows, whatever their number, and its gradients; raises for a size that does not fit into its field."""
    dtypes = (_DTYPES.index(x_TD.dtype), _DTYPES.index(weights_TK.dtype))
    packed, place = 0, 1
    for (name, bits), value in zip(_BITS.items(), (*dtypes, experts_TK.shape[1], num_experts, x_TD.shape[1]), strict=True):
        if value >= 1 << bits:
            raise ValueError(f"{name} must be below {1 << bits} to be exchanged between ranks, got {value}")
        packed = packed + value * place
        place <<= bits
    for bit, asked in enumerate(gradients):
        packed = packed + asked * (_FORM << bit)
    # A compiled graph compares for equality, so that it says only what its backward needs.
    off = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return packed + off * _NO_GRAD


def _fields_of(signature: int) -> dict[str, str]:
    asked = [name for place, name in enumerate(Gradients._fields) if signature & _FORM << place]
    on = f"on for {' and '.join(asked)}" if asked else "on"
    fields = {"gradients": "off (torch.no_grad)" if signature & _NO_GRAD else on}
    for name, bits in _BITS.items():
        value = signature % (1 << bits)
        fields[name] = str(_DTYPES[value]) if name.endswith("dtype") else str(value)
        signature >>= bits
    return fields


class Ranks:
    """A group whose ranks compare the forms of their rows before they send any, and hear of a rank that refuses its arguments.

    gloo ends a process that gets more rows than it expects. Over another backend, nothing but rows may travel.
    """

    numbers = 1  # that a signature travels with
    # Words of the messages about ranks that differ.
    parallelism = "expert"
    row_name = "rows for each rank"
    advice = "with a capacity_factor every rank must have the same number of tokens: give capacity= instead"

    def __init__(self, group: ProcessGroup, *, compares: bool = False) -> None:
        self.group = group
        self.world: int = group.size()
        self.rank: int = group.rank()
        self.compares: bool = self.world > 1 and (compares or dist.get_backend(group) == "gloo")

    def __deepcopy__(self, memo: object) -> "Ranks":
        return self  # a copy of a model talks to the same processes

    def check(self, check: Callable[[], Any], device: torch.device) -> Any:
        """Check a call's arguments. Where they are refused, the other ranks hear of it and do not wait for this one."""
        if torch.compiler.is_compiling():
            return check()
        try:
            return check()
        except Exception:
            self.tell_refusal(device)
            raise

    def tell_refusal(self, device: torch.device) -> None:
        """Tell the other ranks, which wait for this one or will do so, that it raises instead."""
        if self.compares and not torch.compiler.is_compiling():
            # Where the others are gone, this rank's own error says more than that of the exchange.
            with suppress(RuntimeError):
                self.exchange_signatures(REFUSED, torch.zeros(self.world, self.numbers, dtype=torch.int64, device=device))

    def exchange_signatures(self, signature: int, numbers_WN: Tensor) -> tuple[Tensor, Tensor]:
        """Send every rank its numbers and this rank's signature: what was sent and received, ``[W, N + 1]`` int64."""
        own = torch.cat((numbers_WN, numbers_WN.new_full((self.world, 1), signature)), 1)
        return own, all_to_all(own, [1] * self.world, [1] * self.world, self.group)

    def compare(self, signature: int, rows: int, device: torch.device, asked: Gradients) -> Gradients:
        """Exchange signatures in a message of their own: every rank has rows of one form, and equally many."""
        if not self.compares:
            return asked
        rows_W1 = torch.full((self.world, 1), rows, dtype=torch.int64, device=device)
        own_W2, received_W2 = self.exchange_signatures(signature, rows_W1)
        if torch.compiler.is_compiling():
            self.assert_equal(received_W2, own_W2)
            return asked
        if torch.equal(received_W2, own_W2):
            return asked
        counts, signatures = received_W2.T.tolist()
        return self.check_signatures(signatures, counts)

    def assert_equal(self, received: Tensor, own: Tensor | int) -> None:
        """Compare signatures inside a compiled graph, where nothing may be read: it fails on the device."""
        equal = (received & ~_NO_GRAD == own).all()
        torch._assert_async(equal, "parallel experts need the same D, K, dtypes, gradients, experts and capacity on every rank")

    def check_signatures(self, signatures: list[int], rows: list[int] | None = None) -> Gradients:
        """Compare the signatures of all ranks, and their numbers of rows where these must be equal.

        Returns the gradients that any rank asks for, which all of them exchange. Raises a RuntimeError where a rank has refused
        its arguments, and a ValueError where they differ or a rank records no gradients that others need.
        """
        rows = rows or [0] * len(signatures)
        every = reduce(or_, signatures)
        ranks = dist.get_process_group_ranks(self.group)
        what = f"{self.parallelism} parallelism"
        if every & REFUSED:
            refused = [rank for rank, signature in zip(ranks, signatures, strict=True) if signature & REFUSED]
            raise RuntimeError(f"{what} stopped: the arguments were refused on ranks {refused}, which say why")
        gradients = Gradients(*(bool(every & _FORM << place) for place in range(3)))
        torn = any(gradients) and bool(every & _NO_GRAD)
        uneven = len(set(rows)) > 1
        if len({signature % _FORM for signature in signatures}) == 1 and not uneven and not torn:
            return gradients
        fields = {}
        for rank, signature, count in zip(ranks, signatures, rows, strict=True):
            fields[rank] = {**_fields_of(signature), self.row_name: str(count), **({} if torn else {"gradients": ""})}
        needs = "needs gradients on every rank or on none" if torn else "needs the same D, K and dtypes on every rank"
        ending = f"; {self.advice}" if uneven else ""
        if torn:
            ending = "; a rank without gradients has no backward, for which the others would wait"
        raise ValueError(f"{what} {needs}, got {differences(fields)}{ending}")
