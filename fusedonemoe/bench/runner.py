"""Runs a cell: check every peer against float64, meter its memory, then time all peers interleaved."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.peers import GROUPED, PEERS, YARDSTICK, Call, Peer, UnavailableError, agrees, relative_error
from fusedonemoe.bench.workloads import ROTATION, Cell, Floor, Inputs, exact_output, floor_of, least_work, make_inputs

ROUNDS = 5
# Of timed calls per peer, over all rounds; a call that takes longer than its share of it is still timed once a round.
SECONDS_PER_PEER = 0.4
MOST_CALLS_PER_ROUND = 20
# The worker threads of the peer before spin for a while after their last task.
PAUSE_SECONDS = 0.03


@dataclass(frozen=True)
class Row:
    """What came of one peer in one cell.

    Attributes:
        peer: its name.
        note: why there is no time; empty when there is one.
        failed: whether the note is a failure (outputs disagree, an exception) and not a peer that is absent.
        seconds: median of the timed calls; None without a time.
        spread: lower and upper quartile of the timed calls.
        calls: how many were timed.
        error: ``||y - y64|| / ||y64||``; None when there was no output.
        peak_bytes: most bytes held at once beside input and output.
    """

    peer: str
    note: str = ""
    failed: bool = False
    seconds: float | None = None
    spread: tuple[float, float] | None = None
    calls: int = 0
    error: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class CellResult:
    """A measured cell.

    Attributes:
        cell: what was measured.
        rows: one for each peer, ours first.
        floor: the least time this machine needs.
        flops_per_s: the matrix-product rate that the floor was computed with.
        bytes_per_s: the read bandwidth that the floor was computed with.
        experts_hit: distinct experts that the tokens chose, the mean over the inputs.
        real_time: whether the timed calls ran at real-time priority.
    """

    cell: Cell
    rows: tuple[Row, ...]
    floor: Floor
    flops_per_s: float
    bytes_per_s: float
    experts_hit: float
    real_time: bool

    def times_faster(self, row: Row) -> float | None:
        """How many times faster a row is than the cell's yardstick; None where either has no time."""
        base = next((r.seconds for r in self.rows if r.peer == YARDSTICK[self.cell.operator]), None)
        return base / row.seconds if base and row.seconds else None

    def promised_bytes(self, row: Row) -> int | None:
        """The bound on the peak that a row has promised: that of the grouped formulation."""
        return self.cell.promised_bytes if row.peer == GROUPED else None


class RealTime:
    """Runs the threads of this process round-robin at real-time priority, where that is permitted, and puts them back.

    Without it, whatever else the machine does lands in the timings: on a busy machine medians come out doubled.

    Args:
        wanted: False makes this do nothing.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.wanted = wanted and hasattr(os, "sched_setscheduler") and os.path.isdir("/proc/self/task")
        self.granted = False
        self._before: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> "RealTime":
        if self.wanted:
            self._before = {t: (os.sched_getscheduler(t), os.sched_getparam(t).sched_priority) for t in _threads()}
            # Every thread is moved before the answers are looked at.
            answers = [_schedule(thread, os.SCHED_RR, 1) for thread in self._before]
            self.granted = all(answers)
        return self

    def __exit__(self, *_: object) -> None:
        # A thread that was started meanwhile inherited the priority; it goes where the main thread goes.
        usual = self._before.get(os.getpid(), (0, 0))
        for thread in _threads() if self._before else ():
            _schedule(thread, *self._before.get(thread, usual))


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _schedule(thread: int, policy: int, priority: int) -> bool:
    """Whether the thread runs so now; one that has ended in the meantime counts as served."""
    try:
        os.sched_setscheduler(thread, policy, os.sched_param(priority))
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True


def order_of_round(names: Sequence[str], round_index: int) -> list[str]:
    """Every peer once, starting one further along each round, so that none always runs behind the same other."""
    start = round_index % len(names) if names else 0
    return [*names[start:], *names[:start]]


def time_interleaved(
    calls: Mapping[str, Call], *, rounds: int, seconds: float, real_time: bool, between: Callable[[], None]
) -> tuple[dict[str, list[float]], bool]:
    """Time several calls in turns.

    Args:
        calls: by name; each takes the index of an input.
        rounds: each peer's turns. A turn is one untimed call and then timed ones.
        seconds: about how long the timed calls of one peer may take in all.
        real_time: ask for real-time priority.
        between: runs before every round, at the same priority.

    Returns:
        Seconds of every timed call by name, and whether the priority was granted throughout.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    granted = True
    for turn in range(rounds):
        with RealTime(real_time) as priority:
            between()
        granted &= priority.granted
        for name in order_of_round(list(calls), turn):
            call = calls[name]
            time.sleep(PAUSE_SECONDS)
            with RealTime(real_time):
                warm = _timed(call, turn)
                count = max(1, min(MOST_CALLS_PER_ROUND, int(seconds / rounds / max(warm, 1e-9))))
                times[name] += [_timed(call, turn + n) for n in range(1, count + 1)]
    return times, granted


