"""Experts in torchtitan's form: rows that are sorted by expert already, and its names of parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusedonemoe import functional as F
from fusedonemoe.checks import check_float, check_shape
from fusedonemoe.config import MoEConfig
from fusedonemoe.ops.options import options_of


class GroupedExperts(nn.Module):
    """torchtitan's ``GroupedExperts`` over this library's operators, of any dtype that they take.

    ``(silu(x w1^T) * (x w3^T)) w2^T`` for each row and its expert. ``state_dict`` has torchtitan's ``w1_EFD``, ``w2_EDF`` and
    ``w3_EFD``. The parameters are ``w13_EF2D`` ``[E, F, 2, D]``, in which the rows of ``w1`` and ``w3`` stand in pairs, so that
    a shard along F has its part of both, and ``w2_EDF`` ``[E, D, F]``.

    Args:
        dim: ``D``.
        hidden_dim: ``F``.
        num_experts: ``E``, those of this process under expert parallelism.
        activation: as in :class:`~fusedonemoe.MoEConfig`, and so is ``impl``.

    Shape:
        x_RD ``[R, D]`` sorted by expert, num_tokens_per_expert_E ``[E]`` to ``[R, D]``; rows past the sum of the counts,
        which are padding, to zeros.

    Example:
        >>> import torch
        >>> from fusedonemoe.integrations.distributed.torchtitan import GroupedExperts
        >>> experts = GroupedExperts(dim=16, hidden_dim=8, num_experts=3)
        >>> experts(torch.randn(6, 16), torch.tensor([2, 0, 3])).shape
        torch.Size([6, 16])
        >>> list(experts.state_dict())
        ['w1_EFD', 'w2_EDF', 'w3_EFD']
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        activation: str = "silu",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes: Any = {"hidden_size": dim, "intermediate_size": hidden_dim, "num_experts": num_experts, "top_k": 1}
        self.config: MoEConfig = MoEConfig(**sizes, activation=activation, gate_up_layout="interleaved", impl=impl)
        self.num_experts = num_experts
        self.w13_EF2D: nn.Parameter = nn.Parameter(torch.empty(num_experts, hidden_dim, 2, dim, device=device, dtype=dtype))
        self.w2_EDF: nn.Parameter = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype))
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_join)
        self.init_weights(0.02)

    @property
    def w1_EFD(self) -> Tensor:
        """The gate's weights, a view."""
        return self.w13_EF2D[:, :, 0]

    @property
    def w3_EFD(self) -> Tensor:
        """The up-projection's weights, a view."""
        return self.w13_EF2D[:, :, 1]

    @torch.no_grad()
    def init_weights(self, init_std: float) -> None:
        """Initialise as torchtitan does: truncated normal, 0.02 for the gate, ``init_std`` for the others."""
        for weight, std in ((self.w1_EFD, 0.02), (self.w2_EDF, init_std), (self.w3_EFD, init_std)):
            nn.init.trunc_normal_(weight, mean=0.0, std=std)

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Run every row through its expert. Nothing is read on the host."""
        weights: tuple[Tensor, ...] = (self.w13_EF2D, self.w2_EDF)
        w13, w2 = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)
        check_float("x_RD", x_RD)
        check_shape("num_tokens_per_expert_E", num_tokens_per_expert_E, (w2.shape[0],))
        ends = num_tokens_per_expert_E.to(torch.int64).cumsum(0)
        rows = torch.arange(x_RD.shape[0], device=x_RD.device)
        experts = torch.searchsorted(ends, rows, right=True)[:, None]  # E, which names none, from the last end on
        options = options_of(self.config, ("activation", "gate_up_layout", "impl"))
        return F.experts_mlp(x_RD, experts, x_RD.new_ones(x_RD.shape[0], 1), w13.flatten(1, 2), w2, **options)

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        return f"dim={self.config.hidden_size}, hidden_dim={self.config.intermediate_size}, num_experts={self.num_experts}"


def _split(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Views of the parameter, so that what loads into them in place loads into it."""
    w13, w2 = state.pop(f"{prefix}w13_EF2D"), state.pop(f"{prefix}w2_EDF")
    state[f"{prefix}w1_EFD"] = w13[:, :, 0]
    state[f"{prefix}w2_EDF"] = w2
    state[f"{prefix}w3_EFD"] = w13[:, :, 1]


def _join(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    w1, w3 = f"{prefix}w1_EFD", f"{prefix}w3_EFD"
    if w1 in state and w3 in state:
        state[f"{prefix}w13_EF2D"] = torch.stack((state.pop(w1), state.pop(w3)), dim=2)
