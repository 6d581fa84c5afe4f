"""Derivatives of another order or mode: a call refuses them, naming ``dense``, or they are right. ``dense`` does not refuse."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.fuzz.bounds import Bounded
from tests.fuzz.draw import HALVES, Draw
from tests.fuzz.trial import Expected, Given, Trial, widened

REFUSALS = ("dense", "sparse=True")  # what a refusal names: the way out


def _refused(error: Exception, trial: Trial, what: str) -> list[str]:
    """Return what is wrong with a refusal."""
    if trial.impl == "dense":
        return [f"impl='dense' refuses {what}: {error}"]
    return [] if any(name in str(error) for name in REFUSALS) else [f"{what} ended in {type(error).__name__}: {str(error)[:300]}"]


def _inner(pairs: list[tuple[Any, Any]]) -> float:
    return float(sum((np.asarray(a) * np.asarray(b)).sum() for a, b in pairs))


def _directions(draw: Draw, trial: Trial, wanted: list[str]) -> dict[str, Tensor]:
    shapes = {name: trial.inputs[name] for name in wanted}
    return {name: torch.from_numpy(np.asarray(draw.normal(*like.shape))).to(like.dtype) for name, like in shapes.items()}


def forward_mode(
    trial: Trial, draw: Draw, wanted: list[str], upstream: dict[str, Tensor], exact: Expected, compiled: bool
) -> list[str]:
    """``<dy, J v>`` has to be ``<J^T dy, v>``, of which the right side is known; a tangent that is missing counts as zeros."""
    is_half = any(tensor.dtype in HALVES for tensor in trial.inputs.values())  # a tangent may overflow where nothing else does
    if is_half or not all(np.isfinite(exact.gradients[name].error).all() for name in wanted):
        return []
    directions = _directions(draw, trial, wanted)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = trial.call(trial.inputs | dict(zip(wanted, values, strict=True)))
        return tuple(output for output in outputs if output.is_floating_point())

    # torch makes no dual number of an expanded tensor, and asks for the strides of the tangent.
    values = tuple(trial.inputs[name].clone(memory_format=torch.contiguous_format) for name in wanted)
    tangents = tuple(directions[name] for name in wanted)
    found: list[Tensor | None]
    try:
        if compiled:
            torch._dynamo.reset()
            jvp = torch.compile(lambda values, tangents: torch.func.jvp(call, values, tangents)[1], backend="aot_eager")
            found = list(jvp(values, tangents))
        else:
            with forward_ad.dual_level():
                outputs = call(*map(forward_ad.make_dual, values, tangents))
                found = [forward_ad.unpack_dual(output).tangent for output in outputs]
    except (RuntimeError, NotImplementedError) as error:
        while forward_ad._current_level >= 0:  # a compilation that fails inside of jvp leaves its level behind
            forward_ad.exit_dual_level()
        return _refused(error, trial, "a derivative in forward mode")
    floating = [name for name, (dtype, _) in trial.outputs.items() if dtype.is_floating_point]
    left = []
    for name, tangent in zip(floating, found, strict=True):
        t = np.zeros(trial.outputs[name][1]) if tangent is None else widened(tangent)
        if name in upstream:
            left.append((widened(upstream[name]), t))
        elif t.any():  # reverse mode records nothing for it: no input that is wanted changes it
            return [f"forward mode gives {name} a derivative, reverse mode gives it none"]
    gradients = {name: exact.gradients[name] for name in wanted}
    right = [(g.value.reshape(-1), widened(directions[name]).reshape(-1)) for name, g in gradients.items()]
    eps = max(torch.finfo(trial.inputs[name].dtype).eps for name in wanted)
    size = sum(float(np.abs(a * b).sum()) for a, b in left + right)
    if not np.isfinite(size):  # zero times an infinity: nothing is promised
        return []
    allowed = 4 * sum(_error(g, directions[name]) for name, g in gradients.items()) + 32 * eps * size
    if not abs(_inner(left) - _inner(right)) <= allowed:
        return [f"forward mode gives {_inner(left)!r}, reverse mode {_inner(right)!r}, allowed {allowed:.3g}"]
    return []


def _error(gradient: Bounded, direction: Tensor) -> float:
    return float((gradient.error.reshape(-1) * np.abs(widened(direction)).reshape(-1)).sum())


def second_derivative(
    trial: Trial, draw: Draw, wanted: list[str], upstream: dict[str, Tensor], outputs: dict[str, Tensor]
) -> list[str]:
    """The derivative of ``<g, r>`` along v, against the exact gradients a little to both sides, where that converges."""
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in trial.inputs.items()}
    r, v = _directions(draw, trial, wanted), _directions(draw, trial, wanted)
    sources = [leaves[name] for name in wanted]
    try:
        made = dict(zip(trial.outputs, trial.call(leaves), strict=True))
        names = [name for name in made if name in upstream]
        first = torch.autograd.grad(
            [made[name] for name in names], sources, [upstream[name] for name in names], create_graph=True
        )
        total = sum(((g * r[name]).sum() for g, name in zip(first, wanted, strict=True)), torch.zeros(()))
        if not total.requires_grad:
            return []
        second = torch.autograd.grad(total, sources, allow_unused=True)
    except RuntimeError as error:
        return _refused(error, trial, "a second derivative")
    if any(trial.inputs[name].dtype != torch.float64 for name in wanted) or not sources[0].numel():
        return []
    got = _inner([(widened(g), widened(v[name])) for g, name in zip(second, wanted, strict=True) if g is not None])

    def moved(step: float) -> float:
        inputs = trial.inputs | {name: trial.inputs[name] + step * v[name] for name in wanted}
        gradients = trial.exact(Given(inputs, outputs, upstream)).gradients
        if not all(name in gradients and np.isfinite(gradients[name].error).all() for name in wanted):
            return float("nan")
        return _inner([(gradients[name].value.reshape(-1), widened(r[name]).reshape(-1)) for name in wanted])

    steps = (1e-4, 5e-5)
    if any((trial.inputs[name] + steps[1] * v[name] == trial.inputs[name]).any() for name in wanted):
        return []  # numbers too large to be moved by a step
    far, near = ((moved(step) - moved(-step)) / (2 * step) for step in steps)
    if not abs(far - near) <= 1e-4 * abs(near):  # a kink, or numbers too large or too small for differences
        return []
    return [] if abs(got - near) <= 1e-2 * abs(near) + 1e-6 else [f"the second derivative is {got!r}, differences say {near!r}"]
