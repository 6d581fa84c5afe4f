"""Runs a cell: check every peer against float64, meter its memory, then time all peers in turns."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.exact import IDS, OUTPUT, Answer, disagreements, errors_of, exact_answer, gradient_of
from fusedonemoe.bench.inputs import GPU_DRAWS, Inputs, make_inputs
from fusedonemoe.bench.peers import (
    BUDGET,
    OURS,
    Forward,
    Peer,
    UnavailableError,
    WithWeights,
    interpreted,
    is_ours,
    relative_error,
)
from fusedonemoe.bench.results import CellResult, Row, load_of
from fusedonemoe.bench.timing import Call, Timer, copy_call, dense_call, time_interleaved
from fusedonemoe.bench.workloads import Cell, Floor, LeastWork, floor_of, least_work, shrunk

ROUNDS = 5
# Of timed calls per peer, over all rounds.
SECONDS_PER_PEER = 0.4
# Peers that keep copies of the weights are built in groups that fit into this share of the machine's memory. The rest is for
# the results of a call (gradients are as large as the weights), its scratch, and other programs.
SHARE_OF_MEMORY = 0.55
# The note of a peer that ran through in a dry run, which has no times.
RAN = "ran"
DENSE, COPY = "(dense products)", "(copy)"
INFINITE = float("inf")


class CaptureError(Exception):
    """A peer cannot be captured in a CUDA graph."""


class Prepared(NamedTuple):
    """A peer that is ready."""

    call: Callable[[int], Answer]  # the call that is timed, from the index of a draw to an answer
    answer: Callable[[], Answer]  # the same for the check: of the first draw, and of a gradient that is zero outside the sample


def _outputs(result: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {OUTPUT: result} if isinstance(result, Tensor) else {OUTPUT: result[0], IDS: result[1]}


def prepare(cell: Cell, inputs: Inputs, built: Forward | WithWeights, weights: Mapping[str, Tensor], timer: Timer) -> Prepared:
    """Make the timed call of a cell's mode from a peer's forward and the weights it was built with."""
    forward, own, *_ = built if isinstance(built, WithWeights) else WithWeights(built, dict(weights))
    if cell.mode == "decode":
        return _replayed(inputs, forward, timer)
    draws = [[t.detach().requires_grad_(cell.has_gradients and t.is_floating_point()) for t in draw] for draw in inputs.draws]

    def run(i: int) -> dict[str, Tensor]:
        with torch.set_grad_enabled(cell.has_gradients):
            return _outputs(forward(*draws[i]))

    if cell.mode != "training":
        return Prepared(run, lambda: run(0))
    leaves = [name for name, t in zip(inputs.names, draws[0], strict=True) if t.requires_grad]
    names = [gradient_of(name) for name in [*leaves, *own]]
    flat = [t for w in own.values() for t in ([w] if isinstance(w, Tensor) else w)]
    wanted = [[*(t for t in draw if t.requires_grad), *flat] for draw in draws]
    counts = [None] * len(leaves) + [None if isinstance(w, Tensor) else len(w) for w in own.values()]

    def step(i: int, dy: Tensor | None) -> Answer:
        output = run(i)[OUTPUT]
        found = iter(torch.autograd.grad(output, wanted[i], dy, allow_unused=True))
        gradients = (next(found) if n is None else [next(found) for _ in range(n)] for n in counts)
        return {OUTPUT: output.detach(), **dict(zip(names, gradients, strict=True))}

    return Prepared(lambda i: step(i, inputs.dys[i]), lambda: step(0, inputs.dy_checked))


def _replayed(inputs: Inputs, forward: Forward, timer: Timer) -> Prepared:
    """Capture a graph with the second draw, and check it with the first."""
    static = [t.clone() for t in inputs.draws[1]]
    kept: list[dict[str, Tensor]] = []

    def run() -> None:
        with torch.no_grad():
            kept[:] = [_outputs(forward(*static))]

    run()
    try:
        replay = timer.graphed(run)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {_first_line(error)}") from error

    def call(i: int) -> Answer:
        replay()
        return kept[0]

    def answer() -> Answer:
        for target, source in zip(static, inputs.draws[0], strict=True):
            target.copy_(source)
        return {name: tensor.clone() for name, tensor in call(0).items() if isinstance(tensor, Tensor)}

    return Prepared(call, answer)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def note_of(error: Exception, peer: str) -> tuple[str, bool]:
    """Return the note of a row for an exception, and whether it is a failure.

    A peer may be absent, too large for this device or unfit for graphs; ours may not be too large or unfit for graphs.
    """
    if isinstance(error, UnavailableError):
        return f"skipped: {error}", False
    if isinstance(error, torch.OutOfMemoryError):
        return ("failed" if is_ours(peer) else "skipped") + ": out of memory", is_ours(peer)
    if isinstance(error, CaptureError) and not is_ours(peer):
        return f"skipped: cannot be captured in a CUDA graph: {error}", False
    return f"failed: {type(error).__name__}: {_first_line(error)}", True


def tensors_of(answer: Answer) -> list[Tensor]:
    """Return every tensor of an answer."""
    parts = (([value] if isinstance(value, Tensor) else value) for value in answer.values() if value is not None)
    return [tensor for part in parts for tensor in part if tensor is not None]


class _Checks:
    """The checks of one cell's peers, and what they share: inputs, weights, the exact answer, our output."""

    def __init__(self, cell: Cell, inputs: Inputs, exact: Mapping[str, Tensor], timer: Timer) -> None:
        self.cell, self.inputs, self.exact, self.timer = cell, inputs, exact, timer
        # Parameters over the very same memory, so that no peer has a copy in fresher or hotter pages.
        self.weights: dict[str, Tensor] = {
            name: nn.Parameter(w, requires_grad=cell.has_gradients) for name, w in inputs.weights.items()
        }
        self.ours: Tensor | None = None
        self.timed: tuple[Tensor, ...] = inputs.experts if timer.rotates else inputs.experts[:1]
        self.hit: float = sum(experts.unique().numel() for experts in self.timed) / len(self.timed)

    def __call__(self, peer: Peer) -> tuple[Row, Call | None]:
        """Return a peer's row without its time, and the call to time if its answer is right."""
        try:
            return self._checked(peer)
        except Exception as error:  # A peer is other people's code: its failure is a result, and the others still run.
            note, failed = note_of(error, peer.name)
        # Outside the handler, where the traceback no longer holds the peer's tensors.
        self.timer.clean()
        return Row(peer.name, note=note, failed=failed), None

    def _checked(self, peer: Peer) -> tuple[Row, Call | None]:
        cell, inputs = self.cell, self.inputs
        with torch.set_grad_enabled(cell.has_gradients):  # a peer may make views of the weights
            built = peer.build(cell, self.weights)
        prepared, row, exact = prepare(cell, inputs, built, self.weights, self.timer), Row(peer.name), self.exact
        if isinstance(built, WithWeights):
            if built.reads:
                exact = exact_answer(cell, replace(inputs, weights=built.reads()))
                row = replace(row, weight_error=relative_error(exact[OUTPUT], self.exact[OUTPUT]))
            if built.nbytes:
                row = replace(row, weight_bytes=self.hit / cell.E * built.nbytes)
        start = time.perf_counter()
        answer = prepared.answer()
        seconds = time.perf_counter() - start
        errors = errors_of(cell, inputs, answer, exact)
        row = replace(row, error=max(errors.values(), key=lambda e: INFINITE if e != e else e))
        wrong = disagreements(errors, cell.dtype, inputs.sample.device.type)
        output = answer.get(OUTPUT)
        if not wrong and self.ours is not None and inputs.sample.numel() < cell.T:
            assert isinstance(output, Tensor)
            apart = relative_error(output.detach(), self.ours.double())
            if not apart <= 2 * BUDGET[cell.dtype]:  # both may be off by the budget, in opposite directions
                wrong = [f"outputs and ours, by {apart:.1e} over all rows,"]
        if wrong:
            return replace(row, note=f"{', '.join(wrong)} disagree", failed=True), None
        if peer.name == OURS and isinstance(output, Tensor):
            self.ours = output.detach()
        unused = max(cell.E - experts.unique().numel() for experts in inputs.experts)
        if unused and any(not isinstance(value, Tensor) for value in answer.values()):
            row = replace(row, note=f"leaves the gradients of up to {unused} unused experts unwritten", comparable=False)
        del answer, output
        # A graph's memory is its own for good, and no call of it allocates.
        quick = is_ours(peer.name) or seconds < self.timer.metered_seconds
        if peer.metered and quick and cell.mode != "decode":
            row = replace(row, peak_bytes=self.timer.peak_bytes(lambda: [t.detach() for t in tensors_of(prepared.call(0))]))
        return row, prepared.call


