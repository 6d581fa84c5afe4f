"""Run a C++ compiler so that none of its processes outlives the call, a time-out, an error, or the death of this process.

A compiler starts other processes, which go on when only the compiler is killed. So each compiler runs in its own process group,
together with a shell that waits for the end of a pipe. Only this process holds the other end of the pipe. When it closes that
end or dies, even by SIGKILL, each shell kills its group.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from fusedonemoe.ops.cpu.forks import beyond_standard, no_fork, open_beyond_standard, owned

SECONDS_TO_DIE = 5.0
# Exit codes of a shell that could not start a command.
NOT_STARTED = (126, 127)
GUARDED = """
exec 3<&0
(read -r line <&3; kill -s KILL 0) >/dev/null 2>&1 &
"$@" </dev/null 3<&-
status=$?
exec 2>/dev/null
kill -s KILL $!
wait $!
exit $status
"""


class Unavailable(Exception):
    """This machine cannot have the kernels; the message says why."""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a compiler that still runs, and all processes that it started."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a disk cannot be killed
            process.wait(SECONDS_TO_DIE)


def _first_line(message: Path, otherwise: str = "no message") -> str:
    return (message.read_text(errors="replace").strip().splitlines() or [otherwise])[0]


def _pipe() -> tuple[int, ...]:
    return tuple(map(beyond_standard, os.pipe()))


def run(commands: list[list[str]], folder: str, seconds: float) -> None:
    """Run commands of one compiler in parallel.

    Args:
        commands: The commands; each begins with the compiler and ends with the file that it makes.
        folder: The folder that they run in, and that gets their messages: a pipe would stay open as long as any process that a
            compiler started.
        seconds: The time for all of them together.

    Raises:
        Unavailable: A command failed or could not be started.
        subprocess.TimeoutExpired: They took too long.
    """
    compiler, end = commands[0][0], time.monotonic() + seconds
    messages = [Path(folder, f"{index}.txt") for index in range(len(commands))]
    running: list[subprocess.Popen[bytes]] = []
    with owned(_pipe) as (reading, _):
        try:
            for command, message in zip(commands, messages, strict=True):
                with open(message, "wb", opener=open_beyond_standard) as stderr:
                    pipes: dict[str, Any] = {"stdin": reading, "stdout": subprocess.DEVNULL, "stderr": stderr}
                    shell = ["/bin/sh", "-c", GUARDED, "sh", *command]
                    with no_fork:
                        running.append(subprocess.Popen(shell, cwd=folder, start_new_session=True, **pipes))
            for process, command, message in zip(running, commands, messages, strict=True):
                code = process.wait(max(0.0, end - time.monotonic()))
                if code in NOT_STARTED:
                    raise Unavailable(f"{compiler} could not be run: {_first_line(message)}")
                # Where this process ignores SIGCHLD, the code of a command that failed is lost, and Python makes it 0.
                if code or not Path(folder, command[-1]).exists():
                    otherwise = "no message" if code else f"it made no {command[-1]}"
                    raise Unavailable(f"{compiler} failed: {_first_line(message, otherwise)}")
        finally:
            for process in running:
                _end(process)
