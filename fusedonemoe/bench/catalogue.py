"""The cells of the suites: shapes of published models and of other projects' tables."""

from itertools import product
from typing import Any

import torch

from fusedonemoe.bench.workloads import ALLOCATORS, DTYPES, Cell

# T, D, F, E, K of: the original's own benchmark, the blocks of three published models, and sizes that fit no tile.
_SHAPES = {
    "seed32": (512, 128, 512, 32, 8),
    "seed128": (512, 128, 512, 128, 8),
    "seed1024": (512, 128, 512, 1024, 8),
    "qwen3-1": (1, 2048, 768, 128, 8),
    "qwen3-16": (16, 2048, 768, 128, 8),
    "qwen3-512": (512, 2048, 768, 128, 8),
    "mixtral-1": (1, 1024, 3584, 8, 2),
    "mixtral-64": (64, 1024, 3584, 8, 2),
    "mixtral-1024": (1024, 1024, 3584, 8, 2),
    "olmoe-1": (1, 2048, 1024, 64, 8),
    "olmoe-256": (256, 2048, 1024, 64, 8),
    "odd-33": (33, 520, 200, 12, 3),
    "odd-77": (77, 1000, 333, 60, 6),
}
_CPU_USES = (("forward", "default"), *(("training", allocator) for allocator in ALLOCATORS))

# D, F, E, K and options of models, from their configurations.
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
# Tokens by model and use; a use is a mode, after "skewed" where few experts get most of the tokens.
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


def _of_models() -> list[Cell]:
    cells = []
    for model, uses in _USES.items():
        (D, F, E, K), options = _MODELS[model]
        for use, tokens in uses.items():
            given = {"mode": use.rpartition(" ")[2], "routing": "skewed" if use.startswith("skewed") else "uniform", **options}
            cells += [Cell("experts", T, D, F, E, K, torch.bfloat16, label=f"{model}-T{T}", **given) for T in tokens]
    return cells


# The original's benchmark: its merged up-projection.
_OF_FUSEDONEMOE = [
    Cell("merged", 512, 128, 512, E, 8, dtype, mode=mode, label=f"merged-E{E}")
    for dtype, mode in ((torch.bfloat16, "forward"), (torch.float32, "forward"), (torch.bfloat16, "training"))
    for E in (32, 128, 1024)
]
# The rows of candle-moe's tables and router; two more routers have sizes that servers publish.
_ROUTERS = [(32, 8, 2), (512, 8, 2), (8192, 8, 2), (32768, 8, 2), (4096, 128, 8), (8192, 512, 8)]
_ROWS = [*((T, torch.float32) for T in (32, 512, 8192, 32768)), (8192, torch.float16), (32768, torch.float16)]
_OF_CANDLE_MOE = [
    *(Cell("router", T, 1, 1, E, K, torch.float32, label=f"router-T{T}-E{E}", norm_topk_prob=E > 8) for T, E, K in _ROUTERS),
    *(
        Cell("experts", T, 768, 3072, 8, 2, dtype, label=f"candle-{kind}-T{T}", gated=kind == "qwen3", norm_topk_prob=False)
        for kind in ("nomic", "qwen3")
        for T, dtype in _ROWS
    ),
]
# The sizes of MoMoE's example, with its dial at both ends and in the middle: it publishes pictures, no rows.
_OF_MOMOE = [
    Cell("experts", T, 2048, 1024, 128, 8, torch.bfloat16, mode=mode, label=f"momoe-T{T}", save_percent=percent)
    for T in (4096, 16384, 32768)
    for mode, percent in (("forward", 100), ("training", 100), ("training", 50), ("training", 0))
]

SUITES: dict[str, tuple[Cell, ...]] = {
    "quick": tuple(
        Cell(operator, T=512, D=128, F=512, E=E, K=8, dtype=dtype)
        for operator, E, dtype in product(("block", "merged"), (32, 128, 1024), DTYPES)
    ),
    "cpu": tuple(
        Cell("block", T, D, F, E, K, dtype, mode=mode, label=label, allocator=allocator)
        for (label, (T, D, F, E, K)), dtype, (mode, allocator) in product(_SHAPES.items(), DTYPES, _CPU_USES)
    ),
    "quantized": tuple(Cell("quantized", T, *_MODELS["qwen3-30b"][0], torch.bfloat16) for T in (1, 16, 512)),
    # The published models first: a run that is stopped has them.
    "gpu": (*_of_models(), *_OF_FUSEDONEMOE, *_OF_CANDLE_MOE, *_OF_MOMOE),
}
