"""FusedOneMoE: the mixture-of-experts block for torch.compile-d models."""

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
