"""The expert layer with low-rank adapters."""

import math

import torch
from torch import Tensor

from fusedonemoe.checks import check_dim, check_float, check_routing, check_same_device, check_save_percent, check_shape
from fusedonemoe.functional.calls import as_rows, check_biases, choose_impl, projections, records_gradients, with_leading
from fusedonemoe.ops import library
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.options import make_activation

_ops = torch.ops.fusedonemoe


def _factors(
    name: str, A: Tensor | None, B: Tensor | None, scale: float, like: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, float]:
    """The checked factors of an adapter of ``like`` ``[E, out, in]``, in the dtype of x; of rank 0 where there is none."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not -math.inf < scale < math.inf:
        raise ValueError(f"{name}_scale must be a finite number, got {scale!r}")
    E, out, inner = like.shape
    if A is None or B is None:
        if A is not B:
            given, missing = ("A", "B") if B is None else ("B", "A")
            raise ValueError(f"{name}_{missing} must be given with {name}_{given}, got None")
        return x.new_empty(E, 0, inner), x.new_empty(E, out, 0), float(scale)
    for factor, tensor, meaning in (("A", A, "E, r, in"), ("B", B, "E, out, r")):
        check_float(f"{name}_{factor}", tensor)
        check_same_device(f"{name}_{factor}", tensor, "x", x.device)
        check_dim(f"{name}_{factor}", tensor, meaning)
    rank = A.shape[1]
    if rank < 1:
        raise ValueError(f"{name}_A must have a rank of at least 1, got shape {tuple(A.shape)}")
    check_shape(f"{name}_A", A, (E, rank, inner))
    check_shape(f"{name}_B", B, (E, out, rank))
    return A.to(x.dtype), B.to(x.dtype), float(scale)


def experts_mlp_lora(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_A: Tensor | None = None,
    gate_up_B: Tensor | None = None,
    down_A: Tensor | None = None,
    down_B: Tensor | None = None,
    gate_up_scale: float = 1.0,
    down_scale: float = 1.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    gate_up_layout: str = "gate_up",
    transposed: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    save_percent: int = 100,
    impl: str = "auto",
) -> Tensor:
    """Run :func:`experts_mlp` with a low-rank adapter on each projection, factored; what is not said here is as there.

    ``z = x Wup_e + s1 (x A1_e) B1_e + bup_e``, ``y_t = sum_j w_tj (act(z) Wdown_e + s2 (act(z) A2_e) B2_e + bdown_e)``,
    ``e = experts_tj``. The product ``B A`` of no expert is formed, and a projection that requires no gradient costs none of
    its memory and arithmetic.

    Args:
        gate_up_A: ``[E, r, D]`` of any float dtype, computed with in that of x; None, with ``gate_up_B``, for no adapter.
        gate_up_B: ``[E, 2F, r]`` (``[E, F, r]`` when plain), rows as those of ``gate_up_proj``. Whether the projections are
            ``transposed`` or not, factors are not.
        down_A: ``[E, r, F]``; the two adapters may have different ranks.
        down_B: ``[E, D, r]``.
        gate_up_scale: ``s1``, usually ``alpha / r``.
        down_scale: ``s2``.
        impl: ``"auto"``, ``"dense"``, ``"grouped"`` or ``"triton"``. The compiled CPU kernels have no adapters: on CPU,
            ``"auto"`` is ``"grouped"``.

    Source:
        LoRA (Hu et al. 2021, arXiv 2106.09685); layout of the factors after PEFT's ``target_parameters``.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> x, weights, experts = torch.randn(5, 16), torch.full((5, 2), 0.5), torch.randint(4, (5, 2))
        >>> gate_up_proj, down_proj = torch.randn(4, 2 * 32, 16), torch.randn(4, 16, 32)
        >>> A, B = torch.randn(4, 8, 16), torch.randn(4, 2 * 32, 8)
        >>> y = F.experts_mlp_lora(x, experts, weights, gate_up_proj, down_proj, gate_up_A=A, gate_up_B=B, gate_up_scale=2.0)
        >>> merged = F.experts_mlp(x, experts, weights, gate_up_proj + 2 * B @ A, down_proj)
        >>> torch.allclose(y, merged, rtol=1e-3, atol=1e-2)
        True
    """
    act = make_activation(activation, gated, gate_up_layout, swiglu_alpha, swiglu_limit)
    check_save_percent(save_percent)
    check_routing(x, experts, weights)
    up_EGD, down_EDF = projections(x, gate_up_proj, down_proj, gated=gated, transposed=transposed)
    (E, G, D), F = up_EGD.shape, down_EDF.shape[2]
    check_biases(x, gate_up_bias, down_bias, (E, G, D))
    up = _factors("gate_up", gate_up_A, gate_up_B, gate_up_scale, up_EGD, x)
    down = _factors("down", down_A, down_B, down_scale, down_EDF, x)
    chosen = choose_impl("experts_mlp_lora", impl, x, experts, (D, G, F), up_EGD, down_EDF)
    flat = (as_rows(x), as_rows(experts), as_rows(weights))
    parameters = (up_EGD, down_EDF, gate_up_bias, down_bias, *up[:2], *down[:2])
    if chosen == "dense":
        return with_leading(_ops.experts_mlp_lora_dense(*flat, *parameters, up[2], down[2], *act, library.BUILD), x)
    refuse_transforms()
    kept = save_percent if records_gradients(x, weights, *parameters) else 0
    return with_leading(_ops.experts_mlp_lora(*flat, *parameters, up[2], down[2], *act, kept, library.BUILD, chosen)[0], x)
