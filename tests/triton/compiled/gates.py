"""What the machine code of every shipped configuration must be like."""

from tests.triton.compiled.machine_code import Report
from tests.triton.fake_gpu import SHARED_BYTES, Launch


def widens(launch: Launch) -> bool:
    """Whether a kernel's weights pass through registers into one shared buffer, which the product must let go of."""
    return launch.name == "quantized_rows_kernel"


def programs_at_once(launch: Launch, report: Report) -> int:
    """How many programs a Hopper's multiprocessor has registers and shared memory for."""
    threads = 32 * launch.options.num_warps
    registers = -(-report.registers // 8) * 8 * threads
    return min(65_536 // registers, 233_472 // (report.shared_bytes + 1024))


def problems(launch: Launch, report: Report, arch: str, *, aligned: bool = True) -> list[str]:
    """What is wrong with a launch's machine code, in words; nothing when all is well.

    Args:
        launch: what was compiled.
        report: what came out.
        arch: the target.
        aligned: whether all row lengths are multiples of 16 bytes; without that only what would fail at launch is wrong.
    """
    found = []
    if report.shared_bytes > SHARED_BYTES[arch]:
        found.append(f"{report.shared_bytes} bytes of shared memory, {SHARED_BYTES[arch]} are to be had")
    if aligned:
        if arch in ("sm80", "sm90") and report.spill_bytes:
            found.append(f"spills {report.spill_bytes} bytes at {report.registers} registers")
        if report.dots and arch != "gfx942" and not report.async_copies:
            found.append("copies nothing asynchronously")
        if report.is_half() and not report.matrix_ops:
            found.append("uses no matrix instruction")
        if arch == "sm90" and report.wants_wgmma():
            if set(report.matrix_ops) != {"HGMMA"}:
                found.append(f"uses {report.matrix_ops}, not wgmma")
            elif not report.in_flight and not (widens(launch) and programs_at_once(launch, report) >= 2):
                found.append("waits for its wgmma in every iteration, and nothing fills the wait")
    found += [f"ptxas: {warning}" for warning in report.warnings]
    return [f"{arch} {launch}: {problem}" for problem in found]
