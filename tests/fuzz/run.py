"""Runs many cases in processes of their own, which may die: a case that kills its process is a failure like another."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tests.fuzz.cases import CASES, Result, place_of, run_case
from tests.fuzz.check import Outcome

ROOT = Path(__file__).resolve().parents[2]
COMMON = 6  # a choice that more operators have is one of the circumstances
POOLED = ("layout", "values", "rows")  # of whichever tensor
TIME_OUT = 120.0  # seconds for one case, in which compiling the kernels has to fit


def work(seed: int, indices: Iterable[int], triton: bool, out: TextIO) -> None:
    """What a worker does: one line before each case, and one with its result."""
    import torch

    torch.set_num_threads(1)
    if triton:
        from tests.triton.values import interpreter_bf16, interpreter_checks

        interpreter_bf16.install()
        interpreter_checks.install()
    for index in indices:
        print(json.dumps({"begins": index}), file=out, flush=True)
        print(json.dumps(asdict(run_case(seed, index, triton))), file=out, flush=True)


def _lines(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any] | None]:
    """Return what a worker prints; None where it has been silent for too long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=TIME_OUT)
        except queue.Empty:
            yield None
            return
        if line is None:
            return
        yield json.loads(line)


def _start(seed: int, triton: bool) -> "subprocess.Popen[str]":
    """A worker, which reads the numbers of its cases from its standard input."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"} | ({"TRITON_INTERPRET": "1"} if triton else {})
    command = [sys.executable, "-m", "tests.fuzz", "--worker", "--seed", str(seed), *(["--triton"] if triton else [])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def run_all(seed: int, indices: Sequence[int], triton: bool = False) -> Iterator[Result]:
    """Every case's result, in order. A worker that dies or hangs is replaced, and goes on with the next case."""
    left = list(indices)
    while left:
        process = _start(seed, triton)
        assert process.stdin is not None and process.stderr is not None
        errors: list[str] = []
        stderr = process.stderr
        reader = threading.Thread(target=lambda stderr=stderr, errors=errors: errors.extend(stderr), daemon=True)
        reader.start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("\n".join(map(str, left)))
            process.stdin.close()
        current, hung = None, False
        for message in _lines(process):
            if message is None:
                hung = True
                break
            if "begins" in message:
                current = message["begins"]
            else:
                message["outcome"] = Outcome(**message["outcome"])
                yield Result(**message)
                current = None
                left.pop(0)
        if hung:
            process.kill()
        code = process.wait()
        reader.join(timeout=5)
        if not left:
            return
        if current is None:
            raise RuntimeError(
                f"the fuzz's worker ended before its next case, with exit status {code}:\n{''.join(errors)[-4000:]}"
            )
        reason = f"no answer in {TIME_OUT:.0f} s" if hung else f"the process died with exit status {code}"
        yield Result(current, place_of(current, triton)[0], "?", outcome=Outcome([reason]))
        left.pop(0)


@dataclass
class Report:
    """The sum of a run.

    Attributes:
        seed: of the run.
        triton: whether the cases were those of the GPU kernels.
        cases: how many, by operator and implementation.
        failed: the results with failures.
        compared: tensors held against a bound, by operator.
        unmeasured: those whose bound zeros would meet, by operator.
        offered: by operator and choice, the options that there were.
        reached: likewise those that were taken.
    """

    seed: int
    triton: bool = False
    cases: Counter[tuple[str, str]] = field(default_factory=Counter)
    failed: list[Result] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)
    unmeasured: Counter[str] = field(default_factory=Counter)
    offered: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    reached: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, result: Result) -> None:
        """Count one case."""
        operator = result.operator
        self.cases[operator, result.impl] += 1
        if result.outcome.failures:
            self.failed.append(result)
        self.compared[operator] += result.outcome.compared
        self.unmeasured[operator] += result.outcome.unmeasured
        for name, options in result.offered.items():
            self.offered[operator, name].update(options)
        for name, option in result.options.items():
            self.reached[operator, name].add(option)

    def missing(self) -> list[str]:
        """What was offered and never taken: by operator, or by any of them for the circumstances that all have."""
        owners: dict[str, set[str]] = defaultdict(set)
        for operator, name in self.offered:
            owners[name].add(operator)
        offered: dict[str, set[str]] = defaultdict(set)
        reached: dict[str, set[str]] = defaultdict(set)
        for (operator, name), options in self.offered.items():
            kind, shared = name.split(" of ")[0], len(owners[name]) > COMMON and name not in ("impl", "dtype")
            key = kind if kind in POOLED else name if shared else f"{operator}: {name}"
            offered[key] |= options
            reached[key] |= self.reached[operator, name]
        return [f"{key}={option}" for key in sorted(offered) for option in sorted(offered[key] - reached[key])]

    def reproduction(self, result: Result) -> str:
        """How to run a case again."""
        flags = " --triton" if self.triton else ""
        return (
            f"  python -m tests.fuzz --seed {self.seed} --case {result.index}{flags}\n"
            "  or, under a debugger:\n"
            "    from tests.fuzz.cases import run_case\n"
            f"    print(run_case({self.seed}, {result.index}, triton={self.triton}))"
        )

    def describe(self, result: Result) -> str:
        """A failure, what was drawn, and how to see it again."""
        plain = {"contiguous", "no", "none", "off", "normal"}
        drawn = ", ".join(f"{name}={value}" for name, value in result.options.items() if value not in plain)
        failures = "\n".join(f"  {failure}" for failure in result.outcome.failures)
        title = f"FAILED case {result.index}: {result.operator}, impl={result.impl}"
        return f"{title}\n{failures}\n  drawn: {drawn}\n{self.reproduction(result)}"

    def summary(self) -> str:
        """A line for each operator and implementation, and one for the whole."""
        failed = Counter((result.operator, result.impl) for result in self.failed)
        lines = [f"{'operator':26}{'impl':12}{'cases':>8}{'failed':>8}"]
        for operator in CASES:
            for (name, impl), count in sorted(self.cases.items()):
                if name == operator:
                    lines.append(f"{operator:26}{impl:12}{count:8}{failed[operator, impl]:8}")
        compared, unmeasured = sum(self.compared.values()), sum(self.unmeasured.values())
        lines.append(
            f"{sum(self.cases.values())} cases, {len(self.failed)} failed; {compared} tensors held against a bound, "
            f"which zeros would have met for {unmeasured}"
        )
        return "\n".join(lines)


def fuzz(
    seed: int,
    indices: Sequence[int],
    triton: bool = False,
    on_failure: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run the cases, tell of failures and progress as they come, and sum up."""
    report, started, told = Report(seed, triton), time.monotonic(), 0.0
    for count, result in enumerate(run_all(seed, indices, triton), 1):
        report.add(result)
        if result.outcome.failures:
            on_failure(report.describe(result))
        seconds = time.monotonic() - started
        if seconds - told >= 10 or count == len(indices):
            told = seconds
            on_progress(f"{count} of {len(indices)} cases, {len(report.failed)} failed, {seconds:.0f} s")
    return report
