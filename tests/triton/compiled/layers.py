"""Every launch of a layer: the operators run with fake tensors, and what their launchers would launch is collected.

Nothing is listed by hand, so a kernel or a configuration that the library can launch is compiled here or nowhere.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedonemoe.ops import library
from fusedonemoe.ops.library.registration import formulas
from tests.triton.fake_gpu import Launch, fake_gpu, recorded_launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of the adapter of the up-projection; the other's is twice that.
RANK = 8
# Rows per expert: one value from each line of ops/triton/rules.py.
ROWS = {"few": 8, "mid": 48, "many": 512}


@dataclass(frozen=True)
class Layer:
    """A layer's sizes and forms, named after the model that has them."""

    D: int
    F: int
    E: int
    K: int
    layout: str = "gate_up"
    activation: str = "silu"
    bias: bool = False
    transposed: bool = False
    save_percent: int = 100
    route: tuple[Any, ...] = ("softmax", True, True, 1.0, 1, 1, "top2_sum", 1e-20)


# Experts of one neuron each, picked by product keys: F is not used.
FINE_LAYERS = {
    "flashmoe": Layer(1024, 0, 16_384, 64),
    "peer": Layer(256, 0, 102_400, 512, activation="gelu"),
}
LAYERS = {
    "qwen3": Layer(2048, 768, 128, 8),
    "gpt_oss": Layer(2880, 2880, 32, 4, "interleaved", "swiglu_oai", bias=True, transposed=True, save_percent=50),
    "deepseek": Layer(2048, 1408, 64, 6, "up_gate", route=("sigmoid", True, True, 2.5, 8, 4, "top2_sum", 1e-20)),
    "nomic": Layer(768, 3072, 8, 2, "plain", "gelu", save_percent=0, route=("softmax", True, False, 1.0, 1, 1, "max", 1e-20)),
    "odd": Layer(1001, 301, 6, 3, bias=True, save_percent=33),
}


