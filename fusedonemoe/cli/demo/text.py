"""The text to train on: the source of Python's own standard library, read as bytes."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
VALIDATION_EVERY = 10
# Not the library's own prose: other people's packages, tests, tables of characters, generated help.
EXCLUDED_FOLDERS = {"__pycache__", "dist-packages", "site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
EXCLUDED_FOLDERS |= {"encodings", "pydoc_data"}
# Written by the build of one interpreter, so they differ between machines.
EXCLUDED_PREFIX = "_sysconfigdata"


@dataclass(frozen=True)
class Corpus:
    """Training and validation text from different files."""

    train: Tensor  # ``[N]`` uint8, the training files one after the other
    val: Tensor  # ``[M]`` uint8, the validation files
    train_files: tuple[str, ...]  # their paths inside the standard library
    val_files: tuple[str, ...]  # those of the validation files


def source_files(root: Path) -> list[str]:
    """Paths of the ``.py`` files under ``root`` that count as text, relative to it, sorted."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path.as_posix() for path in paths if EXCLUDED_FOLDERS.isdisjoint(path.parts) and not path.name.startswith(EXCLUDED_PREFIX)
    )


def split_files(files: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation files: every tenth is held out, so both come from all over the library."""
    val = files[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    return tuple(file for n, file in enumerate(files, 1) if n % VALIDATION_EVERY), tuple(val)


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library of the running interpreter.

    Raises:
        FileNotFoundError: the folder holds too few source files, as where the library is shipped as a zip of bytecode.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = source_files(root)
    if len(files) < VALIDATION_EVERY:
        raise FileNotFoundError(f"{root} must hold at least {VALIDATION_EVERY} Python source files, got {len(files)}")
    train_files, val_files = split_files(files)

    def read(names: tuple[str, ...]) -> Tensor:
        joined = b"\n".join((root / name).read_bytes() for name in names)
        return torch.frombuffer(bytearray(joined), dtype=torch.uint8)

    return Corpus(read(train_files), read(val_files), train_files, val_files)


def _windows(text: Tensor, starts: Tensor, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[B, S]`` int64: the bytes from each start on, and the same shifted by one."""
    bytes_BS = text[starts[:, None] + torch.arange(window + 1, device="cpu")].to(device=device, dtype=torch.int64)
    return bytes_BS[:, :-1], bytes_BS[:, 1:]


def training_batches(
    text: Tensor, *, batch: int, window: int, steps: int, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets ``[B, S]`` int64 at random places, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(text.shape[0] - window, (batch,), generator=generator, device="cpu")
        yield _windows(text, starts, window, device)


def validation_batches(
    text: Tensor, *, batch: int, window: int, batches: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and targets ``[B, S]`` int64 that are spread evenly over the text, always the same."""
    starts = torch.linspace(0, text.shape[0] - window - 1, batch * batches, dtype=torch.float64, device="cpu").long()
    return [_windows(text, part, window, device) for part in starts.split(batch)]
