"""The expert layer with low-rank adapters."""

import math

import torch
from torch import Tensor

from fusedonemoe.checks import (
    check_dim,
    check_float,
    check_like_x,
    check_one_of,
    check_routing,
    check_same_device,
    check_save_percent,
    check_shape,
)
from fusedonemoe.functional.calls import as_rows, choose_impl, records_gradients, refuse_transforms, with_leading
from fusedonemoe.ops import library
from fusedonemoe.ops.activation import ACTIVATIONS, GATE_UP_LAYOUTS, PLAIN

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
    """:func:`experts_mlp` with a low-rank adapter beside each projection, factored.

    ``z = x Wup_e + s1 (x A1_e) B1_e + bup_e``, ``y_t = sum_j w_tj (act(z) Wdown_e + s2 (act(z) A2_e) B2_e + bdown_e)``,
    ``e = experts_tj``. The product ``B A`` of no expert is formed, and a projection that requires no gradient costs none of
    its memory and arithmetic.

    Args:
        x: ``[..., D]`` float64, float32, bfloat16 or float16.
        experts: ``[..., K]`` ids of any integer dtype; those outside ``[0, E)`` contribute zero.
        weights: ``[..., K]`` routing weights of any float dtype.
        gate_up_proj: ``[E, 2F, D]``, or ``[E, F, D]`` when plain; dtype of x.
        down_proj: ``[E, D, F]``, dtype of x.
        gate_up_A: ``[E, r, D]`` of any float dtype, computed with in that of x; None, with ``gate_up_B``, for no adapter.
        gate_up_B: ``[E, 2F, r]`` (``[E, F, r]`` when plain), rows as those of ``gate_up_proj``. Whether the projections are
            ``transposed`` or not, factors are not.
        down_A: ``[E, r, F]``; the two adapters may have different ranks.
        down_B: ``[E, D, r]``.
        gate_up_scale: ``s1``, usually ``alpha / r``.
        down_scale: ``s2``.
        gate_up_bias: ``[E, 2F]`` or ``[E, F]``.
        down_bias: ``[E, D]``.
        activation: as in :func:`experts_mlp`.
        gated: as in :func:`experts_mlp`.
        gate_up_layout: as in :func:`experts_mlp`.
        transposed: the projections come as ``[E, D, 2F]`` and ``[E, F, D]``; read as views, never copied.
        swiglu_alpha: slope of ``swiglu_oai``.
        swiglu_limit: clamp of ``swiglu_oai``.
        save_percent: 0 to 100, the share of pre-activation rows kept for the backward.
        impl: ``"auto"``, ``"dense"``, ``"grouped"`` or ``"triton"``. The compiled CPU kernels have no adapters: on CPU,
            ``"auto"`` is ``"grouped"``.

    Returns:
        ``[..., D]`` in the dtype of x.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or name that does not fit, or an ``impl`` that cannot run here.

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
    check_routing(x, experts, weights)
    check_one_of("activation", activation, ACTIVATIONS)
    check_one_of("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
    check_save_percent(save_percent)
    if activation == "swiglu_oai" and not gated:
        raise ValueError("activation 'swiglu_oai' is gated by definition, got gated=False")
    check_like_x("gate_up_proj", gate_up_proj, x)
    check_like_x("down_proj", down_proj, x)
    check_dim("gate_up_proj", gate_up_proj, "E, D, G" if transposed else "E, G, D")
    up_EGD = gate_up_proj.transpose(1, 2) if transposed else gate_up_proj
    E, G, D = up_EGD.shape
    if E < 1:
        raise ValueError("gate_up_proj must hold at least one expert, got E = 0")
    if gated and G % 2:
        raise ValueError(f"gate_up_proj must have as many gate rows as up rows, got {G} in all")
    if x.shape[-1] != D:
        raise ValueError(f"x must have shape [..., {D}] to fit gate_up_proj, got {tuple(x.shape)}")
    F = G // 2 if gated else G
    check_shape("down_proj", down_proj, (E, F, D) if transposed else (E, D, F))
    down_EDF = down_proj.transpose(1, 2) if transposed else down_proj
    for name, bias, width in (("gate_up_bias", gate_up_bias, G), ("down_bias", down_bias, D)):
        if bias is not None:
            check_like_x(name, bias, x)
            check_shape(name, bias, (E, width))
    up = _factors("gate_up", gate_up_A, gate_up_B, gate_up_scale, up_EGD, x)
    down = _factors("down", down_A, down_B, down_scale, down_EDF, x)
    chosen = choose_impl("experts_mlp_lora", impl, x, experts, (D, G, F), up_EGD, down_EDF)
    flat = (as_rows(x), as_rows(experts), as_rows(weights))
    parameters = (up_EGD, down_EDF, gate_up_bias, down_bias, *up[:2], *down[:2])
    numbers = (up[2], down[2], activation, gate_up_layout if gated else PLAIN, float(swiglu_alpha), float(swiglu_limit))
    if chosen == "dense":
        return with_leading(_ops.experts_mlp_lora_dense(*flat, *parameters, *numbers, library.BUILD), x)
    refuse_transforms()
    kept = save_percent if records_gradients(x, weights, *parameters) else 0
    return with_leading(_ops.experts_mlp_lora(*flat, *parameters, *numbers, kept, library.BUILD, chosen)[0], x)
