"""The cells of the suite ``seeds``: the rows of the tables that the five reference systems publish.

A row that is too slow for a CPU is measured at a smaller size, and its name says so; a row in float16, which CPUs multiply one
element at a time, is measured in bfloat16. ``published`` has the published size and dtype. Sizes and modes are those of each
system's own benchmark or, where that is a picture, of its example.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedonemoe.bench.workloads import Cell, LeastWork

# original: gate, merged up-projection, squared ReLU, one down-projection. topk: softmax and selection. mlp: experts alone.
# moekernel: gate and plain ReLU experts. product-keys: a router over pairs. neurons, values: rows of tables as experts.
OPERATORS = ("original", "topk", "mlp", "moekernel", "product-keys", "neurons", "values")
ROUTERS = ("topk", "product-keys")
WITH_ROUTER = ("original", "moekernel")


@dataclass(frozen=True)
class SeedCell(Cell):
    """A row of a published table.

    Attributes:
        system: who publishes it.
        published: the sizes that the table has where ours are smaller, and the dtype where ours is another; else empty.
    """

    system: str = ""
    published: str = ""

    @property
    def name(self) -> str:
        """The text that ``--cells`` matches."""
        full = "-save100" if self.operator == "mlp" and self.mode == "training" and self.save_percent == 100 else ""
        return super().name + full + ("-scaled" if self.published else "")

    @property
    def rotation(self) -> int:
        """The number of inputs that the timing rotates through."""
        return 2

    @property
    def parameters(self) -> int:
        """All weights; a router's logits are an input, except of a whole block."""
        per_expert, others = self._weights
        return self.E * per_expert + others

    @property
    def active_parameters(self) -> int:
        """The weights that one token is multiplied with."""
        per_expert, others = self._weights
        return self.K * per_expert + others

    @property
    def _weights(self) -> tuple[int, int]:
        """The weights of one expert, and those outside the experts."""
        router = self.E * self.D
        return {
            "original": (self.D * self.F, router + self.F * self.D),
            "topk": (0, 0),
            "mlp": ((self.G + self.F) * self.D, 0),
            "moekernel": (2 * self.F * self.D, router),
            "product-keys": (0, 0),
            "neurons": (2 * self.D, 0),
            "values": (self.D, 0),
        }[self.operator]


def least_work(cell: SeedCell, *, experts_hit: int) -> LeastWork:
    """Count the work of one call, as :func:`fusedonemoe.bench.workloads.least_work` does.

    Args:
        cell: the shape.
        experts_hit: how many distinct experts the tokens chose.
    """
    T, N, size = cell.T, cell.T * cell.K, cell.dtype.itemsize
    routing = N * (8 + 4)
    training = cell.mode == "training"
    if cell.operator in ROUTERS:
        # One number for each expert, or for each key of both halves; a training step writes as many and reads its weights.
        logits = 4 * T * (cell.E if cell.operator == "topk" else 2 * round(cell.E**0.5))
        return LeastWork(0, (2 * logits + N * 4 if training else logits) + routing)
    per_expert, others = cell._weights
    flops = 2 * (N * per_expert + T * others)
    read = (experts_hit * per_expert + others) * size
    rows = T * cell.D * size
    routing = 0 if cell.operator in WITH_ROUTER else routing
    x = 0 if cell.operator == "values" else rows
    if training:
        return LeastWork(3 * flops, 2 * read + cell.weight_bytes + 2 * x + rows + 2 * routing)
    return LeastWork(flops, read + x + rows + routing)


def shrunk(cell: SeedCell) -> SeedCell:
    """The same options at sizes that a CPU runs at once."""
    E = 9 if cell.operator == "product-keys" else min(cell.E, 12)
    return replace(cell, T=min(cell.T, 7), D=16, F=24 if cell.F > 1 else 1, E=E, K=min(cell.K, 3))


F32, BF16 = torch.float32, torch.bfloat16


def _fusedonemoe() -> list[SeedCell]:
    return [
        SeedCell("original", 512, 128, 512, E, 8, F32, label=f"fusedonemoe-E{E}", system="FusedOneMoE", activation="relu2")
        for E in (32, 128, 1024)
    ]


