"""Messages to the user that never stop the work: where stderr is missing, closed or full, they are lost."""

import contextlib
import io
import os
import sys
import warnings


def say(text: str) -> None:
    """Print a line on stderr; never raise.

    Args:
        text: The line, without the library's name.
    """
    stream, line = sys.stderr, f"fusedonemoe: {text}\n"
    if stream is None:  # a daemon has none, and print() would take None for stdout
        return
    with contextlib.suppress(Exception):  # a stream that somebody put there may raise anything
        stream.flush()
        if type(stream) is io.TextIOWrapper and (descriptor := _descriptor(stream)) is not None:
            # The stream would keep what it cannot write, and the process would end with 120 for it.
            os.write(descriptor, line.encode(stream.encoding, "backslashreplace"))
        else:
            stream.write(line)
            stream.flush()


def _descriptor(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except io.UnsupportedOperation:
        return None


def warn(text: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Issue a warning; raise nothing but the warning itself, where a filter makes it an error.

    Args:
        text: The message.
        category: The class of the warning.
        stacklevel: The frame that the warning points at; 1 is the caller of this function.
    """
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except Warning:
        raise
    except Exception:
        return  # Python prints warnings on stderr, and raises ValueError where that is closed
