"""The modules: blocks, experts, routers, adapters and quantised experts."""

from fusedonemoe.layers.fine_grained import FineGrainedMoE, FineGrainedOutput
from fusedonemoe.layers.form import ExpertsForm
from fusedonemoe.layers.fused_one_moe import FusedOneMoE
from fusedonemoe.layers.lora import LoRAExperts, add_lora
from fusedonemoe.layers.moe import Experts, MoE, MoEOutput
from fusedonemoe.layers.quantization import QuantizationReport, QuantizedLayer, quantize_
from fusedonemoe.layers.quantized import QuantizedExperts
from fusedonemoe.layers.routers import ProductKeyRouter, RouterOutput, TopKRouter

__all__ = [
    "Experts",
    "ExpertsForm",
    "FineGrainedMoE",
    "FineGrainedOutput",
    "FusedOneMoE",
    "LoRAExperts",
    "MoE",
    "MoEOutput",
    "ProductKeyRouter",
    "QuantizationReport",
    "QuantizedExperts",
    "QuantizedLayer",
    "RouterOutput",
    "TopKRouter",
    "add_lora",
    "quantize_",
]
