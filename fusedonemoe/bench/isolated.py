"""Runs a cell in its own process, so that a peer that ends the process ends one cell and not the run.

Some peers also keep the weights that they have seen for the life of a process, and torch chooses how it allocates when it is
imported. The command: ``python -m fusedonemoe.bench.isolated JOB RESULT``, two files that are pickled by this module.
"""

import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedonemoe.bench import runner
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.libraries import line_up
from fusedonemoe.bench.peers import chosen
from fusedonemoe.bench.results import CellResult, Row
from fusedonemoe.bench.timing import Timer
from fusedonemoe.bench.workloads import ALLOCATORS, Cell
from fusedonemoe.files import reason_of

COMMAND = (sys.executable, "-m", "fusedonemoe.bench.isolated")
# The row of a cell that failed as a whole.
PROCESS = "(process)"
# Before a line of the child's stderr that says what it is about to do.
MARK = "bench: "
MOST_SECONDS = 900


@dataclass(frozen=True)
class Job:
    """The task of a process. Rounds and seconds are fewer than for a few cells: these are many, and some calls take seconds."""

    cell: Cell  # what to measure
    ceilings: Ceilings  # the best samples so far
    threads: int  # of every pool
    peers: re.Pattern[str] | None = None  # pattern of the peers' names; None for all
    real_time: bool = True  # ask for real-time priority while timing
    rounds: int = 4  # turns of each peer
    seconds: float = 0.25  # of timed calls for each peer


def run_job(job: Job) -> CellResult:
    """Do a job in a new process; one failed row where the process did not end well. The ceilings take its samples."""
    try:
        with tempfile.TemporaryDirectory(prefix="fusedonemoe-bench-") as folder:
            given, made, said = (Path(folder, name) for name in ("job", "result", "stderr"))
            given.write_bytes(pickle.dumps(job))
            command = [*COMMAND, os.fspath(given), os.fspath(made)]
            with open(said, "wb") as stderr:
                streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": stderr}
                try:
                    ending = _ending(subprocess.call(command, env=environment(job), timeout=MOST_SECONDS, **streams))
                except subprocess.TimeoutExpired:
                    ending = f"took more than {MOST_SECONDS} s"
            if not made.exists() or ending != _ending(0):
                return _failed(job.cell, ending, said.read_text(encoding="utf-8", errors="replace"))
            result, ceilings = pickle.loads(made.read_bytes())
    except OSError as error:  # a full disk, no folder for temporary files, no more processes
        return _failed(job.cell, f"the process could not be started: {reason_of(error)}", "")
    job.ceilings.take(ceilings)
    assert isinstance(result, CellResult)
    return result


def environment(job: Job) -> dict[str, str]:
    """Return the environment of the cell's process, with the allocator's settings of the cell in place of those outside."""
    settings = {name for allocator in ALLOCATORS.values() for name in allocator}
    outside = {name: value for name, value in os.environ.items() if name not in settings}
    # Libraries with an OpenMP runtime of their own do not hear of torch.set_num_threads.
    return outside | {"OMP_NUM_THREADS": str(job.threads)} | ALLOCATORS[job.cell.allocator]


def _ending(status: int) -> str:
    if status >= 0:
        return f"the process ended with status {status}"
    try:
        return f"the process ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"the process ended by signal {-status}"


def _failed(cell: Cell, ending: str, stderr: str) -> CellResult:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    begun = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    where = f" while {begun[-1]}" if begun else ""
    said = f": {lines[-1]}" if lines and not lines[-1].startswith(MARK) else ""
    return CellResult(cell, (Row(PROCESS, note=f"failed: {ending}{where}{said}", failed=True),), real_time=False)


def main(given: str, made: str) -> None:
    """Do a job: read it from one file, and write its result to the other."""
    # By its import name: here this module is __main__, and the job was pickled by the other.
    job = pickle.loads(Path(given).read_bytes())
    torch.set_num_threads(job.threads)
    options: dict[str, Any] = {"ceilings": job.ceilings, "rounds": job.rounds, "seconds": job.seconds}
    options["announce"] = lambda text: print(f"{MARK}{text}", file=sys.stderr, flush=True)
    peers = chosen(line_up("cpu", job.cell), job.peers)
    result = runner.run_cell(job.cell, Timer(real_time=job.real_time), peers=peers, **options)
    Path(made).write_bytes(pickle.dumps((result, job.ceilings)))


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Other people's libraries have been seen to hang or crash while they are torn down; the result is written.
    os._exit(0)
