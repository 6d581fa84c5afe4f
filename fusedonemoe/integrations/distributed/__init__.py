"""More than one process, on :mod:`torch.distributed`: gloo on CPUs, NCCL on GPUs."""

from fusedonemoe.integrations.distributed.dispatch import AllToAll, Dispatched, FixedCapacity
from fusedonemoe.integrations.distributed.expert_parallel import ExpertParallel, dropped_rows

__all__ = [
    "AllToAll",
    "Dispatched",
    "ExpertParallel",
    "FixedCapacity",
    "dropped_rows",
]
