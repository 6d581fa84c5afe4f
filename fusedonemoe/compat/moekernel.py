"""MoeKernel's names: ``MOEConfig``, ``moe_gating_forward`` and ``moe_expert_computation``, which it documents and left empty.

Suffixes of tensor names: T tokens, D ``hidden_dim``, F ``expert_dim``, E experts, K experts per token, P parameters of an
expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.balance import load_balancing_loss
from fusedonemoe.checks import check_count, check_shape
from fusedonemoe.compat.arguments import check_config, check_finite, check_last, check_like_input, check_placed
from fusedonemoe.linear import routing_linear


@dataclass(frozen=True)
class MOEConfig:
    """Sizes of a block.

    Attributes:
        num_experts: ``E``.
        top_k: ``K``.
        hidden_dim: ``D``.
        expert_dim: ``F``.
        capacity_factor: at least 1; an expert takes at most ``ceil(capacity_factor * T * K / E)`` rows.

    Example:
        >>> from fusedonemoe.compat.moekernel import MOEConfig
        >>> MOEConfig(num_experts=8, top_k=2, hidden_dim=512, expert_dim=2048).parameters_per_expert
        2099712
    """

    num_experts: int
    top_k: int
    hidden_dim: int
    expert_dim: int
    capacity_factor: float = 1.25

    def __post_init__(self) -> None:
        """Refuse what MoeKernel's documentation calls invalid."""
        for name in ("num_experts", "hidden_dim", "expert_dim"):
            check_count(name, getattr(self, name))
        check_count("top_k", self.top_k, 1, self.num_experts, "num_experts")
        check_finite("capacity_factor", self.capacity_factor, least=1)

    @property
    def parameters_per_expert(self) -> int:
        """``P = 2 D F + F + D``, the length of one expert's flat parameters."""
        return 2 * self.hidden_dim * self.expert_dim + self.expert_dim + self.hidden_dim


def moe_gating_forward(input: Tensor, gate_weights: Tensor, config: MOEConfig) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
    """Route tokens: ``p = softmax(x W)``, the K largest, ``w = p / sum(p)`` over them, and the load-balancing loss.

    ``loss = E * sum_i f_i P_i`` with ``f_i`` the share of the routed rows that expert i took and ``P_i`` the mean of ``p_i``:
    1 when both are even. Its gradient goes through ``P``.

    Args:
        input: ``[..., D]``, any float dtype.
        gate_weights: ``[D, E]``, any float dtype.
        config: the sizes.

    Returns:
        expert_weights ``[T, K]`` float32 (float64 for float64 input), best first, summing to 1; expert_indices ``[T, K]``
        int32; load_loss ``[1]``, dtype of the weights.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.moekernel import MOEConfig, moe_gating_forward
        >>> config = MOEConfig(num_experts=8, top_k=2, hidden_dim=16, expert_dim=32)
        >>> weights, indices, load_loss = moe_gating_forward(torch.randn(2, 5, 16), torch.randn(16, 8), config)
        >>> weights.shape, indices.dtype, load_loss.shape
        (torch.Size([10, 2]), torch.int32, torch.Size([1]))
    """
    check_config(config, MOEConfig)
    check_last("input", input, config.hidden_dim)
    check_placed("gate_weights", gate_weights, (config.hidden_dim, config.num_experts), input.device)
    logits_TE = routing_linear(input.reshape(-1, config.hidden_dim), gate_weights.t())
    weights_TK, ids_TK = F.route(logits_TE, config.top_k)
    load_loss = load_balancing_loss(logits_TE, ids_TK, config.num_experts).reshape(1)
    return weights_TK, ids_TK.to(torch.int32), load_loss


def _stacked(expert_params: Sequence[Tensor] | Tensor, config: MOEConfig, like: Tensor) -> Tensor:
    E, P = config.num_experts, config.parameters_per_expert
    if isinstance(expert_params, Tensor):
        check_like_input("expert_params", expert_params, like)
        check_shape("expert_params", expert_params, (E, P))
        return expert_params
    if not isinstance(expert_params, Sequence) or isinstance(expert_params, str):
        raise TypeError(f"expert_params must be a list of tensors or one tensor [E, P], got {type(expert_params).__name__}")
    if len(expert_params) != E:
        raise ValueError(f"expert_params must hold {E} tensors, one for each expert, got {len(expert_params)}")
    for i, params_P in enumerate(expert_params):
        name = f"expert_params[{i}]"
        check_like_input(name, params_P, like)
        check_shape(name, params_P, (P,))
    return torch.stack(tuple(expert_params))


def moe_expert_computation(
    input: Tensor,  # noqa: A002
    expert_weights: Tensor,
    expert_indices: Tensor,
    expert_params: Sequence[Tensor] | Tensor,
    config: MOEConfig,
    *,
    impl: str = "auto",
) -> Tensor:
    """Run tokens through their experts: ``y_t = sum_j w_tj (relu(x_t W1_e + b1_e) W2_e + b2_e)``, ``e = indices_tj``.

    An expert takes the first ``C = ceil(capacity_factor * T * K / E)`` rows that name it, in token order; rows beyond that
    contribute zero, and their weights get no gradient.

    Args:
        input: ``[..., D]``, any float dtype.
        expert_weights: ``[T, K]``, any float dtype.
        expert_indices: ``[T, K]``, any integer dtype; ids outside ``[0, E)`` contribute zero.
        expert_params: E flat tensors ``[W1 | W2 | b1 | b2]`` of ``[D, F]``, ``[F, D]``, ``[F]`` and ``[D]``, which are copied
            together on each call; or one tensor ``[E, P]`` with such rows, which is read in place. Dtype of input.
        config: the sizes.
        impl: as in :func:`fusedonemoe.functional.experts_mlp`.

    Returns:
        ``[..., D]`` in the dtype of input.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.moekernel import MOEConfig, moe_expert_computation, moe_gating_forward
        >>> config = MOEConfig(num_experts=4, top_k=2, hidden_dim=16, expert_dim=32)
        >>> x, params = torch.randn(2, 5, 16), [torch.randn(config.parameters_per_expert) for _ in range(4)]
        >>> weights, indices, _ = moe_gating_forward(x, torch.randn(16, 4), config)
        >>> moe_expert_computation(x, weights, indices, params, config).shape
        torch.Size([2, 5, 16])
    """
    check_config(config, MOEConfig)
    D, F_, E = config.hidden_dim, config.expert_dim, config.num_experts
    check_last("input", input, D)
    x_TD = input.reshape(-1, D)
    expected = (x_TD.shape[0], config.top_k)
    check_placed("expert_weights", expert_weights, expected, input.device)
    check_placed("expert_indices", expert_indices, expected, input.device, ids=True)
    params_EP = _stacked(expert_params, config, input)
    w1_EP, w2_EP, b1_EF, b2_ED = params_EP.split((D * F_, F_ * D, F_, D), 1)
    up_EDF, down_EFD = w1_EP.unflatten(1, (D, F_)), w2_EP.unflatten(1, (F_, D))
    experts_TK, weights_TK, _ = F.apply_capacity(expert_indices, expert_weights, E, config.capacity_factor)
    form: dict[str, Any] = {"gate_up_bias": b1_EF, "down_bias": b2_ED, "activation": "relu", "gated": False, "transposed": True}
    return F.experts_mlp(x_TD, experts_TK, weights_TK, up_EDF, down_EFD, **form, impl=impl).reshape(input.shape)
