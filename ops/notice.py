"""Messages to the user that never stop the work: where stderr is missing, closed or full, they are lost."""

import contextlib
import io
import os
import sys
import warnings


def say(text: str) -> None:
    """Print a line, given without the library's name, on stderr; never raise."""
    stream, line = sys.stderr, f"fusedonemoe: {text}\n"
    if stream is None:  # a daemon has none, and print() would take None for stdout
        return
    with contextlib.suppress(Exception):  # a stream that somebody put there may raise anything
        stream.flush()
        if type(stream) is io.TextIOWrapper:
            with contextlib.suppress(io.UnsupportedOperation):
                # The stream would keep what it cannot write, and the process would end with 120 for it.
                os.write(stream.fileno(), line.encode(stream.encoding, "backslashreplace"))
                return
        stream.write(line)
        stream.flush()


def warn(text: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Issue a warning, at the caller for ``stacklevel`` 1; raise only the warning itself, where a filter makes it an error."""
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except Warning:
        raise
    except Exception:
        return  # Python prints warnings on stderr, and raises ValueError where that is closed
