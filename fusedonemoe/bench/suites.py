"""The suites by name: what each measures, the module that runs it, and the options it takes. Another suite is one line."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """One entry.

    Attributes:
        module: below ``fusedonemoe.bench``, imported when the suite is asked for; it has ``run(args) -> int``.
        purpose: a line of ``--help``.
        options: what it takes beside ``--json``, ``--threads`` and ``--no-rt``.
    """

    module: str
    purpose: str
    options: frozenset[str]


# What `session.run_cells` gives to every suite.
_CELLS = frozenset({"cells", "resume", "compare", "minutes"})
_PEERS = _CELLS | {"peers", "picture"}

REGISTRY: dict[str, Suite] = {
    "quick": Suite("cell_suite", "the block and the original's up-projection at 32, 128 and 1024 experts", _PEERS),
    "cpu": Suite("cell_suite", "the block of published models, forward and training, beside everyone on CPUs", _PEERS),
    "fine-grained": Suite("cell_suite", "product keys, single-neuron experts and value memory", _PEERS),
    "gpu": Suite("gpu_suite", "expert layers of published models on a GPU", _PEERS | {"dry"}),
    "seeds": Suite("seed_suite", "the tables of FusedOneMoE, candle-moe, MoMoE, MoeKernel and FlashMoE", _PEERS | {"dry"}),
    "serving": Suite("serving", "requests to a compiled model, one by one and at once", _CELLS | {"peers", "dry", "targets"}),
    "memory": Suite("dial", "bytes that a training step holds and reaches at each save_percent", _CELLS | {"dry"}),
    "quantized": Suite("quantized", "8- and 4-bit expert weights beside bfloat16, and what the rounding costs", _CELLS),
    "lora": Suite("lora", "a training step of adapters on experts, beside PEFT's", _CELLS),
    "transformers": Suite("hf_model", "a whole model of transformers, with its experts and with ours", _CELLS),
    "dial": Suite("dial", "the one table of it that README promises", _CELLS),
}
