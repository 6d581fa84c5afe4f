"""The results of a cell, and how its rows compare."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from fusedonemoe.bench.peers import GROUPED, YARDSTICK, is_ours
from fusedonemoe.bench.workloads import Cell, Floor, LeastWork


def quartiles(samples: list[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile of at least one sample, in any order."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


def percentile(samples: list[float], percent: float) -> float:
    """Return the least of the samples that so many per cent of them do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


LOAD_POINTS = 33


def load_of(experts: Iterable[Tensor], num_experts: int) -> tuple[float, ...]:
    """Count the rows of each expert, the busiest first, in multiples of the mean.

    Returns:
        One number for each expert; of many experts, those at ``LOAD_POINTS`` evenly spaced ranks.
    """
    ids = torch.cat([e.flatten() for e in experts])
    counts = torch.bincount(ids, minlength=num_experts).sort(descending=True).values.double()
    if num_experts > LOAD_POINTS:
        counts = counts[torch.linspace(0, num_experts - 1, LOAD_POINTS, device="cpu").round().long()]
    return tuple((counts * num_experts / max(ids.numel(), 1)).tolist())


@dataclass(frozen=True)
class Row:
    """The result of one peer in one cell.

    Attributes:
        held_bytes: what a training step holds between forward and backward, parameters left out; None where not metered.
    """

    peer: str  # its name
    note: str = ""  # why there is no time, or why the time is not to be compared; empty otherwise
    failed: bool = False  # whether the note is a failure (outputs disagree, an exception) and not a peer that is absent
    seconds: float | None = None  # median of the timed calls; None without a time
    spread: tuple[float, float] | None = None  # lower and upper quartile of the timed calls
    p95_seconds: float | None = None  # 95 of 100 calls took no longer
    p99_seconds: float | None = None  # 99 of 100 calls took no longer
    calls: int = 0  # how many were timed
    error: float | None = None  # ``||y - y64|| / ||y64||``, the greatest of output and gradients; None when there was no output
    peak_bytes: int | None = None  # most bytes held at once besides input and output
    held_bytes: int | None = None
    comparable: bool = True  # whether the peer wrote everything that the others write
    weight_bytes: float | None = None  # of the experts that a call reads, on average, where peers store weights in several forms
    floor_seconds: float | None = None  # of those bytes, in place of the cell's floor
    weight_error: float | None = None  # change of the exact outputs by rounding the weights, relative
    paired_seconds: float | None = None  # the median of ours, timed in turns with this very row; None where ours has no time

    def timed(self, samples: list[float], ours: list[float] | None) -> "Row":
        """Return the row with the seconds of its calls, and of ours, timed in turns with them."""
        paired = median(ours) if ours else None
        return replace(
            self,
            seconds=median(samples),
            spread=quartiles(samples),
            p95_seconds=percentile(samples, 95),
            p99_seconds=percentile(samples, 99),
            calls=len(samples),
            paired_seconds=paired,
        )

    @property
    def is_absent(self) -> bool:
        """True without a time, for a reason that is no failure."""
        return self.seconds is None and not self.failed

    @property
    def relative_seconds(self) -> float | None:
        """The time in units of ours; in seconds where ours has none."""
        return self.seconds / (self.paired_seconds or 1.0) if self.seconds else None


@dataclass(frozen=True)
class CellResult:
    """A measured cell.

    Attributes:
        work: what the floor was computed from; None when the cell failed as a whole.
        dense_seconds: of dense products with as many operations, on as many rows as are routed; None where not timed.
    """

    cell: Cell  # what was measured
    rows: tuple[Row, ...]  # one for each peer, ours first
    floor: Floor | None  # the least time this machine needs; None when the cell failed as a whole
    flops_per_s: float  # the matrix-product rate that the floor was computed with
    bytes_per_s: float  # the read bandwidth that the floor was computed with
    experts_hit: float  # distinct experts that the tokens chose, the mean over the inputs
    real_time: bool | None  # whether the timed calls ran at real-time priority; None where it was of no use
    work: LeastWork | None = field(default=None, kw_only=True)
    load: tuple[float, ...] = field(default=(), kw_only=True)  # rows of an expert in multiples of the mean, the busiest first
    dense_seconds: float | None = field(default=None, kw_only=True)
    copy_seconds: float | None = field(default=None, kw_only=True)  # of a device copy of as many bytes; None where not timed

    def of_dense(self, row: Row) -> float | None:
        """Return the share of the dense products' rate that a row reaches."""
        return self.dense_seconds / row.seconds if self.dense_seconds and row.seconds else None

    def of_copy(self, row: Row) -> float | None:
        """Return the share of the copy's bandwidth that a row reaches."""
        return self.copy_seconds / row.seconds if self.copy_seconds and row.seconds else None

    def tokens_per_second(self, row: Row) -> float | None:
        """Return the tokens of the cell in a second, at the median."""
        return self.cell.T / row.seconds if row.seconds else None

    def times_faster(self, row: Row) -> float | None:
        """Return how many times faster a row is than the cell's yardstick; None where either has no time."""
        base = next((r for r in self.rows if r.peer == YARDSTICK[self.cell.operator]), None)
        return _quotient(base, row)

    @property
    def best_peer(self) -> Row | None:
        """The fastest of the others that wrote everything; None where none has a time."""
        others = [row for row in self.rows if row.relative_seconds and row.comparable and not is_ours(row.peer)]
        return min(others, key=lambda row: row.relative_seconds or 0.0, default=None)

    def times_best(self, row: Row) -> float | None:
        """Return a row's time in multiples of the best peer's; below 1 it is faster. None where either has no time."""
        return _quotient(row, self.best_peer)

    def times_floor(self, row: Row) -> float | None:
        """Return a row's time in multiples of the floor."""
        floor = row.floor_seconds or (self.floor and self.floor.seconds)
        return row.seconds / floor if row.seconds and floor else None

    def promised_bytes(self, row: Row) -> int | None:
        """Return the promised bound on the peak of a row; only the grouped formulation has one."""
        return self.cell.promised_bytes if row.peer == GROUPED else None


def _quotient(row: Row | None, other: Row | None) -> float | None:
    """Divide the times of two rows; both were timed in turns with ours, if not with each other."""
    if row is None or other is None or not row.relative_seconds or not other.relative_seconds:
        return None
    return row.relative_seconds / other.relative_seconds
