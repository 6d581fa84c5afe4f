"""Check this machine: versions, devices, and every implementation of every operator against the float64 oracle.

Exits with 1 when something is wrong. What is optional and missing (a GPU, triton, transformers, a compiler) is not wrong.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedonemoe import MoE, __version__
from fusedonemoe.cli.overview import cpu_fields, cpu_model, is_installed, version_of
from fusedonemoe.cli.probes import BUDGET_TEXT, BUDGETS, DTYPES, D, E, F, K, Probe, make_probes, normal
from fusedonemoe.ops.choice import refusal
from fusedonemoe.ops.cpu import build
from fusedonemoe.ops.reference import FloatArray
from fusedonemoe.testing import exact_float64

Errors = Mapping[str, float]

DIRECTIONS = ("forward", "backward")
# What torch's kernels and Inductor's code ask of a CPU, x86 and then ARM, by the names in /proc/cpuinfo; asimd is NEON.
CPU_FEATURES = "avx2 fma avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_fp16 asimd asimdhp bf16 i8mm sve sve2"


class Finding(NamedTuple):
    """One fact about the environment; its status is ``ok``, ``absent`` (optional and missing) or ``FAIL``."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Row:
    """One measurement."""

    operator: str
    impl: str  # as the operator's ``impl=`` names it
    dtype: str
    device: str
    direction: str
    budget: float
    ok: bool | None  # None when this cannot run here and need not
    tensor: str = ""  # the result, or the gradient with the greatest error
    error: float | None = None  # relative, in the 2-norm; None when there is no finite figure
    note: str = ""  # may then tell why

    def __str__(self) -> str:
        figure = "not finite" if self.error is None else f"{self.error:.1e}"
        what = self.note or f"error of {self.tensor} {figure}, budget {self.budget:.1e}"
        return f"{self.operator} {self.impl} {self.dtype} {self.device} {self.direction}: {what}"


def torch_window() -> dict[str, str]:
    """Return the versions of torch that the installed metadata asks for, ``{">=": ..., "<": ...}``; empty when not installed."""
    try:
        requirements = importlib.metadata.requires("fusedonemoe") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    specifier = next((line for line in requirements if re.match(r"torch\s*[<>(]", line)), "")
    return dict(sorted(re.findall(r"(>=|<)\s*([\d.]+)", specifier), reverse=True))


def _release(version: str) -> tuple[int, ...]:
    """``(2, 16, 0)`` of ``2.16.0.dev1+cpu``: a nightly counts as the release that it leads to."""
    return tuple(int(part) for part in re.findall(r"\d+(?:\.\d+)*", version)[0].split("."))


def _torch_finding() -> Finding:
    version, window = str(torch.__version__), torch_window()
    if not window:
        return Finding("torch", "ok", f"{version} (not compared: no installed metadata says what is supported)")
    is_inside = all((_release(version) >= _release(bound)) == (sign == ">=") for sign, bound in window.items())
    supported = ",".join(f"{sign}{bound}" for sign, bound in window.items())
    return Finding("torch", "ok" if is_inside else "FAIL", f"{version} ({'' if is_inside else 'not '}in {supported})")


def _cpu_findings() -> list[Finding]:
    fields = cpu_fields()
    is_arm = platform.machine().lower() in ("arm64", "aarch64")  # every one has NEON
    flags = (fields.get("flags") or fields.get("Features") or "asimd" * is_arm).split()
    features = " ".join(feature for feature in CPU_FEATURES.split() if feature in flags) or "flags unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("CPU", "ok", cpu_model()),
        Finding("instructions", "ok", f"torch uses {torch.backends.cpu.get_cpu_capability()}; {features}"),
        Finding("threads", "ok", f"{torch.get_num_threads()} in torch, {cores} CPUs for this process"),
    ]


def find_cpp_compiler() -> str | None:
    """Return the C++ compiler that Inductor would call: ``$CXX``, or the platform's usual one; None when it does not run."""
    from torch._inductor import cpp_builder

    try:
        return cpp_builder.get_cpp_compiler()
    except (RuntimeError, OSError):
        return None


