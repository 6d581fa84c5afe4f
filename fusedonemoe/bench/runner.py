"""Runs a cell: check every peer against float64, meter its memory, then time all peers interleaved."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.exact import Exact, disagreements, errors_of, exact_answer
from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.peers import OURS, PEERS, Peer, UnavailableError, is_ours
from fusedonemoe.bench.priority import RealTime
from fusedonemoe.bench.results import CellResult, Row, load_of
from fusedonemoe.bench.steps import Call, Step
from fusedonemoe.bench.workloads import BlockInputs, Cell, Inputs, floor_of, least_work, make_inputs

ROUNDS = 5
# Of timed calls per peer, over all rounds; a call that takes longer than its share of it is still timed once a round.
SECONDS_PER_PEER = 0.4
MOST_CALLS_PER_ROUND = 20
# A call this long needs no untimed one before it.
LONG_SECONDS = 0.5
# Where a peer's first call takes this long, its memory is not metered: that would be a call more.
METERED_SECONDS = 2.0
# The worker threads of the peer before spin for a while after their last task.
PAUSE_SECONDS = 0.06
# Peers that keep copies of the weights are built in groups that fit into this share of the machine's memory. The rest is for
# the results of a call (gradients are as large as the weights), its scratch, and other programs.
SHARE_OF_MEMORY = 0.55


def order_of_round(names: Sequence[str], round_index: int) -> list[str]:
    """Every peer once, starting one further along each round, so that none always runs behind the same other."""
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


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    seconds: float,
    real_time: bool,
    between: Callable[[], None],
    inputs: int = 1,
) -> tuple[dict[str, list[float]], bool]:
    """Time several calls in turns.

    Args:
        calls: by name; each takes the index of an input.
        rounds: each peer's turns. A turn is one untimed call and then timed ones; of very long calls, one timed call.
        seconds: about how long the timed calls of one peer may take in all.
        real_time: ask for real-time priority.
        between: runs before every round, at the same priority.
        inputs: how many inputs the calls rotate through.

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
                warm = _timed(call, turn % inputs)
                if warm > LONG_SECONDS:
                    times[name].append(warm)
                    continue
                count = max(1, min(MOST_CALLS_PER_ROUND, int(seconds / rounds / max(warm, 1e-9))))
                times[name] += [_timed(call, (turn + n) % inputs) for n in range(1, count + 1)]
    return times, granted


def _timed(call: Call, index: int) -> float:
    start = time.perf_counter()
    # The result is dropped at once: what a peer allocates afresh for every call, it also gives back.
    call(index)
    return time.perf_counter() - start


def _checked(peer: Peer, cell: Cell, inputs: Inputs, exact: Exact) -> tuple[Row, Call | None]:
    """A peer's row without its time, and the call to time if its output is right."""
    try:
        call = peer.build(cell, inputs)
        start = time.perf_counter()
        answer = call(0)
        seconds = time.perf_counter() - start
        errors = errors_of(answer, exact)
        error = max(errors.values(), key=lambda e: float("inf") if e != e else e)
        if wrong := disagreements(errors, cell.dtype):
            return Row(peer.name, note=f"{', '.join(wrong)} disagree", failed=True, error=error), None
        unwritten = _experts_missed(inputs) if isinstance(answer, Step) and not answer.is_stacked else 0
        del answer
        row = Row(peer.name, error=error)
        if unwritten:
            note = f"leaves the gradients of up to {unwritten} unused experts unwritten"
            row = replace(row, note=note, comparable=False)
        if peer.metered and (peer.is_ours or seconds < METERED_SECONDS):
            row = replace(row, peak_bytes=peak_extra_bytes(partial(_tensors_of, call)))
        return row, call
    except UnavailableError as reason:
        return Row(peer.name, note=f"skipped: {reason}"), None
    except Exception as error:  # A peer is other people's code: its failure is a result, and the others still run.
        return Row(peer.name, note=f"failed: {type(error).__name__}: {error}", failed=True), None


def _tensors_of(call: Call) -> list[Tensor]:
    answer = call(0)
    if isinstance(answer, dict):
        return list(answer.values())
    return answer.tensors() if isinstance(answer, Step) else [answer]


