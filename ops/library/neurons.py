"""Single-neuron experts and value memory: ``experts_neurons``, ``experts_values``, their backwards, kernels, composites."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.ops import neurons
from fusedonemoe.ops.cpu import neurons as native
from fusedonemoe.ops.derivatives import no_second_derivative
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
from fusedonemoe.ops.neurons import NeuronNeeds, ValueNeeds
from fusedonemoe.ops.operands import check_rows
from fusedonemoe.ops.shortcut import recorder, shortcut

_NEURONS = "Tensor x, Tensor experts, Tensor weights, Tensor down, Tensor up, str activation"
_VALUES = "Tensor experts, Tensor weights, Tensor table"
# With slots, the gradients of tables have num_slots rows, and slots names that of each routed row; see sparse_tables.
_SLOTS = ", Tensor? slots=None, int num_slots=0"


def _wanted_tables(
    needs: Sequence[bool], tables: Sequence[Tensor], slots: Tensor | None = None, num_slots: int = 0
) -> tuple[Tensor, ...]:
    if slots is None:
        return wanted(needs, *tables)
    return tuple(
        table.new_empty(num_slots, table.shape[1]) if needed else table.new_empty(0)
        for needed, table in zip(needs, tables, strict=True)
    )


define_cpu(
    f"experts_neurons_cpu({_NEURONS}) -> (Tensor, Tensor)",
    native.experts_neurons_checked,
    lambda x, experts, *_: (x.new_empty(x.shape), x.new_empty(experts.shape, dtype=torch.float32)),
)
define_cpu(
    f"experts_neurons_cpu_backward(Tensor dy, Tensor s, {_NEURONS}, bool[] needs{_SLOTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    native.experts_neurons_backward,
    lambda *args: (*wanted(args[8][:2], args[2], args[4]), *_wanted_tables(args[8][2:], args[5:7], *args[9:])),
)
define_cpu(
    f"experts_values_cpu({_VALUES}) -> Tensor",
    native.experts_values_checked,
    lambda experts, weights, table: table.new_empty(experts.shape[0], table.shape[1]),
)
define_cpu(
    f"experts_values_cpu_backward(Tensor dy, {_VALUES}, bool[] needs{_SLOTS}) -> (Tensor, Tensor)",
    native.experts_values_backward,
    lambda *args: (*wanted(args[4][:1], args[2]), *_wanted_tables(args[4][1:], args[3:4], *args[5:])),
)


def _experts_neurons(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    build: int,
    impl: str = "grouped",
) -> tuple[Tensor, Tensor]:
    check_rows(experts)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_neurons_cpu(x, experts, weights, down, up, activation)
    kernels = gpu_kernels("neurons") if impl == "triton" else neurons
    return kernels.experts_neurons(x, experts, weights, down, up, activation)


def _experts_neurons_backward(
    dy: Tensor,
    s: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    needs: Sequence[bool],
    build: int,
    impl: str = "grouped",
    slots: Tensor | None = None,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rows(experts)
    arguments = (dy, s, x, experts, weights, down, up, activation)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_neurons_cpu_backward(*arguments, needs, slots, num_slots)
    kernels = gpu_kernels("neurons") if impl == "triton" else neurons
    return kernels.experts_neurons_backward(*arguments, NeuronNeeds(*needs), slots, num_slots)


def _experts_neurons_dense(
    x: Tensor, experts: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str, build: int
) -> Tensor:
    return neurons.experts_neurons_dense(x, experts, weights, down, up, activation)


def _experts_values(experts: Tensor, weights: Tensor, table: Tensor, build: int, impl: str = "grouped") -> Tensor:
    check_rows(experts)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_values_cpu(experts, weights, table)
    kernels = gpu_kernels("neurons") if impl == "triton" else neurons
    return kernels.experts_values(experts, weights, table)


def _experts_values_backward(
    dy: Tensor,
    experts: Tensor,
    weights: Tensor,
    table: Tensor,
    needs: Sequence[bool],
    build: int,
    impl: str = "grouped",
    slots: Tensor | None = None,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor]:
    check_rows(experts)
    if impl == "cpu":
        return torch.ops.fusedonemoe.experts_values_cpu_backward(dy, experts, weights, table, needs, slots, num_slots)
    kernels = gpu_kernels("neurons") if impl == "triton" else neurons
    return kernels.experts_values_backward(dy, experts, weights, table, ValueNeeds(*needs), slots, num_slots)


def _experts_values_dense(experts: Tensor, weights: Tensor, table: Tensor, build: int) -> Tensor:
    return neurons.experts_values_dense(experts, weights, table)


_neurons_save = keeping(tensors=5)


def _neurons_grad(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 8
    needs = NeuronNeeds(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:5])
    grads = experts_neurons_backward(dy, *ctx.saved_tensors, *ctx.constants, needs, BUILD, ctx.impl)
    dx, *rest = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *rest, None, None, None


def _values_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.impl = inputs[4]


def _values_grad(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 5
    needs = ValueNeeds(*ctx.needs_input_grad[1:3])
    grads = experts_values_backward(dy, *ctx.saved_tensors, needs, BUILD, ctx.impl)
    return None, *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None


operator("experts_neurons_backward", _experts_neurons_backward).register_autograd(no_second_derivative)
operator("experts_neurons", _experts_neurons).register_autograd(_neurons_grad, setup_context=_neurons_save)
composite("experts_neurons_dense", _experts_neurons_dense)
operator("experts_values_backward", _experts_values_backward).register_autograd(no_second_derivative)
operator("experts_values", _experts_values).register_autograd(_values_grad, setup_context=_values_save)
composite("experts_values_dense", _experts_values_dense)
for _name in ("experts_neurons_backward", "experts_values_backward"):
    define_autocast(_name, casts=())
for _name in ("experts_neurons", "experts_neurons_dense"):
    define_autocast(_name, casts=(0, 3, 4))
for _name in ("experts_values", "experts_values_dense"):
    define_autocast(_name, casts=(2,))

# What functional and the formulas above call: the operators, or the kernels themselves where nothing would notice.


def _neurons(*args: Any) -> Any:
    return native.experts_neurons(*args[:-2])  # without build and impl


def _neurons_output(*args: Any) -> tuple[Tensor]:
    return (native.experts_neurons_output(*args[:-2]),)


def _neurons_gradients(*args: Any) -> Any:
    return native.experts_neurons_backward(*args[:-2])


def _values(*args: Any) -> Any:
    return native.experts_values(*args[:-2])


def _values_gradients(*args: Any) -> Any:
    return native.experts_values_backward(*args[:-2])


experts_neurons: Callable[..., Any] = shortcut(
    "experts_neurons", _neurons_output, 5, recorder("experts_neurons", _neurons, _neurons_grad, _neurons_save), impl="cpu"
)
experts_neurons_backward: Callable[..., Any] = shortcut("experts_neurons_backward", _neurons_gradients, 7, impl="cpu")
experts_values: Callable[..., Any] = shortcut(
    "experts_values", _values, 3, recorder("experts_values", _values, _values_grad, _values_save), impl="cpu"
)
experts_values_backward: Callable[..., Any] = shortcut("experts_values_backward", _values_gradients, 4, impl="cpu")
