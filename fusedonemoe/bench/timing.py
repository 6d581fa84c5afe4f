"""Timing of calls in turns: by the clock on a CPU, by events and with a cold cache on a GPU.

On a GPU the second-level cache is cold because it would be in a model: between two calls of a layer all other layers run. It
also makes cells of few tokens comparable, whose weights would otherwise be in the cache for some calls and not for others.
Filling the cache takes the device some tens of microseconds, during which the host prepares the call; a call whose host work
takes longer is timed with the wait of the device, as its users wait for it.
"""

import gc
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from shutil import which
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.workloads import Cell, products

# The worker threads of the peer before spin for a while after their last task.
PAUSE_SECONDS = 0.06
# Times the size of the second-level cache, and no less than this.
FLUSHED_CACHES, FLUSHED_BYTES = 4, 1 << 28
WARM_UP_CALLS = 3
CPU = torch.device("cpu")

Call = Callable[[int], object]


def order_of_round(names: Sequence[str], round_index: int) -> list[str]:
    """Return every name once, starting one further along each round, so that none always runs behind the same other."""
    start = round_index % len(names) if names else 0
    return [*names[start:], *names[:start]]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Give torch's pool so many threads for a while; None leaves it alone."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def at_real_time(wanted: bool = True) -> Iterator[bool]:
    """Run the threads of this process round-robin at real-time priority; yield whether that is permitted; put them back.

    Without it, whatever else the machine does lands in the timings: on a busy machine medians come out doubled.
    """
    before: dict[int, tuple[int, int]] = {}
    if wanted and hasattr(os, "sched_setscheduler") and os.path.isdir("/proc/self/task"):
        before = {t: (os.sched_getscheduler(t), os.sched_getparam(t).sched_priority) for t in _threads()}
    try:
        answers = [_schedule(thread, os.SCHED_RR, 1) for thread in before]
        yield bool(answers) and all(answers)
    finally:
        # A thread that was started meanwhile inherited the priority; it goes where the main thread goes.
        usual = before.get(os.getpid(), (0, 0))
        for thread in _threads() if before else ():
            _schedule(thread, *before.get(thread, usual))


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _schedule(thread: int, policy: int, priority: int) -> bool:
    """Set a thread's policy; True when it is set, or the thread has ended in the meantime."""
    try:
        os.sched_setscheduler(thread, policy, os.sched_param(priority))
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True


