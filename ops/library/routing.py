"""Routing: ``route``, its backward, and the composite."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fusedonemoe.ops import route as routing
from fusedonemoe.ops import triton
from fusedonemoe.ops.library.registration import composite, define_autocast, gpu_kernels, no_second_derivative, operator
from fusedonemoe.ops.route import RouteRule
from fusedonemoe.ops.shortcut import recorder, shortcut


def _gpu_routing(logits: Tensor, n_group: int) -> Any:
    """The Triton kernels of the router, where they can take these logits on a GPU."""
    if logits.device.type == "cpu" or triton.refusal(logits.dtype, logits.device.type):
        return None
    kernels = gpu_kernels("routing")
    return None if kernels.refusal(logits.dtype, logits.shape[-1], n_group) else kernels


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
        return routing.route(logits, selection_bias, rule, opaque)

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
route: Callable[..., Any] = shortcut("route", _route, 2, recorder("route", _route, _route_grad, _route_save))
route_backward: Callable[..., Any] = shortcut("route_backward", _route_backward, 3)
