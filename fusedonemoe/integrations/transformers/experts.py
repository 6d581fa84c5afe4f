"""transformers' modules of experts: their form, the activation that they compute, and the function that computes them.

An activation is found without its name. What is read for that are constants only (a function, a class, a few numbers), so that
a graph is guarded on those and one graph serves every layer of a model.
"""

import itertools
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fusedonemoe import functional as F
from fusedonemoe.functional.experts import run_layer
from fusedonemoe.integrations.transformers.registry import default_gates, import_hf
from fusedonemoe.layers import Experts
from fusedonemoe.layers.form import ExpertsForm
from fusedonemoe.layers.form import form_of as form_of_experts
from fusedonemoe.ops import library
from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.options import activation_options
from fusedonemoe.ops.records import GATE_UP_LAYOUTS, PLAIN, Activation

Result = TypeVar("Result")
_Linear = tuple[Tensor, Tensor | None]  # weight and bias
# The attributes in which transformers' classes keep the numbers of their gates.
_NUMBERS = ("limit", "alpha", "swiglu_limit", "swiglu_alpha")
_ALPHA, _LIMIT = 1.702, 7.0
# Magnitudes at which a gate is compared, beside those of its own numbers: a clamp is only seen from beyond it.
_MAGNITUDES = (0.3, 3.0, 30.0, 1e4)
_TOLERANCE = 1e-5  # relative; a gate may compute in float32. The two forms of gelu differ by 5e-4.


def _constant(function: Callable[..., Result]) -> Callable[..., Result]:
    """Cache a function, which is a constant to torch.compile: it would look through the cache by itself."""
    cached = lru_cache(maxsize=256)(function)

    @torch.compiler.assume_constant_result
    def constant(*arguments: Any) -> Result:
        return cached(*arguments)

    return constant


@_constant
def _name_of(function_or_class: Any) -> str | None:
    """The operators' name of the activation that a class or a function computes."""
    hf, functional = import_hf("transformers.activations"), nn.functional
    computing = {
        "silu": (nn.SiLU, hf.SiLUActivation, functional.silu),
        "gelu": (hf.GELUActivation, functional.gelu),
        "gelu_tanh": (hf.GELUTanh, hf.NewGELUActivation),
        "relu": (nn.ReLU, functional.relu),
        "relu2": (hf.ReLUSquaredActivation,),
        "sigmoid": (nn.Sigmoid, torch.sigmoid),
        "identity": (hf.LinearActivation,),
    }
    return next((name for name, known in computing.items() if function_or_class in known), None)


def _name_of_act(act_fn: Any) -> str | None:
    """The operators' name of an ``act_fn``; None for one that they do not have."""
    if isinstance(act_fn, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act_fn.approximate)
    return _name_of(type(act_fn) if isinstance(act_fn, nn.Module) else act_fn)


def _agrees(gate: Callable[[Tensor], Tensor], z: Tensor, candidate: Activation) -> bool:
    with torch.device("cpu"):  # what a gate makes beside its argument
        expected, actual = activate(z, candidate), gate(z)
    if actual.shape != expected.shape:
        return False
    scale = expected.abs().clamp(min=1e-3)
    return bool(((actual - expected).abs() <= _TOLERANCE * scale).all())


@_constant
def _gate_by_numbers(
    gate: Callable[..., Tensor], act_name: str | None, numbers: tuple[float | None, ...]
) -> tuple[str, str, float, float] | None:
    """The fields of the :class:`Activation` that a gate of its own computes, found by comparing numbers; or None.

    The gate is called on a stand-in that has the activation and the numbers and nothing else: a gate that reads more, be it
    a parameter or the configuration, is one that a constant cannot describe.
    """
    named = {name: number for name, number in zip(_NUMBERS, numbers, strict=True) if number is not None}
    finite = sorted({abs(n) for n in named.values() if n == n and abs(n) != float("inf")})
    limits = [named[n] for n in ("swiglu_limit", "limit") if n in named] or [_LIMIT]
    alphas = [named[n] for n in ("swiglu_alpha", "alpha") if n in named] or [_ALPHA]
    candidates = [Activation("swiglu_oai", *values) for values in itertools.product(GATE_UP_LAYOUTS, alphas, limits)]
    stand_in = types.SimpleNamespace(**named)
    if act_name is not None:
        stand_in.act_fn = lambda v: activate(v, Activation(act_name, PLAIN, _ALPHA, _LIMIT))
        candidates += [Activation(act_name, layout, _ALPHA, _LIMIT) for layout in GATE_UP_LAYOUTS]
    try:
        # Also in the middle of a trace: these are real numbers, and none of the traced program's.
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
            z = torch.cat([z * magnitude for magnitude in (*_MAGNITUDES, *finite)])
            found = next((c for c in candidates if _agrees(lambda v: gate(stand_in, v), z, c)), None)
    except Exception:  # Somebody else's code, called on what it may not expect: whatever it raises, it is unknown to us.
        return None
    return None if found is None else (found.name, found.layout, found.alpha, found.limit)


def activation_of(experts: nn.Module) -> Activation | None:
    """Return the activation between an experts module's projections; None where only its own code computes it."""
    act_name = _name_of_act(getattr(experts, "act_fn", None))
    if not getattr(experts, "has_gate", True):
        return None if act_name is None else Activation(act_name, PLAIN, _ALPHA, _LIMIT)
    # Replaced on the instance, by somebody who had a reason. Dynamo guards an attribute that is read, and no name that __dict__
    # lacks.
    if not isinstance(getattr(experts, "_apply_gate", None), types.MethodType) or "_apply_gate" in experts.__dict__:
        return None
    kind: Any = type(experts)
    gate = kind._apply_gate
    if _is_default(gate):
        return None if act_name is None else Activation(act_name, "gate_up", _ALPHA, _LIMIT)
    numbers = tuple(_number(getattr(experts, name, None)) for name in _NUMBERS)
    found = _gate_by_numbers(gate, act_name, numbers)
    return None if found is None else Activation(*found)


