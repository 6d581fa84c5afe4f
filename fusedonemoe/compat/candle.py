"""candle-moe's names: ``apply_topk_softmax_inplace`` and ``FusedMoE``, with both of its weight conventions.

Suffixes of tensor names: T tokens, D hidden size, F intermediate size, E experts, K experts per token.
"""

from enum import Enum

import torch
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.checks import check_count, check_dim, check_float, check_shape
from fusedonemoe.compat.arguments import check_like_input, check_placed

QWEN3, NOMIC = 0, 1


class Activation(Enum):
    """candle-moe's activations; its ``Gelu`` is the tanh form."""

    Silu = "silu"
    Gelu = "gelu_tanh"
    Relu = "relu"


def apply_topk_softmax_inplace(
    gating_output: Tensor, topk_weight: Tensor, topk_indices: Tensor, token_expert_indices: Tensor
) -> None:
    """Write each token's K largest ``softmax(gating_output)`` with their ids and source rows, best first, ties to the lower id.

    The weights keep the softmax's denominator over all E: they are not normalised. ``token_expert_indices[t, j] = j * T + t``.

    Args:
        gating_output: ``[T, E]`` logits of any float dtype; the softmax is float32 (float64 for float64).
        topk_weight: ``[T, K]`` of any float dtype; overwritten. Gradients reach ``gating_output`` through it.
        topk_indices: ``[T, K]`` of any integer dtype; overwritten.
        token_expert_indices: ``[T, K]`` of any integer dtype; overwritten.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.candle import apply_topk_softmax_inplace
        >>> topk_weight = torch.zeros(2, 2)
        >>> topk_indices, token_expert_indices = torch.zeros(2, 2, dtype=torch.uint32), torch.zeros(2, 2, dtype=torch.uint32)
        >>> apply_topk_softmax_inplace(torch.eye(2, 3), topk_weight, topk_indices, token_expert_indices)
        >>> topk_indices.tolist(), token_expert_indices.tolist()
        ([[0, 1], [1, 0]], [[0, 2], [1, 3]])
    """
    check_float("gating_output", gating_output)
    check_dim("gating_output", gating_output, "T, E")
    T, E = gating_output.shape
    check_float("topk_weight", topk_weight)
    check_dim("topk_weight", topk_weight, "T, K")
    K = topk_weight.shape[1]
    if not 1 <= K <= E:
        raise ValueError(f"topk_weight must have shape [T, K] with K from 1 to the number of experts ({E}), got K = {K}")
    outputs = {"topk_weight": topk_weight, "topk_indices": topk_indices, "token_expert_indices": token_expert_indices}
    for name, output in outputs.items():
        check_placed(name, output, (T, K), gating_output.device, "gating_output", ids=name != "topk_weight")
    for output, values in zip(outputs.values(), F.topk_softmax(gating_output, K), strict=True):
        output.copy_(values)


class FusedMoE:
    """candle-moe's expert layer; it holds no weights.

    Args:
        num_experts: ``E``.
        num_selected_experts: ``K``.
        activation: an :class:`Activation`, or its name: ``"silu"``, ``"gelu"`` (the tanh form) or ``"relu"``.
        impl: as in :func:`fusedonemoe.functional.experts_mlp`.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.candle import Activation, FusedMoE
        >>> fused_moe = FusedMoE(8, 2, Activation.Silu)
        >>> x, gate_w, up_w = torch.randn(5, 16), torch.randn(8, 16, 32), torch.randn(8, 16, 32)
        >>> routing_w, experts = torch.rand(5, 2), torch.randint(8, (5, 2))
        >>> fused_moe.forward(x, gate_w, up_w, None, routing_w, experts, 1).shape
        torch.Size([5, 16])
    """

    def __init__(self, num_experts: int, num_selected_experts: int, activation: Activation | str, *, impl: str = "auto") -> None:
        check_count("num_experts", num_experts)
        check_count("num_selected_experts", num_selected_experts, 1, num_experts, "num_experts")
        names = {member.name.lower(): member for member in Activation}
        if isinstance(activation, str) and activation.lower() in names:
            activation = names[activation.lower()]
        if not isinstance(activation, Activation):
            raise ValueError(f"activation must be an Activation or one of {tuple(names)}, got {activation!r}")
        self.num_experts = num_experts
        self.num_selected_experts = num_selected_experts
        self.activation = activation
        self.impl = impl

    def forward(
        self,
        input: Tensor,  # noqa: A002
        gate_weights: Tensor,
        up_weights: Tensor,
        down_weights: Tensor | None,
        routing_weights: Tensor,
        expert_indices: Tensor,
        moe_type: int,
    ) -> Tensor:
        """Run tokens through their experts.

        ``moe_type`` 0 (Qwen3): ``y_t = sum_j w_tj ((act(x_t Wgate_e) * (x_t Wup_e)) Wdown_e)``. ``moe_type`` 1 (Nomic):
        ``y_t = sum_j w_tj (act(x_t Wgate_e) Wup_e^T)``. Each call with ``moe_type`` 0 copies gate and up into one tensor;
        :func:`fusedonemoe.functional.stack_gate_up` and :func:`fusedonemoe.functional.experts_mlp` do it once.

        Args:
            input: ``[T, D]``, any float dtype.
            gate_weights: ``[E, D, F]``, dtype of input.
            up_weights: ``[E, D, F]``, dtype of input.
            down_weights: ``[E, F, D]``, dtype of input; None with ``moe_type`` 1, which does not read it.
            routing_weights: ``[T, K]``, any float dtype.
            expert_indices: ``[T, K]``, any integer dtype; ids outside ``[0, E)`` contribute zero.
            moe_type: 0 or 1.

        Returns:
            ``[T, D]`` in the dtype of input.
        """
        if isinstance(moe_type, bool) or not isinstance(moe_type, int) or moe_type not in (QWEN3, NOMIC):
            raise ValueError(f"moe_type must be 0 (Qwen3) or 1 (Nomic), got {moe_type!r}")
        check_float("input", input)
        check_dim("input", input, "T, D")
        T, D = input.shape
        E, K = self.num_experts, self.num_selected_experts
        weights = {"gate_weights": gate_weights, "up_weights": up_weights}
        if down_weights is not None:
            weights["down_weights"] = down_weights
        elif moe_type == QWEN3:
            raise ValueError("down_weights must be a tensor [E, F, D] with moe_type 0, got None")
        for name, tensor in weights.items():
            check_like_input(name, tensor, input)
        check_dim("gate_weights", gate_weights, "E, D, F")
        F_ = gate_weights.shape[2]
        for name, tensor in weights.items():
            check_shape(name, tensor, (E, F_, D) if name == "down_weights" else (E, D, F_))
        check_placed("routing_weights", routing_weights, (T, K), input.device)
        check_placed("expert_indices", expert_indices, (T, K), input.device, ids=True)
        gated = moe_type == QWEN3
        # Joined in every call: what was joined in an earlier one would be old after a write that torch does not count,
        # as those of fused optimizers and of collectives.
        up_EDG = torch.cat((gate_weights, up_weights), 2) if gated else gate_weights
        down_EDF = weights["down_weights"].transpose(1, 2) if gated else up_weights
        experts = expert_indices.to(torch.int64)
        activation = self.activation.value
        return F.experts_mlp(
            input, experts, routing_weights, up_EDG.transpose(1, 2), down_EDF, activation=activation, gated=gated, impl=self.impl
        )
