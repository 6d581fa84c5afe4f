"""More than one process, on :mod:`torch.distributed`: gloo on CPUs, NCCL on GPUs."""

from fusedonemoe.integrations.distributed.dispatch import AllToAll, Dispatched, FixedCapacity
from fusedonemoe.integrations.distributed.styles import ExpertParallel, TensorParallel, dropped_rows
from fusedonemoe.integrations.distributed.training import (
    average_gradients,
    checkpointable,
    clip_grad_norm_,
    data_parallel,
    expert_placement,
    parameter_groups,
)

__all__ = [
    "AllToAll",
    "Dispatched",
    "ExpertParallel",
    "FixedCapacity",
    "TensorParallel",
    "average_gradients",
    "checkpointable",
    "clip_grad_norm_",
    "data_parallel",
    "dropped_rows",
    "expert_placement",
    "parameter_groups",
]
