"""Sharded parameters in the rest of a training loop: FSDP2, DDP, optimizers, clipping, checkpoints."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from fusedonemoe.agreement import agree, failures_named, start_comparison
from fusedonemoe.integrations.distributed.description import describe_blocks, describe_tensors
from fusedonemoe.integrations.distributed.styles import ExpertExchange, group_of
from fusedonemoe.layers import Experts


def expert_placement(model: nn.Module, mesh: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """The ``shard_placement_fn`` with which ``fully_shard`` cuts the experts of a block over the ranks that hold the same ones.

    They are cut along dimension 1 where the mesh divides it (the rows of the up-, the outputs of the down-projection): that
    works with more ranks than experts. Otherwise along the experts. The guide to distributed training has an example.

    Args:
        model: the block that is given to ``fully_shard``, after :meth:`ExpertParallel.apply`.
        mesh: one-dimensional, the ranks that hold the same experts. Without expert parallelism the mesh of ``fully_shard``.

    Raises:
        TypeError: ``mesh`` is no device mesh.
        ValueError: ``mesh`` has several dimensions, or ``model`` no experts; or the blocks of the mesh's processes differ, which
            they compare here, in a collective call.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim} ({mesh.mesh_dim_names})")
    agree("expert_placement", lambda: describe_blocks(model), mesh.get_group())
    ours = {
        parameter: isinstance(parameter, DTensor) and isinstance(module.exchange, ExpertExchange)
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    }
    if not ours:
        raise ValueError("model has no fusedonemoe.Experts in it")
    if any(ours.values()) and not hasattr(fsdp, "ShardPlacementResult"):
        raise RuntimeError(
            "a mesh for single parameters needs torch 2.12; before, give the experts to fully_shard first: "
            "fully_shard(moe.experts, mesh=mesh), then fully_shard(block)"
        )
    info = fsdp.FSDPMeshInfo(mesh, shard_mesh_dim=0)

    def place(parameter: nn.Parameter) -> Any:
        if parameter not in ours:
            return None
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        taken = isinstance(parameter, DTensor) and any(getattr(p, "dim", None) == 1 for p in parameter.placements)
        along = Shard(0 if taken or local.shape[1] % mesh.size() else 1)
        return fsdp.ShardPlacementResult(along, info) if ours[parameter] else along

    return place


def data_parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """``DistributedDataParallel`` around a model whose experts are parallel: it leaves the experts alone.

    Their gradients are complete when they come out of the exchange, and no two ranks hold the same ones.

    Args:
        model: after :meth:`ExpertParallel.apply`, over the same processes and with ``gradients="mean"``.
        **options: of ``DistributedDataParallel``.

    Raises:
        ValueError: the experts are parallel over other processes than the rest, or their gradients are sums; or the blocks of the
            processes differ, and the message says which ranks have what.
        RuntimeError: :mod:`torch.distributed` is not initialised, or another process has failed.
    """
    group = group_of(options.get("process_group"))
    left_alone: list[str] = []

    def describe() -> dict[str, object]:
        left_alone.extend(_parallel_parameters(model, group))
        return describe_blocks(model)

    agree("data_parallel", describe, group)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_alone)
    return DistributedDataParallel(model, **options)


def _parallel_parameters(model: nn.Module, group: ProcessGroup) -> list[str]:
    """The names of the parameters whose gradients the exchange of experts completes."""
    left_alone: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, Experts) or not isinstance(module.exchange, ExpertExchange):
            continue
        ranks, of_model = (dist.get_process_group_ranks(g) for g in (module.exchange.dispatcher.group, group))
        if ranks != of_model:
            raise ValueError(
                f"{name} is parallel over ranks {ranks}, and the model over {of_model}: the copies of an expert would drift "
                "apart; use fully_shard with expert_placement"
            )
        if module.exchange.divisor != group.size():
            raise ValueError(f"{name} sums its gradients, and DistributedDataParallel averages: use gradients='mean'")
        left_alone += [f"{name}.{key}" if name else key for key, _ in module.named_parameters()]
    return left_alone


def _describe_gradients(model: nn.Module) -> dict[str, object]:
    settings: dict[str, object] = {}
    for name, module in model.named_modules():
        settings |= describe_tensors(module, f"{name}." if name else "")
    with_gradients = {name for name, p in model.named_parameters() if p.grad is not None and not isinstance(p, DTensor)}
    return {f"gradient of {name}": text for name, text in settings.items() if name in with_gradients}