def _timed(call: Call, index: int) -> float:
    start = time.perf_counter()
    call(index % ROTATION)
    return time.perf_counter() - start


def _checked(peer: Peer, cell: Cell, inputs: Inputs, exact: torch.Tensor) -> tuple[Row, Call | None]:
    """A peer's row without its time, and the call to time if its output is right."""
    try:
        call = peer.build(cell, inputs)
        error = relative_error(call(0), exact)
        if not agrees(error, cell.dtype):
            return Row(peer.name, note="outputs disagree", failed=True, error=error), None
        return Row(peer.name, error=error, peak_bytes=peak_extra_bytes(lambda: call(0))), call
    except UnavailableError as reason:
        return Row(peer.name, note=f"skipped: {reason}"), None
    except Exception as error:  # A peer is other people's code: its failure is a result, and the others still run.
        return Row(peer.name, note=f"failed: {type(error).__name__}: {error}", failed=True), None


def run_cell(
    cell: Cell,
    ceilings: Ceilings,
    *,
    peers: Sequence[Peer] | None = None,
    rounds: int = ROUNDS,
    seconds: float = SECONDS_PER_PEER,
    real_time: bool = True,
) -> CellResult:
    """Measure one cell.

    Args:
        cell: what to measure.
        ceilings: of the run; sampled between the rounds, and what the floor is computed with.
        peers: who; by default everyone who computes the cell's operator.
        rounds: turns of each peer.
        seconds: of timed calls for each peer.
        real_time: ask for real-time priority while timing.

    Returns:
        The result; a peer whose output is off has a note in place of a time.
    """
    peers = PEERS[cell.operator] if peers is None else peers
    # Not inference_mode: peers build parameters in here, and inference tensors refuse flags that some of them set.
    with torch.no_grad():
        inputs = make_inputs(cell)
        exact = exact_output(cell, inputs)
        rows, calls = {}, {}
        for peer in peers:
            row, call = _checked(peer, cell, inputs, exact)
            rows[peer.name] = row
            if call is not None:
                calls[peer.name] = call
        times, granted = time_interleaved(
            calls, rounds=rounds, seconds=seconds, real_time=real_time, between=ceilings.sampler(cell.dtype)
        )
    for name, samples in times.items():
        rows[name] = _with_times(rows[name], samples)
    hit = sum(experts.unique().numel() for experts in inputs.experts) / len(inputs.experts)
    work = least_work(cell, experts_hit=round(hit))
    rate, bandwidth = ceilings.flops_per_s[cell.dtype], ceilings.bytes_per_s
    floor = floor_of(work, flops_per_s=rate, bytes_per_s=bandwidth)
    return CellResult(cell, tuple(rows.values()), floor, rate, bandwidth, hit, granted)


def _with_times(row: Row, samples: list[float]) -> Row:
    ordered = sorted(samples)
    quartiles = (ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4])
    return Row(
        row.peer,
        seconds=median(ordered),
        spread=quartiles,
        calls=len(ordered),
        error=row.error,
        peak_bytes=row.peak_bytes,
    )
