"""Product keys: ``route_product_key``, its backward, and the composite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import product_keys, triton
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.library.registration import (
    composite,
    define_autocast,
    define_cpu,
    gpu_kernels,
    operator,
)
from fusedonemoe.ops.shortcut import recorder, shortcut


def _gpu_routing(logits: Tensor, top_k: int | None) -> Any:
    """The Triton kernels, where they can take these logits on a GPU; ``top_k`` None asks for the backward."""
    if logits.device.type == "cpu" or triton.refusal(logits.dtype, logits.device.type):
        return None
    kernels = gpu_kernels("product_keys")
    return None if kernels.refusal(logits.dtype, logits.shape[-1], top_k) else kernels


def _select_fake(logits: Tensor, k: int) -> Tensor:
    return logits.new_empty((logits.shape[0], k), dtype=torch.int64)


# Opaque on CPU: rows without ties, which are nearly all, are done sooner than the others.
define_cpu("select_product_keys(Tensor logits, SymInt k) -> Tensor", product_keys.select_pairs_on_cpu, _select_fake)


def _route_body(opaque: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def body(logits: Tensor, top_k: int, norm_topk_prob: bool, build: int) -> tuple[Tensor, Tensor]:
        if opaque and (kernels := _gpu_routing(logits, top_k)):
            return kernels.route_product_key(logits, top_k, norm_topk_prob)
        return product_keys.route_product_key(logits, top_k, norm_topk_prob, opaque)

    return body


_route, _route_dense = _route_body(opaque=True), _route_body(opaque=False)


def _route_backward(dweights: Tensor, logits: Tensor, experts: Tensor, norm_topk_prob: bool, build: int) -> Tensor:
    kernels = _gpu_routing(logits, None) or product_keys
    # In one order of memory, whatever a saved-tensor hook returned: sums over other strides may round in another order.
    return kernels.route_product_key_backward(dweights, logits.contiguous(), experts.contiguous(), norm_topk_prob)


def _route_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.norm_topk_prob, ctx.build = inputs
    ctx.save_for_backward(logits, output[1])


def _route_grad(ctx: Any, dweights: Tensor, _: Any) -> tuple[Any, ...]:
    return route_product_key_backward(dweights, *ctx.saved_tensors, ctx.norm_topk_prob, ctx.build), None, None, None


operator("route_product_key_backward", _route_backward).register_autograd(no_second_derivative)
operator("route_product_key", _route).register_autograd(_route_grad, setup_context=_route_save)
composite("route_product_key_dense", _route_dense)
for _name in ("route_product_key", "route_product_key_backward", "route_product_key_dense"):
    define_autocast(_name, casts=())

# What functional and the formulas above call: the operators, or the kernels themselves where nothing would notice.
_record = recorder("route_product_key", _route, _route_grad, _route_save)
route_product_key: Callable[..., Any] = shortcut("route_product_key", _route, 1, _record)
route_product_key_backward: Callable[..., Any] = shortcut("route_product_key_backward", _route_backward, 3)
