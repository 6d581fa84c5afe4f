"""What the machine code of a launch looks like: registers, spills, shared memory, matrix instructions, the inner loop.

Needs no GPU: ptxas, cuobjdump and AMD's linker stand inside the triton wheel.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.compiler import ASTSource

from tests.triton.fake_gpu import TARGETS, Launch

NVIDIA_MATRIX = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA")
NVIDIA_ASYNC = ("LDGSTS", "UTMALDG")
HALF = ("bf16", "f16")
READER = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=6).hexdigest()  # an edit of this file reads all anew


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found in one kernel's machine code.

    Attributes:
        registers: per thread.
        spill_bytes: stored to and loaded from local memory, together.
        shared_bytes: of one program.
        dots: operand dtype and result shape of every ``tl.dot`` in the source; without any, Nvidia's instructions are not read.
        matrix_ops: matrix instructions and how many there are.
        async_copies: instructions that copy global memory to shared memory without registers.
        loop_instructions: of the innermost loop with matrix instructions; 0 where there is none.
        in_flight: wgmma groups still running when an iteration of that loop ends; None without wgmma.
        warnings: what ptxas said.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    dots: list[tuple[str, int, int]]
    matrix_ops: dict[str, int]
    async_copies: int
    loop_instructions: int
    in_flight: int | None
    warnings: list[str]

    def is_half(self) -> bool:
        """Whether the kernel multiplies matrices, all of them in half precision."""
        return bool(self.dots) and all(dtype in HALF for dtype, *_ in self.dots)

    def wants_wgmma(self) -> bool:
        """Whether a Hopper should run all dots of the kernel as wgmma: half precision, at least 64 rows.

        A product of 16 columns, into an adapter's narrow space, waits for memory whatever multiplies it.
        """
        return self.is_half() and all(rows >= 64 and columns > 16 for _, rows, columns in self.dots)


def _dots(ttir: str) -> list[tuple[str, int, int]]:
    found = re.findall(r"tt\.dot .*: tensor<\d+x\d+x(\w+)> \* .* -> tensor<(\d+)x(\d+)x", ttir)
    return [(dtype, int(rows), int(columns)) for dtype, rows, columns in found]


def _innermost(bodies: list[list[str]], is_matrix: Callable[[str], bool]) -> list[str]:
    """The shortest loop with a matrix instruction in it; each instruction as its first word."""
    return min((body for body in bodies if any(map(is_matrix, body))), key=len, default=[])


def _sass(cubin: bytes) -> list[tuple[int, str]]:
    """Addresses and instructions, without those that are predicated off, which only pad."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?(.*?);", text, re.MULTILINE)
    return [(int(address, 16), instruction) for address, predicate, instruction in found if predicate not in ("@!PT", "@!UPT")]


def _nvidia(compiled: Any, log: str, multiplies: bool) -> dict[str, Any]:
    # The disassembler takes as long to start as most kernels to compile, and nothing is asked of other kernels' instructions.
    instructions = _sass(compiled.asm["cubin"]) if multiplies else []
    opcode = {address: text.split()[0].split(".")[0] for address, text in instructions}
    counts = Counter(opcode.values())
    bodies = []
    for address, text in instructions:
        target = re.search(r"0x([0-9a-f]+)", text)
        if opcode[address] == "BRA" and target and (start := int(target[1], 16)) < address:
            bodies.append([inside for at, inside in instructions if start <= at <= address and opcode[at] != "NOP"])
    loop = _innermost(bodies, lambda text: text.split()[0].split(".")[0] in NVIDIA_MATRIX)
    waits = [int(wait, 16) for wait in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", "\n".join(loop))]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert registers, f"ptxas said nothing of registers: {log}"
    return {
        "registers": int(registers[1]),
        "spill_bytes": sum(map(int, spills)),
        "shared_bytes": compiled.metadata.shared,
        "matrix_ops": {name: counts[name] for name in NVIDIA_MATRIX if counts[name]},
        "async_copies": sum(counts[name] for name in NVIDIA_ASYNC),
        "loop_instructions": len(loop),
        "in_flight": min(waits, default=None),
        "warnings": sorted(set(re.findall(r".*(?:warning|C7\d\d\d).*", log))),
    }


def _amd(compiled: Any, log: str, multiplies: bool) -> dict[str, Any]:
    lines = compiled.asm["amdgcn"].splitlines()

    def fact(name: str) -> int:
        return next((int(found[1]) for line in lines if (found := re.match(rf"\s+\.{name}:\s+(\d+)", line))), 0)

    def code(start: int, end: int) -> list[str]:
        return [line.strip() for line in lines[start:end] if re.match(r"^\s+[a-z]", line)]

    labels = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"^(\.LBB\w+):", line))}
    bodies = []
    for at, line in enumerate(lines):
        found = re.match(r"\s+s_c?branch\S*\s+(\.LBB\w+)", line)
        if found and labels.get(found[1], at) < at:
            bodies.append(code(labels[found[1]], at + 1))
    counts = Counter(instruction.split()[0] for instruction in code(0, len(lines)))
    return {
        "registers": fact("vgpr_count"),
        "spill_bytes": 4 * (fact("vgpr_spill_count") + fact("sgpr_spill_count")),
        "shared_bytes": max(compiled.metadata.shared, fact("group_segment_fixed_size")),
        "matrix_ops": {name: count for name, count in counts.items() if "mfma" in name},
        "async_copies": sum(count for name, count in counts.items() if "_lds_" in name and "load" in name),
        "loop_instructions": len(_innermost(bodies, lambda text: "mfma" in text)),
        "in_flight": None,
        "warnings": [],
    }


def compile_report(launch: Launch, arch: str) -> Report:
    """Compile a launch for ``arch`` and read its machine code."""
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # ptxas speaks only when it runs
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=TARGETS[arch], options=launch.options.__dict__)
    read = _nvidia if TARGETS[arch].backend == "cuda" else _amd
    dots = _dots(compiled.asm["ttir"])
    return Report(dots=dots, **read(compiled, log.getvalue(), bool(dots)))


def examine(launch: Launch, arch: str, cache: Path | None = None) -> Report:
    """:func:`compile_report`, remembered in the folder ``cache`` under everything that decides the machine code."""
    if cache is None:
        return compile_report(launch, arch)
    file = cache / f"{launch.name}-{arch}-{triton.__version__}-{launch.key}-{READER}.json"
    if not file.exists():
        report = compile_report(launch, arch)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as temporary:
            json.dump(dataclasses.asdict(report), temporary)
        Path(temporary.name).replace(file)  # whole or not at all, for workers side by side
    return Report(**json.loads(file.read_text(encoding="utf-8")))
