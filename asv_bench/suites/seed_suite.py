"""The suite ``seeds``: every row is checked against float64, metered, and then timed in turns with its peers."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from asv_bench.suites.seed_cells import CELLS, SeedCell, least_work, shrunk
from asv_bench.suites.seed_inputs import IDS, OUTPUT, Answer, SeedInputs, exact_answer, gradient_name, leaves_of, make_inputs
from asv_bench.suites.seed_peers import Forward, SeedPeer, line_up
from fusedonemoe.bench import report, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.memory import held_bytes, peak_extra_bytes
from fusedonemoe.bench.peers import BUDGET, OURS, UnavailableError, chosen, relative_error
from fusedonemoe.bench.results import CellResult, Row, load_of
from fusedonemoe.bench.runner import RAN
from fusedonemoe.bench.timing import Timer, time_interleaved
from fusedonemoe.bench.workloads import floor_of

ROUNDS = 3
SECONDS_PER_PEER = 0.25
# Scores that are equal in float32 are not in float64: of so many tokens a peer may pick another expert. Ours may of none.
TIED = 1e-3


class Prepared(NamedTuple):
    """A peer that is ready.

    Attributes:
        call: from the index of a draw to its answer.
        forward: the forward of the first draw alone, recording what a backward needs.
    """

    call: Callable[[int], Answer]
    forward: Callable[[], Tensor]


def _answer(result: Tensor | tuple[Tensor, Tensor]) -> Answer:
    return {OUTPUT: result} if isinstance(result, Tensor) else {OUTPUT: result[0], IDS: result[1]}


def prepare(cell: SeedCell, inputs: SeedInputs, peer: SeedPeer) -> Prepared:
    """Make the timed call of a cell's mode out of a peer's forward.

    Args:
        cell: whose mode.
        inputs: of the cell.
        peer: that computes it.
    """
    training = cell.mode == "training"
    # The very same memory for every peer, so that none has a copy in fresher or hotter pages.
    weights = {name: w.detach().requires_grad_(training) for name, w in inputs.weights.items()}
    forward: Forward = peer.build(cell, weights)
    draws = [tuple(t.detach().requires_grad_(training) if t.is_floating_point() else t for t in d) for d in inputs.draws]

    def run(index: int) -> Answer:
        with torch.set_grad_enabled(training):
            answer = _answer(forward(*draws[index]))
            if not training:
                return answer
            leaves = leaves_of(draws[index], weights)
            gradients = torch.autograd.grad(answer[OUTPUT], list(leaves.values()), inputs.dy)
        return {OUTPUT: answer[OUTPUT].detach()} | dict(zip(map(gradient_name, leaves), gradients, strict=True))

    def recorded() -> Tensor:
        with torch.enable_grad():
            return _answer(forward(*draws[0]))[OUTPUT]

    return Prepared(run, recorded)


def errors_of(answer: Answer, exact: Answer) -> dict[str, float]:
    """Compute the error of each part of an answer; of ids, the share of tokens that have another set of them.

    Args:
        answer: a peer's.
        exact: in float64.
    """
    errors = {}
    for name, tensor in answer.items():
        if name == IDS:
            same = tensor.long().sort(1).values == exact[IDS].sort(1).values
            errors[name] = 1.0 - same.all(1).double().mean().item()
        else:
            errors[name] = relative_error(tensor, exact[name])
    return errors


def _expected(peer: SeedPeer, cell: SeedCell, inputs: SeedInputs, exact: Answer) -> Answer:
    """Return the expected answer. A peer that computes another function is checked against that function in float64."""
    if not peer.differs:
        return exact
    wide = peer.build(cell, {name: w.double() for name, w in inputs.weights.items()})
    return _answer(wide(*(t.double() if t.is_floating_point() else t for t in inputs.draws[0])))


def _checked(
    peer: SeedPeer, cell: SeedCell, inputs: SeedInputs, exact: Answer, meter: bool
) -> tuple[Row, Callable[[int], Answer] | None]:
    """A peer's row without its time, and the call to time if its answer is right."""
    try:
        prepared = prepare(cell, inputs, peer)
        errors = errors_of(prepared.call(0), _expected(peer, cell, inputs, exact))
        error = max(errors.values(), key=lambda e: float("inf") if e != e else e)
        ids = 0.0 if peer.is_ours else TIED
        if wrong := [name for name, e in errors.items() if not e <= (ids if name == IDS else BUDGET[cell.dtype])]:
            return Row(peer.name, note=f"{', '.join(wrong)} disagree", failed=True, error=error), None
        row = Row(peer.name, note=peer.differs, error=error, comparable=not peer.differs)
        if meter and peer.metered:
            row = replace(row, peak_bytes=peak_extra_bytes(lambda: list(prepared.call(0).values())))
        if cell.mode == "training":
            held, _ = held_bytes(prepared.forward, inputs.weights.values())
            row = replace(row, held_bytes=held)
        return row, prepared.call
    except UnavailableError as reason:
        return Row(peer.name, note=f"skipped: {reason}"), None
    except Exception as error:  # The others still run.
        return Row(peer.name, note=f"failed: {type(error).__name__}: {error}", failed=True), None


