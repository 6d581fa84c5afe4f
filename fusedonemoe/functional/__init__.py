"""Public functions: validate once, choose the implementation, call the operator."""

from fusedonemoe.functional.experts import experts_merged, experts_mlp, experts_mlp_lora, stack_gate_up
from fusedonemoe.functional.neurons import experts_neurons, experts_values
from fusedonemoe.functional.packed import PackedExperts, pack_experts
from fusedonemoe.functional.quantized import dequantize_weight, experts_mlp_quantized, quantize_weight
from fusedonemoe.functional.routing import apply_capacity, plan, route, route_product_key, tokens_per_expert
from fusedonemoe.functional.variants import TopKSoftmax, route_top_p, route_with_shared, topk_softmax
from fusedonemoe.ops.formats import QuantizedWeight
from fusedonemoe.ops.plan import Plan
from fusedonemoe.ops.rules import RouteOptions

__all__ = [
    "PackedExperts",
    "Plan",
    "QuantizedWeight",
    "RouteOptions",
    "TopKSoftmax",
    "apply_capacity",
    "dequantize_weight",
    "experts_merged",
    "experts_mlp",
    "experts_mlp_lora",
    "experts_mlp_quantized",
    "experts_neurons",
    "experts_values",
    "pack_experts",
    "plan",
    "quantize_weight",
    "route",
    "route_product_key",
    "route_top_p",
    "route_with_shared",
    "stack_gate_up",
    "tokens_per_expert",
    "topk_softmax",
]