def average_gradients(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Average the gradients of whole parameters over the processes, in one message; those of shards stay.

    The simplest data parallelism, for a model that neither DDP nor FSDP wraps, after its backward pass. A parameter has a
    gradient in all processes, or in none. A collective call over ``group``, by default all processes.

    Raises:
        ValueError: the processes have gradients of other names, shapes or dtypes, which each call compares. The message says
            which ranks have what. Over a group without CPUs the comparison fails on the device, and names nothing.
        RuntimeError: another process has failed.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fusedonemoe.integrations.distributed import average_gradients
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> average_gradients(model)
        >>> dist.destroy_process_group()
    """
    whole = {name: p for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    gradients = [p.grad for p in whole.values() if p.grad is not None]
    forms = [(name, tuple(p.shape), str(p.dtype)) for name, p in whole.items() if p.grad is not None]
    device = next((p.device for p in whole.values()), torch.device("cpu"))
    group = group_of(group)
    equal = start_comparison("average_gradients", forms, group, device)  # travels while the gradients are put together
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    messages = [(same, torch.cat([gradient.reshape(-1) for gradient in same])) for same in by_dtype.values()]
    if not equal():
        agree("average_gradients", lambda: _describe_gradients(model), group)
    for same, flat in messages:
        with failures_named("average_gradients", group, "gradients were averaged"):
            dist.all_reduce(flat, group=group)
        flat /= group.size()
        for gradient, mean in zip(same, flat.split([gradient.numel() for gradient in same]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def parameter_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """The model's parameters for an optimizer, by the mesh that they are placed on.

    One call of a fused or foreach optimizer takes whole tensors, or those of one mesh, but not both. So there is a dict for
    whole parameters that require gradients, then one for each mesh, all with the same ``options``, such as ``weight_decay``.
    """
    groups: dict[DeviceMesh | None, list[Tensor]] = {None: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": parameters, **options} for parameters in groups.values() if parameters]


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most ``max_norm``, whole parameters and shards alike.

    Returns the norm before, 0-dimensional: that of the whole model, the same in every process. (``torch.nn.utils`` takes
    parameters of one mesh at a time.) A collective call where there are shards.

    Args:
        parameters: the same ones in every process, with gradients or without; whole ones have the same gradient in each. A
            shard may have a gradient in one process and none in another.
        max_norm: above 0.

    Raises:
        ValueError: ``max_norm`` is not above 0.
        RuntimeError: another process has died, or did not come.

    Example:
        >>> import torch
        >>> from fusedonemoe.integrations.distributed import clip_grad_norm_
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([w], 1.0), w.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A rank without a gradient takes part for every shard that it holds: others may have one.
    counted = [p if p.grad is None else p.grad for p in parameters if p.grad is not None or isinstance(p, DTensor)]
    if not counted:
        return torch.zeros((), device="cpu")
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in counted) else torch.float32
    given = {id(gradient) for gradient in gradients}
    by_mesh: dict[Any, list[Tensor]] = {}
    for tensor in counted:
        placed: tuple[Any, Any] = (None, ())
        part = tensor
        if isinstance(tensor, DTensor):
            placed, part = (tensor.device_mesh, tensor.placements), tensor.to_local()
        norm = torch.linalg.vector_norm(part, dtype=dtype) if id(tensor) in given else part.new_zeros((), dtype=dtype)
        by_mesh.setdefault(placed, []).append(norm)
    squares = []
    for (mesh, placements), norms in by_mesh.items():
        square = torch.stack(norms).square().sum()
        for axis, placement in enumerate(placements):
            if not placement.is_replicate():
                with failures_named("clip_grad_norm_", mesh.get_group(axis), "norms were summed"):
                    dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale.to(gradient.device))
    return norm


def _pairs(placement: Placement) -> bool:
    return isinstance(placement, _StridedShard) and placement.split_factor == 2


class PairedShard(Tensor):
    """A process's halves of a tensor of gate and up rows, as two pieces of the whole.

    A rank of tensor parallelism has its part of the gate rows and its part of the up rows, one behind the other.
    ``torch.distributed.checkpoint`` takes what a rank has of a ``DTensor`` for one box of the whole, and would mix up the rows.
    Of a tensor with the three methods below it takes several boxes. There is nothing else to do with this one.
    """

    pieces: list[tuple[Tensor, ChunkStorageMetadata]]  # views of the process's tensor, and their places in the whole

    @staticmethod
    def __new__(cls, tensor: DTensor) -> "PairedShard":
        """From a tensor sharded so along one dimension, and maybe plainly along others."""
        self: PairedShard = Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        paired = next(placement.dim for placement in tensor.placements if _pairs(placement))  # type: ignore[attr-defined]
        half = tensor.shape[paired] // 2
        offsets = [0] * tensor.ndim
        for axis, (placement, place) in enumerate(zip(tensor.placements, coordinate, strict=True)):
            if _pairs(placement):
                offsets[paired] = place * (half // mesh.size(axis))
            elif isinstance(placement, Shard):
                offsets[placement.dim] = place * -(-tensor.shape[placement.dim] // mesh.size(axis))
        self.pieces = []
        for first, view in zip((0, half), tensor.to_local().detach().chunk(2, dim=paired), strict=True):
            place_in_whole = [*offsets]
            place_in_whole[paired] += first
            self.pieces.append((view, ChunkStorageMetadata(offsets=torch.Size(place_in_whole), sizes=view.shape)))
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"this tensor is for torch.distributed.checkpoint.save and load alone, not for {function}")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PairedShard({tuple(self.shape)}, at {[tuple(chunk.offsets) for _, chunk in self.pieces]})"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:  # noqa: A002 (the protocol's name)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=TensorProperties.create_from_tensor(view), size=self.shape),
            )
            for view, chunk in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for _, chunk in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for view, chunk in self.pieces if chunk.offsets == index.offset)


def checkpointable(state: Any) -> Any:
    """The same state, in which slices of gate and up rows say where they belong.

    Needed with :class:`TensorParallel` alone; harmless otherwise. Values are not copied: loading into the result loads into
    the parameters. A state dict of a model, an optimizer or both keeps its nesting.
    """
    if isinstance(state, dict):
        return {key: checkpointable(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(checkpointable(value) for value in state)
    if isinstance(state, DTensor) and any(_pairs(placement) for placement in state.placements):
        return PairedShard(state)
    return state
