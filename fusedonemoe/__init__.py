"""FusedOneMoE: the mixture-of-experts block for torch.compile-d models."""

from fusedonemoe import balance, functional, ops
from fusedonemoe.config import MoEConfig
from fusedonemoe.explanation import Explanation, explain
from fusedonemoe.fine_grained import FineGrainedMoE, FineGrainedOutput
from fusedonemoe.fused_one_moe import FusedOneMoE
from fusedonemoe.layers import Experts, MoE, MoEOutput
from fusedonemoe.lora import ExpertsForm, LoRAExperts, add_lora
from fusedonemoe.quantization import QuantizationReport, QuantizedLayer, quantize_
from fusedonemoe.quantized import QuantizedExperts
from fusedonemoe.routers import ProductKeyRouter, RouterOutput, TopKRouter
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
