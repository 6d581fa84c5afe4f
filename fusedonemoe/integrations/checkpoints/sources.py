"""Checkpoints as names of tensors that are read piece by piece: dicts, safetensors and torch files, alone or in shards."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]
"""What the public functions read: a state dict, a file, an index of shards, or a directory of them."""

_INDEX_SUFFIX = ".index.json"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# In the order in which they are looked for; an index is the shards' only complete list.
_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")


class _Tensors:
    """Tensors that are in memory, or mapped into it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: value.detach() for name, value in tensors.items() if isinstance(value, Tensor)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, index: slice | None) -> Tensor:
        tensor = self._tensors[name]
        return tensor if index is None else tensor[index]

    def close(self) -> None:
        self._tensors = {}


class _Safetensors:
    """One safetensors file; of a tensor only the rows asked for are read."""

    def __init__(self, path: Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError(
                f"reading {path.name} needs the package safetensors: pip install 'fusedonemoe[hf]', or pip install safetensors"
            ) from error
        self._file: Any = safe_open(path, framework="pt")
        self._slices: dict[str, Any] = {}

    def names(self) -> list[str]:
        return list(self._file.keys())

    def _slice(self, name: str) -> Any:
        if name not in self._slices:
            self._slices[name] = self._file.get_slice(name)
        return self._slices[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: slice | None) -> Tensor:
        return self._file.get_tensor(name) if index is None else self._slice(name)[index]

    def close(self) -> None:
        self._slices = {}
        self._file = None


def _open_file(path: Path) -> _Tensors | _Safetensors:
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    if path.suffix not in _TORCH_SUFFIXES:
        raise ValueError(
            f"checkpoint must be a .safetensors, {', '.join(_TORCH_SUFFIXES)} or {_INDEX_SUFFIX} file or a directory, got {path}"
        )
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format before torch 1.6 cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise TypeError(f"{path} must hold a state dict, got {type(loaded).__name__}")
    return _Tensors(loaded)


def _shards_of(index: Path) -> dict[str, Path]:
    """The file of every tensor that an index names."""
    weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} must have a weight_map, as the index of a sharded checkpoint has")
    return {name: index.parent / file for name, file in weight_map.items()}


def _files_in(directory: Path) -> list[Path]:
    """What to open in a directory: an index, the one usual file, or every safetensors file."""
    indices = sorted(directory.glob(f"*{_INDEX_SUFFIX}"))
    safe = [index for index in indices if ".safetensors" in index.name]
    for found in (safe, indices):
        if len(found) > 1:
            raise ValueError(f"{directory} holds several checkpoints, name one: {[index.name for index in found]}")
        if found:
            return found
    for name in _WHOLE_FILES:
        if (directory / name).is_file():
            return [directory / name]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no checkpoint: no {_INDEX_SUFFIX} file, none of {_WHOLE_FILES}, no .safetensors file"
        )
    return files


class Source:
    """An open checkpoint: which tensors it has, their shapes, and any rows of them.

    Args:
        checkpoint: a state dict; a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file; an ``.index.json`` file of shards; or
            a directory with one of these.

    Attributes:
        model_type: what a ``config.json`` beside the files says, or None.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model_type: str | None = None
        self._open: dict[Path, _Tensors | _Safetensors] = {}
        self._owner: dict[str, _Tensors | _Safetensors] = {}
        if isinstance(checkpoint, Mapping):
            tensors = _Tensors(checkpoint)
            self._owner = dict.fromkeys(tensors.names(), tensors)
        elif isinstance(checkpoint, str | os.PathLike):
            try:
                self._open_path(Path(checkpoint))
            except BaseException:
                self.close()
                raise
        else:
            raise TypeError(f"checkpoint must be a state dict or a path, got {type(checkpoint).__name__}")

    def _open_path(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"checkpoint {path} is not there")
        directory = path if path.is_dir() else path.parent
        if (config := directory / "config.json").is_file():
            self.model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        files = _files_in(path) if path.is_dir() else [path]
        if files[0].name.endswith(_INDEX_SUFFIX):
            self._open_shards(files[0])
            return
        for file in files:
            self._open[file] = part = _open_file(file)
            self._owner |= dict.fromkeys(part.names(), part)
        counts = Counter(name for part in self._open.values() for name in part.names())
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"{path} holds tensors of the same name in several files and no index: {twice[:5]}")

    def _open_shards(self, index: Path) -> None:
        shard_of = _shards_of(index)
        if lost := sorted({shard.name for shard in shard_of.values() if not shard.is_file()}):
            raise FileNotFoundError(f"{index} names shards that are not there: {lost}")
        for shard in dict.fromkeys(shard_of.values()):
            self._open[shard] = _open_file(shard)
        held = {shard: set(part.names()) for shard, part in self._open.items()}
        if lost := sorted(name for name, shard in shard_of.items() if name not in held[shard]):
            raise ValueError(f"{index} names tensors that their shards do not hold: {lost[:5]}")
        self._owner = {name: self._open[shard] for name, shard in shard_of.items()}

    def names(self) -> list[str]:
        """Every tensor's name, in the checkpoint's order."""
        return list(self._owner)

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._owner[name].shape(name)

    def read(self, name: str, index: slice | None = None) -> Tensor:
        """A tensor, or some of its rows: often a view of the file, so copy what has to last."""
        return self._owner[name].read(name, index)

    def close(self) -> None:
        """Let go of the files."""
        for part in self._open.values():
            part.close()
        self._open, self._owner = {}, {}

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
