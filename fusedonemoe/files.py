"""Files that commands write: whole at every moment, and found to be unwritable before the work and not after it.

New content goes to a temporary file of its own in the same folder, which then takes the name. So a reader never sees a part of
it, two programs that write one file never mix their contents (the last one wins), and a full disk leaves the older file intact.
"""

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

AnyPath = str | os.PathLike[str]


class UnwritableError(OSError):
    """A file cannot be written; the message has its name and the reason."""


class Stamp(NamedTuple):
    """One version of a file, which no other version has.

    Attributes:
        inode: of the file.
        changed: when its content was written, in nanoseconds.
        size: in bytes.
    """

    inode: int
    changed: int
    size: int


def shown(path: AnyPath) -> str:
    """A path as it is printed: quoted where it holds characters that a terminal obeys."""
    text = os.fspath(path)
    return text if text.isprintable() and text else repr(text)


def reason_of(error: OSError | ValueError) -> str:
    """The reason alone, without the number and the path that Python puts around it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def _named(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # The reader of a pipe went away, which is no fault of the path.
        raise
    except (OSError, ValueError) as error:
        raise UnwritableError(f"cannot write {shown(path)}: {reason_of(error)}") from error


def _found(path: AnyPath) -> os.stat_result | None:
    """Return the status of the file at a path, links followed; None where there is none."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _own_output(found: os.stat_result) -> IO[str] | None:
    """The standard stream of this process that is this very file, as ``/dev/stdout`` is behind ``> file``."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with suppress(AttributeError, OSError, ValueError):  # None, without a descriptor, or closed
            if os.path.samestat(found, os.fstat(stream.fileno())):  # type: ignore[union-attr]
                return stream
    return None


def _is_stream(found: os.stat_result | None) -> bool:
    return found is not None and (not stat.S_ISREG(found.st_mode) or _own_output(found) is not None)


def is_stream(path: AnyPath) -> bool:
    """Return whether a path names a pipe, a device or this process's own output: these are written to, never replaced."""
    with _named(path):
        return _is_stream(_found(path))


def stamp_of(path: AnyPath) -> Stamp | None:
    """The version of the file that is there now; None where there is none, or none that can be seen."""
    with suppress(OSError, ValueError):
        found = os.stat(path)
        return Stamp(found.st_ino, found.st_mtime_ns, found.st_size)
    return None


def check(path: AnyPath) -> None:
    """Make the file's folder, and find out whether :func:`write` can write there; the file itself is left as it is.

    Args:
        path: of the file.

    Raises:
        UnwritableError: it cannot.
    """
    with _named(path):
        found = _found(path)
        if found is not None and _is_stream(found):
            _check_stream(path, found)
            return
        target = _target(path, found)
        # A byte, because a full disk still has room for the name of an empty file.
        with _temporary_beside(target) as (temporary, file):
            file.write(b"\n")
            file.close()
            temporary.unlink()


def _check_stream(path: AnyPath, found: os.stat_result) -> None:
    if _own_output(found) is not None:
        return
    if stat.S_ISFIFO(found.st_mode):  # Opened and closed once, it would end for its reader.
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    with open(path, "wb", buffering=0) as file:  # A directory refuses this.
        file.write(b"")  # /dev/full refuses this.


def write(path: AnyPath, content: bytes) -> Stamp | None:
    """Give a file new content.

    The folder is made. An existing file keeps its mode, and its owner where that is permitted; a new one gets what the umask
    leaves. A symbolic link stays, and its target is replaced. A pipe, a device or this process's own output is written to.

    Args:
        path: of the file.
        content: all of it.

    Returns:
        The version that was written; None for a stream.

    Raises:
        UnwritableError: it cannot be written; an older file is as it was, and no temporary file is left.
        BrokenPipeError: nobody reads the pipe any more.
    """
    with _named(path):
        found = _found(path)
        if found is not None and _is_stream(found):
            with _stream(path, found) as stream:
                stream.write(content)
            return None
        target = _target(path, found)
        with _temporary_beside(target) as (temporary, file):
            file.write(content)
            file.close()
            if found is not None:
                _make_alike(temporary, found)
            stamp = stamp_of(temporary)
            os.replace(temporary, target)
        return stamp


def _target(path: AnyPath, found: os.stat_result | None) -> Path:
    """The file itself behind links, in a folder that is there; an error where it may not be written."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if found is not None:
        os.close(os.open(target, os.O_WRONLY))  # Its folder alone decides whether its name may be taken.
    return target


def _stream(path: AnyPath, found: os.stat_result) -> IO[bytes]:
    own = _own_output(found)
    if own is None:
        return open(path, "wb")
    own.flush()
    return os.fdopen(os.dup(own.fileno()), "wb")  # A second opening would begin at the file's start.


@contextmanager
def _temporary_beside(target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file in the folder of another, opened; removed on an error, Ctrl-C included."""
    # Not tempfile: its files are readable for the owner alone, whatever the umask says.
    temporary = target.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with open(temporary, "xb") as file:
            yield temporary, file
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _make_alike(temporary: Path, found: os.stat_result) -> None:
    """Owner and mode of an existing file for the one that replaces it."""
    if hasattr(os, "chown"):
        with suppress(OSError):  # Only root gives files away.
            os.chown(temporary, found.st_uid, found.st_gid)
    os.chmod(temporary, stat.S_IMODE(found.st_mode))