@dataclass(kw_only=True)
class Timer:
    """Times single calls by the clock, on the CPU."""

    real_time: bool = True  # ask for real-time priority
    device: torch.device = CPU
    granted: bool | None = True  # whether the priority was granted so far; None where it is of no use
    long_seconds: float = 0.5  # the untimed call of a turn is one of the timed when it takes this long
    most_calls: int = 20  # timed calls of a turn
    rotates: bool = True  # the calls rotate through the inputs of a cell
    pauses: bool = True  # before a turn, until the threads of the peer before are idle
    metered_seconds: float = 2.0  # a peer with a longer first call is not metered, which takes one more

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Run one peer's calls, or what is between two rounds, at the priority asked for."""
        with at_real_time(self.real_time) as granted:
            yield
        if self.granted is not None:
            self.granted &= granted

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Time each of the calls; their results are dropped at once."""
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def peak_bytes(self, call: Callable[[], list[Tensor]]) -> int:
        """Measure the most bytes that a call holds at one moment besides its inputs and its results."""
        return peak_extra_bytes(call)

    def clean(self) -> None:
        """Free the memory that no object refers to, on the device too."""
        gc.collect()

    def graphed(self, forward: Callable[..., object]) -> Callable[..., object]:
        """Return a replay of a forward on tensors at fixed addresses as a CUDA graph; on a CPU the forward itself."""
        return forward


class GpuTimer(Timer):
    """Times single calls on a GPU."""

    def __init__(self, device: torch.device, **settings: Any) -> None:
        super().__init__(device=device, **settings)
        size = max(FLUSHED_CACHES * torch.cuda.get_device_properties(device).L2_cache_size, FLUSHED_BYTES)
        self._flushed: Tensor = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Time each of the calls, with a cold cache before it."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        for call, (start, end) in zip(calls, events, strict=True):
            self._flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def peak_bytes(self, call: Callable[[], list[Tensor]]) -> int:
        """Measure the most bytes that a call holds at one moment besides its inputs and its results."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        results = call()
        torch.cuda.synchronize(self.device)
        kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in results}
        return max(0, torch.cuda.max_memory_allocated(self.device) - before - sum(kept.values()))

    def clean(self) -> None:
        """Free the memory that no object refers to, on the device too."""
        super().clean()
        torch.cuda.empty_cache()

    def graphed(self, forward: Callable[..., object]) -> Callable[..., object]:
        """Return a replay of the forward as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        return lambda *_: graph.replay()


def gpu_timer(device: torch.device) -> Timer:
    """Return the timer of a GPU; for a CPU, in dry runs, one by the clock with the same settings."""
    settings: dict[str, Any] = {"real_time": False, "granted": None, "long_seconds": 0.05, "most_calls": 30}
    settings |= {"rotates": False, "pauses": False, "metered_seconds": float("inf")}
    return GpuTimer(device, **settings) if device.type == "cuda" else Timer(device=device, **settings)


def time_interleaved(
    timer: Timer,
    calls: Mapping[str, Call],
    *,
    rounds: int,
    seconds: float | None = None,
    between: Callable[[], None] = lambda: None,
    inputs: int = 1,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Time several calls in turns, and return the seconds of every timed call by name.

    A turn is one untimed call and then timed ones; of very long calls, and without ``seconds``, one timed call.

    Args:
        timer: of the device.
        calls: by name; each takes the index of an input.
        rounds: each call's turns.
        seconds: the approximate time that the timed calls of one name may take in all.
        between: runs before every round, at the same priority.
        inputs: the number of inputs that the calls rotate through.
        failed: called when a call raises, which then has no further turn and no time; without it the error goes on.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        with timer.turn():
            between()
        for name in order_of_round(list(calls), turn):
            if name not in times:
                continue
            call = calls[name]
            if seconds is not None and timer.pauses:
                time.sleep(PAUSE_SECONDS)
            try:
                with timer.turn():
                    (first,) = timer.seconds([partial(call, turn % inputs)])
                    if seconds is None or first > timer.long_seconds:
                        times[name].append(first)
                        continue
                    count = max(1, min(timer.most_calls, int(seconds / rounds / max(first, 1e-9))))
                    times[name] += timer.seconds([partial(call, (turn + n) % inputs) for n in range(1, count + 1)])
            except Exception as error:  # Other people's code: the others still have their turns.
                if failed is None:
                    raise
                del times[name]
                failed(name, error)
    return times


def dense_call(cell: Cell, device: torch.device) -> Call | None:
    """Return plain matrix products with the operations of the cell; None where it has none."""
    shapes = products(cell)
    pairs = [[torch.randn(n, device=device, dtype=cell.dtype) for n in ((m, k), (k, n))] for m, k, n in shapes]
    outs = [torch.empty(m, n, device=device, dtype=cell.dtype) for m, _, n in shapes]

    def call(_: int = 0) -> None:
        for (a, b), out in zip(pairs, outs, strict=True):
            torch.mm(a, b, out=out)

    return call if pairs else None


def copy_call(size: int, device: torch.device) -> Call:
    """Return a copy that moves this many bytes, half of them read and half of them written."""
    source, target = (torch.zeros(max(1, size // 2), dtype=torch.int8, device=device) for _ in range(2))

    def call(_: int = 0) -> None:
        target.copy_(source)

    return call


CONDITIONS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active", "utilization.gpu")


def conditions() -> dict[str, str] | None:
    """Return clocks, temperature and power from nvidia-smi; None where it is absent or does not answer."""
    program = which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(CONDITIONS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return dict(zip(CONDITIONS, values, strict=True)) if len(values) == len(CONDITIONS) else None
