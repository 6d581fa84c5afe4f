"""Expert weights in the forms that the layers read: stacked, packed."""

import torch
from torch import Tensor

from fusedonemoe.checks import check_dim, check_float, check_one_of, check_same_device, check_shape
from fusedonemoe.functional.arguments import intermediate_size
from fusedonemoe.ops import PackedExperts, library
from fusedonemoe.ops.activation import GATE_UP_LAYOUTS, PLAIN, Activation
from fusedonemoe.ops.choice import refusal


def stack_gate_up(gate_proj: Tensor, up_proj: Tensor) -> Tensor:
    """Join separate gate and up weights into the ``[E, 2F, D]`` that :func:`experts_mlp` reads. Copies: do it once.

    Args:
        gate_proj: ``[E, F, D]``.
        up_proj: ``[E, F, D]``.

    Returns:
        ``[E, 2F, D]``, gate rows first.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: the shapes differ or are not three-dimensional.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.stack_gate_up(torch.randn(4, 32, 16), torch.randn(4, 32, 16)).shape
        torch.Size([4, 64, 16])
    """
    check_float("gate_proj", gate_proj)
    check_float("up_proj", up_proj)
    check_dim("gate_proj", gate_proj, "E, F, D")
    check_shape("up_proj", up_proj, tuple(gate_proj.shape))
    return torch.cat((gate_proj, up_proj), dim=1)


def pack_experts(
    gate_up_proj: Tensor, down_proj: Tensor, *, gated: bool = True, gate_up_layout: str = "gate_up"
) -> PackedExperts:
    """Copy expert weights into the order in which the CPU kernels read them, for inference.

    With few rows per expert the kernels are bound by reading the weights, and the copy is read as one stream. The weights
    stay what counts: a call with a copy of weights that were changed or replaced since raises. Changes are seen as autograd
    sees them; a write through ``.data`` escapes both.

    Args:
        gate_up_proj: ``[E, 2F, D]``, or ``[E, F, D]`` when plain; float32, bfloat16 or float16, contiguous, on CPU.
        down_proj: ``[E, D, F]``, of the same dtype.
        gated: as in :func:`experts_mlp`.
        gate_up_layout: likewise.

    Returns:
        :class:`PackedExperts`, for the argument ``packed`` of :func:`experts_mlp`; ``nbytes`` tells its size, about that of
        the weights. It keeps the weights alive.

    Raises:
        TypeError: an argument that is no floating-point tensor, or dtypes that differ.
        ValueError: a shape that does not fit, or no CPU kernels for such weights here; the message says why.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> gate_up_proj, down_proj = torch.randn(4, 64, 16), torch.randn(4, 16, 32)
        >>> packed = F.pack_experts(gate_up_proj, down_proj)
        >>> x, experts, weights = torch.randn(5, 16), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
        >>> y = F.experts_mlp(x, experts, weights, gate_up_proj, down_proj, packed=packed)
        >>> torch.equal(y, F.experts_mlp(x, experts, weights, gate_up_proj, down_proj))
        True
    """
    check_float("gate_up_proj", gate_up_proj)
    check_one_of("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
    check_dim("gate_up_proj", gate_up_proj, "E, G, D")
    check_float("down_proj", down_proj)
    check_same_device("down_proj", down_proj, "gate_up_proj", gate_up_proj.device)
    if down_proj.dtype != gate_up_proj.dtype:
        raise TypeError(f"down_proj must have the dtype of gate_up_proj ({gate_up_proj.dtype}), got {down_proj.dtype}")
    E, G, D = gate_up_proj.shape
    F = intermediate_size(E, G, gated)
    check_shape("down_proj", down_proj, (E, D, F))
    contiguous = gate_up_proj.is_contiguous() and down_proj.is_contiguous()
    reason = refusal(
        "cpu", device_type=gate_up_proj.device.type, dtype=gate_up_proj.dtype, widths=(D, G, F), contiguous=contiguous
    )
    if reason is None and (gate_up_proj.is_inference() or down_proj.is_inference()):
        reason = "tensors made in inference mode do not tell when they are changed"
    if reason:
        raise ValueError(f"gate_up_proj and down_proj cannot be packed: {reason}")
    return library.pack(gate_up_proj, down_proj, Activation("identity", gate_up_layout if gated else PLAIN, 0.0, 0.0))
