"""Times calls on a GPU: events around each call, a cold second-level cache before it, everyone in turns.

The cache is cold because in a model it would be: between two calls of a layer all other layers run. It also makes cells of
few tokens comparable, whose weights would otherwise stay in the cache for some calls and not for others. Filling the cache
takes the device some tens of microseconds, during which the host prepares the call; a call whose host work takes longer than
that is timed with what the device has to wait, as its users wait for it.
"""

import subprocess
import time
from collections.abc import Callable, Mapping
from shutil import which

import torch
from torch import Tensor

from fusedonemoe.bench.gpu_cells import GpuCell, products
from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.runner import order_of_round

ROUNDS = 3
# Of device time for the timed calls of a peer, over all rounds; everyone is timed at least once a round.
SECONDS_PER_PEER = 0.1
MOST_CALLS_PER_ROUND = 30
# The untimed call of a turn is one of the timed when it takes this long.
LONG_SECONDS = 0.05
# Times the size of the second-level cache, and no less than this.
FLUSHED_CACHES, FLUSHED_BYTES = 4, 1 << 28
WARM_UP_CALLS = 3

Call = Callable[[], object]


class Timer:
    """Times single calls on a device; on the CPU by the wall clock, for dry runs.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu: bool = device.type == "cuda"
        size = 1
        if self.on_gpu:
            cache: int = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(FLUSHED_CACHES * cache, FLUSHED_BYTES)
        self._flushed = torch.empty(size, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Call, count: int) -> list[float]:
        """The time of each of ``count`` calls, the cache being cold before each."""
        if not self.on_gpu:
            return [self._wall(call) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self._flushed.zero_()
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def _wall(self, call: Call) -> float:
        self._flushed.zero_()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], list[Tensor]]) -> int:
        """The most bytes a call holds at one moment beside its inputs and its results."""
        if not self.on_gpu:
            return peak_extra_bytes(call)
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        results = call()
        self.synchronize()
        kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in results}
        return max(0, torch.cuda.max_memory_allocated(self.device) - before - sum(kept.values()))


def time_interleaved(
    timer: Timer, calls: Mapping[str, Call], *, rounds: int, seconds: float, failed: Callable[[str, Exception], None]
) -> dict[str, list[float]]:
    """Time several calls in turns.

    Args:
        timer: of the device.
        calls: by name.
        rounds: each call's turns. A turn is one untimed call and then timed ones; of very long calls, one timed call.
        seconds: about how long the timed calls of one name may take in all.
        failed: told when a call raises, which then has no further turn and no time.

    Returns:
        Seconds of every timed call by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in order_of_round(list(calls), turn):
            if name not in times:
                continue
            try:
                (estimate,) = timer.seconds(calls[name], 1)
                if estimate > LONG_SECONDS:
                    times[name].append(estimate)
                    continue
                count = max(1, min(MOST_CALLS_PER_ROUND, int(seconds / rounds / max(estimate, 1e-6))))
                times[name] += timer.seconds(calls[name], count)
            except Exception as error:  # Other people's code: the others still have their turns.
                del times[name]
                failed(name, error)
    return times


def graphed(forward: Call, timer: Timer) -> Call:
    """A replay of the forward as a CUDA graph; on the CPU, where there are none, the forward itself.

    Args:
        forward: reads its inputs from tensors that stay where they are.
        timer: of the device.
    """
    if not timer.on_gpu:
        return forward
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay


def dense_call(cell: GpuCell, device: torch.device) -> Call | None:
    """Plain matrix products with the operations of the cell; None where it has none."""
    shapes = products(cell)
    pairs = [[torch.randn(n, device=device, dtype=cell.dtype) for n in ((m, k), (k, n))] for m, k, n in shapes]
    outs = [torch.empty(m, n, device=device, dtype=cell.dtype) for m, _, n in shapes]

    def call() -> None:
        for (a, b), out in zip(pairs, outs, strict=True):
            torch.mm(a, b, out=out)

    return call if pairs else None


def copy_call(size: int, device: torch.device) -> Call:
    """A copy that moves this many bytes, half of them read and half of them written."""
    source, target = (torch.zeros(max(1, size // 2), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


CONDITIONS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active", "utilization.gpu")


def conditions() -> dict[str, str] | None:
    """Clocks, temperature and power as nvidia-smi tells them; None where it is absent or does not answer."""
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
