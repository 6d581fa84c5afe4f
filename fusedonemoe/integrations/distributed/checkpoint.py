"""State dicts that :mod:`torch.distributed.checkpoint` stores and loads at any number of processes."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard


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
