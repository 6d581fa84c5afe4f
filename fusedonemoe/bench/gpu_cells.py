"""What the suite for GPUs measures: the expert layers of published models, and the rows of the benchmarks of three seeds.

A cell's router is not a linear layer but its result: logits are an input. The layer itself is one dense product, the same
for everyone, and given logits can be as uneven as wanted. Logits of a token lie far apart, so every peer picks the same
experts whatever it rounds.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedonemoe.bench.workloads import Cell, LeastWork

SUITE = "gpu"
# forward: without gradients. recorded: the forward that keeps what a backward needs. training: that and the backward.
# decode: the forward without gradients, replayed as a CUDA graph.
MODES = ("forward", "recorded", "training", "decode")
# T and N = TK beyond these are of no use where only code paths are run, and sizes are multiples that every peer takes.
DRY_T, DRY_D, DRY_F, DRY_E, DRY_K = 12, 32, 48, 8, 3


@dataclass(frozen=True)
class GpuCell(Cell):
    """A cell of the suite for GPUs.

    Attributes:
        activation: of the experts, as in :func:`fusedonemoe.functional.experts_mlp`.
        gated: whether the experts have a gate.
        bias: whether they have biases.
        layout: rows of the up-projection.
        transposed: whether the weights are stored ``[E, D, G]`` and ``[E, F, D]``.
        score_first: whether the softmax goes over all logits, or over the picked ones.
        norm_topk_prob: whether a token's weights sum to 1.
        routing: ``"uniform"``, or ``"skewed"``: popularity falls as 1 / rank (Zipf).
        save_percent: share of the pre-activations that a training step keeps; peers have no such dial and keep what they keep.
    """

    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    layout: str = "gate_up"
    transposed: bool = False
    score_first: bool = True
    norm_topk_prob: bool = True
    routing: str = "uniform"
    save_percent: int = 100

    @property
    def name(self) -> str:
        """What ``--cells`` matches."""
        dtype = str(self.dtype).removeprefix("torch.")
        saved = f"-save{self.save_percent}" if self.save_percent != 100 else ""
        return f"{self.label}-{dtype}-{self.mode}{saved}{'-skewed' if self.routing == 'skewed' else ''}"

    @property
    def G(self) -> int:
        """Rows of the up-projection."""
        return 2 * self.F if self.gated else self.F

    @property
    def has_gradients(self) -> bool:
        """Whether a call records what a backward needs."""
        return self.mode in ("recorded", "training")

    @property
    def weight_bytes(self) -> int:
        """The weights of all experts; none of a router."""
        return self.parameters * self.dtype.itemsize

    @property
    def parameters(self) -> int:
        """The weights of all experts, biases left out; none of a router."""
        if self.operator == "router":
            return 0
        return self.E * (self.F if self.operator == "merged" else self.G + self.F) * self.D

    @property
    def active_parameters(self) -> int:
        """Those of the experts of one token."""
        return self.parameters // self.E * self.K


def least_work(cell: GpuCell, *, experts_hit: int) -> LeastWork:
    """Count the work of one call.

    Args:
        cell: the shape.
        experts_hit: how many distinct experts the tokens chose.

    Returns:
        Operations of the matrix products over the routed rows (three times those of the forward in a training step), and
        the bytes of inputs, outputs, the weights of the experts hit, and in a training step their second reading and the
        gradients, which have as many elements as all weights.
    """
    T, N, size = cell.T, cell.T * cell.K, cell.dtype.itemsize
    routing = N * (8 + 4) if cell.operator == "merged" else 4 * T * cell.E
    if cell.operator == "router":
        return LeastWork(0, routing + N * (8 + 4))
    per_expert = cell.weight_bytes // cell.E
    flops = 2 * N * (per_expert // size)
    read, rows = experts_hit * per_expert, T * cell.D * size
    out = T * cell.F * size if cell.operator == "merged" else rows
    if cell.mode == "training":
        return LeastWork(3 * flops, 2 * read + cell.weight_bytes + 2 * rows + out + 2 * routing)
    return LeastWork(flops, read + rows + out + routing)


def products(cell: GpuCell) -> list[tuple[int, int, int]]:
    """The dense products ``[m, k] @ [k, n]`` with the operations of a cell, as ``(m, k, n)``."""
    N, D, F = cell.T * cell.K, cell.D, cell.F
    if cell.operator == "router":
        return []
    forward = [(N, D, F)] if cell.operator == "merged" else [(N, D, cell.G), (N, F, D)]
    if cell.mode != "training":
        return forward
    return [*forward, *((m, n, k) for m, k, n in forward), *((k, m, n) for m, k, n in forward)]


def shrunk(cell: GpuCell, *, interpreted: bool = False) -> GpuCell:
    """The same options at sizes that a CPU runs at once.

    Args:
        cell: of the suite.
        interpreted: for Triton's interpreter, whose matrix products take the bits of bfloat16 for integers: it gets float32.
    """
    E = min(cell.E, DRY_E)
    dtype = torch.float32 if interpreted and cell.dtype == torch.bfloat16 else cell.dtype
    return replace(cell, T=min(cell.T, DRY_T), D=DRY_D, F=DRY_F, E=E, K=min(cell.K, DRY_K, E), dtype=dtype)


# D, F, E, K and the options of models as their configurations have them.
_MODELS: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "qwen3-30b": ((2048, 768, 128, 8), {}),
    "mixtral": ((4096, 14336, 8, 2), {}),
    "olmoe": ((2048, 1024, 64, 8), {"norm_topk_prob": False}),
    "deepseek-v2-lite": ((2048, 1408, 64, 6), {"norm_topk_prob": False}),
    "gpt-oss-20b": (
        (2880, 2880, 32, 4),
        {"activation": "swiglu_oai", "bias": True, "layout": "interleaved", "transposed": True, "score_first": False},
    ),
    "qwen3-next": ((2048, 512, 512, 10), {}),
    "nomic": ((768, 3072, 8, 2), {"activation": "gelu", "gated": False, "bias": True, "norm_topk_prob": False}),
    "granite": ((1024, 512, 32, 8), {"score_first": False}),
}
# Tokens by model and use; a use is a mode, with "skewed" before it where few experts get most of the tokens.
_USES: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen3-30b": {
        "training": (32768, 4096, 512),
        "forward": (32768, 4096, 512, 64, 8, 1),
        "decode": (1, 8, 64),
        "recorded": (32768, 4096),
        "skewed training": (32768,),
        "skewed forward": (32768, 512),
    },
    "mixtral": {"training": (4096,), "forward": (4096, 64, 1), "decode": (1, 8, 64)},
    "gpt-oss-20b": {"training": (4096,), "forward": (4096, 64), "decode": (1, 8, 64), "skewed forward": (4096,)},
    "olmoe": {"training": (4096,), "forward": (4096, 512), "decode": (1, 8)},
    "deepseek-v2-lite": {"training": (4096,), "forward": (4096, 512), "decode": (1, 8)},
    "qwen3-next": {"training": (4096,), "forward": (32768, 4096, 512), "decode": (1, 8), "skewed forward": (4096,)},
    "nomic": {"training": (8192,), "forward": (8192, 512), "decode": (1,), "skewed training": (8192,)},
    "granite": {"training": (4096,), "forward": (4096, 512), "decode": (1, 64)},
}


def _of_models() -> list[GpuCell]:
    cells = []
    for model, uses in _USES.items():
        (D, F, E, K), options = _MODELS[model]
        for use, tokens in uses.items():
            mode = use.rpartition(" ")[2]
            routing = "skewed" if use.startswith("skewed") else "uniform"
            cells += [
                GpuCell("experts", T, D, F, E, K, torch.bfloat16, mode=mode, label=f"{model}-T{T}", routing=routing, **options)
                for T in tokens
            ]
    return cells


def _of_fusedonemoe() -> list[GpuCell]:
    """The original's benchmark: its merged up-projection at 32, 128 and 1024 experts."""
    uses = ((torch.bfloat16, "forward"), (torch.float32, "forward"), (torch.bfloat16, "training"))
    return [
        GpuCell("merged", 512, 128, 512, E, 8, dtype, mode=mode, label=f"merged-E{E}")
        for dtype, mode in uses
        for E in (32, 128, 1024)
    ]


