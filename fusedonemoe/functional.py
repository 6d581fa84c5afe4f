"""Public functions: validate once, choose the implementation, call the operator.

Suffixes of tensor names: T tokens, D hidden size, F intermediate size, E experts, K experts per token,
G rows of the up-projection (2F when gated, F when plain).
"""

import torch
from torch import Tensor

from fusedonemoe.checks import (
    check_dim,
    check_float,
    check_ids,
    check_integer,
    check_like_x,
    check_num_experts,
    check_one_of,
    check_routing,
    check_same_device,
    check_save_percent,
    check_shape,
)
from fusedonemoe.ops import PackedExperts, choose, library
from fusedonemoe.ops.activation import ACTIVATIONS, GATE_UP_LAYOUTS, PLAIN, Activation
from fusedonemoe.ops.choice import refusal
from fusedonemoe.ops.plan import Plan, make_plan
from fusedonemoe.ops.plan import tokens_per_expert as _count_tokens
from fusedonemoe.ops.route import GROUP_SCORES, SCORINGS

__all__ = [
    "PackedExperts",
    "Plan",
    "experts_merged",
    "experts_mlp",
    "pack_experts",
    "plan",
    "route",
    "stack_gate_up",
    "tokens_per_expert",
]

_ops = torch.ops.fusedonemoe


def _records_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype the operator will see: autocast's, where it is enabled."""
    return dtype if dtype is torch.float64 else library.autocast_dtype(device_type) or dtype


def _choose(operator: str, impl: str, x: Tensor, experts: Tensor, widths: tuple[int, ...], *expert_weights: Tensor) -> str:
    device_type = x.device.type
    return choose(
        operator,
        impl,
        top_k=experts.shape[-1],
        num_experts=expert_weights[0].shape[0],
        device_type=device_type,
        dtype=_compute_dtype(x.dtype, device_type),
        contiguous=all(map(Tensor.is_contiguous, expert_weights)),
        widths=widths,
        portable=torch.compiler.is_exporting(),
    ).impl


def _rows(tensor: Tensor) -> Tensor:
    """The leading dimensions as one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    """The leading dimensions of ``like`` again."""
    return rows if like.dim() == 2 else rows.reshape(*like.shape[:-1], rows.shape[-1])


def _refuse_transforms() -> None:
    """The operators have no rule for forward mode, where torch would take a zero for the tangent, nor for torch.func."""
    if torch.compiler.is_compiling():
        return
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "forward-mode derivatives and torch.func need impl='dense'; the other implementations have first derivatives "
            "in reverse mode only"
        )


def route(
    logits: Tensor,
    top_k: int | None,
    *,
    scoring: str = "softmax",
    score_first: bool = True,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    selection_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn router logits into the weights and ids of each token's experts.

    ``score_first``: ``s = scoring(l)``, pick ``TopK(s + b)``, ``w = s[picked]``. Otherwise: pick ``TopK(l + b)``,
    ``w = scoring(l[picked])``. Then ``w / sum(w)`` if ``norm_topk_prob``, times ``routed_scaling_factor``. Equal keys go to
    the lower id. The gradient is exact, the selection being a constant.

    Args:
        logits: ``[..., E]`` float64, float32, bfloat16 or float16.
        top_k: ``K``, experts per token, best first; None keeps every expert, in id order, without selection.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        score_first: score before selecting (Qwen3, Mixtral, DeepSeek-V3) or after (GPT-OSS).
        norm_topk_prob: whether a token's weights sum to 1 before scaling.
        routed_scaling_factor: factor on the weights.
        selection_bias: ``[E]``, added for the selection only (DeepSeek-V3's ``e_score_correction_bias``); no gradient.
        n_group: experts stand in this many contiguous groups of equal size.
        topk_group: only experts of the best ``topk_group`` groups can be picked.
        group_score: a group's value: ``"top2_sum"`` of its keys (DeepSeek-V3) or ``"max"`` (DeepSeek-V2).
        impl: ``"auto"``, or ``"dense"`` for a composite with derivatives of every order, for ``torch.func``.

    Returns:
        ``weights`` ``[..., K]`` float32 (float64 for float64 logits) and ``experts`` ``[..., K]`` int64.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, name or count that does not fit, naming the argument.

    Source:
        Shazeer et al. 2017 (arXiv 1701.06538) section 2.1; DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> weights, experts = F.route(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), top_k=2)
        >>> experts
        tensor([[1, 2]])
        >>> weights
        tensor([[0.5000, 0.5000]])
    """
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., E] with E >= 1, got {tuple(logits.shape)}")
    E = logits.shape[-1]
    check_one_of("scoring", scoring, SCORINGS)
    check_one_of("group_score", group_score, GROUP_SCORES)
    check_one_of("impl", impl, ("auto", "dense"))
    check_integer("n_group", n_group)
    check_integer("topk_group", topk_group)
    if top_k is not None:
        check_integer("top_k", top_k)
    if n_group < 1 or E % n_group:
        raise ValueError(f"n_group must divide the number of experts ({E}), got {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group must be from 1 to n_group ({n_group}), got {topk_group}")
    if top_k is None and (n_group > 1 or selection_bias is not None):
        raise ValueError("top_k=None selects every expert: n_group must be 1 and selection_bias None")
    selectable = E // n_group * topk_group
    if top_k is not None and not 1 <= top_k <= selectable:
        raise ValueError(f"top_k must be from 1 to {selectable}, the experts that can be picked, got {top_k}")
    if selection_bias is not None:
        check_float("selection_bias", selection_bias)
        check_shape("selection_bias", selection_bias, (E,))
        check_same_device("selection_bias", selection_bias, "logits", logits.device)
    if impl != "dense":
        _refuse_transforms()
    op = _ops.route_dense if impl == "dense" else library.route
    weights, experts = op(
        _rows(logits),
        selection_bias,
        top_k or 0,
        scoring,
        score_first,
        norm_topk_prob,
        float(routed_scaling_factor),
        n_group,
        topk_group,
        group_score,
        library.BUILD,
    )
    return _unrows(weights, logits), _unrows(experts, logits)


