"""The block of the original FusedOneMoE."""

from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.checks import check_last_dim
from fusedonemoe.config import MoEConfig
from fusedonemoe.layers.routers import TopKRouter, routing_impl
from fusedonemoe.linear import uniform_by_fan_in


class FusedOneMoE(nn.Module):
    """The block of the original FusedOneMoE: experts mix before the activation and share one down-projection.

    ``y = act(sum_e w_te (x_t W_e) + b_up) Wdown + b_down`` with ``act = relu(.)^2`` and ``w = sigmoid(x W_router)`` on the
    selected experts. Differences from the original's code, which are repairs: unselected experts have weight 0 (there,
    ``sigmoid(0) = 1/2``), biases start small instead of failing to initialise, and weights are drawn by their fan-in.

    Parameters: ``gate.weight`` ``[E, D]``, ``proj`` ``[E, D, F]``, ``down`` ``[F, D]``, and with biases ``up_bias`` ``[F]``,
    ``down_bias`` ``[D]``.

    Args:
        hidden_size: ``D``.
        intermediate_size: ``F``.
        groups: ``E``, number of experts.
        is_sparse: route each token to its ``topk`` experts; otherwise to all.
        topk: ``K`` when sparse.
        bias: ``b_up`` and ``b_down``.
        impl: ``auto``, ``dense``, ``grouped``, ``cpu``, ``triton`` or ``portable``.

    Shape:
        ``[..., D]`` to ``[..., D]``.

    Example:
        >>> import torch
        >>> from fusedonemoe import FusedOneMoE
        >>> layer = FusedOneMoE(hidden_size=128, intermediate_size=512, groups=32, is_sparse=True, topk=8)
        >>> layer(torch.randn(2, 10, 128)).shape
        torch.Size([2, 10, 128])
    """

    def __init__(
        self,
        hidden_size: int = 512,
        intermediate_size: int = 3072,
        groups: int = 12,
        is_sparse: bool = False,
        topk: int = 1,
        bias: bool = False,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes: Any = {"hidden_size": hidden_size, "num_experts": groups, "top_k": topk if is_sparse else None}
        MoEConfig(intermediate_size=intermediate_size, impl=impl, **sizes)  # it checks
        self.impl = impl
        rule: Any = {"scoring": "sigmoid", "norm_topk_prob": False}
        self.gate: TopKRouter = TopKRouter(**sizes, **rule, impl=routing_impl(impl), device=device, dtype=dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.proj: nn.Parameter = parameter(groups, hidden_size, intermediate_size)
        self.down: nn.Parameter = parameter(intermediate_size, hidden_size)
        self.up_bias: nn.Parameter | None = parameter(intermediate_size) if bias else None
        self.down_bias: nn.Parameter | None = parameter(hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does: uniform within ``1 / sqrt(fan_in)``."""
        self.gate.reset_parameters()
        F_, D = self.down.shape
        for parameter, fan_in in ((self.proj, D), (self.down, F_), (self.up_bias, D), (self.down_bias, F_)):
            if parameter is not None:
                uniform_by_fan_in(parameter, fan_in)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on ``x`` ``[..., D]``."""
        check_last_dim("x", x, self.down.shape[1])
        _, weights, experts = self.gate(x)
        h = F.experts_merged(x, experts, weights, self.proj, impl=self.impl)
        if self.up_bias is not None:
            h = h + self.up_bias
        y = torch.matmul(nn.functional.relu(h).square(), self.down)
        return y if self.down_bias is None else y + self.down_bias

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        E, D, F_ = self.proj.shape
        return f"hidden_size={D}, intermediate_size={F_}, groups={E}, topk={self.gate.top_k}"
