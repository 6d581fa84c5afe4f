"""Other routing rules than :func:`~fusedonemoe.functional.route`: top-p, shared experts, candle-moe's top-k softmax."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedonemoe.checks import check_count, check_integer, check_logits, check_number, check_selection_bias
from fusedonemoe.functional.calls import choose_routing
from fusedonemoe.functional.routing import route
from fusedonemoe.linear import in_routing_dtype
from fusedonemoe.ops.operands import check_choices_of


class TopKSoftmax(NamedTuple):
    """The result of :func:`topk_softmax`.

    Attributes:
        weights: ``[..., K]`` float32 (float64 for float64 logits), descending.
        experts: ``[..., K]`` int64.
        token_expert_indices: ``[..., K]`` int64, ``j * T + t``: where row ``(t, j)`` stands when the choices are listed
            choice by choice.
    """

    weights: Tensor
    experts: Tensor
    token_expert_indices: Tensor


def route_top_p(
    logits: Tensor,
    top_p: float,
    *,
    temperature: float = 1.0,
    noise: float = 0.0,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Take every expert whose probability exceeds a threshold, as many as there are.

    ``p = softmax(l / temperature)``, plus ``noise * top_p * randn`` when training; kept where ``p > top_p``;
    ``w = sigmoid(l)`` on the kept. A token may keep all experts, or none; those it drops have weight 0 and id -1, which the
    expert layers skip. The gradient is exact, the selection being a constant.

    Args:
        logits: ``[..., E]`` float64, float32, bfloat16 or float16.
        top_p: the threshold of each expert, from 0 (included) to 1: fewer than ``1 / top_p`` are kept, but for noise.
        temperature: divides the logits of the softmax, not those of the weights; above 0.
        noise: standard deviation of the noise in multiples of ``top_p``; from 0.
        training: whether the noise is added.
        generator: of the noise; torch's own if None. torch.compile takes only None.

    Returns:
        ``weights`` ``[..., E]`` float32 (float64 for float64 logits) and ``experts`` ``[..., E]`` int64: the expert's own id
        in its column, or -1.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Source:
        The original FusedOneMoE's "indefinacy", as its text means it; its code returns 0.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> weights, experts = F.route_top_p(torch.tensor([[0.0, 2.0, 2.0, -1.0]]), top_p=0.3)
        >>> experts
        tensor([[-1,  1,  2, -1]])
        >>> weights
        tensor([[0.0000, 0.8808, 0.8808, 0.0000]])
    """
    check_logits(logits)
    for name, value in (("top_p", top_p), ("temperature", temperature), ("noise", noise)):
        check_number(name, value)
    if not 0 <= top_p < 1:
        raise ValueError(f"top_p must be from 0 to below 1, got {top_p}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {noise}")
    wide = in_routing_dtype(logits)
    # Divided after the maximum is subtracted: large logits keep their differences, and a low temperature overflows nothing.
    below = wide.detach() - wide.detach().amax(-1, keepdim=True)
    probabilities = (below / temperature).softmax(-1)
    if training and noise > 0:
        draw = torch.randn(wide.shape, dtype=wide.dtype, device=wide.device, generator=generator)
        probabilities = probabilities + (noise * top_p) * draw
    kept = probabilities > top_p
    weights = torch.where(kept, wide.sigmoid(), 0.0)
    experts = torch.where(kept, torch.arange(wide.shape[-1], device=wide.device), -1)
    return weights, experts


def route_with_shared(
    logits: Tensor,
    top_k: int,
    num_shared_experts: int,
    *,
    selection_bias: Tensor | None = None,
    norm_topk_prob: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Route with shared experts in the same tensors: the last ``S`` experts take every token.

    With ``R = E - S``: ``r = softmax(l[:R])`` and ``s = softmax(l[R:])``; pick ``TopK(r + b[:R])``, ``K - S`` of them; divide
    the picked ``r`` by their sum if ``norm_topk_prob``. So the weights of a token sum to 2, to 1 where only one kind exists.

    Args:
        logits: ``[..., E]`` float64, float32, bfloat16 or float16.
        top_k: ``K``, experts per token, shared ones included.
        num_shared_experts: ``S``, from 0 to ``K``.
        selection_bias: ``[E]``, added for the selection only; its last ``S`` entries are not read.
        norm_topk_prob: whether the routed weights of a token sum to 1.
        impl: as for :func:`route`.

    Returns:
        ``weights`` ``[..., K]`` float32 (float64 for float64 logits) and ``experts`` ``[..., K]`` int64: first the ``K - S``
        routed ones, best first, then the shared ones in id order.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Source:
        MoMoE (github.com/tilde-research/MoMoE-impl), ``topk_router.py``.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> weights, experts = F.route_with_shared(torch.tensor([[0.0, 2.0, 2.0, 1.0, 1.0]]), top_k=4, num_shared_experts=2)
        >>> experts
        tensor([[1, 2, 3, 4]])
        >>> weights
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    check_logits(logits)
    choose_routing(impl)  # says what is wrong with it where no expert is routed
    E, S = logits.shape[-1], num_shared_experts
    check_count("top_k", top_k, 1, E, "the number of experts")
    check_choices_of(logits, top_k)
    check_count("num_shared_experts", S, 0, top_k, "top_k")
    if selection_bias is not None:
        check_selection_bias(selection_bias, logits)
    R, parts = E - S, []
    if top_k > S:
        bias = None if selection_bias is None else selection_bias[:R]
        parts.append(route(logits[..., :R], top_k - S, norm_topk_prob=norm_topk_prob, selection_bias=bias, impl=impl))
    if S > 0:
        shared = torch.arange(R, E, device=logits.device).expand(*logits.shape[:-1], S)
        parts.append((in_routing_dtype(logits[..., R:]).softmax(-1), shared))
    weights, experts = zip(*parts, strict=True)
    return torch.cat(weights, -1), torch.cat(experts, -1)


def topk_softmax(logits: Tensor, top_k: int, *, impl: str = "auto") -> TopKSoftmax:
    """Softmax over all experts, then the best ``K``, not normalised, with the source row of each choice.

    Args:
        logits: ``[..., E]`` float64, float32, bfloat16 or float16.
        top_k: ``K``.
        impl: as for :func:`route`.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Source:
        candle-moe's ``apply_topk_softmax_inplace``, after vLLM's ``topk_softmax``.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> F.topk_softmax(torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, -1.0]]), top_k=2).token_expert_indices
        tensor([[0, 2],
                [1, 3]])
    """
    check_integer("top_k", top_k)  # route takes None too
    weights, experts = route(logits, top_k, norm_topk_prob=False, impl=impl)
    places_KT = torch.arange(experts.numel(), device=logits.device).view(top_k, -1)
    return TopKSoftmax(weights, experts, places_KT.t().reshape(experts.shape))
