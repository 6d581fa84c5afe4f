"""Cells of the benchmark: an operator at a shape, the least work of one call, and the floor that a machine sets for it.

Shape legend: T tokens, D hidden size, F intermediate size, E experts, K experts per token, G rows of an up-projection.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch

DTYPES = (torch.float32, torch.bfloat16)
# forward: without gradients. recorded: the forward that keeps what a backward needs. training: forward and backward.
# decode: the forward without gradients, replayed as a CUDA graph.
MODES = ("forward", "recorded", "training", "decode")
# How a cell's process lets torch allocate, as settings of its environment. The CPU allocator keeps nothing between calls, so
# a gradient as large as the weights costs a page fault for every 4 KiB of it; with huge pages, for every 2 MiB.
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"}}
# The sizes of a dry run. Multiples of 16, because some peers take only those.
DRY_T, DRY_D, DRY_F, DRY_E, DRY_K = 12, 32, 48, 8, 3


class Named(Protocol):
    """A cell or a peer of any suite."""

    @property
    def name(self) -> str:
        """The text that ``--cells`` or ``--peers`` matches, as printed."""


@dataclass(frozen=True)
class Cell:
    """One line of the benchmark."""

    # "block", router and experts; "experts" and "router", whose logits are an input; "quantized" and "merged", the merged
    # up-projection of the original, whose ids and routing weights are an input.
    operator: str
    T: int  # tokens
    D: int  # hidden size
    F: int  # intermediate size
    E: int  # experts
    K: int  # experts per token
    dtype: torch.dtype  # of the input and the weights
    mode: str = "forward"  # one of ``MODES``
    label: str = ""  # replaces the sizes in the name
    allocator: str = "default"  # one of ``ALLOCATORS``; anything but ``"default"`` needs a process for the cell
    activation: str = "silu"  # of the experts, as in :func:`fusedonemoe.functional.experts_mlp`
    gated: bool = True  # whether the experts have a gate
    bias: bool = False  # whether they have biases
    layout: str = "gate_up"  # rows of the up-projection
    transposed: bool = False  # whether the weights are stored ``[E, D, G]`` and ``[E, F, D]``
    score_first: bool = True  # whether the softmax is over all logits, or over the picked ones
    norm_topk_prob: bool = True  # whether a token's weights sum to 1
    routing: str = "uniform"  # ``"uniform"``, or ``"skewed"``: popularity falls as 1 / rank (Zipf)
    save_percent: int = 100  # share of the pre-activations that our training step keeps

    @property
    def name(self) -> str:
        """The text that ``--cells`` matches."""
        dtype = str(self.dtype).removeprefix("torch.")
        if not self.label:
            sizes = f"T{self.T}-D{self.D}-F{self.F}-E{self.E}-K{self.K}"
            return sizes if self.operator == "quantized" else f"{self.operator}-{sizes}-{dtype}"  # always bfloat16
        allocator = "" if self.allocator == "default" else "-" + self.allocator.replace(" ", "-")
        saved = f"-save{self.save_percent}" if self.save_percent != 100 else ""
        return f"{self.label}-{dtype}-{self.mode}{allocator}{saved}{'-skewed' if self.routing == 'skewed' else ''}"

    @property
    def rotation(self) -> int:
        """The inputs that the timing on CPUs rotates through, so that no call finds its last rows or experts in the cache."""
        return 16 if self.T == 1 else 6 if self.T <= 64 else 3

    @property
    def G(self) -> int:
        """Rows of the up-projection."""
        return 2 * self.F if self.gated else self.F

    @property
    def has_gradients(self) -> bool:
        """True where a call records what a backward needs."""
        return self.mode in ("recorded", "training")

    @property
    def is_plain(self) -> bool:
        """True for the common experts: SiLU, gate rows before up rows, no bias."""
        return (self.activation, self.gated, self.bias, self.layout, self.transposed) == ("silu", True, False, "gate_up", False)

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights, by the names of :func:`fusedonemoe.functional.experts_mlp`."""
        E, D, F, G = self.E, self.D, self.F, self.G
        if self.operator == "router":
            return {}
        if self.operator == "merged":
            return {"proj": (E, D, F)}
        up, down = ((E, D, G), (E, F, D)) if self.transposed else ((E, G, D), (E, D, F))
        shapes: dict[str, tuple[int, ...]] = {"router": (E, D)} if self.operator == "block" else {}
        shapes |= {"gate_up_proj": up, "down_proj": down}
        return shapes | ({"gate_up_bias": (E, G), "down_bias": (E, D)} if self.bias else {})

    @property
    def of_experts(self) -> int:
        """Weights of all experts, without biases."""
        return sum(prod(shape) for shape in self.weight_shapes.values() if len(shape) == 3)

    @property
    def of_router(self) -> int:
        """Weights of the router; 0 where its logits are an input."""
        return prod(self.weight_shapes.get("router", (0,)))

    @property
    def parameters(self) -> int:
        """All weights that a call may read, without biases."""
        return self.of_experts + self.of_router

    @property
    def active_parameters(self) -> int:
        """The weights that one token is multiplied with."""
        return self.of_experts // self.E * self.K + self.of_router

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights."""
        return self.parameters * self.dtype.itemsize

    @property
    def promised_bytes(self) -> int:
        """The bound on the memory of a forward besides input and output: ``3 N (F + D)`` elements, N = TK."""
        return 3 * self.T * self.K * (self.F + self.D) * self.dtype.itemsize


@dataclass(frozen=True)
class LeastWork:
    """The work that no implementation of a cell can avoid."""

    flops: int  # operations of the matrix products over the routed rows; a gradient has two products for each of the forward
    # Forward: the weights of the experts hit, read once, input and output, and a routing that is an input. Training: those
    # weights read twice, the gradient of every expert's weights written once, and the input, the routing and their gradients.
    touched_bytes: int


def least_work(cell: Cell, *, experts_hit: int) -> LeastWork:
    """Count the work of one call whose tokens chose so many distinct experts."""
    T, N, size = cell.T, cell.T * cell.K, cell.dtype.itemsize
    pairs, logits = N * (8 + 4), 4 * T * cell.E  # an int64 id and a float32 weight for each row; float32 logits
    if cell.operator == "router":
        return LeastWork(0, logits + pairs)
    routing = {"block": 0, "experts": logits}.get(cell.operator, pairs)
    per_expert = cell.of_experts // cell.E
    flops = 2 * N * per_expert + 2 * T * cell.of_router
    read, rows = (experts_hit * per_expert + cell.of_router) * size, T * cell.D * size
    out = T * cell.F * size if cell.operator == "merged" else rows
    if cell.mode == "training":
        return LeastWork(3 * flops, 2 * read + cell.weight_bytes + 2 * rows + out + 2 * routing)
    return LeastWork(flops, read + rows + out + routing)


def products(cell: Cell) -> list[tuple[int, int, int]]:
    """Return the dense products ``[m, k] @ [k, n]`` with as many operations as the experts of a cell, as ``(m, k, n)``."""
    N, D, F = cell.T * cell.K, cell.D, cell.F
    if cell.operator == "router":
        return []
    forward = [(N, D, F)] if cell.operator == "merged" else [(N, D, cell.G), (N, F, D)]
    if cell.mode != "training":
        return forward
    return [*forward, *((m, n, k) for m, k, n in forward), *((k, m, n) for m, k, n in forward)]


def shrunk(cell: Cell, *, interpreted: bool = False) -> Cell:
    """Return the same options at sizes for a dry run; Triton's interpreter, which reads bfloat16 as integers, gets float32."""
    E = min(cell.E, DRY_E)
    dtype = torch.float32 if interpreted and cell.dtype == torch.bfloat16 else cell.dtype
    return replace(cell, T=min(cell.T, DRY_T), D=DRY_D, F=DRY_F, E=E, K=min(cell.K, DRY_K, E), dtype=dtype)


@dataclass(frozen=True)
class Floor:
    """The least time that a machine needs."""

    seconds: float  # the larger of the two quotients
    bound_by: str  # ``"flops"`` or ``"bytes"``, the larger one


def floor_of(work: LeastWork, *, flops_per_s: float, bytes_per_s: float) -> Floor:
    """Return the floor ``max(flops / rate, bytes / bandwidth)`` at a rate of matrix products and a read bandwidth."""
    by_flops, by_bytes = work.flops / flops_per_s, work.touched_bytes / bytes_per_s
    return Floor(by_flops, "flops") if by_flops >= by_bytes else Floor(by_bytes, "bytes")


def mfu_of(seconds: float | None, flops: float | None, flops_per_s: float | None) -> float | None:
    """Return the model FLOPs utilisation, the share of a rate of matrix products; None where a part is missing or 0."""
    return flops / seconds / flops_per_s if seconds and flops and flops_per_s else None
