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
from typing import IO

AnyPath = str | os.PathLike[str]
# What tells one version of a file from all others: its inode, when its content was written, and its size.
Stamp = tuple[int, int, int]


class UnwritableError(OSError):
    """A file cannot be written; the message has its name and the reason."""


def shown(path: AnyPath) -> str:
    """Return a path as it is printed: quoted where it holds characters that a terminal obeys."""
    text = os.fspath(path)
    return text if text.isprintable() and text else repr(text)


def reason_of(error: OSError | ValueError) -> str:
    """Return the reason alone, without the number and the path that Python puts around it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def _named(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # The reader of a pipe went away, which is no fault of the path.
        raise
    except (OSError, ValueError) as error:
        raise UnwritableError(f"cannot write {shown(path)}: {reason_of(error)}") from error


def _look(path: AnyPath) -> tuple[os.stat_result | None, bool, IO[str] | None]:
    """Return the status of a file behind links, None where there is none, and whether it is a stream.

    The last is the standard stream of this process that is this very file, as ``/dev/stdout`` is behind ``> file``.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None, False, None
    for own in (sys.__stdout__, sys.__stderr__):
        with suppress(AttributeError, OSError, ValueError):  # None, without a descriptor, or closed
            if os.path.samestat(found, os.fstat(own.fileno())):  # type: ignore[union-attr]
                return found, True, own
    return found, not stat.S_ISREG(found.st_mode), None


def is_stream(path: AnyPath) -> bool:
    """Return whether a path names a pipe, a device or this process's own output: these are written to, never replaced."""
    with _named(path):
        return _look(path)[1]


def stamp_of(path: AnyPath) -> Stamp | None:
    """Return the version of the file that is there now; None where there is none, or none that can be seen."""
    with suppress(OSError, ValueError):
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def check(path: AnyPath) -> None:
    """Make the file's folder, and raise UnwritableError if :func:`write` cannot write there; the file itself is left as it is."""
    with _named(path):
        found, streams, own = _look(path)
        if own is not None:
            return
        if streams and found is not None and stat.S_ISFIFO(found.st_mode):  # Opened and closed once, it would end for its reader.
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        elif streams:
            with open(path, "wb", buffering=0) as file:  # A directory refuses this.
                file.write(b"")  # /dev/full refuses this.
        else:
            # A byte, because a full disk still has room for the name of an empty file.
            with _temporary_beside(path, found) as (_, _, file):
                file.write(b"\n")
                file.close()


def write(path: AnyPath, content: bytes) -> Stamp | None:
    """Give a file new content.

    The folder is made. An existing file keeps its mode, and its owner where that is permitted; a new one gets what the umask
    leaves. A symbolic link stays, and its target is replaced. A pipe, a device or this process's own output is written to.

    Returns:
        The version that was written; None for a stream.

    Raises:
        UnwritableError: it cannot be written; an older file is as it was, and no temporary file is left.
        BrokenPipeError: nobody reads the pipe any more.
    """
    with _named(path):
        found, streams, own = _look(path)
        if streams:
            if own is not None:
                own.flush()
            # A second opening of this process's own output would begin at the file's start.
            with open(path, "wb") if own is None else os.fdopen(os.dup(own.fileno()), "wb") as stream:
                stream.write(content)
            return None
        with _temporary_beside(path, found) as (target, temporary, file):
            file.write(content)
            file.close()
            if found is not None:
                if hasattr(os, "chown"):
                    with suppress(OSError):  # Only root gives files away.
                        os.chown(temporary, found.st_uid, found.st_gid)
                os.chmod(temporary, stat.S_IMODE(found.st_mode))
            stamp = stamp_of(temporary)
            os.replace(temporary, target)
        return stamp


@contextmanager
def _temporary_beside(path: AnyPath, found: os.stat_result | None) -> Iterator[tuple[Path, Path, IO[bytes]]]:
    """Yield the file behind links, and a new one in its folder, which is made; the new one is open, and removed at the end."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if found is not None:
        os.close(os.open(target, os.O_WRONLY))  # Its folder alone decides whether its name may be taken.
    # Not tempfile: its files are readable for the owner alone, whatever the umask says.
    temporary = target.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with open(temporary, "xb") as file:
            yield target, temporary, file
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
