"""Router modules: from hidden states to routing weights and expert ids."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.ops.library import autocast_dtype


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which costs ten times the question when there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class RouterOutput(NamedTuple):
    """What a router returns.

    Attributes:
        logits: ``[..., E]`` float32 (float64 for float64 x).
        weights: ``[..., K]`` routing weights, dtype of the logits.
        experts: ``[..., K]`` int64 ids.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor


class TopKRouter(nn.Module):
    """A linear router: ``l = x W^T (+ b)``, then :func:`fusedonemoe.functional.route`.

    The linear map and everything after it run in float32 whatever the dtype of x and of the module, autocast included:
    which experts are picked should not hang on the last bit of a bfloat16 logit.

    Args:
        hidden_size: ``D``.
        num_experts: ``E``.
        top_k: ``K``; None keeps every expert.
        scoring: ``softmax`` or ``sigmoid``.
        score_first: score before the selection or after it.
        norm_topk_prob: whether a token's weights sum to 1 before scaling.
        routed_scaling_factor: factor on the weights.
        bias: whether the linear map has one.
        selection_bias: keep a float32 buffer ``e_score_correction_bias`` ``[E]``, zero at first, added for the selection
            only; it is not trained by gradients.
        n_group: contiguous expert groups.
        topk_group: groups that stay open.
        group_score: ``top2_sum`` or ``max``.
        impl: ``auto``, or ``dense`` for derivatives of every order.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        x ``[..., D]`` to :class:`RouterOutput`.

    Example:
        >>> import torch
        >>> from fusedonemoe import TopKRouter
        >>> logits, weights, experts = TopKRouter(16, num_experts=4, top_k=2)(torch.randn(3, 5, 16))
        >>> logits.shape, weights.shape, experts.shape
        (torch.Size([3, 5, 4]), torch.Size([3, 5, 2]), torch.Size([3, 5, 2]))
    """

    bias: Tensor | None
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None,
        *,
        scoring: str = "softmax",
        score_first: bool = True,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        bias: bool = False,
        selection_bias: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "top2_sum",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.scoring = scoring
        self.score_first = score_first
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group = n_group
        self.topk_group = topk_group
        self.group_score = group_score
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        # float32 whatever the module's or the default dtype is: it accumulates small steps.
        correction = torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does: uniform within ``1 / sqrt(D)``; the selection bias to zero."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def _logits(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        bias = None if self.bias is None else _in_dtype(self.bias, dtype)
        return nn.functional.linear(_in_dtype(x, dtype), _in_dtype(self.weight, dtype), bias)

    def forward(self, x: Tensor) -> RouterOutput:
        """Route ``x`` ``[..., D]``."""
        device = x.device.type
        if autocast_dtype(device) is None:
            logits = self._logits(x)
        else:
            with torch.autocast(device, enabled=False):
                logits = self._logits(x)
        weights, experts = F.route(
            logits,
            self.top_k,
            scoring=self.scoring,
            score_first=self.score_first,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
            selection_bias=self.e_score_correction_bias,
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
            impl=self.impl,
        )
        return RouterOutput(logits, weights, experts)

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        E, D = self.weight.shape
        return f"hidden_size={D}, num_experts={E}, top_k={self.top_k}, scoring={self.scoring!r}"
