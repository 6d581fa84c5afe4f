"""Quantising the experts of a model in place, and what that changes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.layers.lora import LoRAExperts
from fusedonemoe.layers.moe import Experts
from fusedonemoe.layers.quantized import QuantizedExperts, rows_of, source_of, unwrapped
from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.plan import in_range

TOKENS = 16  # whose outputs are compared with float64


@dataclass(frozen=True)
class QuantizedLayer:
    """The effect of quantising one module of experts. An error is the root mean square of the change over that of the values.

    Attributes:
        name: of the module in the model.
        up_error: of the up-projection.
        down_error: of the down-projection.
        output_error: of the output, against float64 with the weights as they were.
        bytes_before: of both weights.
        bytes_after: of both weights, with scales and zero points.
    """

    name: str
    up_error: float
    down_error: float
    output_error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """The report of :func:`quantize_`; ``print`` shows it as a table.

    Attributes:
        dtype: ``"int8"`` or ``"int4"``.
        layers: one entry for each module of experts.
    """

    dtype: str
    layers: tuple[QuantizedLayer, ...]

    def __str__(self) -> str:
        width = max(len("module"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'module':{width}}  {'up':>8}  {'down':>8}  {'output':>8}  {'MiB':>17}   relative RMS errors, {self.dtype}"]
        for layer in self.layers:
            errors = "  ".join(f"{error:8.2%}" for error in (layer.up_error, layer.down_error, layer.output_error))
            size = f"{layer.bytes_before / 2**20:.1f} -> {layer.bytes_after / 2**20:.1f}"
            lines.append(f"{layer.name:{width}}  {errors}  {size:>17}")
        return "\n".join(lines)


def _relative_rms(difference: float, size: float) -> float:
    return (difference / size) ** 0.5 if size else float(difference > 0)


def _widened(weight: F.QuantizedWeight, expert: int) -> Tensor:
    values, scale, zero_point = (None if part is None else part[expert : expert + 1] for part in weight)
    assert values is not None and scale is not None
    return F.dequantize_weight(F.QuantizedWeight(values, scale, zero_point), torch.float64)[0]


def _exact_weight(weight: Tensor, expert: int) -> Tensor:
    """One expert's weights in float64, whatever class of tensor holds them."""
    quantized = unwrapped("weight", weight)
    return weight.detach()[expert].double() if quantized is None else _widened(quantized, expert)


def _weight_error(before: Tensor, after: F.QuantizedWeight) -> float:
    """Expert by expert, so that no second copy of the weights ever exists."""
    difference = size = 0.0
    for expert in range(after.shape[0]):
        exact = _exact_weight(before, expert)
        difference += float((_widened(after, expert) - exact).square().sum())
        size += float(exact.square().sum())
    return _relative_rms(difference, size)


