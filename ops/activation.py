"""The activations between the two projections of an expert, forward and backward, as plain tensor arithmetic.

``z`` holds pre-activations ``[..., G]``. A plain expert has ``G = F`` and ``h = act(z)``; a gated one has ``G = 2F``, the
gate and up columns of which ``layout`` names the order, and ``h = act(gate) * up``.
"""

import torch
from torch import Tensor

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


def _act(v: Tensor, name: str) -> Tensor:
    match name:
        case "silu":
            return torch.nn.functional.silu(v)
        case "gelu":
            return torch.nn.functional.gelu(v)
        case "gelu_tanh":
            return torch.nn.functional.gelu(v, approximate="tanh")
        case "relu":
            return v.relu()
        case "relu2":
            return v.relu().square()
        case "sigmoid":
            return v.sigmoid()
        case "identity":
            return v.clone()
    raise AssertionError(f"unknown activation {name!r}")


def _act_backward(dh: Tensor, v: Tensor, name: str) -> Tensor:
    """``act'(v) * dh``."""
    match name:
        case "silu":
            return torch.ops.aten.silu_backward(dh, v)
        case "gelu":
            return torch.ops.aten.gelu_backward(dh, v)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(dh, v, approximate="tanh")
        case "relu":
            return torch.ops.aten.threshold_backward(dh, v, 0)
        case "relu2":
            return 2 * v.relu() * dh
        case "sigmoid":
            return torch.ops.aten.sigmoid_backward(dh, v.sigmoid())
        case "identity":
            return dh.clone()
    raise AssertionError(f"unknown activation {name!r}")


def activate(z: Tensor, act: Activation, *, reuse: bool = False) -> Tensor:
    """``h = act(z)`` or ``h = act(gate) * up``.

    Args:
        z: ``[..., G]`` pre-activations.
        act: which activation, and how gate and up are laid out.
        reuse: multiply into the activated gate's own memory, which saves one ``[..., F]`` tensor. Only where autograd
            is not recording.

    Returns:
        ``[..., F]`` in the dtype of ``z``.
    """
    if act.layout == PLAIN:
        return _act(z, act.name)
    gate, up = split_gate_up(z, act.layout)
    if act.name == "swiglu_oai":
        gate = gate.clamp(max=act.limit)
        return (up.clamp(-act.limit, act.limit) + 1) * (gate * torch.sigmoid(act.alpha * gate))
    h = _act(gate, act.name)
    return h.mul_(up) if reuse else h * up


def activate_backward(dh: Tensor, z: Tensor, act: Activation) -> Tensor:
    """Gradient of :func:`activate` with respect to ``z``.

    Args:
        dh: ``[..., F]`` gradient of ``h``.
        z: ``[..., G]`` pre-activations.
        act: as in the forward.

    Returns:
        ``[..., G]``. A clamp passes the gradient on its boundary and stops it outside.
    """
    if act.layout == PLAIN:
        return _act_backward(dh, z, act.name)
    gate, up = split_gate_up(z, act.layout)
    if act.name == "swiglu_oai":
        g, u = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        s = torch.sigmoid(act.alpha * g)
        dgate = dh * (u + 1) * s * (1 + act.alpha * g * (1 - s))
        return join_gate_up(dgate * (gate <= act.limit), dh * g * s * (up.abs() <= act.limit), act.layout)
    return join_gate_up(_act_backward(dh * up, gate, act.name), dh * _act(gate, act.name), act.layout)
