"""The results of a cell, and how its rows compare."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.bench.peers import GROUPED, OURS, YARDSTICK, is_ours
from fusedonemoe.bench.workloads import Cell, Floor, LeastWork, mfu_of


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
    """Count the rows of each expert, the busiest first, in multiples of the mean; of many, at ``LOAD_POINTS`` even ranks."""
    ids = torch.cat([e.flatten() for e in experts])
    counts = torch.bincount(ids, minlength=num_experts).sort(descending=True).values.double()
    if num_experts > LOAD_POINTS:
        counts = counts[torch.linspace(0, num_experts - 1, LOAD_POINTS, device="cpu").round().long()]
    return tuple((counts * num_experts / max(ids.numel(), 1)).tolist())


@dataclass(frozen=True)
class Row:
    """The result of one peer in one cell."""

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
    held_bytes: int | None = None  # by a training step between forward and backward, parameters left out; None where not metered
    comparable: bool = True  # whether the peer wrote everything that the others write
    weight_bytes: float | None = None  # of the experts that a call reads, on average, where peers store weights in several forms
    floor_seconds: float | None = None  # of those bytes, in place of the cell's floor
    weight_error: float | None = None  # change of the exact outputs by rounding the weights, relative
    paired_seconds: float | None = None  # the median of ours, timed in turns with this very row; None where ours has no time

    def timed(self, samples: list[float], ours: list[float] | None) -> "Row":
        """Return the row with the seconds of its calls, and of ours, timed in turns with them."""
        tail: dict[str, Any] = {"p95_seconds": percentile(samples, 95), "p99_seconds": percentile(samples, 99)}
        tail |= {"calls": len(samples), "paired_seconds": median(ours) if ours else None}
        return replace(self, seconds=median(samples), spread=quartiles(samples), **tail)

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
    """A measured cell; one that failed as a whole has no floor and no work."""

    cell: Cell  # what was measured
    rows: tuple[Row, ...]  # one for each peer, ours first
    floor: Floor | None = None  # the least time this machine needs
    flops_per_s: float = 0.0  # the matrix-product rate that the floor was computed with
    bytes_per_s: float = 0.0  # the read bandwidth that the floor was computed with
    experts_hit: float = 0.0  # distinct experts that the tokens chose, the mean over the inputs
    real_time: bool | None = None  # whether the timed calls ran at real-time priority; None where it was of no use
    work: LeastWork | None = None  # what the floor was computed from
    load: tuple[float, ...] = ()  # rows of an expert in multiples of the mean, the busiest first
    # Of dense products with as many operations on as many rows, and of a device copy of as many bytes; None where not timed.
    dense_seconds: float | None = None
    copy_seconds: float | None = None

    def compared(self, row: Row) -> dict[str, Any]:
        """Return a row's rate, and its comparison with other rows, products, copies and the promised bound, by their names."""
        seconds = row.seconds
        faster = _quotient(next((r for r in self.rows if r.peer == YARDSTICK[self.cell.operator]), None), row)
        form = {"weights": row.peer.removeprefix(f"{OURS} "), "speed_up": faster} if self.cell.operator == "quantized" else {}
        return form | {
            "tokens_per_second": self.cell.T / seconds if seconds else None,
            "mfu": mfu_of(seconds, self.work.flops if self.work else None, self.flops_per_s),
            "times_faster": faster,
            "times_best": _quotient(row, self.best_peer),
            # Only the grouped formulation has a bound on its peak.
            "promised_bytes": self.cell.promised_bytes if row.peer == GROUPED else None,
            "of_dense": self.dense_seconds / seconds if self.dense_seconds and seconds else None,
            "of_copy": self.copy_seconds / seconds if self.copy_seconds and seconds else None,
        }

    @property
    def best_peer(self) -> Row | None:
        """The fastest of the others that wrote everything; None where none has a time."""
        others = [row for row in self.rows if row.relative_seconds and row.comparable and not is_ours(row.peer)]
        return min(others, key=lambda row: row.relative_seconds or 0.0, default=None)


def _quotient(row: Row | None, other: Row | None) -> float | None:
    """Divide the times of two rows, both timed in turns with ours if not with each other; None where either has no time."""
    if row is None or other is None or not row.relative_seconds or not other.relative_seconds:
        return None
    return row.relative_seconds / other.relative_seconds
