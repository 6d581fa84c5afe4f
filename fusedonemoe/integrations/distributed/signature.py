"""A call's sizes and dtypes in one integer, which ranks exchange before they exchange rows.

A backend trusts the sizes that each rank computes: where two ranks differ, gloo ends one process and leaves the other's memory
unwritten. So each rank tells the others the form of its rows first, in a message that has the same size in every rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fusedonemoe.agreement import differences

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The fields from the lowest bits on, and their widths: 62 bits in all. A value that needs more bits keeps its lower ones.
_BITS = {"x.dtype": 2, "weights.dtype": 2, "K": 14, "num_experts": 20, "D": 24}
REFUSED = 1 << sum(_BITS.values())  # the rank's own checks have refused its arguments


def signature_of(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> int:
    """All that must be equal in every rank of an exchange; the number of tokens need not be."""
    values = (_DTYPES.index(x_TD.dtype), _DTYPES.index(weights_TK.dtype), experts_TK.shape[1], num_experts, x_TD.shape[1])
    packed, place = 0, 1
    for value, bits in zip(values, _BITS.values(), strict=True):
        packed = packed + value % (1 << bits) * place
        place <<= bits
    return packed


def _fields_of(signature: int) -> dict[str, str]:
    fields = {}
    for name, bits in _BITS.items():
        value = signature % (1 << bits)
        fields[name] = str(_DTYPES[value]) if name.endswith("dtype") else str(value)
        signature >>= bits
    return fields


def check_signatures(signatures: list[int], group: ProcessGroup, rows: list[int] | None = None) -> None:
    """Compare the signatures of all ranks, in the order of the group.

    Args:
        signatures: one of each rank.
        group: the process group.
        rows: of a fixed capacity: the rows that each rank sends to each other.

    Raises:
        RuntimeError: a rank has refused its arguments.
        ValueError: the ranks' arguments differ.
    """
    rows = rows or [0] * len(signatures)
    if len(set(zip(signatures, rows, strict=True))) == 1 and signatures[0] < REFUSED:
        return
    ranks = dist.get_process_group_ranks(group)
    if refused := [rank for rank, signature in zip(ranks, signatures, strict=True) if signature >= REFUSED]:
        raise RuntimeError(f"expert parallelism stopped: the arguments were refused on ranks {refused}, which say why")
    fields = {rank: _fields_of(signature) for rank, signature in zip(ranks, signatures, strict=True)}
    if len(set(rows)) > 1:
        for rank, count in zip(ranks, rows, strict=True):
            fields[rank]["rows for each rank"] = str(count)
    raise ValueError(f"expert parallelism needs the same D, K and dtypes on every rank, got {differences(fields)}{_advice(rows)}")


def _advice(rows: list[int]) -> str:
    if len(set(rows)) == 1:
        return ""
    return "; with a capacity_factor every rank must have the same number of tokens: give capacity= instead"


def assert_equal_signatures(received: Tensor, own: Tensor | int) -> None:
    """The check inside a compiled graph, where nothing may be read: it fails on the device."""
    torch._assert_async(
        (received == own).all(), "expert parallelism needs the same D, K, dtypes, experts and capacity on every rank"
    )
