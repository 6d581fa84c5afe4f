"""Checkpoints as names of tensors that are read piece by piece: dicts, safetensors and torch files, alone or in shards."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from types import TracebackType

from torch import Tensor

from fusedonemoe.integrations.checkpoints.files import INDEX_SUFFIX, Held, Stored, held, open_file, read_json

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]
"""What the public functions read: a state dict, a file, an index of shards, or a directory of them."""

# In the order in which they are looked for; an index is the shards' only complete list.
_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")


def _shard_path(index: Path, name: str, file: object) -> Path:
    """The file of one entry, which must be in the index's own folder, or below it."""
    # A link in that folder may lead out of it: Hugging Face's cache consists of such links.
    if not isinstance(file, str) or not file:
        raise ValueError(f"{index} must name a file for {name!r}, got {file!r}")
    path = Path(file)
    outside = path.is_absolute() or ".." in path.parts or PureWindowsPath(file).anchor or PureWindowsPath(file).drive
    if outside or "\\" in file or not file.isprintable():
        raise ValueError(f"{index} must name files in its own folder, by relative paths with '/', got {file!r} for {name!r}")
    return index.parent / path


def _shards_of(index: Path) -> dict[str, Path]:
    """The file of every tensor that an index names."""
    weight_map = read_json(index, "the index of a sharded checkpoint", unique=True).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"{index} must have a weight_map, as the index of a sharded checkpoint has, from names to files, "
            f"got {type(weight_map).__name__}"
        )
    return {name: _shard_path(index, name, file) for name, file in weight_map.items()}


def _files_in(directory: Path) -> list[Path]:
    """Return the files to open in a directory: an index, the one usual file, or every safetensors file."""
    indices = sorted(directory.glob(f"*{INDEX_SUFFIX}"))
    safe = [index for index in indices if ".safetensors" in index.name]
    for found in (safe, indices):
        if len(found) > 1:
            raise ValueError(f"{directory} holds several checkpoints, name one: {[index.name for index in found]}")
        if found:
            return found
    for name in _WHOLE_FILES:
        if (directory / name).exists():
            return [directory / name]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no checkpoint: no {INDEX_SUFFIX} file, none of {_WHOLE_FILES}, no .safetensors file"
        )
    return files


class Source(dict[str, Held | Stored]):
    """An open checkpoint: its tensors by name, in its order, whose shapes are known and of which any rows can be read.

    Inside ``with``, a ValueError or TypeError about the checkpoint gets the file's name.

    Attributes:
        model_type: what a ``config.json`` beside the files says, or None.
        unlisted: tensors that the shards hold in other files than the index says, or that it does not name, with their files.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model_type: str | None = None
        self.unlisted: dict[str, str] = {}
        self._path: Path | None = None
        if isinstance(checkpoint, Mapping):
            self.update(held(checkpoint, "checkpoint"))
        elif isinstance(checkpoint, str | os.PathLike):
            self._path = Path(checkpoint)
            self._open(self._path)
        else:
            raise TypeError(f"checkpoint must be a state dict or a path, got {type(checkpoint).__name__}")

    def _open(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"checkpoint {path} is not there")
        directory = path if path.is_dir() else path.parent
        if (config := directory / "config.json").exists():
            self.model_type = read_json(config, "a model's configuration").get("model_type")
            if self.model_type is not None and not isinstance(self.model_type, str):
                raise ValueError(f"{config} must have a string for model_type, got {type(self.model_type).__name__}")
        files = _files_in(path) if path.is_dir() else [path]
        if files[0].name.endswith(INDEX_SUFFIX):
            self._open_shards(files[0])
            return
        parts = [open_file(file) for file in files]
        counts = Counter(name for part in parts for name in part)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"{path} holds tensors of the same name in several files and no index: {twice[:5]}")
        for part in parts:
            self.update(part)

    def _open_shards(self, index: Path) -> None:
        shard_of = _shards_of(index)
        shards = dict.fromkeys(shard_of.values())
        if lost := sorted({shard.name for shard in shards if not shard.exists()}):
            raise FileNotFoundError(f"{index} names shards that are not there: {lost[:5]}")
        parts = {shard: open_file(shard) for shard in shards}
        if lost := sorted(name for name, shard in shard_of.items() if name not in parts[shard]):
            raise ValueError(f"{index} names tensors that their shards do not hold: {lost[:5]}")
        self.update({name: parts[shard][name] for name, shard in shard_of.items()})
        self.unlisted = {name: shard.name for shard, part in parts.items() for name in part if shard_of.get(name) != shard}

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()  # closes the files
        if self._path is not None and kind in (ValueError, TypeError) and str(self._path) not in str(error):
            raise kind(f"{self._path}: {error}") from error
