"""Expert parallelism and FSDP2 in one model, trained by several processes.

    torchrun --nproc-per-node 2 examples/expert_parallel.py

Each process holds half of the experts and a shard of everything else. The training is the one of a single process on the
whole batch, up to rounding.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fusedonemoe import MoE
from fusedonemoe.integrations.distributed import ExpertParallel, clip_grad_norm_, expert_placement, parameter_groups

HIDDEN, BATCH, STEPS = 32, 256, 60


def make_model():
    """Make the model with the same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), MoE(hidden_size=HIDDEN, intermediate_size=64, num_experts=8, top_k=2))


def train(model, rank, world, clip):
    """Train on this process's part of each batch; return the mean losses of the whole batches."""
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
    draw, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        x = torch.randn(BATCH, HIDDEN, generator=draw).chunk(world)[rank]
        loss = (model(x) - x.flip(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = train(make_model(), 0, 1, nn.utils.clip_grad_norm_)

    model = make_model()
    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("everyone",))
    grid = init_device_mesh("cpu", (1, world), mesh_dim_names=("copies", "experts"))
    ExpertParallel(grid["experts"]).apply(model)
    fully_shard(model, mesh=everyone, shard_placement_fn=expert_placement(model, grid["copies"]))
    losses = train(model, rank, world, clip_grad_norm_)
    dist.all_reduce(losses)

    held = torch.tensor(sum(p.to_local().numel() for p in model.parameters()))
    dist.all_reduce(held)  # what all processes hold together is the model once
    if rank == 0:
        torch.testing.assert_close(losses / world, alone, rtol=1e-2, atol=1e-4)
        print(f"{world} processes, {held} parameters in all, {sum(p.numel() for p in make_model().parameters())} in the model")
        print("losses:", *(f"{loss:.3f}" for loss in losses[::15] / world))
        print("as in one process:", *(f"{loss:.3f}" for loss in alone[::15]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
