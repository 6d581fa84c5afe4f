"""The operators of routing, merged projections, single neurons and value memory: a row each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import dense, grouped, neurons, product_keys, triton
from fusedonemoe.ops import route as routing
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.grouped import MergedNeeds
from fusedonemoe.ops.library import flops
from fusedonemoe.ops.library.registration import gpu_kernels, register, register_composite
from fusedonemoe.ops.library.rows import Compiled, Operator
from fusedonemoe.ops.library.signature import flags, record
from fusedonemoe.ops.neurons import NeuronNeeds, ValueNeeds
from fusedonemoe.ops.rules import RouteRule


def _refused_by_gpu(kernels: str, logits: Tensor, *sizes: Any) -> bool:
    """Return whether the router's Triton kernels in a module cannot take these logits."""
    if logits.device.type == "cpu" or triton.refusal(logits.dtype, logits.device.type):
        return True
    return gpu_kernels(kernels).refusal(logits.dtype, logits.shape[-1], *sizes) is not None


# Routing

_RULE = record(RouteRule)


def _choose_routing(logits: Tensor, selection_bias: Tensor | None, rule: RouteRule) -> str:
    """Return the implementation that routes."""
    if logits.device.type == "cpu":
        # An exported graph holds no kernel that is compiled for this machine.
        return "torch" if is_exporting() or native.refusal(logits.dtype, contiguous=True) else "cpu"
    return "torch" if _refused_by_gpu("routing", logits, rule.n_group) else "triton"


def _routing_fake(logits: Tensor, selection_bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], rule.top_k or logits.shape[1]
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


_LOGITS = "Tensor logits, Tensor? selection_bias"
route: Callable[..., Any] = register(
    Operator(
        name="route",
        arguments=(_LOGITS, _RULE),
        results=("weights", "experts"),
        choose=_choose_routing,
        kernels={"torch": (routing, "route"), "triton": ("routing", "route")},
        compiled=Compiled(fake=_routing_fake),
        backward=Operator(
            name="route_backward",
            arguments=("Tensor dweights, Tensor logits, Tensor experts", _RULE),
            gradients=("logits",),
            choose=lambda dweights, logits, experts, rule: _choose_routing(logits, None, rule),
            kernels={"torch": (routing, "route_backward"), "triton": ("routing", "route_backward")},
            compiled=Compiled(),
        ),
    )
)
register_composite("route_dense", (_LOGITS, _RULE), 2, (routing, "route"))


# Product keys


def _choose_product_keys(logits: Tensor, top_k: int | None) -> str:
    """Return who routes; the backward has no limit to ``top_k``, which is None."""
    return "torch" if _refused_by_gpu("product_keys", logits, top_k) else "triton"


_PAIRS = "Tensor logits, int top_k, bool norm_topk_prob"