def _of_candle_moe() -> list[GpuCell]:
    """The rows of candle-moe's tables, and of its router's; two more routers are of sizes that servers publish."""
    routers = [(32, 8, 2), (512, 8, 2), (8192, 8, 2), (32768, 8, 2), (4096, 128, 8), (8192, 512, 8)]
    cells = [
        GpuCell("router", T, 1, 1, E, K, torch.float32, label=f"router-T{T}-E{E}", norm_topk_prob=E > 8) for T, E, K in routers
    ]
    rows = [(T, torch.float32) for T in (32, 512, 8192, 32768)] + [(T, torch.float16) for T in (8192, 32768)]
    for kind in ("nomic", "qwen3"):
        options: dict[str, Any] = {"gated": kind == "qwen3", "norm_topk_prob": False}
        cells += [GpuCell("experts", T, 768, 3072, 8, 2, dtype, label=f"candle-{kind}-T{T}", **options) for T, dtype in rows]
    return cells


def _of_momoe() -> list[GpuCell]:
    """MoMoE publishes pictures: these are the sizes of its example, with its dial at both ends and in the middle."""
    uses: list[dict[str, Any]] = [{"mode": "forward"}]
    uses += [{"mode": "training", "save_percent": percent} for percent in (100, 50, 0)]
    return [
        GpuCell("experts", T, 2048, 1024, 128, 8, torch.bfloat16, label=f"momoe-T{T}", **use)
        for T in (4096, 16384, 32768)
        for use in uses
    ]


# The headline first: a run that is stopped has what matters most.
CELLS: tuple[GpuCell, ...] = (*_of_models(), *_of_fusedonemoe(), *_of_candle_moe(), *_of_momoe())
