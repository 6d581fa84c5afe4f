"""The folder of compiled kernels: only its user can write it, and one process at a time compiles into it.

A loaded library may do everything that its process may do. So the folder and the library must belong to the user of this
process, other users must not be able to write them, and neither may be a symbolic link. Both are opened once. Owner, permissions
and checksum are read from the open files, and the kernels are loaded from the open folder, so moving or replacing the folder in
between cannot substitute another library.

The parent folders can therefore do little harm where Linux's ``/proc`` names open folders. Three kinds of parents are refused: a
folder that every user may write and that is not sticky (``/tmp`` is sticky); for root, a folder of another user; and without
``/proc``, a folder of another user or one that a group may write. Elsewhere a group may write the parents, because a umask of 002
gives ``~/.cache`` such permissions on many systems.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from fusedonemoe.ops.cpu.compiler import Unavailable
from fusedonemoe.ops.cpu.forks import open_beyond_standard
from fusedonemoe.ops.notice import say

CHECKSUM_BYTES = 12
SECONDS_BETWEEN_TRIES = 0.1
ATTEMPTS = 2  # processes that wait give up after so many failed compilations
IS_BY_DESCRIPTOR = os.path.isdir("/proc/self/fd")
WORKING = "compiling-"
# Folders that killed compilations of versions before the lock left. Younger ones may still be at work.
OLD_WORKING = re.compile("tmp[a-z0-9_]{8}")
OLD_FILES = {"f32.o", "bf16.o", "f16.o", "kernels.so"}
SECONDS_UNTIL_OLD = 86_400
# Errors of a file system without locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ESTALE)
ADVICE = "set FUSEDONEMOE_CACHE_DIR to a folder that is yours and that no other user can write"

_loads = itertools.count()


class Untrusted(Unavailable):
    """Another user could have written the library, or could write it."""


class Failures(NamedTuple):
    """The failed compilations of a library since the last success, and the reason of the last."""

    times: int
    reason: str


class Found(NamedTuple):
    """A library's file: the identity of this version of the file, and whether its checksum is right."""

    identity: tuple[int, ...]
    is_whole: bool


def checksum(library: bytes) -> bytes:
    """Return the checksum that follows the library in its file."""
    return hashlib.blake2b(library, digest_size=CHECKSUM_BYTES).digest()


def _refuse(path: Path, fault: str) -> Untrusted:
    return Untrusted(f"the kernels' cache is not safe: {path} {fault}; remove it, or {ADVICE}")


def _refuse_above(path: Path, above: Path, fault: str) -> Untrusted:
    return Untrusted(f"the kernels' cache {path} is not safe: {above} {fault}; {ADVICE}")


def _not_ours(status: os.stat_result) -> str:
    return f"belongs to user {status.st_uid}, and this process is user {os.geteuid()}'s"


def _writable(status: os.stat_result) -> str:
    return f"can be written by other users (its mode is {stat.S_IMODE(status.st_mode):04o})"


