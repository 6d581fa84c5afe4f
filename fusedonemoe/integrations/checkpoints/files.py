"""Checkpoints as names of tensors that are read piece by piece: dicts, safetensors and torch files, alone or in shards."""

import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PureWindowsPath
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_SUFFIX = ".index.json"
MOST_JSON = 256 << 20  # bytes; the index of a million tensors takes half of it
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# As a safetensors header spells the dtypes that torch has; the name of another one stays as it is written.
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


def read_json(path: Path, meaning: str, *, unique: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds; a name that occurs twice in it is an error, or else the last one counts."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if unique and len(content) < len(pairs):
            twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"names that occur twice: {twice[:5]}")
        return content

    read = _content(path, meaning)
    try:
        content = json.loads(read.decode("utf-8"), object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError(f"{path} must be {meaning}, got JSON that is nested too deeply") from error
    except ValueError as error:  # no UTF-8, no JSON, or an integer of thousands of digits
        raise ValueError(f"{path} must be {meaning}, as JSON in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be {meaning}, a JSON object, got {type(content).__name__}")
    return content


def _content(path: Path, meaning: str) -> bytes:
    """Return what is in a file of JSON, if it is a regular one and no larger than such files are."""
    # Opened before it is looked at, so that nothing takes its place in between; without waiting for the writer of a pipe.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} must be {meaning}, a file of JSON, got a special file")
        if found.st_size > MOST_JSON:
            raise ValueError(f"{path} must be {meaning}, of {MOST_JSON >> 20} MiB at most, got {found.st_size} bytes")
        return file.read(found.st_size)  # and no further, should the file grow


def refusal(tensor: Tensor) -> str | None:
    """Why the numbers of a tensor cannot be read or written piece by piece, or None."""
    # A shard, a quantised tensor or another subclass has numbers that do not lie in its memory.
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a plain tensor, got {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}"
    if tensor.numel() and tensor.untyped_storage().nbytes() < (tensor.storage_offset() + reach(tensor)) * tensor.element_size():
        return "a tensor with memory, got one whose memory was freed"
    return None


def reach(tensor: Tensor) -> int:
    """Count the elements from a tensor's first to its last in memory."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def unreadable(tensor: Tensor) -> str | None:
    """Why the numbers of a tensor cannot be read, or None."""
    return "memory, got a tensor on the meta device" if tensor.is_meta else refusal(tensor)


class Held:
    """A tensor in memory, or mapped into it from a file."""

    def __init__(self, name: str, tensor: Tensor, *, in_file: bool) -> None:
        self._name, self._tensor = name, tensor
        self.in_memory: bool = not in_file  # what is read is a view of memory that somebody else may hold as well

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        if self._tensor.is_nested:
            raise TypeError(f"{self._name} must be {refusal(self._tensor)}")
        return tuple(self._tensor.shape)

    @property
    def dtype(self) -> torch.dtype | str:
        """The dtype."""
        return self._tensor.dtype

    def refusal(self) -> str | None:
        """Why it cannot be read, or None."""
        tensor = self._tensor
        # One number in a file can be the value of a billion elements, for which memory would be taken.
        if not (why := unreadable(tensor)) and not self.in_memory and tensor.untyped_storage().nbytes() < tensor.nbytes:
            return f"stored with all its elements, got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
        return why

    def read(self, index: slice | None = None) -> Tensor:
        """It or some of its rows, as a view: copy what has to last."""
        return self._tensor if index is None else self._tensor[index]


class Stored:
    """A tensor in a safetensors file, of which only the rows asked for are read."""

    in_memory = False

    def __init__(self, path: Path, file: Any, name: str) -> None:
        self._path, self._file, self._name = path, file, name

    @cached_property
    def _slice(self) -> Any:
        return self._file.get_slice(self._name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, from the header."""
        return tuple(self._slice.get_shape())

    @property
    def dtype(self) -> torch.dtype | str:
        """The dtype, from the header; as the file writes it where torch has none."""
        written: str = self._slice.get_dtype()
        return _DTYPES.get(written, written)

    def refusal(self) -> str | None:
        """None: the header was checked when the file was opened."""
        return None

    def read(self, index: slice | None = None) -> Tensor:
        """It or some of its rows."""
        try:
            tensor: Tensor = self._file.get_tensor(self._name) if index is None else self._slice[index]
        except Exception as error:
            raise ValueError(f"{self._path}: {self._name} cannot be read: {error}") from error
        return tensor


def held(tensors: Mapping[Any, object], origin: str, *, in_file: bool = False) -> dict[str, Held]:
    """The tensors among the values of a state dict."""
    found: dict[str, Held] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            continue
        if not isinstance(name, str):
            raise TypeError(f"{origin} must have strings for names, got {name!r}")
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            raise ValueError(f"{name} of {origin} must have numbers, got a parameter without a shape")
        found[name] = Held(name, value.detach(), in_file=in_file)
    return found


def _stored(path: Path) -> dict[str, Stored]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs the package safetensors: pip install 'fusedonemoe[hf]', or pip install safetensors"
        ) from error
    try:
        file: Any = safe_open(path, framework="pt")
    except Exception as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    return {name: Stored(path, file, name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def open_file(path: Path) -> Mapping[str, Held | Stored]:
    """The tensors of one file, by its ending."""
    if path.suffix != ".safetensors" and path.suffix not in TORCH_SUFFIXES:
        raise ValueError(
            f"checkpoint must be a .safetensors, {', '.join(TORCH_SUFFIXES)} or {INDEX_SUFFIX} file or a directory, got {path}"
        )
    if not os.path.isfile(path):  # a pipe would wait for a writer
        raise ValueError(f"{path} must be a file of tensors, got a {'directory' if path.is_dir() else 'special file'}")
    with path.open("rb"):  # the operating system's own error names the file
        pass
    if path.suffix == ".safetensors":
        return _stored(path)
    loaded = _load_torch(path)
    if not isinstance(loaded, Mapping):
        raise TypeError(f"{path} must hold a state dict, got {type(loaded).__name__}")
    return held(loaded, str(path), in_file=True)


def _load_torch(path: Path) -> object:
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format before torch 1.6 cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of zip, pickle, torch and mmap: a damaged file ends in a dozen types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} must be a file of torch.save with tensors: {type(error).__name__}: {reason}") from error


Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]
"""A source of the public functions: a state dict, a file, an index of shards, or a directory of them."""

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
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model_type: str | None = None  # of a config.json beside the files
        self.unlisted: dict[str, str] = {}  # the file of each tensor that the index does not name for it
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
        weight_map = read_json(index, "the index of a sharded checkpoint", unique=True).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(
                f"{index} must have a weight_map, as the index of a sharded checkpoint has, from names to files, "
                f"got {type(weight_map).__name__}"
            )
        shard_of = {name: _shard_path(index, name, file) for name, file in weight_map.items()}
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
