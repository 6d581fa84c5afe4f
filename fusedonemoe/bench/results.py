"""What came of a cell, and how its rows compare."""

from dataclasses import dataclass, replace
from statistics import median

from fusedonemoe.bench.peers import GROUPED, YARDSTICK, is_ours
from fusedonemoe.bench.workloads import Cell, Floor


def quartiles(samples: list[float]) -> tuple[float, float]:
    """The lower and the upper one.

    Args:
        samples: at least one, in any order.
    """
    ordered = sorted(samples)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


@dataclass(frozen=True)
class Row:
    """What came of one peer in one cell.

    Attributes:
        peer: its name.
        note: why there is no time, or why the time is not to be compared; empty otherwise.
        failed: whether the note is a failure (outputs disagree, an exception) and not a peer that is absent.
        seconds: median of the timed calls; None without a time.
        spread: lower and upper quartile of the timed calls.
        calls: how many were timed.
        error: ``||y - y64|| / ||y64||``, the greatest of output and gradients; None when there was no output.
        peak_bytes: most bytes held at once beside input and output.
        comparable: whether the peer wrote everything that the others write.
        paired_seconds: the median of ours, timed in turns with this very row; None where ours has no time.
    """

    peer: str
    note: str = ""
    failed: bool = False
    seconds: float | None = None
    spread: tuple[float, float] | None = None
    calls: int = 0
    error: float | None = None
    peak_bytes: int | None = None
    comparable: bool = True
    paired_seconds: float | None = None

    def timed(self, samples: list[float], ours: list[float] | None) -> "Row":
        """The row with its times.

        Args:
            samples: seconds of its calls.
            ours: seconds of ours, timed in turns with them.
        """
        paired = median(ours) if ours else None
        return replace(self, seconds=median(samples), spread=quartiles(samples), calls=len(samples), paired_seconds=paired)

    @property
    def is_absent(self) -> bool:
        """Whether there is no time, for a reason that is nobody's mistake."""
        return self.seconds is None and not self.failed

    @property
    def relative_seconds(self) -> float | None:
        """The time in units of ours; in seconds where ours has none."""
        return self.seconds / (self.paired_seconds or 1.0) if self.seconds else None


@dataclass(frozen=True)
class CellResult:
    """A measured cell.

    Attributes:
        cell: what was measured.
        rows: one for each peer, ours first.
        floor: the least time this machine needs; None when the cell failed as a whole.
        flops_per_s: the matrix-product rate that the floor was computed with.
        bytes_per_s: the read bandwidth that the floor was computed with.
        experts_hit: distinct experts that the tokens chose, the mean over the inputs.
        real_time: whether the timed calls ran at real-time priority; None where it was of no use.
    """

    cell: Cell
    rows: tuple[Row, ...]
    floor: Floor | None
    flops_per_s: float
    bytes_per_s: float
    experts_hit: float
    real_time: bool | None

    def times_faster(self, row: Row) -> float | None:
        """How many times faster a row is than the cell's yardstick; None where either has no time."""
        base = next((r for r in self.rows if r.peer == YARDSTICK[self.cell.operator]), None)
        return _quotient(base, row)

    @property
    def best_peer(self) -> Row | None:
        """The fastest of the others who wrote everything; None where none has a time."""
        others = [row for row in self.rows if row.relative_seconds and row.comparable and not is_ours(row.peer)]
        return min(others, key=lambda row: row.relative_seconds or 0.0, default=None)

    def times_best(self, row: Row) -> float | None:
        """A row's time in multiples of the best peer's; below 1 it is faster. None where either has no time."""
        return _quotient(row, self.best_peer)

    def times_floor(self, row: Row) -> float | None:
        """A row's time in multiples of the floor."""
        return row.seconds / self.floor.seconds if row.seconds and self.floor else None

    def promised_bytes(self, row: Row) -> int | None:
        """The bound on the peak that a row has promised: that of the grouped formulation."""
        return self.cell.promised_bytes if row.peer == GROUPED else None


def _quotient(row: Row | None, other: Row | None) -> float | None:
    """How many times as long a row takes as another; both were timed in turns with ours, if not with each other."""
    if row is None or other is None or not row.relative_seconds or not other.relative_seconds:
        return None
    return row.relative_seconds / other.relative_seconds