def groups_of(peers: Sequence[Peer], *, weight_bytes: int, memory_bytes: float) -> list[list[Peer]]:
    """Split peers so that the copies of the weights that a group keeps fit into memory, with the weights and our own copies.

    Ours are in every group, and first; then come the others in the order of their copies. A peer that does not fit is alone.
    """
    ours = [peer for peer in peers if is_ours(peer.name)]
    room = memory_bytes - weight_bytes * (1 + sum(peer.copies for peer in ours))
    groups, used = [list(ours)], 0
    for peer in sorted((peer for peer in peers if not is_ours(peer.name)), key=lambda peer: peer.copies):
        size = peer.copies * weight_bytes
        if used and size and used + size > room:
            groups.append(list(ours))
            used = 0
        groups[-1].append(peer)
        used += size
    return groups


def physical_memory() -> int:
    """Return the bytes of this machine's memory; a modest amount where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def run_cell(
    cell: Cell,
    timer: Timer,
    *,
    peers: Sequence[Peer],
    ceilings: Ceilings | None = None,
    inputs: Inputs | None = None,
    exact: Mapping[str, Tensor] | None = None,
    count_work: Callable[..., LeastWork] = least_work,
    dry: bool = False,
    rounds: int = ROUNDS,
    seconds: float = SECONDS_PER_PEER,
    announce: Callable[[str], None] = lambda text: None,
) -> CellResult:
    """Measure one cell; a peer with a wrong output has a note in place of a time.

    Args:
        cell: what to measure.
        timer: of the device.
        peers: in the order of the result.
        ceilings: of the run; sampled between the rounds, and used for the floor. Without them the floor is the time of dense
            products and of a copy, which are timed in turns with the peers.
        inputs: of a cell of another kind, whose ``exact`` answer and ``count_work`` come with them; by default drawn here.
        exact: the answer for them.
        count_work: counts the work of a call.
        dry: run everything at small sizes and keep no time.
        rounds: turns of each peer.
        seconds: of timed calls for each peer, over all rounds.
        announce: called with what is about to happen.
    """
    asked, cell = cell, shrunk(cell, interpreted=interpreted()) if dry else cell
    rows: dict[str, Row] = {}
    samples: dict[str, list[float]] = {}

    def failed(name: str, error: Exception) -> None:
        if name not in rows:
            raise error
        note, is_failure = note_of(error, name)
        rows[name] = replace(rows[name], note=note, failed=is_failure, peak_bytes=None)
        timer.clean()

    # Not inference_mode: peers build parameters in here, and inference tensors refuse flags that some of them set.
    with torch.no_grad():
        announce("making inputs")
        if inputs is None:
            inputs = make_inputs(cell, timer.device, cell.rotation if timer.rotates else GPU_DRAWS)
        checked = _Checks(cell, inputs, exact or exact_answer(cell, inputs), timer)
        work = count_work(cell, experts_hit=round(checked.hit))
        between = ceilings.sampler(cell.dtype) if ceilings else lambda: None
        rotation = len(inputs.draws) if timer.rotates else 1
        calls: dict[str, Call] = {}
        for group in groups_of(peers, weight_bytes=cell.weight_bytes, memory_bytes=SHARE_OF_MEMORY * physical_memory()):
            # Ours stay; what the peers of the last group kept is freed before the next are built.
            calls = {name: call for name, call in calls.items() if is_ours(name)}
            timer.clean()
            for peer in group:
                if peer.name not in rows:
                    announce(f"building {peer.name}")
                    rows[peer.name], call = checked(peer)
                    if call is not None:
                        calls[peer.name] = call
                    del call
            announce(f"timing {', '.join(calls)}")
            timer.clean()
            references: dict[str, Call | None] = {}
            if not ceilings:  # what sets the floor; for a cell of graphs they are graphs too
                references = {COPY: copy_call(work.touched_bytes, timer.device), DENSE: dense_call(cell, timer.device)}
            graphed = timer.graphed if cell.mode == "decode" else lambda call: call
            in_turns = calls | {name: graphed(call) for name, call in references.items() if call}
            times = time_interleaved(
                timer, in_turns, rounds=rounds, seconds=seconds, between=between, inputs=rotation, failed=failed
            )
            for name, taken in times.items():
                samples.setdefault(name, []).extend(taken)
                if not is_ours(name) and name in rows:
                    rows[name] = rows[name].timed(taken, times.get(OURS))
    for name in samples:
        if is_ours(name):
            rows[name] = rows[name].timed(samples[name], samples.get(OURS))
    ordered = [rows[peer.name] for peer in peers]
    if dry:
        ran = tuple(Row(row.peer, note=RAN, error=row.error) if row.peer in samples else row for row in ordered)
        return CellResult(asked, ran, experts_hit=checked.hit, real_time=timer.granted)
    dense, copy = (median(samples[name]) if name in samples else None for name in (DENSE, COPY))
    if ceilings:
        rate, bandwidth = ceilings.flops_per_s[cell.dtype], ceilings.bytes_per_s
        floor = floor_of(work, flops_per_s=rate, bytes_per_s=bandwidth)
        for n, row in enumerate(ordered):
            if row.weight_bytes:
                own = floor_of(LeastWork(work.flops, round(row.weight_bytes)), flops_per_s=rate, bytes_per_s=bandwidth)
                ordered[n] = replace(row, floor_seconds=own.seconds)
    else:
        assert copy is not None
        floor = Floor(dense, "flops") if dense and dense >= copy else Floor(copy, "bytes")
        rate, bandwidth = work.flops / dense if dense else 0.0, work.touched_bytes / copy
    load = load_of([experts.cpu() for experts in checked.timed], cell.E)
    return CellResult(asked, tuple(ordered), floor, rate, bandwidth, checked.hit, timer.granted, work, load, dense, copy)
