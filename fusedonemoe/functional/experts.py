"""The expert layers. Suffixes of tensor names: T tokens, D, F sizes, E experts, K of a token, G rows of the up-projection."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedonemoe import checks
from fusedonemoe.functional import calls
from fusedonemoe.functional.calls import as_rows, check_biases, choose_impl, projections, with_leading
from fusedonemoe.functional.packed import PackedExperts, check_packed, home_weights, refuse_packed_training
from fusedonemoe.ops import library
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.options import make_activation
from fusedonemoe.ops.portable import experts_merged_portable, experts_mlp_portable
from fusedonemoe.ops.records import MLP_ARGUMENTS, PLAIN, Activation

_ops = torch.ops.fusedonemoe


def _portable(*arguments: Any) -> Tensor:
    return experts_mlp_portable(MLP_ARGUMENTS.call(arguments))


def experts_mlp(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor | None = None,
    down_proj: Tensor | None = None,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    gate_up_layout: str = "gate_up",
    transposed: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    save_percent: int = 100,
    packed: PackedExperts | None = None,
    impl: str = "auto",
) -> Tensor:
    """Run each token through its experts' MLPs and sum the results by routing weight.

    Gated: ``y_t = sum_j w_tj ((act(x_t Wg_e + bg_e) * (x_t Wu_e + bu_e)) Wd_e + bd_e)``, ``e = experts_tj``. Plain:
    ``y_t = sum_j w_tj (act(x_t Wu_e + bu_e) Wd_e + bd_e)``. An id outside ``[0, E)`` contributes zero, and gets none.

    Args:
        x: ``[..., D]`` float64, float32, bfloat16 or float16.
        experts: ``[..., K]`` ids of any integer dtype.
        weights: ``[..., K]`` routing weights of any float dtype (float32 beside a bfloat16 x is usual).
        gate_up_proj: ``[E, 2F, D]`` gate and up rows, or the up rows ``[E, F, D]`` when plain; dtype of x.
        down_proj: ``[E, D, F]``, dtype of x.
        gate_up_bias: ``[E, 2F]`` (laid out as the rows of ``gate_up_proj``), or ``[E, F]`` when plain.
        down_bias: ``[E, D]``; multiplied by the routing weight like the rest of the expert's output.
        activation: ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``relu``, ``relu2`` (relu squared), ``sigmoid``, ``identity``,
            or ``swiglu_oai``, GPT-OSS's clamped SwiGLU ``(u + 1) g sigmoid(alpha g)``.
        gated: whether ``gate_up_proj`` holds gate and up.
        gate_up_layout: rows of ``gate_up_proj``: ``gate_up`` (Hugging Face), ``up_gate`` (MoMoE), ``interleaved`` (GPT-OSS).
        transposed: weights come as ``[E, D, 2F]`` and ``[E, F, D]`` (GPT-OSS); read as views, never copied.
        swiglu_alpha: slope of ``swiglu_oai``.
        swiglu_limit: clamp of ``swiglu_oai``.
        save_percent: 0 to 100, the share of pre-activation rows kept for the backward; the rest is computed again there, for
            the same gradients. ``dense`` is left to autograd and keeps everything.
        packed: what :func:`pack_experts` made, in place of both weights, for calls with ``impl`` ``"auto"`` or ``"cpu"`` that
            record no gradients. The same bits. If autocast computes in another dtype, each call unpacks the weights first.
        impl: ``"auto"``, ``"dense"`` (masked batched matmul, derivatives of every order), ``"grouped"`` (sorted rows),
            ``"cpu"`` (kernels that are compiled on first use; contiguous weights, no float64), ``"triton"`` (GPU kernels;
            no float64) or ``"portable"`` (torch's own operators only, for export; may read a number from the device).

    Returns:
        ``[..., D]`` in the dtype of x. Products accumulate in float32 for half precision; each written tensor is rounded
        once; each row is written once, in a fixed order of summation.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names, or an ``impl`` that cannot run here.
        RuntimeError: the weights are packed, and the call records gradients or is exported.

    Source:
        Shazeer et al. 2017 (arXiv 1701.06538); backward after SonicMoE (arXiv 2512.14080) section 3.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> x, router = torch.randn(5, 16), torch.randn(16, 4)
        >>> gate_up_proj, down_proj = torch.randn(4, 2 * 32, 16), torch.randn(4, 16, 32)
        >>> weights, experts = F.route(x @ router, top_k=2)
        >>> F.experts_mlp(x, experts, weights, gate_up_proj, down_proj).shape
        torch.Size([5, 16])
    """
    act = make_activation(activation, gated, gate_up_layout, swiglu_alpha, swiglu_limit)
    checks.check_save_percent(save_percent)
    if packed is not None:
        if gate_up_proj is not None or down_proj is not None:
            raise TypeError("give either gate_up_proj and down_proj or packed, which holds the weights, got both")
        return run_packed(x, experts, weights, packed, gate_up_bias, down_bias, act, save_percent, transposed, impl)
    if gate_up_proj is None or down_proj is None:
        missing = "gate_up_proj" if gate_up_proj is None else "down_proj"
        raise TypeError(f"{missing} must be a torch.Tensor, got NoneType")
    rest = (gate_up_bias, down_bias, act, save_percent, transposed, impl)
    return run_experts(x, experts, weights, gate_up_proj, down_proj, *rest)


def run_packed(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    packed: PackedExperts,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: Activation,
    save_percent: int,
    transposed: bool,
    impl: str,
) -> Tensor:
    """Run :func:`experts_mlp` on packed weights, with a checked activation and percentage."""
    checks.check_routing(x, experts, weights)
    check_packed(packed, x, act.layout, transposed, impl)
    up, down = packed._homes
    check_biases(x, gate_up_bias, down_bias, (packed.up.shape[0], up.rows, up.width))
    refuse_packed_training(x, weights, packed.up, packed.down, gate_up_bias, down_bias)
    autocast = library.autocast_dtype(x.device.type)
    if autocast is not None and (x.dtype is torch.float64 or {packed.up.dtype, packed.down.dtype} != {autocast}):
        # The kernels have no panels of one dtype for rows of another.
        biases = gate_up_bias, down_bias
        return run_experts(x, experts, weights, *home_weights(packed), *biases, act, save_percent, transposed, impl)
    parameters = (packed.up, packed.down, gate_up_bias, down_bias, down.width, *act, library.BUILD)
    return with_leading(library.experts_mlp_packed(as_rows(x), as_rows(experts), as_rows(weights), *parameters), x)


def run_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: Activation,
    save_percent: int,
    transposed: bool,
    impl: str,
) -> Tensor:
    """Run :func:`experts_mlp` with a checked activation and percentage."""
    checks.check_routing(x, experts, weights)
    up_EGD, down_EDF = projections(x, gate_up_proj, down_proj, gated=act.layout != PLAIN, transposed=transposed)
    (E, G, D), F = up_EGD.shape, down_EDF.shape[2]
    if gate_up_bias is not None or down_bias is not None:
        check_biases(x, gate_up_bias, down_bias, (E, G, D))
    chosen = choose_impl("experts_mlp", impl, x, experts, (D, G, F), up_EGD, down_EDF)
    has_rows = x.dim() == 2
    flat = (x, experts, weights) if has_rows else (as_rows(x), as_rows(experts), as_rows(weights))
    parameters = (up_EGD, down_EDF, gate_up_bias, down_bias)
    if chosen == "dense":
        y = _ops.experts_mlp_dense(*flat, *parameters, *act, library.BUILD)
    elif chosen == "portable":
        y = calls.run_portable("experts_mlp", _portable, (*flat, *parameters, *act))
    else:
        if forward_ad._current_level >= 0:
            refuse_transforms()
        # A call of records_gradients would take a large share of a small layer's time.
        recording = torch.is_grad_enabled() and (
            (x.requires_grad or weights.requires_grad or up_EGD.requires_grad or down_EDF.requires_grad)
            or (gate_up_bias is not None and gate_up_bias.requires_grad)
            or (down_bias is not None and down_bias.requires_grad)
        )
        if recording:
            y = library.experts_mlp(*flat, *parameters, *act, save_percent, library.BUILD, chosen)[0]
        elif chosen == "grouped":
            y = _ops.experts_mlp(*flat, *parameters, *act, 0, library.BUILD, chosen)[0]
        else:
            inference = library.experts_mlp_inference if chosen == "cpu" else _ops.experts_mlp_inference
            y = inference(*flat, *parameters, *act, library.BUILD)
    return y if has_rows else with_leading(y, x)


def run_layer(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: Activation,
    *options: Any,
) -> Tensor:
    """Run :func:`run_experts` for a layer: for Dynamo as one operator, whose errors are torch's and hold the text of ours."""
    tensors = (x, experts, weights, up, down, up_bias, down_bias)
    if options[-1] != "portable" and calls.is_hidden(*tensors):
        return experts_form(*tensors, *act, *options, calls.traced_build())
    return run_experts(*tensors, act, *options)


def _run_form(*arguments: Any) -> Tensor:
    """Run :func:`run_experts` of the activation's fields one by one, and of a number that tells versions apart."""
    *tensors, activation, layout, alpha, limit, save_percent, transposed, impl, _ = arguments
    given = (*tensors, Activation(activation, layout, alpha, limit), save_percent, transposed, impl)
    return run_experts(*given)


experts_form: Callable[..., Any] = library.register_transparent(
    "experts_form", f"{MLP_ARGUMENTS.schema}, int save_percent, bool transposed, str impl, int build", _run_form, 1
)


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
        checks.check_float(f"{name}_{factor}", tensor)
        checks.check_same_device(f"{name}_{factor}", tensor, "x", x.device)
        checks.check_dim(f"{name}_{factor}", tensor, meaning)
    rank = A.shape[1]
    if rank < 1:
        raise ValueError(f"{name}_A must have a rank of at least 1, got shape {tuple(A.shape)}")
    checks.check_shape(f"{name}_A", A, (E, rank, inner))
    checks.check_shape(f"{name}_B", B, (E, out, rank))
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
    checks.check_save_percent(save_percent)
    checks.check_routing(x, experts, weights)
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
    kept = save_percent if calls.records_gradients(x, weights, *parameters) else 0
    return with_leading(_ops.experts_mlp_lora(*flat, *parameters, up[2], down[2], *act, kept, library.BUILD, chosen)[0], x)


def experts_merged(x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor, *, impl: str = "auto") -> Tensor:
    """Project each token by the weighted mix of its experts: ``h_t = sum_j w_tj (x_t W_e)``, ``e = experts_tj``.

    The up-projection of the original FusedOneMoE: the mix happens before the activation, which is the caller's. The first
    three arguments are those of :func:`experts_mlp`.

    Args:
        proj: ``[E, D, F]``, dtype of x.
        impl: ``"auto"``, ``"dense"``, ``"grouped"``, ``"cpu"``, ``"triton"`` or ``"portable"``.

    Returns:
        ``[..., F]`` in the dtype of x.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names, or an ``impl`` that cannot run here.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> x, proj = torch.randn(5, 16), torch.randn(4, 16, 32)
        >>> weights, experts = F.route(torch.randn(5, 4), top_k=2, scoring="sigmoid", norm_topk_prob=False)
        >>> F.experts_merged(x, experts, weights, proj).shape
        torch.Size([5, 32])
    """
    checks.check_routing(x, experts, weights)
    checks.check_like_x("proj", proj, x)
    checks.check_dim("proj", proj, "E, D, F")
    E, D, F = proj.shape
    if E < 1:
        raise ValueError("proj must hold at least one expert, got E = 0")
    checks.check_fits(x, D, "proj")
    chosen = choose_impl("experts_merged", impl, x, experts, (D, F), proj)
    flat = (as_rows(x), as_rows(experts), as_rows(weights), proj)
    if chosen == "dense":
        h = _ops.experts_merged_dense(*flat, library.BUILD)
    elif chosen == "portable":
        h = calls.run_portable("experts_merged", experts_merged_portable, flat)
    else:
        refuse_transforms()
        h = library.experts_merged(*flat, library.BUILD, chosen)[0]
    return with_leading(h, x)


def stack_gate_up(gate_proj: Tensor, up_proj: Tensor) -> Tensor:
    """Join separate gate and up weights into the ``[E, 2F, D]`` that :func:`experts_mlp` reads. Copies: do it once.

    Gate rows come first. An argument that is no floating-point ``[E, F, D]`` is a TypeError or a ValueError.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.stack_gate_up(torch.randn(4, 32, 16), torch.randn(4, 32, 16)).shape
        torch.Size([4, 64, 16])
    """
    checks.check_float("gate_proj", gate_proj)
    checks.check_float("up_proj", up_proj)
    checks.check_dim("gate_proj", gate_proj, "E, F, D")
    checks.check_shape("up_proj", up_proj, tuple(gate_proj.shape))
    return torch.cat((gate_proj, up_proj), dim=1)
