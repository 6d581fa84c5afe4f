"""Compiles the CPU kernels on first use, for the machine they run on, into a per-user cache.

The source needs no headers but the compiler's own. The library's file name is a digest of all that decides what the
compiler makes of it (source, compiler, flags, the CPU's features), so nothing is ever stale; it is written under another
name and moved into place, so two processes may race for it, and it ends in a checksum, so a damaged one is made again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "native"
# -ffp-contract makes a * b + c one rounding wherever it is written, in every loop alike; without it the same sum could
# round differently in a vector and in its tail.
FLAGS = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fopenmp", "-fPIC"]
ELEMENTS = ("f32", "bf16", "f16")  # compiled side by side: they take as long as the slowest
SECONDS_TO_COMPILE = 300
HUGE_PAGE = 2 << 20  # the pool's unit, as in native/layer.h
CHECKSUM_BYTES = 12


class Unavailable(Exception):
    """The kernels cannot be had on this machine; the message says why."""


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise Unavailable("no C++ compiler was found ($CXX, g++, c++, clang++)")


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``$FUSEDONEMOE_CACHE_DIR``, else under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FUSEDONEMOE_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fusedonemoe"


def _cpu_features() -> str:
    """What -march=native looks at, as far as it can be read cheaply."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model", "cpu family", "flags", "Features", "CPU part"))})
    )


def _digest(compiler: str, flags: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    status = os.stat(compiler)  # a new compiler is a new file; asking it for its version costs a process
    for part in (compiler, str(status.st_size), str(status.st_mtime_ns), *flags, platform.machine(), _cpu_features()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _checksum(library: bytes) -> bytes:
    return hashlib.blake2b(library, digest_size=CHECKSUM_BYTES).digest()


def _is_whole(library: Path) -> bool:
    """Whether the file is there and as it was written; of a truncated one the loader dies by a signal."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-CHECKSUM_BYTES:] == _checksum(content[:-CHECKSUM_BYTES])


def _run(commands: list[list[str]]) -> None:
    """Run commands of one compiler side by side."""
    compiler, running = commands[0][0], []
    end = time.monotonic() + SECONDS_TO_COMPILE
    try:
        for command in commands:
            pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            running.append(subprocess.Popen(command, **pipes, text=True, errors="replace"))
        for process in running:
            _, message = process.communicate(timeout=max(0.0, end - time.monotonic()))
            if process.returncode:
                raise Unavailable(f"{compiler} failed: {(message.strip().splitlines() or ['no message'])[0]}")
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{compiler} could not be run: it timed out after {SECONDS_TO_COMPILE} seconds") from error
    except OSError as error:
        raise Unavailable(f"{compiler} could not be run: {error}") from error
    finally:
        for process in running:
            process.kill()
            process.communicate()


def _compile(compiler: str, flags: list[str], target: Path) -> None:
    print(f"fusedonemoe: compiling the CPU kernels for this machine, once, into {target.parent} ...", file=sys.stderr, flush=True)
    source = str(SOURCES / "moe.cpp")
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        objects = {element: f"{directory}/{element}.o" for element in ELEMENTS}
        common = {ELEMENTS[0]: ["-DCOMMON"]}
        _run([[compiler, *flags, f"-DELEMENT={e}", *common.get(e, []), "-c", source, "-o", o] for e, o in objects.items()])
        linked = Path(directory, "kernels.so")
        _run([[compiler, *flags, "-shared", *objects.values(), "-o", str(linked)]])
        library = linked.read_bytes()
        linked.write_bytes(library + _checksum(library))  # the loader reads no further than the headers say
        os.replace(linked, target)


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none; looked for once per process."""
    if os.environ.get("FUSEDONEMOE_CPU_KERNELS") == "0":
        return "FUSEDONEMOE_CPU_KERNELS=0 turns them off"
    try:
        compiler = _compiler()
        flags = [*FLAGS, *os.environ.get("FUSEDONEMOE_CXXFLAGS", "").split()]
        directory = cache_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = directory / f"kernels-{_digest(compiler, flags)}.so"
        if not _is_whole(target):
            _compile(compiler, flags, target)
        return ctypes.CDLL(str(target))
    except Unavailable as error:
        return str(error)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return f"the kernels could not be cached or loaded: {error}"


def load() -> ctypes.CDLL:
    """The compiled kernels.

    Returns:
        The library, compiled if it is not in the cache.

    Raises:
        Unavailable: no compiler, a cache that cannot be written, or kernels turned off by ``FUSEDONEMOE_CPU_KERNELS=0``.
    """
    library = _load()
    if isinstance(library, str):
        raise Unavailable(library)
    return library
