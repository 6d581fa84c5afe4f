"""Find the CPU kernels in the wheel, or compile them on first use, for the machine they run on, into a per-user cache.

The source includes only the compiler's own headers. The library's file name is a digest of everything that determines the
machine code (source, compiler, flags, the CPU's features), so the cache never holds a stale library. The library is written
under another name and moved into place. It ends in a checksum, so a damaged library is compiled again.

One thread of one process compiles, and the others wait for it. If the compilation fails, one process that waited tries once
more; if that fails too, the rest report its reason. If the compiling process is killed, the next one compiles.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from functools import cache
from pathlib import Path

import torch  # its headers compile the operators, and its libraries must be in the process

from fusedonemoe.ops.cpu import commands
from fusedonemoe.ops.cpu import compiler as compilers
from fusedonemoe.ops.cpu.cache import ATTEMPTS, Folder, Found, Untrusted
from fusedonemoe.ops.cpu.commands import ELEMENTS, SOURCES, STABLE_TORCH, VARIANTS
from fusedonemoe.ops.cpu.compiler import Unavailable as Unavailable
from fusedonemoe.ops.cpu.forks import no_fork
from fusedonemoe.ops.notice import say

SECONDS_TO_COMPILE = 300
SECONDS_TO_WAIT = 660  # for another process, which may compile ATTEMPTS times
PREBUILT = Path(__file__).parent / "prebuilt"  # in the wheels for one system
HUGE_PAGE = 2 << 20  # the pool's unit, as in native/layer.h


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return os.path.abspath(path)
    raise Unavailable("no C++ compiler was found ($CXX, g++, c++, clang++)")


def cache_directory() -> Path:
    """Return the folder of the kernels: ``$FUSEDONEMOE_CACHE_DIR``, else one in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FUSEDONEMOE_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fusedonemoe"


def _cpu_features() -> str:
    """Return the features that -march=native depends on, as far as they can be read cheaply."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model", "cpu family", "flags", "Features", "CPU part"))})
    )


def _flags_of_cpu() -> frozenset[str]:
    """Return the features of an x86-64 CPU, as Linux names them; none for another machine."""
    for line in _cpu_features().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _digest(compiler: str, flags: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    status = os.stat(compiler)  # a new compiler is a new file; reading its version would start a process
    for part in (
        compiler,
        str(status.st_size),
        str(status.st_mtime_ns),
        *flags,
        STABLE_TORCH,
        platform.machine(),
        _cpu_features(),
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _symbols() -> list[str]:
    """Return the library's entry points, read from the source."""
    source = (SOURCES / "moe.cpp").read_text()
    of_elements = re.findall(r"\bENTRY\((\w+)\)\(", source)
    return [
        *("fusedonemoe_register", "fusedonemoe_load"),
        *re.findall(r"\b(fusedonemoe_\w+)\(", source),
        *(f"fusedonemoe_{name}_{element}" for name in of_elements for element in ELEMENTS),
    ]


def _compile(compiler: str, flags: list[str], folder: Folder, name: str) -> None:
    say(f"compiling the CPU kernels for this machine, once, into {folder.path} ...")
    end = time.monotonic() + SECONDS_TO_COMPILE
    with folder.working_folder() as working:
        try:
            for step in commands.steps(compiler, flags, Path(torch.__file__).parent, "kernels.so"):
                compilers.run(step, working, end - time.monotonic())
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{compiler} could not be run: it timed out after {SECONDS_TO_COMPILE} seconds") from error
        folder.keep(Path(working, "kernels.so").read_bytes(), name, working)


def _make(compiler: str, flags: list[str], folder: Folder, name: str, seen: Found | None) -> None:
    """Compile the library, unless another process has done it since this one saw ``seen``."""
    failures_before = folder.failures(name).times
    with folder.lock(SECONDS_TO_WAIT) as is_alone:
        if folder.look(name) != seen:
            return
        failures = folder.failures(name)
        if failures.times >= failures_before + ATTEMPTS:
            raise Unavailable(failures.reason)
        if is_alone:
            folder.remove_remains()
        try:
            _compile(compiler, flags, folder, name)
        except OSError as error:
            reason = f"the kernels could not be cached or loaded: {error}"
            folder.note_failure(name, reason)
            raise Unavailable(reason) from error
        except Unavailable as error:
            folder.note_failure(name, str(error))
            raise
        folder.forget_failures()


def _checked(library: ctypes.CDLL, path: Path) -> ctypes.CDLL | str:
    """Register a library's operators; return it, or what is wrong with it."""
    if missing := [symbol for symbol in _symbols() if not hasattr(library, symbol)]:
        return f"the kernels could not be loaded: {path} has no {missing[0]}"
    with no_fork:  # a child that is forked meanwhile would wait for torch's lock for ever
        is_refused = library.fusedonemoe_register()
    if is_refused:
        return f"the kernels could not be loaded: torch refuses the operators of {path}"
    return library


