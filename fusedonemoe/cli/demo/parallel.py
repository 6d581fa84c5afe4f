"""The processes of a demo that was given several: each has a part of the experts and a part of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedonemoe.layers import Experts


@dataclass(frozen=True)
class Processes:
    """The processes that take part."""

    world: int = 1  # their number
    rank: int = 0  # of this process; rank 0 prints

    def share(self, model: nn.Module) -> list[dict[str, Any]]:
        """Cut the experts of a model over the processes, if it has any; its parameters for an optimizer."""
        if self.world == 1:
            return [{"params": list(model.parameters())}]
        from fusedonemoe.integrations.distributed import ExpertParallel, parameter_groups

        if any(isinstance(module, Experts) for module in model.modules()):
            torch._dynamo.config.capture_scalar_outputs = True  # how many rows come is a number in the graph
            ExpertParallel().apply(model)
        return parameter_groups(model)

    def part(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return batch.tensor_split(self.world)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, without a gradient."""
        if self.world == 1:
            return value.detach()
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over the processes; in a compiled graph too."""
        if self.world == 1:
            return counts
        assert dist.group.WORLD is not None
        out = torch.ops._c10d_functional.all_reduce(counts, "sum", dist.group.WORLD.group_name)
        return torch.ops._c10d_functional.wait_tensor(out)

    def clip_gradients(self, model: nn.Module, max_norm: float) -> None:
        """Average what every process has a copy of, then clip by the norm of the whole model."""
        if self.world == 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            return
        from fusedonemoe.integrations.distributed import average_gradients, clip_grad_norm_

        average_gradients(model)
        clip_grad_norm_(model.parameters(), max_norm)


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the group that torchrun started this process for; without torchrun it is alone."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_world_size(), dist.get_rank())
    finally:
        dist.destroy_process_group()
