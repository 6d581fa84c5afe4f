"""The MLP over quantised weights: ``experts_mlp_quantized``, its backward, the compiled CPU kernels, the composite."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import dense
from fusedonemoe.ops.cpu import mlp as cpu
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.library.mlp import ACT, as_backward, as_call, forward_fake, gradients_of, kernels_of
from fusedonemoe.ops.library.registration import (
    BUILD,
    composite,
    define_autocast,
    define_cpu,
    keeping,
    operator,
    wanted,
)
from fusedonemoe.ops.operands import check_rows
from fusedonemoe.ops.records import QUANTIZED_ARGUMENTS, SavedRows
from fusedonemoe.ops.shortcut import recorder, shortcut

_WEIGHT = "Tensor {0}, Tensor {0}_scale, Tensor? {0}_zero"
_MLP = f"Tensor x, Tensor experts, Tensor weights, {_WEIGHT.format('up')}, {_WEIGHT.format('down')}"
_MLP += ", Tensor? up_bias, Tensor? down_bias"
_TENSORS = 11  # of _MLP


_forward_kernel, _backward_kernel = as_call(QUANTIZED_ARGUMENTS, cpu.experts_mlp), as_backward(QUANTIZED_ARGUMENTS)

define_cpu(
    f"experts_mlp_quantized_cpu({_MLP}, {ACT}, int save_percent) -> (Tensor, Tensor, Tensor, Tensor)",
    as_call(QUANTIZED_ARGUMENTS, cpu.experts_mlp_checked),
    forward_fake,
)
define_cpu(
    f"experts_mlp_quantized_cpu_backward(Tensor dy, Tensor z, Tensor order, Tensor offsets, {_MLP}, {ACT}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    lambda *args: wanted(args[-1], args[4], args[6], *args[13:15]),
)


def _experts_mlp(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
    save_percent: int,
    build: int,
    impl: str = "grouped",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rows(experts)
    act = (activation, layout, alpha, limit)
    arguments = (x, experts, weights, up, up_scale, up_zero, down, down_scale, down_zero, up_bias, down_bias, *act, save_percent)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_mlp_quantized_cpu(*arguments)
    return kernels_of(impl).experts_mlp(QUANTIZED_ARGUMENTS.call(arguments), save_percent)


def _experts_mlp_backward(
    dy: Tensor,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
    save_percent: int,
    needs: Sequence[bool],
    build: int,
    impl: str = "grouped",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rows(experts)
    act = (activation, layout, alpha, limit)
    arguments = (x, experts, weights, up, up_scale, up_zero, down, down_scale, down_zero, up_bias, down_bias, *act)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_mlp_quantized_cpu_backward(dy, z, order, offsets, *arguments, needs)
    return gradients_of(QUANTIZED_ARGUMENTS, impl, dy, SavedRows(z, order, offsets), arguments, save_percent, needs)


def _experts_mlp_dense(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
    build: int,
) -> Tensor:
    weight_tensors = (up, up_scale, up_zero, down, down_scale, down_zero)
    act = (activation, layout, alpha, limit)
    arguments = (x, experts, weights, *weight_tensors, up_bias, down_bias, *act)
    return dense.experts_mlp_dense(QUANTIZED_ARGUMENTS.call(arguments))


_save = keeping(_TENSORS)


def _gradient(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    if dy is None:
        return (None,) * count
    needed = ctx.needs_input_grad
    if needed[4] or needed[7]:
        raise RuntimeError("quantised weights have no gradient: their scales must not require one")
    needs = (needed[0], needed[2], *needed[9:11])
    grads = experts_mlp_quantized_backward(dy, *ctx.saved_tensors, *ctx.constants, needs, BUILD, ctx.impl)
    dx, dweights, *biases = (grad if wants else None for grad, wants in zip(grads, needs, strict=True))
    return dx, None, dweights, *(None for _ in range(6)), *biases, *(None for _ in range(count - _TENSORS))


operator("experts_mlp_quantized_backward", _experts_mlp_backward).register_autograd(no_second_derivative)
operator("experts_mlp_quantized", _experts_mlp).register_autograd(_gradient, setup_context=_save)
composite("experts_mlp_quantized_dense", _experts_mlp_dense)
define_autocast("experts_mlp_quantized_backward", casts=())
for _name in ("experts_mlp_quantized", "experts_mlp_quantized_dense"):
    define_autocast(_name, casts=(0, 9, 10))

# What functional and the formulas above call: the operators, or the kernels themselves where nothing would notice.


def _kernel(*args: Any) -> Any:
    return _forward_kernel(*args[:-2])  # without build and impl


def _gradients(*args: Any) -> Any:
    return _backward_kernel(*args[:19], args[20])  # without save_percent as well


experts_mlp_quantized: Callable[..., Any] = shortcut(
    "experts_mlp_quantized", _kernel, _TENSORS, recorder("experts_mlp_quantized", _kernel, _gradient, _save), impl="cpu"
)
experts_mlp_quantized_backward: Callable[..., Any] = shortcut(
    "experts_mlp_quantized_backward", _gradients, _TENSORS + 4, impl="cpu"
)
