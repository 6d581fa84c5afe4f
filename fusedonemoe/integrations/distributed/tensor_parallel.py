"""Tensor parallelism: each process of a group holds a slice of every expert's intermediate width."""

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fusedonemoe.config import MoEConfig
from fusedonemoe.functional.calls import as_rows
from fusedonemoe.integrations.distributed.collectives import in_autocast_dtype, sum_of_parts, with_summed_gradient
from fusedonemoe.integrations.distributed.expert_parallel import GroupStyle, check_forward, place
from fusedonemoe.integrations.distributed.signature import Ranks, gradients_of, joined, signature_of
from fusedonemoe.layers import Experts


def _placements(config: MoEConfig) -> dict[str, Placement]:
    """Return the placement of each parameter, cut along F.

    In a concatenation of gate and up rows an ordinary shard would give one rank gate rows only: each rank needs its part of
    both halves. Interleaved rows are in pairs already.
    """
    paired = config.gated and config.gate_up_layout != "interleaved"

    def rows(axis: int) -> Placement:
        # A rank's part of each of two pieces along the axis, one behind the other.
        return _StridedShard(axis, split_factor=2) if paired else Shard(axis)

    up_name = "gate_up_proj" if config.gated else "up_proj"
    up, down = (2, 1) if config.transposed else (1, 2)
    return {up_name: rows(up), f"{up_name}_bias": rows(1), "down_proj": Shard(down), "down_proj_bias": Replicate()}


class TensorExchange:
    """The forward over the group that :class:`TensorParallel` sets on an :class:`~fusedonemoe.Experts`."""

    def __init__(self, group: ProcessGroup) -> None:
        self.ranks: Ranks = Ranks(group)

    def __call__(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The forward of ``experts``, for tokens that all processes have."""
        ranks, device = self.ranks, experts.down_proj.device
        ranks.check(lambda: check_forward(experts, x, ids, weights), device)
        up, down, up_bias, down_bias = experts.local_weights()
        x = in_autocast_dtype(x)
        needed = gradients_of(x, weights, down_bias is not None and down_bias.requires_grad)
        if ranks.compares:
            asked, rows = needed, (as_rows(x), as_rows(ids), as_rows(weights))
            signature = ranks.check(lambda: signature_of(*rows, experts.config.num_experts, asked), device)
            texts = {"parallelism": "tensor", "row_name": "T", "advice": "every rank must have the same tokens"}
            needed = ranks.compare(signature, rows[0].shape[0], device, asked, **texts)
        if down_bias is not None:  # added once; the other ranks' zeros have zero gradients, which the sum then replaces
            bias = joined(down_bias, needed.parameters)
            down_bias = with_summed_gradient(bias, ranks.group) * float(ranks.rank == 0)
        shared = with_summed_gradient(joined(x, needed.x), ranks.group)
        weights = with_summed_gradient(joined(weights, needed.weights), ranks.group)
        return sum_of_parts(experts.compute(shared, ids, weights, up, down, up_bias, down_bias), ranks.group)

    def tell_refusal(self, experts: Experts) -> None:
        """Tell the other ranks that this one refuses its input; with gloo."""
        self.ranks.tell_refusal(experts.down_proj.device)

    def __repr__(self) -> str:
        return f"TensorParallel over {self.ranks.world} ranks"


class TensorParallel(GroupStyle):
    """Cuts every expert of a model along its intermediate width ``F``, over the processes of a group.

    All processes have the same tokens and get the same output, the sum of their parts. Parameters keep their names and become
    ``DTensor``. In a ``gate_up_proj`` of gate rows and then up rows each rank holds its part of both halves, which
    :mod:`torch.distributed.checkpoint` cannot store by itself: give it :func:`checkpointable` of the state dict.

    Args:
        group: a process group or a one-dimensional device mesh; the default group if None. Its size must divide ``F``.

    Raises:
        TypeError: an argument of the wrong type.

    Source:
        Megatron-LM (arXiv 1909.08053) section 3, for each expert.
    """

    def check(self, experts: Experts, world: int) -> None:
        """Raise where the ranks cannot have equal slices."""
        width = experts.config.intermediate_size
        if width % world:
            raise ValueError(f"the group's size must divide the intermediate size ({width}), got {world} ranks")

    def shard(self, experts: Experts, mesh: DeviceMesh) -> None:
        """Give each rank its slice of every expert."""
        place(experts, mesh, _placements(experts.config))
        experts.exchange = TensorExchange(mesh.get_group())