class _Context:
    """What an operator's autograd formulas ask of their context: the engine itself refuses a device that is not there."""

    def __init__(self, needs_input_grad: list[bool]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _forward_and_backward(name: str, args: tuple[Any, ...]) -> None:
    outputs = getattr(torch.ops.fusedonemoe, name)(*args)
    context = _Context([isinstance(arg, Tensor) and arg.is_floating_point() for arg in args])
    save, grad = formulas[name]
    save(context, args, outputs)
    first, *others = (outputs,) if isinstance(outputs, Tensor) else outputs
    grad(context, torch.empty_like(first), *(None for _ in others))


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _routed(layer: Layer, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights."""
    return (
        _tensor(tokens, layer.D, dtype=dtype),
        _tensor(tokens, layer.K, dtype=torch.int64),
        _tensor(tokens, layer.K, dtype=torch.float32),
    )


def _parameters(layer: Layer, dtype: torch.dtype) -> tuple[Any, ...]:
    """Weights, biases and activation."""
    D, F, E = layer.D, layer.F, layer.E
    G = F if layer.layout == "plain" else 2 * F
    if layer.transposed:
        up, down = _tensor(E, D, G, dtype=dtype).transpose(1, 2), _tensor(E, F, D, dtype=dtype).transpose(1, 2)
    else:
        up, down = _tensor(E, G, D, dtype=dtype), _tensor(E, D, F, dtype=dtype)
    biases = (_tensor(E, G, dtype=dtype), _tensor(E, D, dtype=dtype)) if layer.bias else (None, None)
    return up, down, *biases, layer.activation, layer.layout, 1.702, 7.0


def _route(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
    args = (_tensor(tokens, layer.E, dtype=dtype), None, layer.K, *layer.route, library.BUILD)
    _forward_and_backward("route", args)


def _mlp(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
    args = (*_routed(layer, dtype, tokens), *_parameters(layer, dtype), layer.save_percent, library.BUILD, "triton")
    _forward_and_backward("experts_mlp", args)


def _inference(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
    for T in (tokens, 1):
        torch.ops.fusedonemoe.experts_mlp_inference(*_routed(layer, dtype, T), *_parameters(layer, dtype), library.BUILD)


def _merged(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
    args = (*_routed(layer, dtype, tokens), _tensor(layer.E, layer.D, layer.F, dtype=dtype), library.BUILD, "triton")
    _forward_and_backward("experts_merged", args)


def _neurons(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
    tables = (_tensor(layer.E, layer.D, dtype=dtype) for _ in range(2))
    args = (*_routed(layer, dtype, tokens), *tables, layer.activation, library.BUILD, "triton")
    _forward_and_backward("experts_neurons", args)


def _values(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
    _, experts, weights = _routed(layer, dtype, tokens)
    args = (experts, weights, _tensor(layer.E, layer.D, dtype=dtype), library.BUILD, "triton")
    _forward_and_backward("experts_values", args)


def _product_keys(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
    args = (_tensor(tokens, 2, math.isqrt(layer.E), dtype=dtype), layer.K, False, library.BUILD)
    _forward_and_backward("route_product_key", args)


def _lora(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
    up, down, *rest = _parameters(layer, dtype)
    factors = [
        _tensor(*shape, dtype=dtype)
        for weight, rank in ((up, RANK), (down, 2 * RANK))
        for shape in ((layer.E, rank, weight.shape[2]), (layer.E, weight.shape[1], rank))
    ]
    numbers = (2.0, 1.0, *rest[2:], layer.save_percent, library.BUILD, "triton")
    args = (*_routed(layer, dtype, tokens), up, down, *rest[:2], *factors, *numbers)
    _forward_and_backward("experts_mlp_lora", args)


def _quantized(layer: Layer, dtype: torch.dtype, tokens: int, bits: int) -> None:
    up, down, *rest = _parameters(replace(layer, transposed=False), dtype)
    group_size = next(size for size in (128, 64, 32) if bits == 8 or layer.D % size == layer.F % size == 0)
    weights: list[Tensor | None] = []
    for E, O, I in (up.shape, down.shape):  # noqa: E741
        if bits == 8:
            weights += [_tensor(E, O, I, dtype=torch.int8), _tensor(E, O, dtype=torch.float32), None]
            continue
        groups = I // group_size
        scale, zero = (_tensor(E, O, groups, dtype=kind) for kind in (torch.float32, torch.uint8))
        weights += [_tensor(E, O, I // 2, dtype=torch.uint8), scale, zero]
    args = (*_routed(layer, dtype, tokens), *weights, *rest, layer.save_percent, library.BUILD, "triton")
    operator = torch.ops.fusedonemoe.experts_mlp_quantized
    y, *saved = operator(*args)
    needs = (True, True, layer.bias, layer.bias)
    arguments = (torch.empty_like(y), *saved, *args[:-2], needs, library.BUILD, "triton")
    torch.ops.fusedonemoe.experts_mlp_quantized_backward(*arguments)


OPERATORS = {"route": _route, "experts_mlp": _mlp, "inference": _inference, "experts_merged": _merged}
ADAPTED_OPERATORS = {"lora": _lora}
QUANTIZED_OPERATORS = {"int8": partial(_quantized, bits=8), "int4": partial(_quantized, bits=4)}
FINE_OPERATORS = {"product_keys": _product_keys, "neurons": _neurons, "values": _values}


def tokens_for(layer: Layer, rows: str) -> int:
    """``T`` with about that many rows per expert; odd, so that no count of rows is a multiple of 16 by luck."""
    return ROWS[rows] * layer.E // layer.K // 2 * 2 + 1


def launches(arch: str, layer: str, dtype: str, rows: str, operators: Iterable[str] = tuple(OPERATORS)) -> list[Launch]:
    """The distinct launches of the operators, forward and backward."""
    chosen = LAYERS[layer]
    with fake_gpu(arch), FakeTensorMode(), torch.no_grad(), recorded_launches() as recorded:
        for operator in operators:
            (OPERATORS | ADAPTED_OPERATORS | QUANTIZED_OPERATORS)[operator](chosen, DTYPES[dtype], tokens_for(chosen, rows))
    return list({launch.key: launch for launch in recorded}.values())


def fine_launches(arch: str, layer: str, dtype: str) -> list[Launch]:
    """The same of the fine-grained experts and their router, for one token and for many."""
    chosen = FINE_LAYERS[layer]
    with fake_gpu(arch), FakeTensorMode(), torch.no_grad(), recorded_launches() as recorded:
        for operator, tokens in itertools.product(FINE_OPERATORS.values(), (1, 2049)):
            operator(chosen, DTYPES[dtype], tokens)
    return list({launch.key: launch for launch in recorded}.values())
