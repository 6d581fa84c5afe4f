"""The layers under measurement: 32 experts of the small shape, or 16384 single neurons."""

import torch

from .subjects import SHAPES, SMOKE, present

LAYERS = ("MoE", "MoE-shared", "FusedOneMoE", "LoRAExperts", "QuantizedExperts", "FineGrainedMoE")
BACKEND = "aot_eager" if SMOKE else "inductor"
# A shared branch would only add plain matrix products to the same compiled block.
COMPILED = ("MoE", "FusedOneMoE", "LoRAExperts", "QuantizedExperts", "FineGrainedMoE")


def inputs(device, tokens=SHAPES["E32"][0]):
    """``[T, D]``, the same for every layer."""
    return torch.randn(tokens, SHAPES["E32"][1], generator=torch.Generator().manual_seed(0)).to(device)


def make(layer, device):
    """A layer by name, drawn from one seed."""
    _, D, F, E, K = SHAPES["E32"]
    torch.manual_seed(0)
    if layer == "FusedOneMoE":
        return present("FusedOneMoE")(D, F, E, is_sparse=True, topk=K).to(device)
    if layer == "FineGrainedMoE":
        return present("FineGrainedMoE")(D, 16384, 32, intermediate_size=F).to(device)
    shared = {"shared_intermediate_size": F} if layer == "MoE-shared" else {}
    moe = present("MoE")(hidden_size=D, intermediate_size=F, num_experts=E, top_k=K, **shared)
    if layer == "LoRAExperts":
        moe.experts = present("LoRAExperts")(moe.experts, r=8)
        with torch.no_grad():  # at its start, B = 0 lets no gradient reach A
            moe.experts.gate_up_lora_B.normal_(std=0.1)
            moe.experts.down_lora_B.normal_(std=0.1)
    if layer == "QuantizedExperts":
        moe.experts = present("QuantizedExperts").from_experts(moe.experts, "int8")
    return moe.to(device)


def output(result):
    """Return the output tensor from a layer's result."""
    return result if isinstance(result, torch.Tensor) else result[0]
