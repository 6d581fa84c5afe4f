"""The page of ``python -m fusedonemoe`` without arguments: versions, implementations that run here, next steps."""

import contextlib
import importlib.metadata
import importlib.util
import platform
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

WIDTH = 80
# Packages that more can be done with, and the extra that brings each.
OPTIONAL: dict[str, str] = {"rich": "cli", "shtab": "cli", "matplotlib": "plot", "transformers": "hf"}
# What a command needs that the library does not: for the terminal, and the demo for its picture.
NEEDS: dict[str, tuple[str, ...]] = {"demo": ("rich", "matplotlib"), "bench": ("rich",)}
CLOSE = """\
Each takes --help. In a program: help(fusedonemoe.MoE), and for a transformers
model fusedonemoe.integrations.transformers.apply(model). To read on: README.md,
examples/ and docs/ of the repository."""


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module in sys.modules that names no specification: as good as absent
        return False


def version_of(package: str) -> str:
    """Return the version of an installed package; nothing where its distribution has another name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_fields() -> dict[str, str]:
    """Return name and flags of the processor as Linux lists them; nothing on another system."""
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return dict(re.findall(r"^(model name|flags|Features)\s*: *(.+)", cpuinfo, re.MULTILINE))
    return {}


def cpu_model() -> str:
    """Return the processor's name from the kernel, else from Python."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def install_command(missing: list[str]) -> str:
    """Return the command that installs these packages of :data:`OPTIONAL`."""
    return f"pip install 'fusedonemoe[{','.join(sorted({OPTIONAL[package] for package in missing}))}]'"


def _here() -> Iterator[str]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    threads = torch.get_num_threads()
    yield f"Python {platform.python_version()}, torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}"
    yield f"GPU: {', '.join(gpus) or 'none that torch can use'}"
    if present := [f"{name} {version_of(name)}".rstrip() for name in (*OPTIONAL, "triton") if is_installed(name)]:
        yield f"installed: {', '.join(present)}"
    if missing := [package for package in OPTIONAL if not is_installed(package)]:
        yield f"not installed: {', '.join(missing)}; {install_command(missing)}"


def _experts() -> Iterator[str]:
    import torch

    from fusedonemoe import MoEConfig, explain

    config = MoEConfig(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        told = explain(config, device=device)
        yield f"on {device} impl='{told.impl}': {told.reason}"
        refused = {one.impl: one.refusal for one in told.candidates}
        yield f"  on request {', '.join(impl for impl, why in refused.items() if why is None and impl != told.impl)}"
        yield from (f"  not {impl}: {why}" for impl, why in refused.items() if why is not None)


def _next(commands: Mapping[str, str]) -> Iterator[str]:
    for name, purpose in commands.items():
        yield f"python -m fusedonemoe {name:8s}{purpose}"
        if missing := [package for package in NEEDS.get(name, ()) if not is_installed(package)]:
            yield f"  needs {' and '.join(missing)}: {install_command(missing)}"


def overview(version: str, commands: Mapping[str, str]) -> str:
    """Return the text, in lines of at most 80 characters, from the version and the purpose of each command."""
    parts = {"Here": _here(), "Experts, in float32": _experts(), "Next": _next(commands)}
    lines = [f"FusedOneMoE {version}: mixture-of-experts blocks for PyTorch and torch.compile."]
    for title, part in parts.items():
        lines += ["", f"{title}:"]
        for line in part:
            indent = "  " + " " * (len(line) - len(line.lstrip()))
            wrapper = textwrap.TextWrapper(WIDTH, indent, f"{indent}  ", break_long_words=False, break_on_hyphens=False)
            lines += wrapper.wrap(line.lstrip())
    return "\n".join([*lines, "", CLOSE])
