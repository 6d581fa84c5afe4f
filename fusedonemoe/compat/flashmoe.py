"""FlashMoE's names: ``FlashMoEConfig`` and ``FlashMoE``, over :class:`fusedonemoe.layers.fine_grained.FineGrainedMoE`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe.checks import check_count, check_last_dim
from fusedonemoe.compat.arguments import check_config, check_flag
from fusedonemoe.hf.families import ACTIVATIONS
from fusedonemoe.layers.fine_grained import FineGrainedMoE


@dataclass(frozen=True)
class FlashMoEConfig:
    """Sizes of a block.

    Attributes:
        hidden_size: ``D``.
        intermediate_size: of the dense branch.
        hidden_act: of the experts and of the dense branch, by transformers' names.
        num_experts: ``E = G * G``, a square.
        num_experts_per_tok: ``K``.
        norm_topk_prob: whether a token's weights sum to 1.
    """

    hidden_size: int
    intermediate_size: int
    hidden_act: str
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        for name in ("hidden_size", "intermediate_size", "num_experts"):
            check_count(name, getattr(self, name))
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {tuple(ACTIVATIONS)}, got {self.hidden_act!r}")
        check_count("num_experts_per_tok", self.num_experts_per_tok, 1, self.num_experts, "num_experts")
        check_flag("norm_topk_prob", self.norm_topk_prob)


class FlashMoE(nn.Module):
    """Single-neuron experts found by product keys, plus a dense branch that every token takes.

    ``[a | b] = BatchNorm(x) Wr``, ``la, lb = log_softmax``; the K pairs ``(i, j)`` of largest ``la_i + lb_j`` are the experts
    ``e = i * G + j``, ``w = exp(la_i + lb_j)``; ``y = sum_e act(<x, down_e>) w_e up_e + (act(x Wg) * (x Wu)) Wd``. The
    BatchNorm has no trained scale or shift. A state dict of FlashMoE loads.

    Args:
        config: a :class:`FlashMoEConfig`.
        sparse: whether the gradients of ``down_embed`` and ``up_embed`` are sparse tensors.
        impl: as in :func:`fusedonemoe.functional.experts_neurons`.

    Shape:
        x ``[..., D]`` with T tokens in all to y ``[..., D]`` and router_logits ``[2, T, G]``.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.flashmoe import FlashMoE, FlashMoEConfig
        >>> config = FlashMoEConfig(
        ...     hidden_size=32, intermediate_size=64, hidden_act="silu", num_experts=1024, num_experts_per_tok=8
        ... )
        >>> y, router_logits = FlashMoE(config)(torch.randn(2, 10, 32))
        >>> y.shape, router_logits.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 20, 32]))
    """

    def __init__(
        self,
        config: FlashMoEConfig,
        *,
        sparse: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_config(config, FlashMoEConfig)
        self.config = config
        sizes = (config.hidden_size, config.num_experts, config.num_experts_per_tok)
        form: dict[str, Any] = {"intermediate_size": config.intermediate_size, "activation": ACTIVATIONS[config.hidden_act]}
        form |= {"norm_topk_prob": config.norm_topk_prob, "input_norm": "batch", "sparse": sparse, "impl": impl}
        self.moe: FineGrainedMoE = FineGrainedMoE(*sizes, **form, device=device, dtype=dtype)
        self.moe.gate.norm.requires_grad_(False)  # type: ignore[union-attr]
        self.register_load_state_dict_pre_hook(_read_original)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the block on ``x`` ``[..., D]``."""
        check_last_dim("x", x, self.config.hidden_size)
        y, logits = self.moe(x)
        return y, logits.reshape(-1, 2, logits.shape[-1]).transpose(0, 1)


_ORIGINAL_NAMES = {
    "router_gate.weight": "moe.gate.weight",
    "down_embed.weight": "moe.down_embed",
    "up_embed.weight": "moe.up_embed",
    **{f"router_norm.{name}": f"moe.gate.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")},
    **{f"{name}.weight": f"moe.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
}


def _read_original(module: FlashMoE, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the original's parameters the names that this class has, and the norm the scale and shift that the original lacks."""
    found = [old for old in _ORIGINAL_NAMES if prefix + old in state_dict]
    for old in found:
        state_dict[prefix + _ORIGINAL_NAMES[old]] = state_dict.pop(prefix + old)
    if found:
        for name, parameter in module.moe.gate.norm.named_parameters():  # type: ignore[union-attr]
            state_dict.setdefault(f"{prefix}moe.gate.norm.{name}", parameter.detach().clone())
