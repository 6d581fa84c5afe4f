"""The merged up-projection: ``experts_merged``, its backward, the compiled CPU kernels, the composite."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import dense, grouped
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.grouped import MergedNeeds
from fusedonemoe.ops.library.registration import (
    BUILD,
    composite,
    define_autocast,
    define_cpu,
    gpu_kernels,
    keeping,
    operator,
    wanted,
)
from fusedonemoe.ops.operands import check_rows, read_merged
from fusedonemoe.ops.shortcut import recorder, shortcut

_MERGED = "Tensor x, Tensor experts, Tensor weights, Tensor proj"


def _merged_cpu_fake(x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor) -> tuple[Tensor, ...]:
    order, offsets = (experts.new_empty(n, dtype=torch.int32) for n in (experts.numel(), proj.shape[0] + 1))
    return x.new_empty(x.shape[0], proj.shape[2]), order, offsets


define_cpu(f"experts_merged_cpu({_MERGED}) -> (Tensor, Tensor, Tensor)", native.experts_merged_checked, _merged_cpu_fake)
define_cpu(
    f"experts_merged_cpu_backward(Tensor dh, Tensor order, Tensor offsets, {_MERGED}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    native.experts_merged_backward,
    lambda *args: wanted(args[7], args[3], *args[5:7]),
)


def _experts_merged(
    x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor, build: int, impl: str = "grouped"
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(experts)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_merged_cpu(x, experts, weights, proj)
    kernels = gpu_kernels("merged") if impl == "triton" else grouped
    return kernels.experts_merged(x, experts, weights, proj)


def _experts_merged_backward(
    dh: Tensor,
    order: Tensor,
    offsets: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    proj: Tensor,
    needs: Sequence[bool],
    build: int,
    impl: str = "grouped",
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(experts)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_merged_cpu_backward(dh, order, offsets, x, experts, weights, proj, needs)
    kernels = gpu_kernels("merged") if impl == "triton" else grouped
    if impl == "triton":
        reader, (x, experts, weights, proj) = read_merged(x, experts, weights, proj, views=True)
        dh = reader.read("dh", dh, (x.shape[0], proj.shape[2]))
        order, offsets = reader.plan(order, offsets, experts, proj.shape[0])
    return kernels.experts_merged_backward(dh, order, offsets, x, experts, weights, proj, MergedNeeds(*needs))


def _experts_merged_dense(x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor, build: int) -> Tensor:
    return dense.experts_merged_dense(x, experts, weights, proj)


_experts_merged_save = keeping(tensors=4)


def _experts_merged_grad(ctx: Any, dh: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dh is None:
        return (None,) * 6
    needs = MergedNeeds(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
    grads = experts_merged_backward(dh, *ctx.saved_tensors, needs, BUILD, ctx.impl)
    dx, *rest = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *rest, None, None


operator("experts_merged_backward", _experts_merged_backward).register_autograd(no_second_derivative)
operator("experts_merged", _experts_merged).register_autograd(_experts_merged_grad, setup_context=_experts_merged_save)
composite("experts_merged_dense", _experts_merged_dense)
define_autocast("experts_merged_backward", casts=())
for _name in ("experts_merged", "experts_merged_dense"):
    define_autocast(_name, casts=(0, 3))

# What functional and the formulas above call: the operators, or the kernels themselves where nothing would notice.


def _merged(*args: Any) -> Any:
    return native.experts_merged(*args[:-2])  # without build and impl


def _merged_gradients(*args: Any) -> Any:
    return native.experts_merged_backward(*args[:-2])


experts_merged: Callable[..., Any] = shortcut(
    "experts_merged", _merged, 4, recorder("experts_merged", _merged, _experts_merged_grad, _experts_merged_save), impl="cpu"
)
experts_merged_backward: Callable[..., Any] = shortcut("experts_merged_backward", _merged_gradients, 7, impl="cpu")
