"""Tensor parallelism: each process of a group holds a slice of every expert's intermediate width."""

from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard

from fusedonemoe.config import MoEConfig
from fusedonemoe.functional.calls import as_rows
from fusedonemoe.integrations.distributed.collectives import in_autocast_dtype, sum_of_parts, with_summed_gradient
from fusedonemoe.integrations.distributed.expert_parallel import AnyModule, check_forward, for_each, place
from fusedonemoe.integrations.distributed.signature import (
    REFUSED,
    Gradients,
    check_sizes,
    compare_signatures,
    exchange_signatures,
    gradients_of,
    joined,
    signature_of,
)
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


def _check_width(experts: Experts, world: int) -> None:
    width = experts.config.intermediate_size
    if width % world:
        raise ValueError(f"the group's size must divide the intermediate size ({width}), got {world} ranks")


class TensorExchange:
    """The forward over the group that :class:`TensorParallel` sets on an :class:`~fusedonemoe.Experts`."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        # gloo ends a process that gets more numbers than it expects, so there ranks compare their arguments in each call.
        self._compares: bool = group.size() > 1 and dist.get_backend(group) == "gloo"

    def __call__(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The forward of ``experts``, for tokens that all processes have."""
        if torch.compiler.is_compiling():
            self._check(experts, x, ids, weights)
        else:
            try:
                self._check(experts, x, ids, weights)
            except Exception:
                self.tell_refusal(experts)
                raise
        up, down, up_bias, down_bias = experts.local_weights()
        x = in_autocast_dtype(x)
        needed = self._compare(experts, x, ids, weights, down_bias is not None and down_bias.requires_grad)
        if down_bias is not None:  # added once; the other ranks' zeros have zero gradients, which the sum then replaces
            bias = joined(down_bias, needed.parameters)
            down_bias = with_summed_gradient(bias, self.group) * float(self.group.rank() == 0)
        shared = with_summed_gradient(joined(x, needed.x), self.group)
        weights = with_summed_gradient(joined(weights, needed.weights), self.group)
        return sum_of_parts(experts.compute(shared, ids, weights, up, down, up_bias, down_bias), self.group)

    def _check(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        check_forward(experts, x, ids, weights)
        if self._compares:
            check_sizes(as_rows(x), as_rows(ids), experts.config.num_experts)

    def _compare(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, trained: bool) -> Gradients:
        """With gloo: every rank has arguments of the same form. The gradients of all ranks."""
        asked = gradients_of(x, weights, trained)
        if not self._compares:
            return asked
        x_TD = as_rows(x)
        signature = signature_of(x_TD, as_rows(ids), as_rows(weights), experts.config.num_experts, asked)
        texts = {"parallelism": "tensor", "row_name": "T", "advice": "every rank must have the same tokens"}
        return compare_signatures(signature, x_TD.shape[0], self.group, experts.down_proj.device, asked, **texts)

    def tell_refusal(self, experts: Experts) -> None:
        """Tell the other ranks that this one refuses its input; with gloo."""
        if self._compares and not torch.compiler.is_compiling():
            # Where the others are gone, this rank's own error says more than that of the exchange.
            with suppress(RuntimeError):
                exchange_signatures(REFUSED, 0, self.group, experts.down_proj.device)

    def __deepcopy__(self, memo: object) -> "TensorExchange":
        return self

    def __repr__(self) -> str:
        return f"TensorParallel over {self.group.size()} ranks"


class TensorParallel(ParallelStyle):
    """Cuts every expert of a model along its intermediate width ``F``, over the processes of a group.

    All processes have the same tokens and get the same output, the sum of their parts. Parameters keep their names and become
    ``DTensor``. In a ``gate_up_proj`` of gate rows and then up rows each rank holds its part of both halves, which
    :mod:`torch.distributed.checkpoint` cannot store by itself: give it :func:`checkpointable` of the state dict.

    Args:
        group: a process group or a one-dimensional device mesh; the default group if None. Its size must divide ``F``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a mesh of several dimensions.

    Source:
        Megatron-LM (arXiv 1909.08053) section 3, for each expert.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fusedonemoe import MoE
        >>> from fusedonemoe.integrations.distributed import TensorParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # under torchrun: no arguments
        >>> moe = TensorParallel().apply(MoE(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2))
        >>> moe(torch.randn(5, 16)).shape
        torch.Size([5, 16])
        >>> dist.destroy_process_group()
    """

    def __init__(self, group: ProcessGroup | DeviceMesh | None = None) -> None:
        super().__init__()
        if group is not None and not isinstance(group, ProcessGroup | DeviceMesh):
            raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
        self.group = group

    def apply(self, model: AnyModule) -> AnyModule:
        """Cut every :class:`~fusedonemoe.Experts` of the model, in place; a collective call.

        The weights of the group's first rank are the ones that count. A model on the meta device is cut without them.

        Args:
            model: a block, its experts, or a model with blocks in it.

        Returns:
            ``model``.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: it has no experts, they are parallel already, or have adapters; the group's size does not divide ``F``; or
                the processes' models or versions differ. The message names what differs and which ranks have what.
            RuntimeError: :mod:`torch.distributed` is not initialised, or another process has failed.
        """
        return self._each(model, self.group)

    def _each(self, model: AnyModule, where: DeviceMesh | ProcessGroup | None, device_type: str | None = None) -> AnyModule:
        return for_each(model, where, self._cut, style="TensorParallel", options={}, check=_check_width, device_type=device_type)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Apply the plan: :func:`torch.distributed.tensor.parallel.parallelize_module` calls this."""
        return self._each(module, device_mesh if self.group is None else self.group, device_mesh.device_type)

    def _cut(self, experts: Experts, mesh: DeviceMesh) -> None:
        place(experts, mesh, _placements(experts.config))
        experts.exchange = TensorExchange(mesh.get_group())
