"""The arguments that the expert layers have in common: their checks, and the form in which the operators take them."""

from torch import Tensor

from fusedonemoe.checks import check_dim, check_fits, check_like_x, check_shape


def intermediate_size(E: int, G: int, gated: bool) -> int:
    """``F`` of an up-projection ``[E, G, D]``: of at least one expert, with as many gate rows as up rows."""
    if E < 1:
        raise ValueError("gate_up_proj must hold at least one expert, got E = 0")
    if gated and G % 2:
        raise ValueError(f"gate_up_proj must have as many gate rows as up rows, got {G} in all")
    return G // 2 if gated else G


def projections(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *, gated: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    """The checked weights as ``[E, G, D]`` and ``[E, D, F]``: views where they come ``transposed``."""
    dtype, device = x.dtype, x.device
    if not isinstance(gate_up_proj, Tensor) or gate_up_proj.dtype != dtype or gate_up_proj.device != device:
        check_like_x("gate_up_proj", gate_up_proj, x)
    if not isinstance(down_proj, Tensor) or down_proj.dtype != dtype or down_proj.device != device:
        check_like_x("down_proj", down_proj, x)
    if gate_up_proj.dim() != 3:
        check_dim("gate_up_proj", gate_up_proj, "E, D, G" if transposed else "E, G, D")
    up_EGD = gate_up_proj.transpose(1, 2) if transposed else gate_up_proj
    E, G, D = up_EGD.shape
    F = G // 2 if gated else G
    if E < 1 or (gated and G % 2):
        intermediate_size(E, G, gated)
    if x.shape[-1] != D:
        check_fits(x, D, "gate_up_proj")
    expected = (E, F, D) if transposed else (E, D, F)
    if down_proj.shape != expected:
        check_shape("down_proj", down_proj, expected)
    return up_EGD, down_proj.transpose(1, 2) if transposed else down_proj


def check_biases(x: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Check the biases, where there are some, of an up-projection of this shape ``[E, G, D]``."""
    E, G, D = shape
    for name, bias, width in (("gate_up_bias", gate_up_bias, G), ("down_bias", down_bias, D)):
        if bias is not None:
            check_like_x(name, bias, x)
            check_shape(name, bias, (E, width))
