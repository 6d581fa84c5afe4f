"""Runs a cell on a device: check every peer against float64, meter its memory, then time all peers interleaved."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.bench import gpu_exact
from fusedonemoe.bench.gpu_cells import GpuCell, least_work, shrunk
from fusedonemoe.bench.gpu_exact import IDS, OUTPUT, Answer, disagreements, errors_of, exact_answer, gradient_names
from fusedonemoe.bench.gpu_inputs import GpuInputs, make_inputs
from fusedonemoe.bench.gpu_libraries import line_up, parameters
from fusedonemoe.bench.gpu_peers import Forward, GpuPeer, Weights, interpreted
from fusedonemoe.bench.gpu_timing import ROUNDS, SECONDS_PER_PEER, Call, Timer, copy_call, dense_call, graphed, time_interleaved
from fusedonemoe.bench.peers import OURS, UnavailableError, is_ours, relative_error
from fusedonemoe.bench.results import CellResult, Row, load_of
from fusedonemoe.bench.workloads import Floor

# The note of a peer that ran through in a dry run, which has no times.
RAN = "ran"
DENSE, COPY = "(dense products)", "(copy)"
# How far a peer's output may be from ours over all tokens: both may be off by the budget, in opposite directions.
TWICE = 2.0


class CaptureError(Exception):
    """A peer cannot be captured in a CUDA graph."""


@dataclass(frozen=True)
class GpuResult(CellResult):
    """A measured cell of the suite for GPUs; none of its times is set in a dry run.

    Attributes:
        dense_seconds: of dense products with as many operations, at rows as many as are routed.
        copy_seconds: of a device copy of as many bytes.
    """

    dense_seconds: float | None = None
    copy_seconds: float | None = None

    def of_dense(self, row: Row) -> float | None:
        """The share of the dense products' rate that a row reaches."""
        return self.dense_seconds / row.seconds if self.dense_seconds and row.seconds else None

    def of_copy(self, row: Row) -> float | None:
        """The share of the copy's bandwidth that a row reaches."""
        return self.copy_seconds / row.seconds if self.copy_seconds and row.seconds else None


class Prepared(NamedTuple):
    """A peer that is ready.

    Attributes:
        call: what is timed.
        results: the same call; the tensors that it returns.
        answer: what it computes, for the check.
    """

    call: Call
    results: Callable[[], list[Tensor]]
    answer: Callable[[], Answer]


def _outputs(result: Tensor | tuple[Tensor, Tensor]) -> Answer:
    return {OUTPUT: result} if isinstance(result, Tensor) else {OUTPUT: result[0], IDS: result[1]}


def prepare(cell: GpuCell, inputs: GpuInputs, weights: Weights, forward: Forward, timer: Timer) -> Prepared:
    """Make the timed call of a cell's mode out of a forward.

    Args:
        cell: whose mode.
        inputs: the first draw is computed; a graph is captured with the second.
        weights: that the forward was built with.
        forward: of a peer.
        timer: of the device.
    """
    if cell.mode == "decode":
        return _replayed(inputs, forward, timer)
    draw = inputs.draws[0]
    if cell.mode == "forward":

        def run() -> Answer:
            with torch.no_grad():
                return _outputs(forward(*draw))

        return Prepared(run, lambda: list(run().values()), run)
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in draw]

    def record() -> Answer:
        with torch.enable_grad():
            return _outputs(forward(*leaves))

    if cell.mode == "recorded":
        return Prepared(record, lambda: list(record().values()), record)
    wanted = [*(t for t in leaves if t.requires_grad), *weights.values()]

    def step(dy: Tensor | None) -> Answer:
        output = record()[OUTPUT]
        gradients = torch.autograd.grad(output, wanted, dy)
        return {OUTPUT: output.detach(), **dict(zip(gradient_names(cell, weights), gradients, strict=True))}

    timed = partial(step, inputs.dy)
    return Prepared(timed, lambda: list(timed().values()), partial(step, inputs.dy_checked))


def _replayed(inputs: GpuInputs, forward: Forward, timer: Timer) -> Prepared:
    static = [t.clone() for t in inputs.draws[1]]
    kept: list[Answer] = []

    def run() -> None:
        with torch.no_grad():
            kept[:] = [_outputs(forward(*static))]

    run()
    try:
        replay = graphed(run, timer)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {_first_line(error)}") from error

    def answer() -> Answer:
        for target, source in zip(static, inputs.draws[0], strict=True):
            target.copy_(source)
        replay()
        return {name: tensor.clone() for name, tensor in kept[0].items()}

    return Prepared(replay, lambda: list(answer().values()), answer)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def note_of(error: Exception, peer: GpuPeer) -> tuple[str, bool]:
    """What a row says of an exception, and whether that is a failure.

    A peer may be absent, too large for this device or not made for graphs; ours may not be too large or uncapturable.
    """
    if isinstance(error, UnavailableError):
        return f"skipped: {error}", False
    if isinstance(error, torch.OutOfMemoryError):
        return ("failed" if is_ours(peer.name) else "skipped") + ": out of memory", is_ours(peer.name)
    if isinstance(error, CaptureError) and not is_ours(peer.name):
        return f"skipped: cannot be captured in a CUDA graph: {error}", False
    return f"failed: {type(error).__name__}: {_first_line(error)}", True


