"""Find, without its name, the activation that an experts module computes between its two projections.

What is read are constants only (a function, a class, a few numbers), so that a graph is guarded on those and one graph
serves every layer of a model.
"""

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fusedonemoe.integrations.transformers.registry import activations, default_gates
from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.records import GATE_UP_LAYOUTS, PLAIN, Activation

Result = TypeVar("Result")
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
    hf, functional = activations(), nn.functional
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
    candidates = [
        Activation("swiglu_oai", layout, alpha, limit) for layout in GATE_UP_LAYOUTS for alpha in alphas for limit in limits
    ]
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
    if "_apply_gate" in experts.__dict__:
        return None  # replaced on the instance, by somebody who had a reason
    gate = getattr(type(experts), "_apply_gate", None)
    if gate is None:
        return None
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
