"""State dicts that :mod:`torch.distributed.checkpoint` stores and loads at any number of processes."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


class _Piece:
    """A view of a process's tensor, and where it belongs in the whole."""

    def __init__(self, view: Tensor, offsets: tuple[int, ...]) -> None:
        self.view = view
        self.chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=view.shape)


class PairedShard:
    """A process's halves of a tensor of gate and up rows, as two pieces of the whole.

    A rank of tensor parallelism has its part of the gate rows and its part of the up rows, one behind the other.
    ``torch.distributed.checkpoint`` takes what a rank has for one box of the whole tensor and would mix up the rows.

    Args:
        tensor: sharded so along dimension 1, and maybe plainly along others.
    """

    def __init__(self, tensor: DTensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        mesh, local = tensor.device_mesh, tensor.to_local()
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        offsets = [0] * tensor.ndim
        for axis, (placement, place) in enumerate(zip(tensor.placements, coordinate, strict=True)):
            if isinstance(placement, _StridedShard):
                paired, offsets[1] = placement.dim, place * (tensor.shape[1] // 2 // mesh.size(axis))
                assert paired == 1 and placement.split_factor == 2
            elif isinstance(placement, Shard):
                assert placement.dim != 1
                offsets[placement.dim] = place * -(-tensor.shape[placement.dim] // mesh.size(axis))
        self.pieces = []
        for half, view in enumerate(local.detach().chunk(2, dim=1)):
            first = offsets[1] + half * (tensor.shape[1] // 2)
            self.pieces.append(_Piece(view, (offsets[0], first, *offsets[2:])))

    def size(self) -> torch.Size:
        """Of the whole tensor; a loader compares it with what was saved."""
        return self.shape

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:  # noqa: A002 (the protocol's name)
        return [
            WriteItem(
                index=MetadataIndex(fqn, piece.chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=piece.chunk, properties=TensorProperties.create_from_tensor(piece.view), size=self.shape
                ),
            )
            for piece in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [piece.chunk for piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(piece.view for piece in self.pieces if piece.chunk.offsets == index.offset)


def _is_paired(value: object) -> bool:
    return isinstance(value, DTensor) and any(
        isinstance(placement, _StridedShard) and placement.dim == 1 and placement.split_factor == 2
        for placement in value.placements
    )


def checkpointable(state: Any) -> Any:
    """The same state, in which slices of gate and up rows say where they belong.

    Needed with :class:`TensorParallel` alone; harmless otherwise. Values are not copied: loading into the result loads into
    the parameters.

    Args:
        state: a state dict, of a model, an optimizer or both, nested as they are.

    Returns:
        The same nesting of dicts and lists.

    Example:
        >>> import torch
        >>> from fusedonemoe.integrations.distributed import checkpointable
        >>> checkpointable({"model": {"weight": torch.ones(2)}, "step": 3})
        {'model': {'weight': tensor([1., 1.])}, 'step': 3}
    """
    if isinstance(state, dict):
        return {key: checkpointable(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(checkpointable(value) for value in state)
    if _is_paired(state):
        return PairedShard(state)
    return state
