"""The numbers of the prefill kernels on sm90, which ``recorded.json`` holds to: a proxy for their speed, without a GPU.

    python -m tests.triton.compiled.record            prints them, with what is on record
    python -m tests.triton.compiled.record --write    puts those of the installed triton on record

Write when a change of the numbers is meant, once with each version of triton that is on record.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import triton

from tests.triton.compiled.layers import launches
from tests.triton.compiled.machine_code import examine

FILE = Path(__file__).with_name("recorded.json")
ARCH, DTYPE, ROWS = "sm90", "bf16", "many"
LAYERS = ("qwen3", "gpt_oss")

Numbers = dict[str, int]


def measure(layer: str, cache: Path | None = None) -> dict[str, Numbers]:
    """The numbers of each kernel of a layer that multiplies matrices; one launched in several ways has a number behind it."""
    numbers = {}
    seen: Counter[str] = Counter()
    for launch in launches(ARCH, layer, DTYPE, ROWS):
        report = examine(launch, ARCH, cache)
        if not report.dots:
            continue
        seen[launch.name] += 1
        name = launch.name if seen[launch.name] == 1 else f"{launch.name} {seen[launch.name]}"
        numbers[name] = {
            "registers": report.registers,
            "spill_bytes": report.spill_bytes,
            "loop_instructions": report.loop_instructions,
            "wgmma_in_flight": report.in_flight or 0,
        }
    return numbers


def recorded() -> dict[str, dict[str, dict[str, Numbers]]]:
    """Numbers by triton's version, layer and kernel."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def main(write: bool) -> None:
    """Print the numbers, and write them down if asked."""
    everything = recorded()
    before = everything.get(triton.__version__, {})
    now = {layer: measure(layer) for layer in LAYERS}
    for layer, kernels in now.items():
        for kernel, numbers in kernels.items():
            print(layer, kernel, numbers, "on record:", before.get(layer, {}).get(kernel))
    if write:
        everything[triton.__version__] = now
        FILE.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