@_constant
def _is_default(gate: Any) -> bool:
    return gate in default_gates()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def form_of(module: nn.Module) -> ExpertsForm | None:
    """Return the form of experts, ours or transformers'; None for another module. Raise for what the operators do not have."""
    if isinstance(module, Experts):
        return form_of_experts(module)
    down = dict(module.named_parameters(recurse=False)).get("down_proj")
    if down is None or down.dim() != 3 or not (hasattr(module, "num_experts") and hasattr(module, "_apply_gate")):
        return None  # without the attributes that transformers' decorator of experts sets
    kind = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{kind} normalises each expert's output, which the operators do not")
    gated = getattr(module, "has_gate", True)
    up = "gate_up_proj" if gated else "up_proj"
    act = activation_of(module)
    if act is None:
        own_gate = "_apply_gate" in vars(module) or getattr(type(module), "_apply_gate", None) not in default_gates()
        if gated and own_gate:
            raise ValueError(f"{kind} has a gate of its own, which the operators do not")
        name = type(getattr(module, "act_fn", None)).__name__
        raise ValueError(f"{kind} has the activation {name}, which the operators do not")
    has_bias = getattr(module, "has_bias", False)
    return ExpertsForm(
        up=up,
        up_bias=f"{up}_bias" if has_bias else None,
        down_bias="down_proj_bias" if has_bias else None,
        transposed=getattr(module, "is_transposed", False),
        **activation_options(act),
    )


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run an experts module of transformers: ``y_t = sum_k w_tk expert_{e_tk}(x_t)``.

    The module's attributes have the defaults of the first version of transformers' contract, because each later version has
    added some. The number of experts is that of the weights: under expert parallelism a module has fewer than its
    configuration says. Any id outside it is skipped, be it ``E``, which is transformers' word for "not here", or -1.
    transformers passes the arguments by position: ``[T, D]``, ``[T, K]`` ids, ``[T, K]`` weights of any float dtype; the result
    is ``[T, D]`` in the dtype of ``hidden_states``.
    """
    has_gate = getattr(experts, "has_gate", True)
    up = experts.gate_up_proj if has_gate else experts.up_proj
    transposed = getattr(experts, "is_transposed", False)
    up_bias = down_bias = None
    if getattr(experts, "has_bias", False):
        up_bias, down_bias = experts.gate_up_proj_bias if has_gate else experts.up_proj_bias, experts.down_proj_bias
    x = hidden_states
    if x.dtype != up.dtype and library.autocast_dtype(x.device.type) is None:
        x = x.to(up.dtype)
    act = None if getattr(experts, "has_post_expert_norm", False) else activation_of(experts)
    if act is None:
        y = _unfused(experts, x, top_k_index, top_k_weights, (up, up_bias), (experts.down_proj, down_bias), transposed)
    else:
        down, save_percent = experts.down_proj, 100
        y = run_layer(x, top_k_index, top_k_weights, up, down, up_bias, down_bias, act, save_percent, transposed, "auto")
    return y if y.dtype == hidden_states.dtype else y.to(hidden_states.dtype)


def _unfused(
    experts: Any, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, up: _Linear, down: _Linear, transposed: bool
) -> Tensor:
    """Two grouped products with the module's own code between and behind them; a row for every token and choice."""
    (T, K), D, E = experts_TK.shape, x_TD.shape[-1], up[0].shape[0]
    ids_N1 = experts_TK.reshape(-1, 1)
    inside_N1 = (ids_N1 >= 0) & (ids_N1 < E)
    x_ND = x_TD[:, None].expand(T, K, D).reshape(T * K, D)
    z_NG = _grouped(x_ND, ids_N1, *up, transposed)
    h_NF = experts._apply_gate(z_NG) if getattr(experts, "has_gate", True) else experts.act_fn(z_NG)
    y_ND = _grouped(h_NF, ids_N1, *down, transposed)
    if getattr(experts, "has_post_expert_norm", False):
        # A row of zeros, which a skipped id has, is what a norm has no gradient at.
        y_ND = experts.post_expert_norm(torch.where(inside_N1, y_ND, 1))
    # Not times a weight of zero: what the module made of a skipped row need not be finite.
    y_TKD = torch.where(inside_N1, y_ND, 0).view(T, K, D)
    wide = torch.promote_types(torch.promote_types(y_TKD.dtype, weights_TK.dtype), torch.float32)
    weights_TK = torch.where(inside_N1.view(T, K), weights_TK, 0)
    return (y_TKD.to(wide) * weights_TK.to(wide)[..., None]).sum(1).to(y_ND.dtype)


def _grouped(rows_NA: Tensor, ids_N1: Tensor, weight: Tensor, bias_EB: Tensor | None, transposed: bool) -> Tensor:
    """``rows[n] @ weight[id_n] + bias[id_n]``, zeros for an id of no expert: both are sums over one choice of weight 1."""
    ones_N1 = torch.ones(ids_N1.shape, dtype=torch.float32, device=rows_NA.device)
    y_NB = F.experts_merged(rows_NA, ids_N1, ones_N1, weight if transposed else weight.transpose(1, 2))
    if bias_EB is None:
        return y_NB
    return y_NB + F.experts_values(ids_N1, ones_N1, bias_EB).to(y_NB.dtype)