def plan(experts: Tensor, num_experts: int) -> Plan:
    """Sort the rows of a routing by expert, without a host synchronisation.

    Args:
        experts: ``[..., K]`` ids of any integer dtype; ids outside ``[0, num_experts)`` sort to the end.
        num_experts: ``E``.

    Returns:
        :class:`Plan` ``(order, offsets)``: ``order`` ``[N]`` int32 lists the flattened rows ``t * K + j`` by expert, in
        token order inside an expert; expert ``e`` owns ``order[offsets[e]:offsets[e + 1]]``.

    Raises:
        TypeError: ``experts`` has no integer dtype, or ``num_experts`` is no integer.
        ValueError: ``num_experts`` is below 1.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.plan(torch.tensor([[1, 0], [1, 7]]), num_experts=2)
        Plan(order=tensor([1, 0, 2, 3], dtype=torch.int32), offsets=tensor([0, 1, 3], dtype=torch.int32))
    """
    check_ids(experts)
    check_num_experts(num_experts)
    return make_plan(experts, num_experts)


def tokens_per_expert(experts: Tensor, num_experts: int) -> Tensor:
    """Count the routed rows of every expert: ``c_e = #{(t, j): experts_tj = e}``, without a host synchronisation.

    Args:
        experts: ids of any shape and integer dtype; ids outside ``[0, num_experts)`` are not counted.
        num_experts: ``E``.

    Returns:
        ``[E]`` int64.

    Raises:
        TypeError: ``experts`` has no integer dtype, or ``num_experts`` is no integer.
        ValueError: ``num_experts`` is below 1.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.tokens_per_expert(torch.tensor([[1, 0], [1, 7]]), num_experts=3)
        tensor([1, 2, 0])
    """
    check_ids(experts)
    check_num_experts(num_experts)
    return _count_tokens(experts, num_experts)


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
    if E < 1:
        raise ValueError("gate_up_proj must hold at least one expert, got E = 0")
    if gated and G % 2:
        raise ValueError(f"gate_up_proj must have as many gate rows as up rows, got {G} in all")
    F = G // 2 if gated else G
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


def _check_packed(packed: PackedExperts, up_EGD: Tensor, down_EDF: Tensor, layout: str) -> None:
    if packed.layout != layout:
        raise ValueError(f"packed must have been packed with gate_up_layout {layout!r}, got {packed.layout!r}")
    shapes = tuple(tuple(source.shape) for source in packed.sources)
    if shapes != (tuple(up_EGD.shape), tuple(down_EDF.shape)):
        raise ValueError(f"packed must be of weights of shapes {tuple(up_EGD.shape)}, {tuple(down_EDF.shape)}, got {shapes}")


