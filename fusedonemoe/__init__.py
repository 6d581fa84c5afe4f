"""FusedOneMoE: the mixture-of-experts block for torch.compile-d models."""

import sys

from fusedonemoe import balance, functional, ops
from fusedonemoe.config import MoEConfig
from fusedonemoe.explanation import Explanation, explain
from fusedonemoe.layers import (
    Experts,
    ExpertsForm,
    FineGrainedMoE,
    FineGrainedOutput,
    FusedOneMoE,
    LoRAExperts,
    MoE,
    MoEOutput,
    ProductKeyRouter,
    QuantizationReport,
    QuantizedExperts,
    QuantizedLayer,
    RouterOutput,
    TopKRouter,
    add_lora,
    quantize_,
)
from fusedonemoe.tuning import Tuned, tune

__version__ = "0.1.0.dev0"

# The modules of these classes have moved into layers/. Programs import them by these names, and pickles hold the names.
for _name in ("fine_grained", "fused_one_moe", "lora", "quantization", "quantized", "routers"):
    globals()[_name] = sys.modules[f"{__name__}.{_name}"] = sys.modules[f"{__name__}.layers.{_name}"]

__all__ = [
    "Experts",
    "ExpertsForm",
    "Explanation",
    "FineGrainedMoE",
    "FineGrainedOutput",
    "FusedOneMoE",
    "LoRAExperts",
    "MoE",
    "MoEConfig",
    "MoEOutput",
    "ProductKeyRouter",
    "QuantizationReport",
    "QuantizedExperts",
    "QuantizedLayer",
    "RouterOutput",
    "TopKRouter",
    "Tuned",
    "__version__",
    "add_lora",
    "balance",
    "explain",
    "functional",
    "ops",
    "quantize_",
    "tune",
]