def _exact_output(module: Experts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The layer in float64, one expert after the other."""
    config, y = module.config, torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    up_bias, down_bias = getattr(module, f"{module._up_name}_bias"), module.down_proj_bias
    routed = experts[in_range(experts, config.num_experts)]
    for expert in map(int, routed.unique()):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        z = x[token].double() @ _exact_weight(rows_of(module, module._up_name), expert).t()
        h = activate(z if up_bias is None else z + up_bias[expert].double(), config.act)
        rows = h @ _exact_weight(rows_of(module, "down_proj"), expert).t()
        rows = rows if down_bias is None else rows + down_bias[expert].double()
        y.index_add_(0, token, rows * weights[token, choice, None].double())
    return y


def _random_call(module: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """Normal tokens for distinct experts of equal weight, by a generator of its own."""
    config, weight = module.config, module.down_proj
    K, made = config.experts_per_token, {"dtype": torch.float32, "device": "cpu", "generator": torch.Generator().manual_seed(0)}
    x = torch.randn(TOKENS, config.hidden_size, **made).to(weight.device, weight.dtype)  # type: ignore[call-overload]
    experts = torch.rand(TOKENS, config.num_experts, **made).topk(K).indices  # type: ignore[call-overload]
    return x, experts.to(weight.device), torch.full((TOKENS, K), 1 / K, dtype=torch.float32, device=weight.device)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module into every place of another."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _calls(model: nn.Module, inputs: tuple[Any, ...], modules: dict[str, Experts]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The first tokens that each module of experts is called with when the model runs on ``inputs``."""
    calls: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    runs: dict[str, nn.Module] = {}

    def record(name: str, _: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        x, experts, weights = (tensor.detach().reshape(-1, tensor.shape[-1])[:TOKENS] for tensor in args)
        calls.setdefault(name, (x, experts, weights))

    hooks = []
    try:
        for name, module in modules.items():
            runs[name] = module
            if unwrapped("down_proj", module.down_proj) is not None:  # Experts cannot compute with tensors of that class
                runs[name] = QuantizedExperts.from_experts(module)
                _replace(model, module, runs[name])
            hooks.append(runs[name].register_forward_pre_hook(partial(record, name)))
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for name, run in runs.items():
            _replace(model, run, modules[name])
    return calls


@torch.no_grad()
def quantize_(
    model: nn.Module,
    dtype: str = "int8",
    *,
    group_size: int = 128,
    symmetric: bool = True,
    inputs: Tensor | tuple[Any, ...] | None = None,
) -> QuantizationReport:
    """Replace every :class:`Experts` inside a model by :class:`QuantizedExperts`, one after the other, in place.

    Args:
        model: what holds the experts, such as a :class:`MoE`.
        dtype: ``"int8"``, one scale per output, or ``"int4"``, one per group of inputs. torchao's Int8Tensor, in place of
            weights, is unwrapped as it is.
        group_size: 32, 64 or 128 inputs. For int4 only.
        symmetric: whether there are no zero points. For int4 only.
        inputs: an input of the model, or the tuple of its arguments. The model is run on it once, before, and errors of
            outputs are those of the first tokens that reach each module; without it they are those of random tokens.

    Returns:
        :class:`QuantizationReport`: relative errors of weights and outputs against float64, and bytes, of each module.

    Raises:
        TypeError: the model is no module, or itself an :class:`Experts`; or weights are of a class that is not known.
        ValueError: there are no experts to quantise, or they cannot be quantised so. Nothing is changed then.

    Example:
        >>> import torch
        >>> from fusedonemoe import MoE, quantize_
        >>> moe = MoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
        >>> report = quantize_(moe, "int8", inputs=torch.randn(10, 64))
        >>> moe.experts.gate_up_proj.dtype, report.layers[0].output_error < 0.02
        (torch.int8, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, Experts):
        raise TypeError("model must hold Experts, not be one, to have them replaced in place; see QuantizedExperts.from_experts")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    for name, parent in model.named_modules():
        if isinstance(parent, LoRAExperts) and any(isinstance(child, Experts) for child in parent.children()):
            raise ValueError(f"{name} must not be adapters, which read plain weights: merge and unload them first")
    if not modules:
        raise ValueError(f"model must hold Experts to quantise; there are none in this {type(model).__name__}")
    options: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric}
    for module in modules.values():  # what would fail fails now, before anything is replaced
        QuantizedExperts(module.config, dtype, **options, device="meta")
        for weight in (module._up_name, "down_proj"):
            source_of(module, weight, dtype)
    calls = {} if inputs is None else _calls(model, inputs if isinstance(inputs, tuple) else (inputs,), modules)
    layers = []
    for name in list(modules):
        module = modules.pop(name)  # whose weights nothing holds any more, once they are replaced
        module.unpack()  # they are read expert by expert below
        quantized = QuantizedExperts.from_experts(module, dtype, **options)
        call = calls.get(name) or _random_call(module)
        exact, actual = _exact_output(module, *call), quantized(*call).double()
        before = (rows_of(module, module._up_name), rows_of(module, "down_proj"))
        up_error, down_error = map(_weight_error, before, quantized.quantized_weights())
        output_error = _relative_rms(float((actual - exact).square().sum()), float(exact.square().sum()))
        size = sum(weight.numel() * weight.dtype.itemsize for weight in before)
        layers.append(QuantizedLayer(name, up_error, down_error, output_error, size, quantized.nbytes))
        _replace(model, module, quantized)
    return QuantizationReport(dtype, tuple(layers))