def _route_product_key(logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    return product_keys.route_product_key(logits, top_k, norm_topk_prob, opaque=True)


route_product_key: Callable[..., Any] = register(
    Operator(
        name="route_product_key",
        arguments=(_PAIRS,),
        results=("weights", "experts"),
        choose=lambda logits, top_k, norm_topk_prob: _choose_product_keys(logits, top_k),
        kernels={"torch": _route_product_key, "triton": ("product_keys", "route_product_key")},
        backward=Operator(
            name="route_product_key_backward",
            arguments=("Tensor dweights, Tensor logits, Tensor experts, bool norm_topk_prob",),
            gradients=("logits",),
            choose=lambda dweights, logits, experts, norm_topk_prob: _choose_product_keys(logits, None),
            kernels={
                "torch": (product_keys, "route_product_key_backward"),
                "triton": ("product_keys", "route_product_key_backward"),
            },
        ),
    )
)
register_composite("route_product_key_dense", (_PAIRS,), 2, (product_keys, "route_product_key"))


# The merged projection

_MERGED = "Tensor x, Tensor experts, Tensor weights, Tensor proj"
_MERGED_CASTS = ("x", "proj")


def _merged_fake(x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor) -> tuple[Tensor, ...]:
    order, offsets = (experts.new_empty(n, dtype=torch.int32) for n in (experts.numel(), proj.shape[0] + 1))
    return x.new_empty(x.shape[0], proj.shape[2]), order, offsets


experts_merged: Callable[..., Any] = register(
    Operator(
        name="experts_merged",
        arguments=(_MERGED,),
        results=("h", "order", "offsets"),
        casts=_MERGED_CASTS,
        kernels={"grouped": (grouped, "experts_merged"), "triton": ("merged", "experts_merged")},
        compiled=Compiled(fake=_merged_fake),
        flops=flops.merged,
        backward=Operator(
            name="experts_merged_backward",
            arguments=("Tensor dh, Tensor order, Tensor offsets", _MERGED, flags(MergedNeeds)),
            gradients=("x", "weights", "proj"),
            kernels={"grouped": (grouped, "experts_merged_backward"), "triton": ("merged", "experts_merged_backward")},
            compiled=Compiled(),
            flops=flops.merged_backward,
        ),
    )
)
register_composite("experts_merged_dense", (_MERGED,), 1, (dense, "experts_merged_dense"), casts=_MERGED_CASTS)


# Single neurons, and value memory. A backward's slots name the row of a table's gradient of each routed row: sparse_tables.

_SLOTS = "Tensor? slots=None, int num_slots=0"
_NEURONS = "Tensor x, Tensor experts, Tensor weights, Tensor down, Tensor up, str activation"
_NEURONS_CASTS = ("x", "down", "up")
_VALUES = "Tensor experts, Tensor weights, Tensor table"
_VALUES_CASTS = ("table",)


NEURONS = Operator(
    name="experts_neurons",
    arguments=(_NEURONS,),
    results=("y", "s"),
    casts=_NEURONS_CASTS,
    kernels={"grouped": (neurons, "experts_neurons"), "triton": ("neurons", "experts_neurons")},
    compiled=Compiled(fake=lambda x, experts, *_: (x.new_empty(x.shape), x.new_empty(experts.shape, dtype=torch.float32))),
    flops=flops.neurons,
    backward=Operator(
        name="experts_neurons_backward",
        arguments=("Tensor dy, Tensor s", _NEURONS, flags(NeuronNeeds)),
        optional=_SLOTS,
        gradients=("x", "weights", "down", "up"),
        kernels={"grouped": (neurons, "experts_neurons_backward"), "triton": ("neurons", "experts_neurons_backward")},
        compiled=Compiled(),
        slotted=("down", "up"),
        flops=flops.neurons_backward,
    ),
)
experts_neurons: Callable[..., Any] = register(NEURONS)
register_composite("experts_neurons_dense", (_NEURONS,), 1, (neurons, "experts_neurons_dense"), casts=_NEURONS_CASTS)

VALUES = Operator(
    name="experts_values",
    arguments=(_VALUES,),
    results=("y",),
    casts=_VALUES_CASTS,
    kernels={"grouped": (neurons, "experts_values"), "triton": ("neurons", "experts_values")},
    compiled=Compiled(fake=lambda experts, weights, table: table.new_empty(experts.shape[0], table.shape[1])),
    flops=flops.neurons,
    backward=Operator(
        name="experts_values_backward",
        arguments=("Tensor dy", _VALUES, flags(ValueNeeds)),
        optional=_SLOTS,
        gradients=("weights", "table"),
        kernels={"grouped": (neurons, "experts_values_backward"), "triton": ("neurons", "experts_values_backward")},
        compiled=Compiled(),
        slotted=("table",),
        flops=flops.neurons_backward,
    ),
)
experts_values: Callable[..., Any] = register(VALUES)
register_composite("experts_values_dense", (_VALUES,), 1, (neurons, "experts_values_dense"), casts=_VALUES_CASTS)
