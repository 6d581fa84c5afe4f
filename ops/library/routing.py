"""Routing: ``route``, its backward, and the composite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import route as routing
from fusedonemoe.ops import triton
from fusedonemoe.ops.cpu import routing as cpu_routing
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.library.registration import (
    composite,
    define_autocast,
    define_cpu,
    gpu_kernels,
    operator,
)
from fusedonemoe.ops.records import RouteRule
from fusedonemoe.ops.shortcut import recorder, shortcut


def _gpu_routing(logits: Tensor, n_group: int) -> Any:
    """The Triton kernels of the router, where they can take these logits on a GPU."""
    if logits.device.type == "cpu" or triton.refusal(logits.dtype, logits.device.type):
        return None
    kernels = gpu_kernels("routing")
    return None if kernels.refusal(logits.dtype, logits.shape[-1], n_group) else kernels


_RULE = (
    "int top_k, str scoring, bool score_first, bool norm_topk_prob, float scale, int n_group, int topk_group, str group_score,"
    " float norm_eps"
)


def _route_cpu(logits: Tensor, selection_bias: Tensor | None, *rule: Any) -> tuple[Tensor, Tensor]:
    return cpu_routing.route(logits, selection_bias, RouteRule(*rule))


def _route_cpu_checked(logits: Tensor, selection_bias: Tensor | None, *rule: Any) -> tuple[Tensor, Tensor]:
    return cpu_routing.route_checked(logits, selection_bias, RouteRule(*rule))


def _route_cpu_fake(logits: Tensor, selection_bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], top_k or logits.shape[1]
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _route_cpu_backward(dweights: Tensor, logits: Tensor, experts: Tensor, *rule: Any) -> Tensor:
    return cpu_routing.route_backward(dweights, logits, experts, RouteRule(*rule))


define_cpu(f"route_cpu(Tensor logits, Tensor? selection_bias, {_RULE}) -> (Tensor, Tensor)", _route_cpu_checked, _route_cpu_fake)
define_cpu(
    f"route_cpu_backward(Tensor dweights, Tensor logits, Tensor experts, {_RULE}) -> Tensor",
    _route_cpu_backward,
    lambda dweights, logits, *_: logits.new_empty(logits.shape),
)


def _on_cpu(logits: Tensor) -> bool:
    """Whether the compiled kernels route these logits; a graph that is exported keeps to torch's own operators."""
    return logits.device.type == "cpu" and not torch.compiler.is_exporting() and cpu_routing.refusal(logits.dtype) is None


def _route_body(opaque: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def body(
        logits: Tensor,
        selection_bias: Tensor | None,
        top_k: int,
        scoring: str,
        score_first: bool,
        norm_topk_prob: bool,
        scale: float,
        n_group: int,
        topk_group: int,
        group_score: str,
        norm_eps: float,
        build: int,
    ) -> tuple[Tensor, Tensor]:
        rule = RouteRule(top_k, scoring, score_first, norm_topk_prob, scale, n_group, topk_group, group_score, norm_eps)
        if opaque and (kernels := _gpu_routing(logits, n_group)):
            return kernels.route(logits, selection_bias, rule)
        if opaque and _on_cpu(logits):
            return torch.ops.fusedonemoe.route_cpu.default(logits, selection_bias, *rule)
        return routing.route(logits, selection_bias, rule)

    return body


_route, _route_dense = _route_body(opaque=True), _route_body(opaque=False)


def _route_backward(
    dweights: Tensor,
    logits: Tensor,
    experts: Tensor,
    top_k: int,
    scoring: str,
    score_first: bool,
    norm_topk_prob: bool,
    scale: float,
    n_group: int,
    topk_group: int,
    group_score: str,
    norm_eps: float,
    build: int,
) -> Tensor:
    rule = RouteRule(top_k, scoring, score_first, norm_topk_prob, scale, n_group, topk_group, group_score, norm_eps)
    if _on_cpu(logits):
        return torch.ops.fusedonemoe.route_cpu_backward.default(dweights, logits, experts, *rule)
    kernels = _gpu_routing(logits, n_group) or routing
    return kernels.route_backward(dweights, logits, experts, rule)


def _route_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.rule = inputs[2:]


def _route_grad(ctx: Any, dweights: Tensor, _: Any) -> tuple[Any, ...]:
    logits, experts = ctx.saved_tensors
    dlogits = route_backward(dweights, logits, experts, *ctx.rule)
    return dlogits, *(None for _ in range(1 + len(ctx.rule)))


operator("route_backward", _route_backward).register_autograd(no_second_derivative)
operator("route", _route).register_autograd(_route_grad, setup_context=_route_save)
composite("route_dense", _route_dense)
for _name in ("route", "route_backward", "route_dense"):
    define_autocast(_name, casts=())

# What functional and the formulas above call: the operators, or the kernels themselves where nothing would notice.


def _route_directly(*args: Any) -> tuple[Tensor, Tensor]:
    return _route_cpu(*args[:-1]) if _on_cpu(args[0]) else _route(*args)  # the kernel does without build


def _route_backward_directly(*args: Any) -> Tensor:
    return _route_cpu_backward(*args[:-1]) if _on_cpu(args[1]) else _route_backward(*args)


route: Callable[..., Any] = shortcut("route", _route_directly, 2, recorder("route", _route_directly, _route_grad, _route_save))
route_backward: Callable[..., Any] = shortcut("route_backward", _route_backward_directly, 3)
