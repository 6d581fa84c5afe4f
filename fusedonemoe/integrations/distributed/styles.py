"""Parallel experts: each process of a group holds some of them, and rows go there; or a slice of each, and outputs are summed."""

from typing import Literal, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard

from fusedonemoe.agreement import agree
from fusedonemoe.checks import check_last_dim, check_like_x, check_routing
from fusedonemoe.config import MoEConfig
from fusedonemoe.functional.calls import as_rows, check_biases, choose_impl, projections, with_leading
from fusedonemoe.integrations.distributed import collectives
from fusedonemoe.integrations.distributed.description import describe_blocks
from fusedonemoe.integrations.distributed.dispatch import AllToAll, FixedCapacity, check_capacity
from fusedonemoe.integrations.distributed.signature import Ranks, gradients_of, joined, signature_of
from fusedonemoe.layers import Experts, panels
from fusedonemoe.layers.lora import LoRAExperts

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def group_of(where: DeviceMesh | ProcessGroup | None) -> ProcessGroup:
    """The group of a one-dimensional mesh, or the group itself; the default group for None."""
    if isinstance(where, DeviceMesh):
        if where.ndim != 1:
            raise ValueError(
                f"mesh must have one dimension, got {where.ndim}: {where.mesh_dim_names}; take one of them, mesh['name']"
            )
        return where.get_group()
    if where is not None and not isinstance(where, ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(where).__name__}")
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    group = dist.group.WORLD if where is None else where
    assert group is not None
    return group


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """The model's :class:`~fusedonemoe.Experts` by name, if all of them can become parallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    if not found:
        raise ValueError("model has no fusedonemoe.Experts in it")
    adapted = {id(module.base): name for name, module in model.named_modules() if isinstance(module, LoRAExperts)}
    for name, module in found.items():
        if module.exchange is not None:
            raise ValueError(f"{name or 'the model'} is parallel already: {module.exchange}")
        if id(module) in adapted:
            raise ValueError(
                f"{adapted[id(module)] or 'the model'} has adapters, which compute with all experts in one process: merge them "
                "and put unload() in the place of the module"
            )
    names = {p: f"{name}.{key}".lstrip(".") for name, m in found.items() for key, p in m.named_parameters(recurse=False)}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter in names and not isinstance(module, Experts):  # there it would stay whole
                shared = f"{name}.{key}".lstrip(".")
                raise ValueError(f"{names[parameter]} must belong to experts alone, got a parameter that is {shared} too")
    return found


def place(experts: Experts, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Make each parameter a ``DTensor`` of the mesh, from the values of the first rank; one process has them whole anyway."""
    experts.unpack()
    if mesh.size() == 1:
        return
    for name, parameter in list(experts.named_parameters(recurse=False)):
        placed = distribute_tensor(parameter.detach(), mesh, [placements[name]])
        experts.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def check_forward(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Everything that the operator would refuse once the ranks wait for each other."""
    config = experts.config
    check_routing(x, ids, weights)
    check_last_dim("x", x, config.hidden_size)
    check_like_x(experts._up_name, getattr(experts, experts._up_name), x)
    up, down, up_bias, down_bias = experts.local_weights()
    if panels.is_panels(up) or panels.is_panels(down):
        panels.refuse_exchange(experts)
    if config.impl != "auto" and up.shape[0]:  # one rank alone may lack the kernels that impl names
        up_EGD, down_EDF = projections(x, up, down, gated=config.gated, transposed=config.transposed)
        check_biases(x, up_bias, down_bias, (up_EGD.shape[0], up_EGD.shape[1], down_EDF.shape[1]))
        widths = (up_EGD.shape[2], up_EGD.shape[1], down_EDF.shape[2])
        choose_impl("experts_mlp", config.impl, x, ids, widths, up_EGD, down_EDF)


class ExpertExchange:
    """The forward over the group that :class:`ExpertParallel` sets on an :class:`~fusedonemoe.Experts`."""

    def __init__(self, dispatcher: AllToAll | FixedCapacity, divisor: int) -> None:
        self.dispatcher = dispatcher
        self.divisor = divisor

    @property
    def ranks(self) -> Ranks:
        """The ranks that wait for this one."""
        return self.dispatcher

    def __call__(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The forward of ``experts``, for the tokens of this process."""
        self.dispatcher.check(lambda: check_forward(experts, x, ids, weights), experts.down_proj.device)
        rows = collectives.in_autocast_dtype(as_rows(x))
        local = experts.local_weights()
        trained = any(w is not None and w.requires_grad for w in local)
        dispatched = self.dispatcher.exchange(rows, as_rows(ids), as_rows(weights), trained=trained)
        up, down, *biases = (None if w is None else collectives.with_divided_gradient(w, self.divisor) for w in local)
        assert up is not None and down is not None
        if up.shape[0]:
            y = experts.compute(dispatched.x, dispatched.experts, dispatched.weights, up, down, *biases)
        else:  # more ranks than experts: no row comes here, but the others wait for this rank's part in the backward
            nothing = sum(w.sum() for w in (up, down, *biases) if w is not None)
            y = (dispatched.x * dispatched.weights + nothing).to(rows.dtype)
        return with_leading(dispatched.combine(y), x)

    def __repr__(self) -> str:
        return f"{type(self.dispatcher).__name__} over {self.dispatcher.world} ranks"


class GroupStyle(ParallelStyle):
    """Makes every :class:`~fusedonemoe.Experts` of a model parallel over a group: what the styles have in common."""

    options: tuple[str, ...] = ()  # attributes that must be equal in every process

    def __init__(self, group: ProcessGroup | DeviceMesh | None = None) -> None:
        super().__init__()
        if group is not None and not isinstance(group, ProcessGroup | DeviceMesh):
            raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
        self.group = group

    def check(self, experts: Experts, world: int) -> None:
        """Raise where experts cannot be parallel over ``world`` ranks."""

    def shard(self, experts: Experts, mesh: DeviceMesh) -> None:
        """Make experts parallel over the mesh."""
        raise NotImplementedError

    def apply(self, model: AnyModule) -> AnyModule:
        """Shard every :class:`~fusedonemoe.Experts` of the model, in place; a collective call.

        The weights of the group's first rank are the ones that count. A model on the meta device is sharded without them.
        Before anything changes, the processes compare their models: what each of them would refuse alone is refused by all.

        The model may be a block, its experts, or have blocks in it; it is returned.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: it has no experts, or they are parallel already, or have adapters, or have sizes that the group cannot
                share; or the processes' models, options or versions differ. The message says which ranks have what.
            RuntimeError: :mod:`torch.distributed` is not initialised, or another process has failed.
        """
        return self._each(model, self.group)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Apply the plan: :func:`torch.distributed.tensor.parallel.parallelize_module` calls this."""
        return self._each(module, device_mesh if self.group is None else self.group, device_mesh.device_type)

    def _each(self, model: AnyModule, where: DeviceMesh | ProcessGroup | None, device_type: str | None = None) -> AnyModule:
        """Apply the style over a group; a new mesh is of ``device_type``, or of the parameters' device."""
        group = group_of(where)
        style = type(self).__name__

        def describe() -> dict[str, object]:
            for experts in experts_of(model).values():
                self.check(experts, group.size())
            options = {name: getattr(self, name) for name in self.options}
            ranks = dist.get_process_group_ranks(group)
            return {"style": style, **options, "ranks of the group": ranks, **describe_blocks(model)}

        agree(f"{style}.apply", describe, group)
        tied: dict[nn.Parameter, nn.Parameter] = {}
        for experts in experts_of(model).values():
            before = dict(experts.named_parameters(recurse=False))
            device = device_type or next(experts.parameters()).device.type
            mesh = where if isinstance(where, DeviceMesh) else DeviceMesh.from_group(group, "cpu" if device == "meta" else device)
            self.shard(experts, mesh)
            for name, parameter in before.items():
                # What two modules of experts share, they go on to share.
                experts.register_parameter(name, tied.setdefault(parameter, experts.get_parameter(name)))
        return model


class ExpertParallel(GroupStyle):
    """Shards the experts of a model over the processes of a group.

    Rank ``r`` holds the ``r``-th block of ``ceil(E / W)`` experts, the last ranks fewer or none. Every process routes its own
    tokens; each row goes to the ranks of its experts and comes back as their weighted sum. Routers and shared experts stay
    whole in every process. Parameters keep their names and become ``DTensor``, sharded over the expert axis.

    Without a capacity, as many rows travel as there are: each token once to every other rank that it needs
    (:class:`AllToAll`). With one, the sizes are fixed and nothing is read on the host (:class:`FixedCapacity`).

    Args:
        group: a process group or a one-dimensional device mesh, each of whose processes has tokens of its own; the default
            group if None.
        capacity_factor: of :class:`FixedCapacity`; None for no limit.
        capacity: of :class:`FixedCapacity`, in rows.
        gradients: ``"mean"`` divides the gradient of the experts by ``W``, as data parallelism does with that of everything
            else; ``"sum"`` leaves it the sum over the processes' losses.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a mesh of several dimensions, a capacity that is no positive number, or an unknown name.

    Source:
        GShard (arXiv 2006.16668) section 3; sending a token once to a rank: DeepSeek-V3 (arXiv 2412.19437) section 3.2.2.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fusedonemoe import MoE
        >>> from fusedonemoe.integrations.distributed import ExpertParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # under torchrun: no arguments
        >>> moe = MoE(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2)
        >>> moe = ExpertParallel().apply(moe)
        >>> moe(torch.randn(5, 16)).shape
        torch.Size([5, 16])
        >>> dist.destroy_process_group()
    """

    options: tuple[str, ...] = ("capacity_factor", "capacity", "gradients")

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None = None,
        *,
        capacity_factor: float | None = None,
        capacity: int | None = None,
        gradients: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(group)
        check_capacity(capacity_factor, capacity)
        if gradients not in ("mean", "sum"):
            raise ValueError(f"gradients must be 'mean' or 'sum', got {gradients!r}")
        self.capacity_factor = capacity_factor
        self.capacity = capacity
        self.gradients = gradients

    def shard(self, experts: Experts, mesh: DeviceMesh) -> None:
        """Give each rank a block of the experts, and a dispatcher of rows."""
        place(experts, mesh, {name: Shard(0) for name, _ in experts.named_parameters(recurse=False)})
        group, E = mesh.get_group(), experts.config.num_experts
        dispatcher: AllToAll | FixedCapacity
        if self.capacity_factor is None and self.capacity is None:
            dispatcher = AllToAll(group, E)
        else:
            dispatcher = FixedCapacity(group, E, capacity_factor=self.capacity_factor, capacity=self.capacity)
        experts.exchange = ExpertExchange(dispatcher, group.size() if self.gradients == "mean" else 1)


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


class _SameTokens(Ranks):
    """Ranks that all have the same tokens."""

    parallelism = "tensor"
    row_name = "T"
    advice = "every rank must have the same tokens"


class TensorExchange:
    """The forward over the group that :class:`TensorParallel` sets on an :class:`~fusedonemoe.Experts`."""

    def __init__(self, group: ProcessGroup) -> None:
        self.ranks: Ranks = _SameTokens(group)

    def __call__(self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The forward of ``experts``, for tokens that all processes have."""
        ranks, device = self.ranks, experts.down_proj.device
        ranks.check(lambda: check_forward(experts, x, ids, weights), device)
        up, down, up_bias, down_bias = experts.local_weights()
        x = collectives.in_autocast_dtype(x)
        needed = gradients_of(x, weights, down_bias is not None and down_bias.requires_grad)
        if ranks.compares:
            asked, rows = needed, (as_rows(x), as_rows(ids), as_rows(weights))
            signature = ranks.check(lambda: signature_of(*rows, experts.config.num_experts, asked), device)
            needed = ranks.compare(signature, rows[0].shape[0], device, asked)
        if down_bias is not None:  # added once; the other ranks' zeros have zero gradients, which the sum then replaces
            bias = joined(down_bias, needed.parameters)
            down_bias = collectives.with_summed_gradient(bias, ranks.group) * float(ranks.rank == 0)
        shared = collectives.with_summed_gradient(joined(x, needed.x), ranks.group)
        weights = collectives.with_summed_gradient(joined(weights, needed.weights), ranks.group)
        return collectives.sum_of_parts(experts.compute(shared, ids, weights, up, down, up_bias, down_bias), ranks.group)

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


def dropped_rows(model: nn.Module, *, reset: bool = False) -> dict[str, Tensor]:
    """Return the rows that this process dropped for want of capacity, by the name of the experts, without waiting.

    They are 0-dimensional int64 tensors: routed rows (choices) since the start or the last call with ``reset``.
    """
    counts: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        dropped = getattr(getattr(getattr(module, "exchange", None), "dispatcher", None), "dropped", None)
        if dropped is not None:
            counts[name] = dropped[0].clone()
            if reset:
                dropped.zero_()
    return counts
