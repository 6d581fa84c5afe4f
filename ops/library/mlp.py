"""The gated and the plain MLP: ``experts_mlp``, its backward, its inference forms, the compiled CPU kernels, the composite."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import dense, mlp
from fusedonemoe.ops.cpu import mlp as cpu
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.grouped import saved_rows
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
from fusedonemoe.ops.operands import check_rows, reader_of
from fusedonemoe.ops.records import MLP_ARGUMENTS, ExpertsArguments, SavedRows
from fusedonemoe.ops.shortcut import recorder, shortcut
from fusedonemoe.ops.triton import rules

_MLP = "Tensor x, Tensor experts, Tensor weights, Tensor up_proj, Tensor down_proj, Tensor? up_bias, Tensor? down_bias"
ACT = "str activation, str layout, float alpha, float limit"


def as_call(arguments: ExpertsArguments, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``kernel``, of a call and what is behind it, as a function of a flat argument list."""
    count = len(arguments.arguments)
    return lambda *args: kernel(arguments.call(args), *args[count:])


def as_backward(arguments: ExpertsArguments) -> Callable[..., Any]:
    """Return the backward of the CPU kernels as a function of a flat argument list."""

    def backward(dy: Tensor, z: Tensor, order: Tensor, offsets: Tensor, *args: Any) -> Any:
        *_, needs = args
        call, wanted = arguments.call(args), arguments.needs(needs)
        return arguments.results(cpu.experts_mlp_backward(dy, SavedRows(z, order, offsets), call, wanted), call.x)

    return backward


def forward_fake(*args: Any) -> tuple[Tensor, ...]:
    """What the kernels of a forward allocate; of the up-projection ``[E, G, .]`` only E and G matter."""
    x, experts, _, up_proj, *_, save_percent = args
    N = experts.numel()
    z = x.new_empty(saved_rows(N, save_percent), up_proj.shape[1])
    order, offsets = (experts.new_empty(n, dtype=torch.int32) for n in (N, up_proj.shape[0] + 1))
    return x.new_empty(x.shape), z, order, offsets


_mlp_kernel, _mlp_output_kernel = as_call(MLP_ARGUMENTS, cpu.experts_mlp), as_call(MLP_ARGUMENTS, cpu.experts_mlp_output)
_mlp_backward_kernel = as_backward(MLP_ARGUMENTS)

define_cpu(
    f"experts_mlp_cpu({_MLP}, {ACT}, int save_percent) -> (Tensor, Tensor, Tensor, Tensor)",
    as_call(MLP_ARGUMENTS, cpu.experts_mlp_checked),
    forward_fake,
)
define_cpu(
    f"experts_mlp_cpu_backward(Tensor dy, Tensor z, Tensor order, Tensor offsets, {_MLP}, {ACT}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mlp_backward_kernel,
    lambda *args: wanted(args[15], args[4], *args[6:11]),
)


def kernels_of(impl: str) -> Any:
    """Return the module of an implementation other than the CPU kernels."""
    return gpu_kernels("mlp") if impl == "triton" else mlp


def gradients_of(
    arguments: ExpertsArguments,
    impl: str,
    dy: Tensor,
    saved: SavedRows,
    flat: tuple[Any, ...],
    save_percent: int,
    needs: Sequence[bool],
) -> Any:
    """Return the gradients of a call by these arguments, which autograd may have kept in other strides."""
    call = arguments.call(flat)
    if impl == "triton":
        reader, call = call.read(views=True)
        dy = reader.read("dy", dy, call.x.shape)
    if impl == "triton" or arguments is not MLP_ARGUMENTS:
        saved = SavedRows(*reader_of(call.x).rows(*saved, call.experts, call.form.up.shape))
    gradients = kernels_of(impl).experts_mlp_backward(dy, saved, call, save_percent, arguments.needs(needs))
    return arguments.results(gradients, call.x)


def _experts_mlp(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
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
    arguments = (x, experts, weights, up_proj, down_proj, up_bias, down_bias, activation, layout, alpha, limit)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_mlp_cpu(*arguments, save_percent)
    return kernels_of(impl).experts_mlp(MLP_ARGUMENTS.call(arguments), save_percent)


def _experts_mlp_inference(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
    build: int,
) -> Tensor:
    check_rows(experts)
    call = MLP_ARGUMENTS.call((x, experts, weights, up_proj, down_proj, up_bias, down_bias, activation, layout, alpha, limit))
    if rules.few_rows(rules.hint(experts.numel()), up_proj.shape[0]):
        return gpu_kernels("decode").experts_mlp(call)
    return gpu_kernels("mlp").experts_mlp(call, save_percent=0)[0]


def _experts_mlp_backward(
    dy: Tensor,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows(experts)
    arguments = (x, experts, weights, up_proj, down_proj, up_bias, down_bias, activation, layout, alpha, limit)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_mlp_cpu_backward(dy, z, order, offsets, *arguments, needs)
    return gradients_of(MLP_ARGUMENTS, impl, dy, SavedRows(z, order, offsets), arguments, save_percent, needs)


def _experts_mlp_dense(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
    build: int,
) -> Tensor:
    arguments = (x, experts, weights, up_proj, down_proj, up_bias, down_bias, activation, layout, alpha, limit)
    return dense.experts_mlp_dense(MLP_ARGUMENTS.call(arguments))


_experts_mlp_save = keeping(tensors=7)


def _experts_mlp_grad(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    if dy is None:
        return (None,) * count
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:7])
    grads = experts_mlp_backward(dy, *ctx.saved_tensors, *ctx.constants, needs, BUILD, ctx.impl)
    dx, *rest = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *rest, *(None for _ in range(count - 7))


def _inference_only(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("fusedonemoe::experts_mlp_inference keeps nothing for a backward pass; experts_mlp does")


operator("experts_mlp_backward", _experts_mlp_backward).register_autograd(no_second_derivative)
operator("experts_mlp", _experts_mlp).register_autograd(_experts_mlp_grad, setup_context=_experts_mlp_save)
operator("experts_mlp_inference", _experts_mlp_inference).register_autograd(_inference_only)
composite("experts_mlp_dense", _experts_mlp_dense)
define_autocast("experts_mlp_backward", casts=())
for _name in ("experts_mlp", "experts_mlp_inference", "experts_mlp_dense"):
    define_autocast(_name, casts=(0, 3, 4, 5, 6))

# What functional and the formulas above call: the operators, or the kernels themselves where nothing would notice.


def _mlp(*args: Any) -> Any:
    return _mlp_kernel(*args[:-2])  # without build and impl


def _mlp_output(*args: Any) -> tuple[Tensor]:
    return (_mlp_output_kernel(*args[:11]),)


def _mlp_gradients(*args: Any) -> Any:
    return _mlp_backward_kernel(*args[:15], args[16])  # without save_percent as well


experts_mlp: Callable[..., Any] = shortcut(
    "experts_mlp", _mlp_output, 7, recorder("experts_mlp", _mlp, _experts_mlp_grad, _experts_mlp_save), impl="cpu"
)
experts_mlp_backward: Callable[..., Any] = shortcut("experts_mlp_backward", _mlp_gradients, 11, impl="cpu")
