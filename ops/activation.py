"""The activations of an expert, forward and backward, as plain tensor arithmetic.

``z [..., G]``: ``h = act(z)`` with ``G = F``, or ``h = act(gate) * up`` with ``G = 2F`` in the order ``layout``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fusedonemoe.ops.records import PLAIN, Activation


def split_gate_up(z: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Views of the gate and the up columns."""
    if layout == "interleaved":
        return z[..., 0::2], z[..., 1::2]
    first, second = z.chunk(2, dim=-1)
    return (first, second) if layout == "gate_up" else (second, first)


def join_gate_up(gate: Tensor, up: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`split_gate_up`."""
    if layout == "interleaved":
        return torch.stack((gate, up), dim=-1).flatten(-2)
    return torch.cat((gate, up) if layout == "gate_up" else (up, gate), dim=-1)


_aten = torch.ops.aten
# act(v), and act'(v) * dh of dh and v.
_RULES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, _aten.silu_backward),
    "gelu": (functional.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda v: functional.gelu(v, approximate="tanh"),
        lambda dh, v: _aten.gelu_backward(dh, v, approximate="tanh"),
    ),
    "relu": (torch.relu, lambda dh, v: _aten.threshold_backward(dh, v, 0)),
    "relu2": (lambda v: v.relu().square(), lambda dh, v: 2 * v.relu() * dh),
    "sigmoid": (torch.sigmoid, lambda dh, v: _aten.sigmoid_backward(dh, v.sigmoid())),
    "identity": (torch.clone, lambda dh, _: dh.clone()),
}


def _rules(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    if name not in _RULES:
        raise AssertionError(f"unknown activation {name!r}")
    return _RULES[name]


def activate(z: Tensor, act: Activation, *, reuse: bool = False) -> Tensor:
    """``h = act(z)`` or ``h = act(gate) * up``, ``[..., F]`` in the dtype of ``z [..., G]``.

    ``reuse`` multiplies into the activated gate's own memory: only where autograd is not recording.
    """
    if act.layout == PLAIN:
        return _rules(act.name)[0](z)
    gate, up = split_gate_up(z, act.layout)
    if act.name == "swiglu_oai":
        gate = gate.clamp(max=act.limit)
        return (up.clamp(-act.limit, act.limit) + 1) * (gate * torch.sigmoid(act.alpha * gate))
    h = _rules(act.name)[0](gate)
    return h.mul_(up) if reuse else h * up


def activate_backward(dh: Tensor, z: Tensor, act: Activation) -> Tensor:
    """Gradient of :func:`activate` with respect to ``z``; a clamp passes it on its boundary and stops it outside."""
    if act.layout == PLAIN:
        return _rules(act.name)[1](dh, z)
    gate, up = split_gate_up(z, act.layout)
    if act.name == "swiglu_oai":
        g, u = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        s = torch.sigmoid(act.alpha * g)
        dgate = dh * (u + 1) * s * (1 + act.alpha * g * (1 - s))
        return join_gate_up(dgate * (gate <= act.limit), dh * g * s * (up.abs() <= act.limit), act.layout)
    value, gradient = _rules(act.name)
    return join_gate_up(gradient(dh * up, gate), dh * value(gate), act.layout)