def _candle_moe() -> list[SeedCell]:
    """Its router's four rows; its layer's six, which are timed as Nomic's experts; and Qwen3's, which it has as well."""
    system = "candle-moe"
    cells = [SeedCell("topk", T, 1, 1, 8, 2, F32, label=f"candle-router-T{T}", system=system) for T in (32, 512, 8192, 32768)]
    rows = [(32, 32, F32, ""), (512, 512, F32, ""), (8192, 1024, F32, ""), (32768, 2048, F32, "")]
    rows += [(8192, 1024, BF16, "float16, "), (32768, 2048, BF16, "float16, ")]
    for kind, gated in (("nomic", False), ("qwen3", True)):
        for there, here, dtype, told in rows if kind == "nomic" else rows[:3]:
            published = "" if there == here else f"{told}T {there}"
            label = f"candle-{kind}-T{there}"
            cells.append(
                SeedCell("mlp", here, 768, 3072, 8, 2, dtype, label=label, system=system, published=published, gated=gated)
            )
    return cells


def _momoe() -> list[SeedCell]:
    """Its pictures' kinds of call at three numbers of tokens, at a quarter of its example's widths and experts."""
    uses: list[dict[str, Any]] = [{}]
    uses += [{"mode": "training", "save_percent": percent} for percent in (100, 50, 0)]
    return [
        SeedCell(
            "mlp",
            T // 8,
            512,
            256,
            32,
            8,
            BF16,
            label=f"momoe-T{T}",
            system="MoMoE",
            published=f"T {T}, D 2048, F 1024, E 128",
            **use,
        )
        for T in (4096, 16384, 32768)
        for use in uses
    ]


def _moekernel() -> list[SeedCell]:
    """Its comparison with NumPy and PyTorch, and the three configurations of its layer."""
    cells = []
    for T, D, F, E, K, published, label in (
        (1024, 256, 1024, 4, 2, "", "comparison"),
        (512, 1024, 2048, 8, 2, "T 16384", "small"),
        (256, 512, 1024, 16, 4, "T 65536, D 2048, F 4096", "medium"),
        (256, 512, 1024, 32, 8, "T 262144, D 4096, F 8192", "large"),
    ):
        options: dict[str, Any] = {"activation": "relu", "gated": False, "published": published}
        cells.append(SeedCell("moekernel", T, D, F, E, K, F32, label=f"moekernel-{label}", system="MoeKernel", **options))
    return cells


def _flashmoe() -> list[SeedCell]:
    """Its four benchmarks: the router over pairs of keys, the experts, PKM and PEER."""
    system = "FlashMoE"

    def router(T: int, G: int, K: int, mode: str) -> SeedCell:
        return SeedCell("product-keys", T, 1, 1, G * G, K, F32, mode=mode, label=f"flashmoe-router-T{T}-G{G}", system=system)

    sizes = [(T, G, K) for G, K in ((64, 8), (128, 16)) for T in (4096, 8192, 16384, 32768)]
    cells = [router(*size, "forward") for size in sizes]
    cells += [router(*size, "training") for size in (sizes[0], sizes[4])]
    for D, E, K, T in ((1024, 4096, 4, 4096), (1024, 4096, 8, 4096), (4096, 16384, 16, 512), (4096, 16384, 32, 512)):
        told = "" if T == 4096 else "T 4096"
        for mode in ("forward", "training"):
            label = f"flashmoe-expert-D{D}-K{K}"
            cells.append(SeedCell("neurons", T, D, 1, E, K, F32, mode=mode, label=label, system=system, published=told))
    for operator, E, Ks, activation in (
        ("values", 197136, (2500, 5000, 12500, 25000), "identity"),
        ("neurons", 102400, (1250, 2500, 6250, 12500), "gelu"),
    ):
        name = "pkm" if operator == "values" else "peer"
        for T, K in [(1024, K) for K in Ks] + [(T, Ks[0]) for T in (2048, 4096, 8192, 16384)]:
            cells.append(
                SeedCell(
                    operator,
                    T // 64,
                    1024,
                    1,
                    E,
                    K,
                    BF16,
                    label=f"flashmoe-{name}-T{T}-K{K}",
                    system=system,
                    published=f"T {T}",
                    activation=activation,
                )
            )
    return cells


CELLS: tuple[SeedCell, ...] = (*_fusedonemoe(), *_candle_moe(), *_momoe(), *_moekernel(), *_flashmoe())
