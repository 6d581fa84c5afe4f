"""Expert weights in the form that the layers read: stacked."""

import torch
from torch import Tensor

from fusedonemoe.checks import check_dim, check_float, check_shape


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
