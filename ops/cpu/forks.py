"""Guard against os.fork() in another thread: make it wait, and close files that the child must not keep."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

# fork() waits while a thread holds this lock. Otherwise the child would keep the state of a busy dynamic loader for ever, and the
# ends of the pipe that tells subprocess that a program has started.
no_fork: "threading.RLock" = threading.RLock()
_not_for_children: set[int] = set()


def beyond_standard(descriptor: int) -> int:
    """Move a descriptor away from the numbers of stdin, stdout and stderr, which are free where the caller has closed these.

    A program that is started gets other files under these numbers, and text for stderr would go into the file.
    """
    if descriptor > 2:
        return descriptor
    import fcntl  # Windows has none

    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


def open_beyond_standard(path: "str | os.PathLike[str]", flags: int, mode: int = 0o600) -> int:
    """Open a file as ``os.open`` does, and never as stdin, stdout or stderr."""
    return beyond_standard(os.open(path, flags, mode))


@contextlib.contextmanager
def owned(make: Callable[[], tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Open descriptors and close them at the end. A forked child closes them at once: it would keep a lock or a pipe alive."""
    with no_fork:
        descriptors = make()
        _not_for_children.update(descriptors)
    try:
        yield descriptors
    finally:
        with no_fork:
            _not_for_children.difference_update(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _in_child() -> None:
    for descriptor in _not_for_children:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _not_for_children.clear()
    no_fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=_in_child)