def _prebuilt() -> Path | None:
    """Return the wheel's library for this machine; None without one, or where the flags of the user ask for another."""
    if os.environ.get("FUSEDONEMOE_CXXFLAGS"):
        return None
    has, chosen = _flags_of_cpu(), os.environ.get("FUSEDONEMOE_CPU_ARCH")
    for name, (needs, _) in reversed(VARIANTS.items()):
        path = PREBUILT / f"kernels-{name}.so"
        if chosen in (None, name) and needs <= has and path.exists():
            return path
    return None


def _open(folder: Folder, name: str, found: Found | None) -> ctypes.CDLL | str:
    """Return the library, or what is wrong with it: "" if it is missing or damaged. The loader could crash on a damaged one."""
    if found is None or not found.is_whole:
        return ""
    path = folder.path / name
    try:
        with no_fork:
            handle = ctypes.CDLL(folder.name_to_load(name))._handle
    except OSError as error:
        return f"the kernels could not be cached or loaded: {error}"
    library = ctypes.CDLL(str(path), handle=handle)
    return _checked(library, path)


def _plan() -> tuple[str, list[str], str]:
    """Return the compiler, its flags, and the library's file name."""
    compiler = _compiler()
    chosen = os.environ.get("FUSEDONEMOE_CPU_ARCH")
    _, options = VARIANTS[chosen] if chosen else (None, ["-march=native"])
    flags = [*options, *os.environ.get("FUSEDONEMOE_CXXFLAGS", "").split()]
    return compiler, flags, f"kernels-{_digest(compiler, flags)}.so"


def _find() -> ctypes.CDLL:
    chosen = os.environ.get("FUSEDONEMOE_CPU_ARCH")
    if chosen and chosen not in VARIANTS:
        raise Unavailable(f"FUSEDONEMOE_CPU_ARCH must be one of {tuple(VARIANTS)}, got {chosen!r}")
    if path := _prebuilt():
        with contextlib.suppress(OSError), no_fork:  # one that this system cannot load: another is compiled
            library = _checked(ctypes.CDLL(str(path)), path)
            if isinstance(library, str):
                raise Unavailable(library)
            return library
    compiler, flags, name = _plan()
    with contextlib.closing(Folder(cache_directory())) as folder:
        found = folder.look(name)
        library = _open(folder, name, found)
        # A library from elsewhere or of another version is compiled again. One that does not load when it is new is not.
        if isinstance(library, str) and not (library and folder.failures(name).times):
            _make(compiler, flags, folder, name, found)
            library = _open(folder, name, folder.look(name))
            if isinstance(library, str):
                folder.note_failure(name, library)
        else:
            folder.tidy()
    if isinstance(library, str):
        raise Unavailable(library)
    return library


@cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or the reason why there is none. Each process looks once."""
    if os.environ.get("FUSEDONEMOE_CPU_KERNELS") == "0":
        return "FUSEDONEMOE_CPU_KERNELS=0 turns them off"
    if not hasattr(os, "geteuid"):
        return "the CPU kernels need a system with users and locks, such as Linux or macOS"
    try:
        return _find()
    except Unavailable as error:
        reason = str(error)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        reason = f"the kernels could not be cached or loaded: {error}"
    say(f"going on without the CPU kernels: {reason}")
    return reason


def library_file() -> Path:
    """Return the file of the library, which is loaded first; see :func:`load` for what it raises."""
    load()
    return _prebuilt() or cache_directory() / _plan()[2]


def cache_fault() -> str | None:
    """Return the reason if another user could have written the cached library, else None."""
    try:
        with contextlib.closing(Folder(cache_directory())) as folder:
            folder.look(_plan()[2])
    except Untrusted as error:
        return str(error)
    except (Unavailable, OSError, RuntimeError):  # faults of another kind
        return None
    return None


class _Turn:
    """The thread that loads the kernels, while the others wait."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_taken = False


_turn = _Turn()


def _forget_other_threads() -> None:
    """Reset the turn in a forked child, where the thread that had it does not exist."""
    global _turn
    _turn = _Turn()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


# The kernels, once they are loaded.
library: ctypes.CDLL | None = None


def load() -> ctypes.CDLL:
    """Load the compiled kernels.

    Returns:
        The library, compiled if it is not in the cache.

    Raises:
        Unavailable: There is no compiler, the cache cannot be written or another user can write it, or
            ``FUSEDONEMOE_CPU_KERNELS=0`` turns the kernels off.
    """
    global library
    turn = _turn
    with turn.lock:
        if turn.is_taken:  # called again by a signal's handler or by a stderr that uses this library
            raise Unavailable("the kernels are being loaded by this very thread")
        turn.is_taken = True
        try:
            found = _load()
        finally:
            turn.is_taken = False
    if isinstance(found, str):
        raise Unavailable(found)
    library = found
    return found