def _check_own(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise _refuse(path, _not_ours(status))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refuse(path, _writable(status))


def _check_above(path: Path) -> None:
    """Check the folders that lead to ``path``, through symbolic links and without them."""
    for folder in dict.fromkeys((*path.absolute().parents, *path.resolve().parents)):
        try:
            status = os.stat(folder)
        except OSError:  # missing, or without permission to enter, which opening the cache will report
            continue
        of_another = status.st_uid not in (0, os.geteuid())
        if of_another and (os.geteuid() == 0 or not IS_BY_DESCRIPTOR):
            raise _refuse_above(path, folder, _not_ours(status))
        writers = stat.S_IWOTH if IS_BY_DESCRIPTOR else stat.S_IWOTH | stat.S_IWGRP
        if status.st_mode & writers and not status.st_mode & stat.S_ISVTX:
            raise _refuse_above(path, folder, _writable(status))


class Folder:
    """The cache, open and checked; made if it does not exist. The caller closes it.

    Args:
        path: The folder.

    Raises:
        Untrusted: Another user owns it or can write it.
        OSError: It cannot be made or opened.
    """

    def __init__(self, path: Path):
        self.path = path
        _check_above(path)
        if path.is_symlink():
            raise _refuse(path, "is a symbolic link")
        for folder in (*reversed(path.parents), path):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
        self.descriptor: int = open_beyond_standard(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _check_own(path, os.fstat(self.descriptor))
        except BaseException:
            self.close()
            raise
        # A name of the open folder itself, so that another folder cannot replace it.
        self.name: str = f"/proc/self/fd/{self.descriptor}" if IS_BY_DESCRIPTOR else str(path)

    def close(self) -> None:
        """Close the folder."""
        os.close(self.descriptor)

    def _at(self, name: str) -> str:
        return f"{self.name}/{name}"

    def look(self, name: str) -> Found | None:
        """Return the library of this name, or None if it does not exist.

        Raises:
            Untrusted: It is not a file, or another user owns it or can write it.
        """
        path = self.path / name
        if path.is_symlink():
            raise _refuse(path, "is a symbolic link")
        try:
            # Non-blocking, because a FIFO would make open() wait.
            descriptor = open_beyond_standard(self._at(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _refuse(path, "is not a file")
            _check_own(path, status)
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read()
        finally:
            os.close(descriptor)
        is_whole = content[-CHECKSUM_BYTES:] == checksum(content[:-CHECKSUM_BYTES])
        return Found((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns), is_whole)

    def name_to_load(self, name: str) -> str:
        """Return a new path of the library: the dynamic loader does not load a path again that it has seen."""
        return self._at("./" * next(_loads) + name)

    @contextlib.contextmanager
    def working_folder(self) -> Iterator[str]:
        """Make a folder inside the cache, and remove it at the end."""
        # TemporaryDirectory would also be removed by a forked child when the child exits.
        working = tempfile.mkdtemp(prefix=WORKING, dir=self.name)
        try:
            yield working
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def remove_remains(self) -> None:
        """Remove the working folders of compilations that were killed; the lock must be held."""
        for name in os.listdir(self.name):
            if name.startswith(WORKING) or self._is_of_an_older_version(name):
                shutil.rmtree(self._at(name), ignore_errors=True)

    def _is_of_an_older_version(self, name: str) -> bool:
        """Return whether a name is of a working folder that versions without the lock left, and not of another program's."""
        if not OLD_WORKING.fullmatch(name):
            return False
        with contextlib.suppress(OSError):
            status = os.lstat(self._at(name))
            is_old = stat.S_ISDIR(status.st_mode) and time.time() - status.st_mtime > SECONDS_UNTIL_OLD
            return is_old and set() < set(os.listdir(self._at(name))) <= OLD_FILES
        return False

    def tidy(self) -> None:
        """Remove what killed compilations have left, unless one is at work now."""
        with contextlib.suppress(OSError, Unavailable):  # the cache may be read-only
            if any(name.startswith(WORKING) for name in os.listdir(self.name)):
                with self.lock(0) as is_alone:
                    if is_alone:
                        self.remove_remains()

    def keep(self, library: bytes, name: str, working: str) -> None:
        """Put a library into the cache in one step, so that no process sees a part of it."""
        descriptor = open_beyond_standard(f"{working}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        with open(descriptor, "wb") as file:
            file.write(library + checksum(library))  # the loader does not read behind the library
        os.replace(f"{working}/{name}", self._at(name))

    def failures(self, name: str) -> Failures:
        """Return the failures of the library's compilation."""
        try:
            with self._open_failures(name, os.O_RDONLY) as file:
                times, _, reason = file.read().partition("\n")
            return Failures(int(times), reason)
        except (OSError, ValueError):
            return Failures(0, "")

    def note_failure(self, name: str, reason: str) -> None:
        """Count one more failure."""
        times = self.failures(name).times + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with contextlib.suppress(OSError), self._open_failures(name, flags) as file:  # a full disk may be the very reason
            file.write(f"{times}\n{reason}")

    def _open_failures(self, name: str, flags: int) -> IO[str]:
        # Non-blocking, because a FIFO would make open() wait.
        descriptor = open_beyond_standard(self._at(f"{name}.failed"), flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        return open(descriptor, "w" if flags & os.O_WRONLY else "r", encoding="utf-8", errors="replace")

    def forget_failures(self) -> None:
        """Forget all failures after a success, also those of other compilers and sources."""
        for path in Path(self.name).glob("kernels-*.so.failed"):
            with contextlib.suppress(OSError):  # a folder of this name is not ours
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, seconds: float) -> Iterator[bool]:
        """Wait until no other process compiles; yield True, or False where there are no locks.

        The system releases the lock of a process that dies.

        Args:
            seconds: How long to wait at most.

        Raises:
            Unavailable: Another process has held the lock for all this time.
        """
        import filelock  # torch requires it

        # Releases before 4 follow links, keep the lock in forked children, and take a file system without locks for a held lock.
        if int(filelock.__version__.partition(".")[0]) < 4:
            yield False
            return
        lock = filelock.FileLock(self._at("lock"), mode=0o600, fallback_to_soft=False)
        try:
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                if seconds:
                    compiles = f"another process compiles the CPU kernels into {self.path}"
                    say(f"{compiles}; waiting for it, {seconds} seconds at most ...")
                lock.acquire(timeout=seconds, poll_interval=SECONDS_BETWEEN_TRIES)
        except filelock.Timeout:
            text = f"another process has been compiling the kernels into {self.path} for {seconds} seconds"
            raise Unavailable(text) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        try:
            yield lock.is_locked
        finally:
            lock.release()