def run_cell(
    cell: SeedCell,
    ceilings: Ceilings,
    *,
    peers: Sequence[SeedPeer] | None = None,
    dry: bool = False,
    rounds: int = ROUNDS,
    seconds: float = SECONDS_PER_PEER,
    real_time: bool = True,
) -> CellResult:
    """Measure one cell.

    Args:
        cell: what to measure.
        ceilings: of the run; sampled between the rounds, and what the floor is computed with.
        peers: who; by default everyone who computes the cell.
        dry: run everything at small sizes and keep no time.
        rounds: turns of each peer.
        seconds: of timed calls for each peer.
        real_time: ask for real-time priority while timing.
    """
    asked, cell = cell, shrunk(cell) if dry else cell
    peers = line_up(cell) if peers is None else peers
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[int], Answer]] = {}
    with torch.no_grad():
        inputs = make_inputs(cell)
        exact = exact_answer(cell, inputs)
        for peer in peers:
            rows[peer.name], call = _checked(peer, cell, inputs, exact, meter=not dry)
            if call is not None:
                calls[peer.name] = call
        experts = inputs.experts or (exact[IDS],)
        hit = sum(ids.unique().numel() for ids in experts) / len(experts)
        if dry:
            ran = tuple(replace(row, note=RAN) if row.peer in calls else row for row in rows.values())
            return CellResult(asked, ran, None, 0.0, 0.0, hit, None)
        del exact
        between = ceilings.sampler(cell.dtype)
        timer = Timer(real_time=real_time)
        times = time_interleaved(timer, calls, rounds=rounds, seconds=seconds, between=between, inputs=len(inputs.draws))
    for name, samples in times.items():
        rows[name] = rows[name].timed(samples, times.get(OURS))
    work = least_work(cell, experts_hit=round(hit))
    rate, bandwidth = ceilings.flops_per_s[cell.dtype], ceilings.bytes_per_s
    floor = floor_of(work, flops_per_s=rate, bytes_per_s=bandwidth)
    ordered = tuple(rows[peer.name] for peer in peers)
    return CellResult(asked, ordered, floor, rate, bandwidth, hit, timer.granted, work=work, load=load_of(experts, cell.E))


def print_cell(result: CellResult) -> None:
    """Print one cell's table, after the size at which the row is published."""
    cell = result.cell
    assert isinstance(cell, SeedCell)
    if cell.published:
        report.console().print(f"{cell.name}: {cell.system} publishes this row at {cell.published}", highlight=False)
    report.print_cell(result)


def run(args: argparse.Namespace) -> int:
    """Run the cells asked for and print them.

    Args:
        args: of the command.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 2 also when a pattern matches nothing.
    """
    measure = partial(run_cell, ceilings=Ceilings(), dry=args.dry, real_time=not args.no_rt)
    return session.run_suite(
        args,
        CELLS,
        measure=lambda cell: measure(cell, peers=chosen(line_up(cell), args.peers)),
        to_json=report.cell_to_json,
        show=print_cell,
        peers=lambda cell: [peer.name for peer in line_up(cell)],
        summarised=not args.dry,
        described={"dry": args.dry},
        long=True,
    )