def _compiler_finding() -> Finding:
    compiler = find_cpp_compiler()
    if compiler is None:
        return Finding("C++ compiler", "absent", "torch.compile on CPU will not work: install g++ or clang++, or set CXX")
    run = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return Finding("C++ compiler", "ok", run.stdout.partition("\n")[0] or compiler)


def _kernels_finding() -> Finding:
    """The CPU kernels of this library; a cache that another user could write is wrong, and the detail says what to do."""
    try:
        return Finding("CPU kernels", "ok", build.load()._name)
    except build.Unavailable as error:
        return Finding("CPU kernels", "FAIL" if build.cache_fault() else "absent", str(error))


def _gpu_findings() -> list[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return [Finding("GPU", "absent", "" if built else "this torch is built for CPU only")]
    gpus = enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    told = "{0.name}, capability {0.major}.{0.minor}, {1:.0f} GiB"
    return [Finding(f"GPU {i}", "ok", told.format(gpu, gpu.total_memory / 2**30)) for i, gpu in gpus]


def _cache_finding() -> Finding:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding("compile cache", "ok", f"{folder}, writable")
    except OSError as error:
        return Finding("compile cache", "FAIL", f"{folder}: {error.strerror}; set TORCHINDUCTOR_CACHE_DIR")


def check_environment() -> list[Finding]:
    """Look at versions, processors, compiler and cache."""
    names = ("numpy", "triton", "transformers")
    packages = {name: (version_of(name) or "of unknown version") if is_installed(name) else "" for name in names}
    return [
        Finding("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        Finding("fusedonemoe", "ok", __version__),
        _torch_finding(),
        *(Finding(name, "ok" if version else "absent", version) for name, version in packages.items()),
        *_cpu_findings(),
        _compiler_finding(),
        _kernels_finding(),
        *_gpu_findings(),
        _cache_finding(),
    ]


def relative_error(actual: Tensor, exact: FloatArray) -> float:
    """``|actual - exact| / |exact|`` in the 2-norm; infinite for another shape, and where there is nothing to compare with."""
    size = float(np.linalg.norm(exact))
    if tuple(actual.shape) != exact.shape or size == 0:
        return math.inf
    return float(np.linalg.norm(exact_float64(actual) - exact)) / size


def _rows(head: tuple[str, str, str, str], missing: str | None, measure: Callable[[], list[Errors]]) -> list[Row]:
    """Return the rows of forward and backward, from the errors of the tensors of each; ``missing`` tells why not to measure."""
    operator, _, dtype, _ = head
    ways = [(name, budget.of(DTYPES[dtype])) for name, budget in zip(DIRECTIONS, BUDGETS[operator], strict=True)]
    if missing:
        return [Row(*head, *way, None, note=missing) for way in ways]
    try:
        errors = measure()
    except Exception as error:  # whatever an operator raises is this report's finding, not its end
        note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return [Row(*head, *way, False, note=note) for way in ways]
    rows = []
    for way, of_tensors in zip(ways, errors, strict=True):
        # NaN compares false with everything, so max alone could miss it.
        tensor, worst = max(of_tensors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
        rows.append(Row(*head, *way, worst <= way[1], tensor, worst if math.isfinite(worst) else None))
    return rows


def _probe_rows(probe: Probe, impl: str, dtype: str, device: str) -> list[Row]:
    def measure() -> list[Errors]:
        output = probe.forward(impl)
        gradients = torch.autograd.grad(output, list(probe.leaves.values()), probe.seed)
        backward = {name: relative_error(g, probe.exact[name]) for name, g in zip(probe.leaves, gradients, strict=True)}
        return [{"output": relative_error(output, probe.exact["output"])}, backward]

    kind: dict[str, Any] = {"device_type": device, "dtype": DTYPES[dtype], "operator": probe.operator}
    missing = None if probe.widths is None else refusal(impl, **kind, widths=probe.widths)
    return _rows((probe.operator, impl, dtype, device), missing, measure)


def self_test() -> list[Row]:
    """Every operator, implementation, dtype and device against the oracle, forward and backward."""
    return [
        row
        for device, name in itertools.product(["cpu", *(["cuda"] if torch.cuda.is_available() else [])], DTYPES)
        for probe, impls in make_probes(DTYPES[name], device)
        for impl in impls
        for row in _probe_rows(probe, impl, name, device)
    ]


def compile_smoke(device: str) -> list[Row]:
    """A small MoE in float32, compiled with ``fullgraph=True``, against itself uncompiled."""

    def measure() -> list[Errors]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            moe = MoE(hidden_size=D, intermediate_size=F, num_experts=E, top_k=K, device=device, dtype=torch.float32)
        x, seed = normal(D, torch.float32, device).requires_grad_(), normal(D, torch.float32, device, seed=8)
        leaves = {"x": x, **dict(moe.named_parameters())}

        def run(block: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
            y = block(x)
            return y, *torch.autograd.grad(y, list(leaves.values()), seed)

        eager = [exact_float64(tensor) for tensor in run(moe)]
        output, *backward = map(relative_error, run(torch.compile(moe, fullgraph=True)), eager)
        return [{"output": output}, dict(zip(leaves, backward, strict=True))]

    tool, found = ("C++ compiler", find_cpp_compiler()) if device == "cpu" else ("triton", importlib.util.find_spec("triton"))
    return _rows(("MoE", "compiled", "float32", device), "" if found else f"no {tool}", measure)


def print_table(title: str, lines: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print aligned columns: in colour by rich where it is installed, else as plain text."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        lines = [header, *lines] if header else lines
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [" ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        print(title, *texts, "", sep="\n")
        return
    # Single spaces between columns: the self-test's then fit into 80.
    table = Table(*header, title=title, title_justify="left", show_header=bool(header), box=None, padding=(0, 1, 0, 0))
    style = {"ok": "green", "absent": "yellow", "FAIL": "bold red"}
    for line in lines:
        table.add_row(*(Text(cell, style.get(cell.partition(" ")[0], "")) for cell in line))
    Console().print(table, "")


def _print_self_test(rows: list[Row]) -> None:
    """A table for each device and direction, with a line for each operator and implementation, a column for each dtype."""
    for device, direction in dict.fromkeys((row.device, row.direction) for row in rows):
        lines: dict[tuple[str, str], list[str]] = {}
        for row in (row for row in rows if (row.device, row.direction) == (device, direction)):
            figure = "" if row.error is None else f"{row.error:.0e}"
            cell = f"{figure}/{row.budget:.0e}" if row.ok else "absent" if row.ok is None else f"FAIL {figure}"
            lines.setdefault((row.operator, row.impl), []).append(cell)
        cells = [[*key, *line] for key, line in lines.items()]
        print_table(f"Self-test on {device}, {direction}, error/budget", cells, ("operator", "impl", *DTYPES))
    print(BUDGET_TEXT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, to stdout")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, the slowest of the checks")


def run(args: argparse.Namespace) -> int:
    """Check everything and print a report; 1 when something failed, else 0."""
    # With --json, stdout is for the object alone, whatever else has something to say.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        environment = check_environment()
        if not args.json:
            print_table("Environment", [(status, name, detail) for name, status, detail in environment])
        rows = self_test()
        if not args.json:
            _print_self_test(rows)
            print(f"\ntorch.compile of a small MoE{': left out' if args.no_compile else ', beside itself eager:'}", flush=True)
        devices = () if args.no_compile else dict.fromkeys(row.device for row in rows)
        compiled = [row for device in devices for row in compile_smoke(device)]
    failures = [f"{name}: {detail}" for name, status, detail in environment if status == "FAIL"]
    failures += [str(row) for row in (*rows, *compiled) if row.ok is False]
    if args.json:
        report = {
            "ok": not failures,
            "failures": failures,
            "environment": {name: {"status": status, "detail": detail} for name, status, detail in environment},
            "budget": BUDGET_TEXT,
            "self_test": [dataclasses.asdict(row) for row in rows],
            "compile": [dataclasses.asdict(row) for row in compiled],
        }
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        status = {True: "ok", None: "absent", False: "FAIL"}
        lines = [f"{status[row.ok]} {row}" for row in compiled]
        print(*lines, "", *(["All fine."] if not failures else [f"{len(failures)} failed:", *failures]), sep="\n")
    return int(bool(failures))