class _Cell:
    """One cell while it runs: what its peers share."""

    def __init__(self, cell: GpuCell, timer: Timer) -> None:
        self.cell, self.timer = cell, timer
        self.inputs = make_inputs(cell, timer.device)
        self.weights = parameters(cell, self.inputs.weights)
        self.exact = exact_answer(cell, self.inputs)
        self.ours: Tensor | None = None

    def checked(self, peer: GpuPeer) -> tuple[Row, Call | None]:
        """A peer's row without its time, and the call to time if its answer is right."""
        cell = self.cell
        try:
            forward = peer.build(cell, self.weights)
            prepared = prepare(cell, self.inputs, self.weights, forward, self.timer)
            answer = {name: tensor.detach() for name, tensor in prepared.answer().items()}
            errors = errors_of(cell, self.inputs, answer, self.exact)
            error = max(errors.values(), key=lambda e: float("inf") if e != e else e)
            wrong = disagreements(errors, cell.dtype)
            if not wrong and self.ours is not None:
                apart = relative_error(answer[OUTPUT], self.ours.double())
                if not apart <= TWICE * gpu_exact.BUDGETS[cell.dtype][OUTPUT]:
                    wrong = [f"outputs and ours, by {apart:.1e} over all rows,"]
            if wrong:
                return Row(peer.name, note=f"{', '.join(wrong)} disagree", failed=True, error=error), None
            if peer.name == OURS:
                self.ours = answer[OUTPUT]
            del answer
            # A graph's memory is its own for good, and no call of it allocates.
            peak = None if cell.mode == "decode" else self.timer.peak_bytes(prepared.results)
            return Row(peer.name, error=error, peak_bytes=peak), prepared.call
        except Exception as error:  # A peer is other people's code: its failure is a result, and the others still run.
            note, failed = note_of(error, peer)
            if isinstance(error, UnavailableError):
                return Row(peer.name, note=note), None
        # Outside the handler, where the traceback no longer holds the peer's tensors.
        self.clean()
        return Row(peer.name, note=note, failed=failed), None

    def clean(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.timer.on_gpu:
            torch.cuda.empty_cache()

    def ceilings(self, touched_bytes: int) -> dict[str, Call]:
        """The calls that set the floor; in a cell of graphs they are graphs too."""
        found: dict[str, Call] = {COPY: copy_call(touched_bytes, self.timer.device)}
        if dense := dense_call(self.cell, self.timer.device):
            found[DENSE] = dense
        if self.cell.mode == "decode":
            found = {name: graphed(call, self.timer) for name, call in found.items()}
        return found


def run_cell(
    cell: GpuCell,
    timer: Timer,
    *,
    peers: Sequence[GpuPeer] | None = None,
    dry: bool = False,
    rounds: int = ROUNDS,
    seconds: float = SECONDS_PER_PEER,
    announce: Callable[[str], None] = lambda text: None,
) -> GpuResult:
    """Measure one cell.

    Args:
        cell: what to measure.
        timer: of the device.
        peers: who; by default everyone who computes the cell.
        dry: run everything at small sizes and keep no time.
        rounds: turns of each peer.
        seconds: of timed calls for each peer.
        announce: told what is about to happen.

    Returns:
        The result; a peer whose output is off has a note in place of a time.
    """
    asked, cell = cell, shrunk(cell, interpreted=interpreted()) if dry else cell
    peers = line_up(cell) if peers is None else peers
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    announce("making inputs")
    shared = _Cell(cell, timer)
    for peer in peers:
        announce(f"checking {peer.name}")
        rows[peer.name], call = shared.checked(peer)
        if call is not None:
            calls[peer.name] = call
        del call
    hit = shared.inputs.experts.unique().numel()
    work = least_work(cell, experts_hit=hit)

    def failed(name: str, error: Exception) -> None:
        peer = next((peer for peer in peers if peer.name == name), None)
        if peer is None:
            raise error
        note, is_failure = note_of(error, peer)
        rows[name] = replace(rows[name], note=note, failed=is_failure, peak_bytes=None)
        shared.clean()

    announce(f"timing {', '.join(calls)}")
    shared.clean()
    with torch.no_grad():
        calls |= shared.ceilings(work.touched_bytes)
    times = time_interleaved(timer, calls, rounds=rounds, seconds=seconds, failed=failed)
    timer.synchronize()
    if dry:
        ran = {name: replace(rows[name], note=RAN, peak_bytes=None) for name in times if name in rows}
        return GpuResult(asked, tuple((rows | ran).values()), None, 0.0, 0.0, hit, None)
    for name in rows.keys() & times.keys():
        rows[name] = rows[name].timed(times[name], times.get(OURS))
    dense, copy = (median(times[name]) if name in times else None for name in (DENSE, COPY))
    assert copy is not None
    floor = Floor(dense, "flops") if dense and dense >= copy else Floor(copy, "bytes")
    return GpuResult(
        asked,
        tuple(rows[peer.name] for peer in peers),
        floor,
        work.flops / dense if dense else 0.0,
        work.touched_bytes / copy,
        hit,
        None,
        dense,
        copy,
        work=work,
        load=load_of([shared.inputs.experts.cpu()], cell.E),
    )
