"""One file of tensors, or of JSON: opened and checked. What is wrong with a file is said with its name."""

import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
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
    if tensor.numel():
        last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + last + 1) * tensor.element_size():
            return "a tensor with memory, got one whose memory was freed"
    return None


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
