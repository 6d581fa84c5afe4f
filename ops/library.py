"""The only place that speaks to torch.library: schemas, fakes, autograd, autocast, one name for every device.

Each public operator is a ``triton_op``: eager calls run its body as one operator with a hand-written backward, torch.compile
inlines the body and fuses it, torch.export keeps the operator. The body takes the branch of the tensors' device. The
``*_dense`` operators are composites instead: autograd, ``torch.func`` and export look straight through them, so they have
derivatives of every order.

Every operator takes ``build``, a fingerprint of this package's source. torch.compile's on-disk cache knows an operator by
its name and arguments, not by its Python, and would go on running the old body after an upgrade; the fingerprint in the
graph makes the new one a different graph.
"""

import hashlib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from fusedonemoe.ops import cuda, dense, grouped, triton
from fusedonemoe.ops import route as routing
from fusedonemoe.ops.activation import Activation
from fusedonemoe.ops.cpu import grouped_gemm, native, packing, selection
from fusedonemoe.ops.grouped import MergedNeeds, MLPNeeds, saved_rows
from fusedonemoe.ops.route import RouteRule
from fusedonemoe.ops.shortcut import recorder, shortcut
from fusedonemoe.ops.triton import rules

NAMESPACE = "fusedonemoe"


def _fingerprint() -> int:
    """A 62-bit digest of the operators' source files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "big") >> 2


BUILD = _fingerprint()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a device; None where it is off, or not to be had."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


_lib = torch.library.Library(NAMESPACE, "FRAGMENT")


@contextmanager
def _without_triton_warning() -> Iterator[None]:
    """Registering a ``triton_op`` logs a warning where Triton is not installed; the CPU bodies need none."""
    logger = logging.getLogger("torch._library.triton")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _operator(name: str, body: Callable[..., Any]) -> Any:
    """Register an operator with an opaque eager body that compilation inlines; the schema is read off its annotations."""
    with _without_triton_warning():
        return triton_op(f"{NAMESPACE}::{name}", body, mutates_args=())


def _composite(name: str, body: Callable[..., Any]) -> None:
    """Register an operator that autograd, torch.func and compilation look through."""
    _lib.define(name + torch.library.infer_schema(body, mutates_args=()))
    _lib.impl(name, body, "CompositeImplicitAutograd")
    _lib.impl(name, body, "FuncTorchBatched")  # without it vmap would run a loop over the batch, and say so


def _define_autocast(name: str, casts: Sequence[int]) -> None:
    """Under autocast, cast the floating arguments at ``casts`` and run the body with autocast off.

    The others keep their dtype: routing arithmetic and routing weights are float32 whatever the model's dtype is.
    """
    op = getattr(torch.ops.fusedonemoe, name).default

    def rule_for(device: str) -> Callable[..., Any]:
        def rule(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [
                a.to(dtype) if i in casts and isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
                for i, a in enumerate(args)
            ]
            with torch.autocast(device, enabled=False):
                return op(*cast)

        return rule

    _lib.impl(name, rule_for("cpu"), "AutocastCPU")
    _lib.impl(name, rule_for("cuda"), "AutocastCUDA")


# Grouped GEMMs: opaque, because on CPU how many rows an expert has decides how they are best computed, and because torch's
# own refuses to be traced in float32 before 2.15.

_lib.define("grouped_mm(Tensor rows, Tensor weights, Tensor offsets) -> Tensor")
_lib.impl("grouped_mm", grouped_gemm.grouped_mm, "CPU")
_lib.impl("grouped_mm", cuda.grouped_mm, "CUDA")
_lib.define("grouped_outer(Tensor left, Tensor right, Tensor offsets) -> Tensor")
_lib.impl("grouped_outer", grouped_gemm.grouped_outer, "CPU")
_lib.impl("grouped_outer", cuda.grouped_outer, "CUDA")


@torch.library.register_fake(f"{NAMESPACE}::grouped_mm", lib=_lib)
def _(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@torch.library.register_fake(f"{NAMESPACE}::grouped_outer", lib=_lib)
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


# The selection: opaque on CPU for its kernel.

_lib.define("select_experts(Tensor keys, SymInt k) -> Tensor")
_lib.impl("select_experts", selection.select, "CPU")
_lib.impl("select_experts", routing.select, "CUDA")


@torch.library.register_fake(f"{NAMESPACE}::select_experts", lib=_lib)
def _(keys: Tensor, k: int) -> Tensor:
    return keys.new_empty((keys.shape[0], k), dtype=torch.int64)


# The compiled CPU kernels: opaque too, one operator a pass.

_MLP = "Tensor x, Tensor experts, Tensor weights, Tensor up_proj, Tensor down_proj, Tensor? up_bias, Tensor? down_bias"
_ACT = "str activation, str layout, float alpha, float limit"
_MERGED = "Tensor x, Tensor experts, Tensor weights, Tensor proj"


def _define_cpu(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _lib.define(schema)
    name = schema.partition("(")[0]
    _lib.impl(name, kernel, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_lib)


def _wanted(needs: Sequence[bool], *likes: Tensor | None) -> tuple[Tensor, ...]:
    """What a backward returns: a contiguous tensor like each argument, or an empty one where no gradient is needed."""
    owner = next(like for like in likes if like is not None)
    return tuple(
        like.new_empty(like.shape) if needed and like is not None else owner.new_empty(0)
        for needed, like in zip(needs, likes, strict=True)
    )


def _with_act(kernel: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """``kernel`` for a flat argument list, whose activation stands in four arguments behind the tensors."""
    return lambda *args: kernel(*args[:tensors], Activation(*args[tensors : tensors + 4]), *args[tensors + 4 :])


def _mlp_cpu_fake(*args: Any) -> tuple[Tensor, ...]:
    x, experts, _, up_proj, *_, save_percent = args
    N = experts.numel()
    z = x.new_empty(saved_rows(N, save_percent), up_proj.shape[1])
    order, offsets = (experts.new_empty(n, dtype=torch.int32) for n in (N, up_proj.shape[0] + 1))
    return x.new_empty(x.shape), z, order, offsets


def _merged_cpu_fake(x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor) -> tuple[Tensor, ...]:
    order, offsets = (experts.new_empty(n, dtype=torch.int32) for n in (experts.numel(), proj.shape[0] + 1))
    return x.new_empty(x.shape[0], proj.shape[2]), order, offsets


_mlp_kernel, _mlp_output_kernel = _with_act(native.experts_mlp, 7), _with_act(native.experts_mlp_output, 7)
_mlp_backward_kernel = _with_act(native.experts_mlp_backward, 11)

_define_cpu(
    f"experts_mlp_cpu({_MLP}, {_ACT}, int save_percent) -> (Tensor, Tensor, Tensor, Tensor)",
    _mlp_kernel,
    _mlp_cpu_fake,
)
_define_cpu(
    f"experts_mlp_packed({_MLP}, Tensor packed_up, Tensor packed_down, {_ACT}) -> Tensor",
    packing.experts_mlp_packed,
    lambda x, *_: x.new_empty(x.shape),
)
_define_cpu(
    f"experts_mlp_cpu_backward(Tensor dy, Tensor z, Tensor order, Tensor offsets, {_MLP}, {_ACT}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mlp_backward_kernel,
    lambda *args: _wanted(args[15], args[4], *args[6:11]),
)
_define_cpu(f"experts_merged_cpu({_MERGED}) -> (Tensor, Tensor, Tensor)", native.experts_merged, _merged_cpu_fake)
_define_cpu(
    f"experts_merged_cpu_backward(Tensor dh, Tensor order, Tensor offsets, {_MERGED}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    native.experts_merged_backward,
    lambda *args: _wanted(args[7], args[3], *args[5:7]),
)


# The Triton kernels: their launchers are called in the operators' bodies, so compilation sees every kernel.


def _gpu_kernels(name: str) -> Any:
    """A module of ``ops.triton``, imported now: only who computes on a GPU has to have triton."""
    return importlib.import_module(f"{triton.__name__}.{name}")


# Routing


def _gpu_routing(logits: Tensor) -> Any:
    """The Triton kernels of the router, where they can take these logits on a GPU."""
    if logits.device.type == "cpu" or triton.refusal(logits.dtype, logits.device.type):
        return None
    kernels = _gpu_kernels("routing")
    return None if kernels.refusal(logits.dtype, logits.shape[-1]) else kernels


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
        build: int,
    ) -> tuple[Tensor, Tensor]:
        rule = RouteRule(top_k, scoring, score_first, norm_topk_prob, scale, n_group, topk_group, group_score)
        if opaque and (kernels := _gpu_routing(logits)):
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
    build: int,
) -> Tensor:
    rule = RouteRule(top_k, scoring, score_first, norm_topk_prob, scale, n_group, topk_group, group_score)
    kernels = _gpu_routing(logits) or routing
    return kernels.route_backward(dweights, logits, experts, rule)


def _route_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.rule = inputs[2:]


def _route_grad(ctx: Any, dweights: Tensor, _: Any) -> tuple[Any, ...]:
    logits, experts = ctx.saved_tensors
    dlogits = route_backward(dweights, logits, experts, *ctx.rule)
    return dlogits, *(None for _ in range(1 + len(ctx.rule)))


# The gated and the plain MLP


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
    act = Activation(activation, layout, alpha, limit)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_mlp_cpu(
            x, experts, weights, up_proj, down_proj, up_bias, down_bias, *act, save_percent
        )
    kernels = _gpu_kernels("mlp_forward") if impl == "triton" else grouped
    return kernels.experts_mlp(x, experts, weights, up_proj, down_proj, up_bias, down_bias, act, save_percent)


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
    arguments = (x, experts, weights, up_proj, down_proj, up_bias, down_bias, Activation(activation, layout, alpha, limit))
    if rules.few_rows(rules.hint(experts.numel()), up_proj.shape[0]):
        return _gpu_kernels("decode").experts_mlp(*arguments)
    return _gpu_kernels("mlp_forward").experts_mlp(*arguments, save_percent=0)[0]


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
    act = Activation(activation, layout, alpha, limit)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_mlp_cpu_backward(
            dy, z, order, offsets, x, experts, weights, up_proj, down_proj, up_bias, down_bias, *act, needs
        )
    kernels = _gpu_kernels("mlp_backward") if impl == "triton" else grouped
    return kernels.experts_mlp_backward(
        dy, z, order, offsets, x, experts, weights, up_proj, down_proj, up_bias, down_bias, act, save_percent, MLPNeeds(*needs)
    )


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
    act = Activation(activation, layout, alpha, limit)
    return dense.experts_mlp_dense(x, experts, weights, up_proj, down_proj, up_bias, down_bias, act)


def _experts_mlp_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, z, order, offsets = output
    ctx.mark_non_differentiable(z, order, offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, order, offsets, *inputs[:7])
    ctx.activation_and_percent = inputs[7:12]
    ctx.impl = inputs[13]


def _experts_mlp_grad(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    if dy is None:
        return (None,) * count
    needs = MLPNeeds(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:7])
    activation_and_percent, saved = ctx.activation_and_percent, ctx.saved_tensors
    grads = experts_mlp_backward(dy, *saved, *activation_and_percent, needs, BUILD, ctx.impl)
    dx, *rest = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *rest, *(None for _ in range(count - 7))


# The merged up-projection


def _experts_merged(
    x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor, build: int, impl: str = "grouped"
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_merged_cpu(x, experts, weights, proj)
    kernels = _gpu_kernels("merged") if impl == "triton" else grouped
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
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_merged_cpu_backward(dh, order, offsets, x, experts, weights, proj, needs)
    kernels = _gpu_kernels("merged") if impl == "triton" else grouped
    return kernels.experts_merged_backward(dh, order, offsets, x, experts, weights, proj, MergedNeeds(*needs))


def _experts_merged_dense(x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor, build: int) -> Tensor:
    return dense.experts_merged_dense(x, experts, weights, proj)


def _experts_merged_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, order, offsets = output
    ctx.mark_non_differentiable(order, offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(order, offsets, *inputs[:4])
    ctx.impl = inputs[5]


def _experts_merged_grad(ctx: Any, dh: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dh is None:
        return (None,) * 6
    needs = MergedNeeds(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
    grads = experts_merged_backward(dh, *ctx.saved_tensors, needs, BUILD, ctx.impl)
    dx, *rest = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *rest, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("fusedonemoe's operators have first derivatives only; impl='dense' has derivatives of every order")


def _inference_only(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("fusedonemoe::experts_mlp_inference keeps nothing for a backward pass; experts_mlp does")


for _name in ("grouped_mm", "grouped_outer"):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _no_second_derivative, lib=_lib)

_operator("route_backward", _route_backward).register_autograd(_no_second_derivative)
_operator("route", _route).register_autograd(_route_grad, setup_context=_route_save)
_composite("route_dense", _route_dense)

_operator("experts_mlp_backward", _experts_mlp_backward).register_autograd(_no_second_derivative)
_operator("experts_mlp", _experts_mlp).register_autograd(_experts_mlp_grad, setup_context=_experts_mlp_save)
_operator("experts_mlp_inference", _experts_mlp_inference).register_autograd(_inference_only)
_composite("experts_mlp_dense", _experts_mlp_dense)

_operator("experts_merged_backward", _experts_merged_backward).register_autograd(_no_second_derivative)
_operator("experts_merged", _experts_merged).register_autograd(_experts_merged_grad, setup_context=_experts_merged_save)
_composite("experts_merged_dense", _experts_merged_dense)

# What functional and the formulas above call: the operators, or the kernels themselves where nothing would notice.


def _without_build_and_impl(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: kernel(*args[:-2])


def _mlp_output(*args: Any) -> tuple[Tensor]:
    return (_mlp_output_kernel(*args[:11]),)


def _mlp_gradients(*args: Any) -> Any:
    return _mlp_backward_kernel(*args[:15], args[16])  # without save_percent as well


_mlp, _merged = _without_build_and_impl(_mlp_kernel), _without_build_and_impl(native.experts_merged)
_merged_gradients = _without_build_and_impl(native.experts_merged_backward)
_mlp_recorder = recorder("experts_mlp", _mlp, _experts_mlp_grad, _experts_mlp_save)
_merged_recorder = recorder("experts_merged", _merged, _experts_merged_grad, _experts_merged_save)

route = shortcut("route", _route, 2, recorder("route", _route, _route_grad, _route_save))
route_backward = shortcut("route_backward", _route_backward, 3)
experts_mlp = shortcut("experts_mlp", _mlp_output, 7, _mlp_recorder, impl="cpu")
experts_mlp_backward = shortcut("experts_mlp_backward", _mlp_gradients, 11, impl="cpu")
pack = packing.pack
experts_mlp_packed = shortcut("experts_mlp_packed", packing.experts_mlp_packed, 9)
experts_merged = shortcut("experts_merged", _merged, 4, _merged_recorder, impl="cpu")
experts_merged_backward = shortcut("experts_merged_backward", _merged_gradients, 7, impl="cpu")

for _name in ("route", "route_backward", "route_dense", "experts_mlp_backward", "experts_merged_backward"):
    _define_autocast(_name, casts=())
for _name in ("experts_mlp", "experts_mlp_inference", "experts_mlp_dense"):
    _define_autocast(_name, casts=(0, 3, 4, 5, 6))
for _name in ("experts_merged", "experts_merged_dense"):
    _define_autocast(_name, casts=(0, 3))