def _experts_missed(inputs: Inputs) -> int:
    """The most experts that no token of an input chose."""
    assert isinstance(inputs, BlockInputs)
    return max(inputs.router.shape[0] - experts.unique().numel() for experts in inputs.experts)


def groups_of(peers: Sequence[Peer], *, weight_bytes: int, memory_bytes: float) -> list[list[Peer]]:
    """Split peers so that the copies of the weights that a group keeps fit into memory, beside the weights and our own copies.

    Args:
        peers: everyone; ours are in every group, and first.
        weight_bytes: one copy.
        memory_bytes: what there is.

    Returns:
        The groups; within each, the others in the order of their copies. A peer that does not fit even alone is alone.
    """
    ours = [peer for peer in peers if peer.is_ours]
    room = memory_bytes - weight_bytes * (1 + sum(peer.copies for peer in ours))
    groups, used = [list(ours)], 0
    for peer in sorted((peer for peer in peers if not peer.is_ours), key=lambda peer: peer.copies):
        size = peer.copies * weight_bytes
        if used and size and used + size > room:
            groups.append(list(ours))
            used = 0
        groups[-1].append(peer)
        used += size
    return groups


def physical_memory() -> int:
    """Bytes of this machine's memory; of none to speak of where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def run_cell(
    cell: Cell,
    ceilings: Ceilings,
    *,
    peers: Sequence[Peer] | None = None,
    rounds: int = ROUNDS,
    seconds: float = SECONDS_PER_PEER,
    real_time: bool = True,
    memory_bytes: float | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> CellResult:
    """Measure one cell.

    Args:
        cell: what to measure.
        ceilings: of the run; sampled between the rounds, and what the floor is computed with.
        peers: who; by default everyone who computes the cell's operator.
        rounds: turns of each peer.
        seconds: of timed calls for each peer.
        real_time: ask for real-time priority while timing.
        memory_bytes: for the weights and the copies that peers keep of them; by default a share of the machine's.
        announce: told what is about to happen.

    Returns:
        The result; a peer whose output is off has a note in place of a time.
    """
    peers = PEERS[cell.operator] if peers is None else peers
    if memory_bytes is None:
        memory_bytes = SHARE_OF_MEMORY * physical_memory()
    rows: dict[str, Row] = {}
    samples: dict[str, list[float]] = {}
    granted = True
    # Not inference_mode: peers build parameters in here, and inference tensors refuse flags that some of them set.
    with torch.no_grad():
        announce("making inputs")
        inputs = make_inputs(cell)
        exact = exact_answer(cell, inputs)
        between = ceilings.sampler(cell.dtype)
        calls: dict[str, Call] = {}
        for group in groups_of(peers, weight_bytes=cell.weight_bytes, memory_bytes=memory_bytes):
            # Ours stay; what the peers of the last group kept is gone before the next are built.
            calls = {name: call for name, call in calls.items() if is_ours(name)}
            gc.collect()
            for peer in group:
                if peer.name not in rows:
                    announce(f"building {peer.name}")
                    rows[peer.name], call = _checked(peer, cell, inputs, exact)
                    if call is not None:
                        calls[peer.name] = call
                    del call
            announce(f"timing {', '.join(calls)}")
            times, quiet = time_interleaved(
                calls, rounds=rounds, seconds=seconds, real_time=real_time, between=between, inputs=cell.rotation
            )
            granted &= quiet
            for name, seconds_of_call in times.items():
                samples.setdefault(name, []).extend(seconds_of_call)
                if not is_ours(name):
                    rows[name] = rows[name].timed(seconds_of_call, times.get(OURS))
    for name in samples:
        if is_ours(name):
            rows[name] = rows[name].timed(samples[name], samples.get(OURS))
    hit = sum(experts.unique().numel() for experts in inputs.experts) / len(inputs.experts)
    work = least_work(cell, experts_hit=round(hit))
    rate, bandwidth = ceilings.flops_per_s[cell.dtype], ceilings.bytes_per_s
    floor = floor_of(work, flops_per_s=rate, bytes_per_s=bandwidth)
    load = load_of(inputs.experts, cell.E)
    ordered = tuple(rows[peer.name] for peer in peers)
    return CellResult(cell, ordered, floor, rate, bandwidth, hit, granted, work=work, load=load)
