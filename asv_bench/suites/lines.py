"""Suites whose tables have columns of their own: lines, their place in the file, and the command."""

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from rich.table import Table

from fusedonemoe.bench import report, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.results import percentile
from fusedonemoe.bench.workloads import Floor, LeastWork, floor_of, mfu_of


@dataclass(frozen=True)
class LinesCell(ABC):
    """One table."""

    dtype: torch.dtype  # of activations and, unless the lines say otherwise, weights
    rounds: int  # how often each line is timed

    @property
    @abstractmethod
    def name(self) -> str:
        """The text that ``--cells`` matches."""

    @property
    @abstractmethod
    def described(self) -> dict[str, Any]:
        """The operator, sizes and mode, for the file."""


@dataclass(frozen=True)
class SizedCell(LinesCell):
    """A table that is named by its sizes."""

    LETTERS: ClassVar[str] = "TDFEK"
    sizes: tuple[int, ...]  # one for each of ``LETTERS``

    @property
    def by_letter(self) -> dict[str, int]:
        """The sizes by their letters."""
        return dict(zip(self.LETTERS, self.sizes, strict=True))

    @property
    def name(self) -> str:
        """Letters and numbers, and the dtype."""
        return "-".join(f"{letter}{n}" for letter, n in self.by_letter.items()) + "-" + str(self.dtype).removeprefix("torch.")


class AnyLine(Protocol):
    """A line of a table; a dataclass."""

    @property
    def name(self) -> str:
        """The name, as printed."""

    @property
    def seconds(self) -> float | None:
        """Its median."""

    @property
    def problem(self) -> str:
        """The problem with it; empty otherwise."""


C = TypeVar("C", bound=LinesCell)
L = TypeVar("L", bound=AnyLine)


@dataclass(frozen=True)
class LinesResult(Generic[C, L]):
    """A measured table."""

    cell: C  # what was measured
    lines: tuple[L, ...]  # in the order of the table
    work: LeastWork  # the least work of the timed step
    parameters: int  # of all experts, or of the whole model
    active_parameters: int  # the part that one token is multiplied with
    floor: Floor | None = None  # of the timed step; None in a dry run
    flops_per_s: float = 0.0  # the matrix-product rate that the floor was computed with
    bytes_per_s: float = 0.0  # the read bandwidth that the floor was computed with

    @property
    def accounts(self) -> dict[str, Any]:
        """Floor, rates and work, for the file."""
        rates, parameters = (self.flops_per_s, self.bytes_per_s), (self.parameters, self.active_parameters)
        return report.accounts_of(self.floor, rates, self.work, parameters)

    @property
    def title(self) -> str:
        """The heading of the table: the name, the floor and its ceilings, the work."""
        return report.title_of(self.cell.name, self.accounts)


def result_of(
    cell: C, lines: Sequence[L], ceilings: Ceilings | None, *, work: LeastWork, parameters: int, active_parameters: int
) -> LinesResult[C, L]:
    """Make a table with its floor; ``ceilings`` is None in a dry run."""
    if ceilings is None:
        return LinesResult(cell, tuple(lines), work, parameters, active_parameters)
    rate, bandwidth = ceilings.flops_per_s[cell.dtype], ceilings.bytes_per_s
    floor = floor_of(work, flops_per_s=rate, bytes_per_s=bandwidth)
    return LinesResult(cell, tuple(lines), work, parameters, active_parameters, floor, rate, bandwidth)


def times_of(samples: list[float]) -> dict[str, Any]:
    """Return median and tail of at least one sample, under the names of all lines."""
    tail = {"p95_seconds": percentile(samples, 95), "p99_seconds": percentile(samples, 99)}
    return {"seconds": median(samples), **tail, "calls": len(samples)}


def cell_to_json(result: LinesResult[C, L]) -> dict[str, Any]:
    """Return a table as plain values, in the form of all suites; times in seconds, memory in bytes."""
    described = result.cell.described
    rows = []
    for line in result.lines:
        values = asdict(line)  # type: ignore[call-overload]
        values.pop("name", None)
        rate = described["T"] / line.seconds if line.seconds else None
        told = {"note": line.problem, "failed": bool(line.problem), "tokens_per_second": rate}
        mfu = mfu_of(line.seconds, result.work.flops, result.flops_per_s)
        rows.append({"peer": line.name, "mfu": mfu, **values, **told})
    return {
        "name": result.cell.name,
        **described,
        "dtype": str(result.cell.dtype).removeprefix("torch."),
        **result.accounts,
        "rows": rows,
    }


def run(
    args: argparse.Namespace,
    everything: Sequence[C],
    *,
    measure: Callable[[C], LinesResult[C, L]],
    table_of: Callable[[LinesResult[C, L]], Table],
    described: Mapping[str, Any] | None = None,
) -> int:
    """Measure and print the tables asked for.

    Args:
        args: of the command.
        everything: all tables of the suite.
        measure: one of them.
        table_of: for the terminal.
        described: further settings of the run, for the file.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 1 where a line has a problem.
    """

    def show(result: LinesResult[C, L]) -> None:
        report.console().print(table_of(result), highlight=False)
        for line in result.lines:
            if line.problem:
                print(f"{line.name}: {line.problem}", file=sys.stderr)

    return session.run_suite(args, everything, measure=measure, to_json=cell_to_json, show=show, described=described)