def experts_mlp(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
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
        save_percent: 0 to 100, the share of pre-activation rows kept for the backward; the rest is computed again there.
            Less memory for more time, the same gradients. ``dense`` is left to autograd and keeps everything.
        packed: what :func:`pack_experts` made of these very weights. Used where ``impl`` is or comes out as ``"cpu"``, no
            gradients are recorded, no graph is exported and autocast is off; otherwise the weights themselves are. The same
            bits.
        impl: ``"auto"``, ``"dense"`` (masked batched matmul, derivatives of every order), ``"grouped"`` (sorted rows),
            ``"cpu"`` (kernels that are compiled on first use; contiguous weights, no float64) or ``"triton"`` (GPU kernels;
            no float64).

    Returns:
        ``[..., D]`` in the dtype of x. Products accumulate in float32 for half precision; each written tensor is rounded
        once; each row is written once, in a fixed order of summation.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or name that does not fit, or an ``impl`` that cannot run here.
        RuntimeError: the weights were changed or replaced after they were packed.

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
    if gate_up_bias is not None:
        check_like_x("gate_up_bias", gate_up_bias, x)
        check_shape("gate_up_bias", gate_up_bias, (E, G))
    if down_bias is not None:
        check_like_x("down_bias", down_bias, x)
        check_shape("down_bias", down_bias, (E, D))
    chosen = _choose("experts_mlp", impl, x, experts, (D, G, F), up_EGD, down_EDF)
    flat = (_rows(x), _rows(experts), _rows(weights))
    parameters = (up_EGD, down_EDF, gate_up_bias, down_bias)
    act = (activation, gate_up_layout if gated else PLAIN, float(swiglu_alpha), float(swiglu_limit))
    if chosen == "dense":
        y = _ops.experts_mlp_dense(*flat, *parameters, *act, library.BUILD)
    else:
        _refuse_transforms()
        recording = _records_gradients(x, weights, *parameters)
        if packed is not None:
            _check_packed(packed, up_EGD, down_EDF, act[1])
            # Autocast casts the arguments on their way into an operator, and what was packed stays as it is.
            as_they_are = library.autocast_dtype(x.device.type) is None and not torch.compiler.is_exporting()
            if chosen == "cpu" and as_they_are and not recording:
                y = library.experts_mlp_packed(*flat, *parameters, packed.up, packed.down, *act)
                return _unrows(y, x)
        if chosen == "triton" and not recording:
            return _unrows(_ops.experts_mlp_inference(*flat, *parameters, *act, library.BUILD), x)
        kept = save_percent if recording else 0
        y = library.experts_mlp(*flat, *parameters, *act, kept, library.BUILD, chosen)[0]
    return _unrows(y, x)


def experts_merged(x: Tensor, experts: Tensor, weights: Tensor, proj: Tensor, *, impl: str = "auto") -> Tensor:
    """Project each token by the weighted mix of its experts: ``h_t = sum_j w_tj (x_t W_e)``, ``e = experts_tj``.

    The up-projection of the original FusedOneMoE: the mix happens before the activation, which is the caller's.

    Args:
        x: ``[..., D]`` float64, float32, bfloat16 or float16.
        experts: ``[..., K]`` ids of any integer dtype; ids outside ``[0, E)`` contribute zero.
        weights: ``[..., K]`` routing weights of any float dtype.
        proj: ``[E, D, F]``, dtype of x.
        impl: ``"auto"``, ``"dense"``, ``"grouped"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``[..., F]`` in the dtype of x.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or name that does not fit, or an ``impl`` that cannot run here.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> x, proj = torch.randn(5, 16), torch.randn(4, 16, 32)
        >>> weights, experts = F.route(torch.randn(5, 4), top_k=2, scoring="sigmoid", norm_topk_prob=False)
        >>> F.experts_merged(x, experts, weights, proj).shape
        torch.Size([5, 32])
    """
    check_routing(x, experts, weights)
    check_like_x("proj", proj, x)
    check_dim("proj", proj, "E, D, F")
    E, D, F = proj.shape
    if E < 1:
        raise ValueError("proj must hold at least one expert, got E = 0")
    if x.shape[-1] != D:
        raise ValueError(f"x must have shape [..., {D}] to fit proj, got {tuple(x.shape)}")
    chosen = _choose("experts_merged", impl, x, experts, (D, F), proj)
    flat = (_rows(x), _rows(experts), _rows(weights), proj)
    if chosen == "dense":
        h = _ops.experts_merged_dense(*flat, library.BUILD)
    else:
        _refuse_transforms()
        h = library.experts_merged(*flat, library.BUILD, chosen)[0]
    return _unrows(h, x)
