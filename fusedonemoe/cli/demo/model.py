"""The two models: one small transformer, its feed-forward part either a mixture of experts or dense."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedonemoe.cli.demo import Settings
from fusedonemoe.cli.demo.parallel import ALONE, Processes
from fusedonemoe.cli.demo.text import VOCABULARY
from fusedonemoe.layers import MoE

ROTARY_BASE = 10_000.0


class Loss(NamedTuple):
    """The losses of a model on a batch."""

    cross_entropy: Tensor  # mean over the bytes, in nats
    balance: Tensor  # load-balancing loss, mean over the layers; 1 when balanced, 0 for a dense model
    tokens_per_expert: Tensor  # ``[L, E]`` int64; ``[L, 0]`` for a dense model


def balance_loss(logits: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Compute the load-balancing loss ``E * sum_e f_e P_e`` of the Switch Transformer (arXiv 2101.03961, section 2.2).

    It is 1 when every expert is as likely and as busy as every other. ``P`` is the mean softmax of the logits ``[..., E]``; ``f``
    is the share of each expert in ``tokens_per_expert`` ``[E]``, through which no gradient flows.
    """
    E = logits.shape[-1]
    share_E = tokens_per_expert.to(logits.dtype) / tokens_per_expert.sum()
    probability_E = logits.softmax(-1).reshape(-1, E).mean(0)
    return E * (share_E * probability_E).sum()


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions; ``num_heads`` divides ``D`` with an even quotient."""

    cos: Tensor
    sin: Tensor

    def __init__(self, hidden_size: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv: nn.Linear = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out: nn.Linear = nn.Linear(hidden_size, hidden_size, bias=False)
        half = hidden_size // num_heads // 2
        frequency = ROTARY_BASE ** (-torch.arange(half) / half)
        angle_SH = torch.arange(window)[:, None] * frequency
        self.register_buffer("cos", angle_SH.cos(), persistent=False)
        self.register_buffer("sin", angle_SH.sin(), persistent=False)

    def _rotate(self, v: Tensor) -> Tensor:
        """Turn each pair of coordinates of ``v`` ``[B, heads, S, D / heads]`` by its position's angle."""
        S = v.shape[2]
        cos, sin = self.cos[:S], self.sin[:S]
        a, b = v.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x_BSD).chunk(3, dim=-1))
        y = functional.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class DenseMLP(nn.Module):
    """The baseline's feed-forward part, ``(silu(x Wg) * (x Wu)) Wd``: what every token would get from one wide expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj: nn.Linear = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj: nn.Linear = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer: attention, then a mixture of experts or the dense baseline."""

    def __init__(self, settings: Settings, *, use_experts: bool, processes: Processes = ALONE) -> None:
        super().__init__()
        D, F = settings.hidden_size, settings.intermediate_size
        self.attention_norm: nn.RMSNorm = nn.RMSNorm(D)
        self.attention: Attention = Attention(D, settings.num_heads, settings.window)
        self.mlp_norm: nn.RMSNorm = nn.RMSNorm(D)
        self.processes = processes
        self.mlp: MoE | DenseMLP
        if use_experts:
            self.mlp = MoE(hidden_size=D, intermediate_size=F, num_experts=settings.num_experts, top_k=settings.top_k)
        else:
            self.mlp = DenseMLP(D, settings.top_k * F)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, its balance loss and its ``tokens_per_expert``."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        normed_BSD = self.mlp_norm(x_BSD)
        if isinstance(self.mlp, MoE):
            y_BSD, logits, _, _, tokens_per_expert = self.mlp(normed_BSD, return_routing=True)
            tokens_per_expert = self.processes.sum(tokens_per_expert)
            return x_BSD + y_BSD, balance_loss(logits, tokens_per_expert), tokens_per_expert
        return x_BSD + self.mlp(normed_BSD), x_BSD.new_zeros(()), x_BSD.new_zeros(0, dtype=torch.int64)


class ByteTransformer(nn.Module):
    """Predicts the next byte, with mixtures of experts or a dense baseline with as many active parameters."""

    def __init__(self, settings: Settings, *, use_experts: bool, processes: Processes = ALONE) -> None:
        super().__init__()
        self.window: int = settings.window
        self.embedding: nn.Embedding = nn.Embedding(VOCABULARY, settings.hidden_size)
        self.blocks: nn.ModuleList = nn.ModuleList(
            Block(settings, use_experts=use_experts, processes=processes) for _ in range(settings.num_layers)
        )
        self.norm: nn.RMSNorm = nn.RMSNorm(settings.hidden_size)
        self.head: nn.Linear = nn.Linear(settings.hidden_size, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(settings.hidden_size))

    def _run(self, bytes_BS: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x_BSD = self.embedding(bytes_BS)
        routed = []
        for block in self.blocks:
            x_BSD, *balance_and_counts = block(x_BSD)
            routed.append(balance_and_counts)
        return self.head(self.norm(x_BSD)), routed

    def forward(self, bytes_BS: Tensor, targets_BS: Tensor) -> Loss:
        """The losses on a batch; cross-entropy is inside, so that a compiled model fuses it."""
        logits_BSV, routed = self._run(bytes_BS)
        balances, counts = zip(*routed, strict=True)
        cross_entropy = functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
        return Loss(cross_entropy, torch.stack(balances).mean(), torch.stack(counts))

    def logits(self, bytes_BS: Tensor) -> Tensor:
        """``[B, S, 256]``: of the byte after each."""
        return self._run(bytes_BS)[0]

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, *, temperature: float, seed: int) -> bytes:
        """Continue a prompt byte by byte, and return the added bytes."""
        device = self.head.weight.device
        # Drawn on the CPU, so that the same seed means the same draws on every device.
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(length):
            bytes_BS = torch.tensor([text[-self.window :]], device=device)
            probability = (self.logits(bytes_BS)[0, -1].float() / temperature).softmax(-1).cpu()
            text.append(int(torch.multinomial(probability, 1, generator=generator)))
        return bytes(text[len(prompt) :])


class ParameterCount(NamedTuple):
    """Parameters of a model, in all and those that one token passes through."""

    total: int
    active: int


def count_parameters(model: ByteTransformer) -> ParameterCount:
    """Count a model's parameters; of each MoE block, a token uses ``K`` of ``E`` experts."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        of_an_expert = sum(parameter.numel() for parameter in moe.experts.parameters()) // moe.config.num_experts
        idle += of_an_expert * (moe.config.num_experts - moe.config.experts_per_token)
    return ParameterCount(total, total - idle)
