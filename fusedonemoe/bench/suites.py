"""The suites by name: the module that runs each, its purpose, and the options it takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """One entry."""

    module: str  # imported when the suite is asked for; it has ``run(args) -> int``
    purpose: str  # a line of ``--help``
    options: frozenset[str]  # that it takes in addition to ``--json``, ``--threads`` and ``--no-rt``


# `session.run_cells` gives these to every suite.
CELLS = frozenset({"cells", "resume", "compare", "minutes"})
PEERS = CELLS | {"peers", "picture"}

REGISTRY: dict[str, Suite] = {
    "quick": Suite("fusedonemoe.bench.cell_suite", "the block and the original's up-projection at 32 to 1024 experts", PEERS),
    "cpu": Suite("fusedonemoe.bench.cell_suite", "the block of published models, forward and training, and CPU peers", PEERS),
    "gpu": Suite("fusedonemoe.bench.cell_suite", "expert layers of published models on a GPU", PEERS | {"dry"}),
    "quantized": Suite("fusedonemoe.bench.cell_suite", "8- and 4-bit expert weights and bfloat16, and the rounding error", CELLS),
}
# Suites that only this project needs. They are in its repository, not in the wheel.
IN_THE_REPOSITORY = ("seeds", "serving", "memory", "dial", "lora", "transformers", "fine-grained")
