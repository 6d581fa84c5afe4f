"""The parts of a block as operators that Dynamo does not look into.

Dynamo guards every function, module and constant that it traces, and checks the guards at each call, mostly in cold caches: for
a small block that took as long as its products. An operator is one guard. It decomposes behind Dynamo: AOTAutograd traces the
Python that eager calls run, and the graph that is compiled is the same. The forms of a router and of a block are strings,
because each field would be a guard. The experts alone are in :mod:`fusedonemoe.functional.experts`.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.checks import check_last_dim
from fusedonemoe.functional.calls import as_rows, records_gradients, with_leading
from fusedonemoe.functional.experts import run_experts
from fusedonemoe.functional.routing import route_by
from fusedonemoe.linear import routing_linear
from fusedonemoe.ops import library
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.records import Activation
from fusedonemoe.ops.rules import RouteRule, make_rule

Weights = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]


def run_block(x: Tensor, weights: Weights, rule: RouteRule, act: Activation, impl: str) -> Tensor | None:
    """Run a block as one operator of the compiled CPU kernels; None where it takes others, or an argument does not fit.

    ``weights`` are the router's weight, bias and selection bias, and the experts' two projections and their biases.
    """
    gate, gate_bias, selection_bias, up, down, up_bias, down_bias = weights
    dtype = x.dtype
    if (
        impl not in ("auto", "cpu")
        or x.device.type != "cpu"
        or up.device.type != "cpu"
        or (gate.dtype is not dtype and gate.dtype is not torch.float32)
        or up.dtype is not dtype
        or down.dtype is not dtype
        or up.dim() != 3
        or up.shape[0] < 1
        or (gate_bias is not None and gate_bias.shape != gate.shape[:1])
        or x.dim() < 1
        or x.shape[-1] != up.shape[2]
        or torch.is_autocast_enabled("cpu")
        or native.refusal(dtype, up.is_contiguous() and down.is_contiguous()) is not None
        or records_gradients(x, *weights)
    ):
        return None
    y = library.moe_inference(
        as_rows(x), gate, gate_bias, selection_bias, *rule, up, down, up_bias, down_bias, *act, library.BUILD
    )
    return with_leading(y, x)


def _route(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection_bias: Tensor | None, form: str, impl: str, build: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a linear router; ``form`` has the fields of its rule."""
    check_last_dim("x", x, weight.shape[1])
    logits = routing_linear(x, weight, bias)
    rule = make_rule(logits.shape[-1], selection_bias=selection_bias is not None, **json.loads(form))
    return logits, *route_by(rule, logits, selection_bias, impl)


def _block(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    selection_bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    rule_form: str,
    experts_form: str,
    build: int,
) -> Tensor:
    """Run a linear router without hooks and its experts: as one operator, if it can."""
    act, *rest = json.loads(experts_form)
    _, transposed, impl = rest
    weights = gate, gate_bias, selection_bias, up, down, up_bias, down_bias
    rule = make_rule(gate.shape[0], selection_bias=selection_bias is not None, **json.loads(rule_form))
    y = run_block(x, weights, rule, Activation(*act), impl) if not transposed else None
    if y is None:
        _, shares, experts = _route(x, gate, gate_bias, selection_bias, rule_form, "auto", build)
        y = run_experts(x, experts, shares, up, down, up_bias, down_bias, Activation(*act), *rest)
    return y


route_linear: Callable[..., Any] = library.register_transparent(
    "route_linear", "Tensor x, Tensor weight, Tensor? bias, Tensor? selection_bias, str form, str impl, int build", _route, 3
)
block_form: Callable[..., Any] = library.register_transparent(
    "block_form",
    "Tensor x, Tensor gate, Tensor? gate_bias, Tensor? selection_bias, Tensor up, Tensor down, Tensor? up_bias, "
    "Tensor? down_bias, str rule_form, str experts_form, int build",
    _block,
    1,
)
