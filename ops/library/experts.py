"""The operators of experts that are MLPs: plain, adapted, quantised and packed weights, a row each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import dense, mlp, triton
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.formats import FLOATS
from fusedonemoe.ops.grouped import saved_rows
from fusedonemoe.ops.library import flops
from fusedonemoe.ops.library.registration import NAMESPACE, define_compiled, gpu_kernels, lib, register, register_composite
from fusedonemoe.ops.library.rows import Compiled, Kernel, Operator
from fusedonemoe.ops.library.signature import Part, record
from fusedonemoe.ops.operands import check_rows, reader_of
from fusedonemoe.ops.records import (
    LORA_ARGUMENTS,
    MLP_ARGUMENTS,
    PACKED_ARGUMENTS,
    QUANTIZED_ARGUMENTS,
    ExpertsArguments,
    ExpertsCall,
    ExpertsNeeds,
    SavedRows,
)
from fusedonemoe.ops.rules import RouteRule
from fusedonemoe.ops.triton import rules

_SAVED = record(SavedRows, "Tensor z, Tensor order, Tensor offsets")
_PERCENT = "int save_percent"


def _call(arguments: ExpertsArguments) -> Part:
    return Part(arguments.schema, arguments.call)


def _casts(arguments: ExpertsArguments) -> tuple[str, ...]:
    return tuple(argument.name for argument in arguments.arguments if argument.casts)


def _grouped_gradients(arguments: ExpertsArguments) -> Kernel:
    def backward(dy: Tensor, saved: SavedRows, call: ExpertsCall, save_percent: int, needs: ExpertsNeeds) -> tuple[Tensor, ...]:
        if arguments is not MLP_ARGUMENTS:  # the products of plain weights take any strides
            saved = SavedRows(*reader_of(call.x).rows(*saved, call.experts, call.form.up.shape))
        return arguments.results(mlp.experts_mlp_backward(dy, saved, call, save_percent, needs), call.x)

    return backward


def _triton_gradients(arguments: ExpertsArguments) -> Kernel:
    def backward(dy: Tensor, saved: SavedRows, call: ExpertsCall, save_percent: int, needs: ExpertsNeeds) -> tuple[Tensor, ...]:
        reader, call = call.read(views=True)  # autograd may have kept the tensors in other strides
        dy, saved = reader.read("dy", dy, call.x.shape), SavedRows(*reader.rows(*saved, call.experts, call.form.up.shape))
        gradients = gpu_kernels("mlp").experts_mlp_backward(dy, saved, call, save_percent, needs)
        return arguments.results(gradients, call.x)

    return backward


def _forward_fake(call: ExpertsCall, save_percent: int) -> tuple[Tensor, ...]:
    x, experts, (E, G, _), N = call.x, call.experts, call.form.up.shape, call.experts.numel()
    z = x.new_empty(saved_rows(N, save_percent), G)
    order, offsets = (experts.new_empty(n, dtype=torch.int32) for n in (N, E + 1))
    return x.new_empty(x.shape), z, order, offsets


def _register(
    name: str,
    arguments: ExpertsArguments,
    *,
    compiled: bool = True,
    vanishing: tuple[str, ...] = (),
    ungraded: tuple[str, ...] = (),
    refusal: str = "",
) -> Callable[..., Any]:
    """Register the operator of experts with these arguments, its backward and its composite."""
    call, casts = _call(arguments), _casts(arguments)
    needs = Part("bool[] needs", lambda flat: arguments.needs(*flat))
    register_composite(f"{name}_dense", (call,), 1, (dense, "experts_mlp_dense"), casts)
    return register(
        Operator(
            name=name,
            arguments=(call, _PERCENT),
            results=("y", "z", "order", "offsets"),
            casts=casts,
            ungraded=ungraded,
            refusal=refusal,
            kernels={"grouped": (mlp, "experts_mlp"), "triton": ("mlp", "experts_mlp")},
            compiled=Compiled(fake=_forward_fake) if compiled else None,
            flops=flops.mlp,
            backward=Operator(
                name=f"{name}_backward",
                arguments=("Tensor dy", _SAVED, call, _PERCENT, needs),
                gradients=tuple(argument.name for argument in arguments.arguments if argument.has_gradient),
                vanishing=vanishing,
                kernels={"grouped": _grouped_gradients(arguments), "triton": _triton_gradients(arguments)},
                compiled=Compiled(arguments=("Tensor dy", _SAVED, call, needs)) if compiled else None,
                flops=flops.mlp_backward,
            ),
        )
    )


experts_mlp: Callable[..., Any] = _register("experts_mlp", MLP_ARGUMENTS)
experts_mlp_lora: Callable[..., Any] = _register(
    "experts_mlp_lora", LORA_ARGUMENTS, compiled=False, vanishing=("up_A", "up_B", "down_A", "down_B")
)
experts_mlp_quantized: Callable[..., Any] = _register(
    "experts_mlp_quantized",
    QUANTIZED_ARGUMENTS,
    ungraded=("up_scale", "down_scale"),
    refusal="quantised weights have no gradient: their scales must not require one",
)


# Forwards that keep nothing for a backward


def _choose_for_inference(call: ExpertsCall) -> str:
    check_rows(call.experts)
    if call.x.device.type == "cpu" and triton.refusal(call.x.dtype, "cpu"):  # without Triton's interpreter
        return "torch" if native.refusal(call.x.dtype, contiguous=True) else "cpu"
    if call.form.up.format not in FLOATS:
        return "triton"
    return "decode" if rules.few_rows(rules.hint(call.experts.numel()), call.form.up.shape[0]) else "triton"


def _output_of(experts_mlp: Callable[..., tuple[Tensor, ...]]) -> Callable[[ExpertsCall], Tensor]:
    return lambda call: experts_mlp(call, save_percent=0)[0]


def _output_fake(call: ExpertsCall) -> Tensor:
    return call.x.new_empty(call.x.shape)


def _register_inference(name: str, arguments: ExpertsArguments) -> Callable[..., Any]:
    return register(
        Operator(
            name=f"{name}_inference",
            arguments=(_call(arguments),),
            results=("y",),
            casts=_casts(arguments),
            refusal=f"fusedonemoe::{name}_inference keeps nothing for a backward pass; {name} does",
            choose=_choose_for_inference,
            kernels={
                "decode": ("decode", "experts_mlp"),
                "triton": _output_of(lambda *call, **kept: gpu_kernels("mlp").experts_mlp(*call, **kept)),
                "torch": _output_of(mlp.experts_mlp),
            },
            compiled=Compiled(fake=_output_fake),
            flops=flops.mlp,
        )
    )


experts_mlp_inference: Callable[..., Any] = _register_inference("experts_mlp", MLP_ARGUMENTS)
experts_mlp_quantized_inference: Callable[..., Any] = _register_inference("experts_mlp_quantized", QUANTIZED_ARGUMENTS)


# A block: a linear router and its experts

_EXPERTS = MLP_ARGUMENTS.schema.removeprefix("Tensor x, Tensor experts, Tensor weights, ")

moe_inference: Callable[..., Any] = register(
    Operator(
        name="moe_inference",
        arguments=("Tensor x, Tensor gate, Tensor? gate_bias, Tensor? selection_bias", record(RouteRule), _EXPERTS),
        results=("y",),
        refusal="fusedonemoe::moe_inference keeps nothing for a backward pass; route and experts_mlp do",
        choose=lambda *call: "cpu",
        kernels={},
        compiled=Compiled(fake=lambda x, *_: x.new_empty(x.shape)),
        flops=flops.block,
    )
)


# Packed weights, for inference, and the way to them and back: compiled CPU kernels without gradients

FOR_INFERENCE = (
    "packed weights are for inference, and this call records gradients: call it under torch.no_grad() or "
    "torch.inference_mode(), or call unpack() before training"
)

experts_mlp_packed: Callable[..., Any] = register(
    Operator(
        name="experts_mlp_packed",
        arguments=(_call(PACKED_ARGUMENTS),),
        results=("y",),
        casts=_casts(PACKED_ARGUMENTS),
        refusal=FOR_INFERENCE,
        refuses_early=True,
        choose=lambda call: "cpu",
        kernels={},
        compiled=Compiled(fake=_output_fake),
        flops=flops.mlp,
    )
)


def _refuse_gradients(*_: Any, **__: Any) -> Any:
    raise RuntimeError(FOR_INFERENCE)


def _pack_fake(panels: Tensor, weight: Tensor, layout: str) -> None:
    raise RuntimeError("weights can be packed and unpacked in memory alone, and under this mode a tensor has none")


define_compiled("pack_weights_", "Tensor(a!) panels, Tensor weight, str layout", _pack_fake, results=0)
define_compiled(
    "unpack_weights",
    "Tensor panels, SymInt rows, SymInt width, str layout",
    lambda panels, rows, width, layout: panels.new_empty(panels.shape[0], rows, width),
)
# Refused in the forward already: the weights would otherwise look like constants.
torch.library.register_autograd(f"{NAMESPACE}::unpack_weights", _refuse_gradients, setup_context=_refuse_gradients, lib=lib)
unpack_weights: Callable[..., Any] = torch.ops.fusedonemoe.unpack_weights
