"""The models of the suite ``serving``: norms and blocks, by this library and by its peers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe import MoE
from fusedonemoe.bench.peers import LOOP, OURS, TRANSFORMERS, UnavailableError, qwen3_moe_config

EAGER = f"{OURS}, eager"


@dataclass(frozen=True)
class ServingCell:
    """One way to send the requests.

    Attributes:
        clients: how many at once.
        requests: of one peer, over all rounds.
        layers: of the model.
        D: hidden size.
        F: intermediate size.
        E: experts.
        K: experts per token.
    """

    clients: int
    requests: int = 240
    layers: int = 2
    D: int = 512
    F: int = 384
    E: int = 32
    K: int = 4

    @property
    def name(self) -> str:
        """The text that ``--cells`` matches."""
        return "sequential" if self.clients == 1 else f"concurrent-{self.clients}"

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.layers * self.E * (3 * self.D * self.F + self.D)

    @property
    def active_parameters(self) -> int:
        """The weights that one token is multiplied with."""
        return self.layers * (self.K * 3 * self.D * self.F + self.E * self.D)


CELLS = (ServingCell(1), ServingCell(4), ServingCell(8))


class Blocks(nn.Module):
    """Blocks with a norm before and a sum after them: the part of a decoder that experts are in.

    Args:
        blocks: from ``[T, D]`` to ``[T, D]``.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """``x + block(x / rms(x))``, block after block."""
        for block in self.blocks:
            x = x + block(nn.functional.rms_norm(x, x.shape[-1:]))
        return x


class LoopBlock(nn.Module):
    """Router and experts as most people write them first; in float64, the answer that all others are compared with.

    Args:
        like: whose weights are read.
        dtype: of the computation.
    """

    def __init__(self, like: MoE, dtype: torch.dtype) -> None:
        super().__init__()
        self.K = int(like.gate.top_k or 0)
        like_experts: Any = like.experts
        self.router: Tensor = like.gate.weight.detach().to(dtype)
        self.gate_up: Tensor = like_experts.gate_up_proj.detach().to(dtype)
        self.down: Tensor = like_experts.down_proj.detach().to(dtype)
        self.hit: int = 0

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``[T, D]``; ``hit`` counts the experts that were picked."""
        scores, experts = nn.functional.linear(x, self.router).softmax(-1).topk(self.K, dim=-1)
        scores = scores / scores.sum(-1, keepdim=True)
        y, hit = torch.zeros_like(x), 0
        for e in range(self.router.shape[0]):
            token, choice = torch.where(experts == e)
            if token.numel():
                hit += 1
                gate, up = nn.functional.linear(x[token], self.gate_up[e]).chunk(2, dim=-1)
                out = nn.functional.linear(nn.functional.silu(gate) * up, self.down[e])
                y.index_add_(0, token, out * scores[token, choice, None])
        self.hit = hit
        return y


def blocks_of(cell: ServingCell) -> list[MoE]:
    """The blocks whose weights everyone shares; the same for every run.

    Args:
        cell: their sizes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return [
            MoE(hidden_size=cell.D, intermediate_size=cell.F, num_experts=cell.E, top_k=cell.K).eval() for _ in range(cell.layers)
        ]


def _transformers(cell: ServingCell, blocks: Sequence[MoE]) -> nn.Module:
    if find_spec("transformers") is None:
        raise UnavailableError("transformers is not installed: pip install 'fusedonemoe[bench]'")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    class Block(nn.Module):
        def __init__(self, like: Any) -> None:
            super().__init__()
            with torch.device("meta"):
                self.block: Any = Qwen3MoeSparseMoeBlock(qwen3_moe_config(cell.D, cell.F, cell.E, cell.K))
            self.block.gate.weight = like.gate.weight
            self.block.experts.gate_up_proj = like.experts.gate_up_proj
            self.block.experts.down_proj = like.experts.down_proj

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x[None])[0]

    return Blocks([Block(block) for block in blocks]).eval()


@dataclass(frozen=True)
class ServingPeer:
    """One contender.

    Attributes:
        name: as printed.
        build: from a cell and the blocks whose weights everyone shares to the model.
    """

    name: str
    build: Callable[[ServingCell, Sequence[MoE]], Callable[[Tensor], Tensor]]


def _compiled(cell: ServingCell, blocks: Sequence[MoE], backend: str = "inductor") -> Callable[[Tensor], Tensor]:
    return torch.compile(Blocks(blocks), fullgraph=True, dynamic=True, backend=backend)


PEERS: tuple[ServingPeer, ...] = (
    ServingPeer(OURS, _compiled),
    ServingPeer(EAGER, lambda cell, blocks: Blocks(blocks)),
    ServingPeer(TRANSFORMERS, _transformers),
    ServingPeer(LOOP, lambda cell, blocks: Blocks([LoopBlock(block, torch.float32) for block in blocks])),
)
