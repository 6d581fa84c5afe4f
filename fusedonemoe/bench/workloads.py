"""What is measured: cells, their inputs, and the least work that they ask of a machine.

Shape legend: T tokens, D hidden size, F intermediate size, E experts, K experts per token.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fusedonemoe.testing import make_experts, make_merged_inputs, make_mlp_inputs

DTYPES = (torch.float32, torch.bfloat16)
# How a cell's process lets torch allocate, as settings of its environment. The CPU allocator keeps nothing between calls, so
# a gradient as large as the weights costs a page fault for every 4 KiB of it; with huge pages, for every 2 MiB.
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"}}
# Tokens are kept whose K-th and (K+1)-th logit lie further apart than this many units of bfloat16 rounding at the size of
# the largest logit. Peers differ in the dtype of their logits (transformers: that of the model; we: float32), so on an
# unselected token they may rightly pick different experts, and whole blocks could not be compared.
LEAST_GAP = 2.0
CANDIDATES_PER_TOKEN = 8
# How many rows of tables an expert is, by operator; those of product keys are not the router's.
ROWS_OF_TABLES = {"keys": 0, "neurons": 2, "values": 1}


@dataclass(frozen=True)
class Cell:
    """One line of the benchmark: an operator at a shape.

    Attributes:
        operator: ``"block"``, router and SwiGLU experts; ``"merged"``, the merged up-projection of the original; ``"neurons"``
            and ``"values"``, experts of one neuron and of none; or ``"keys"``, the product-key router, whose two lists of
            logits have ``G`` keys each: ``E = G * G``, and no ``D``. The last three have no ``F``.
        T: tokens.
        D: hidden size.
        F: intermediate size.
        E: experts.
        K: experts per token.
        dtype: of the input and the weights.
        mode: ``"forward"``, without gradients; or ``"training"``, the forward and the gradients of the input and all weights.
        label: what stands for the sizes in the name.
        allocator: of ``ALLOCATORS``; anything but ``"default"`` needs a process of the cell's own.
    """

    operator: str
    T: int
    D: int
    F: int
    E: int
    K: int
    dtype: torch.dtype
    mode: str = "forward"
    label: str = ""
    allocator: str = "default"

    @property
    def name(self) -> str:
        """What ``--cells`` matches."""
        dtype = str(self.dtype).removeprefix("torch.")
        if not self.label:
            return f"{self.operator}-T{self.T}-D{self.D}-F{self.F}-E{self.E}-K{self.K}-{dtype}"
        allocator = "" if self.allocator == "default" else "-" + self.allocator.replace(" ", "-")
        return f"{self.label}-{dtype}-{self.mode}{allocator}"

    @property
    def rotation(self) -> int:
        """How many inputs the timing rotates through.

        Three, so that no call finds exactly its own last rows in the cache; few tokens need more, so that no call finds the
        experts of its own last turn there.
        """
        return 16 if self.T == 1 else 6 if self.T <= 64 else 3

    @property
    def weight_bytes(self) -> int:
        """The weights of router and gated experts."""
        return self.E * (3 * self.D * self.F + self.D) * self.dtype.itemsize

    @property
    def parameters(self) -> int:
        """All weights that a call may read."""
        if self.operator in ROWS_OF_TABLES:
            return ROWS_OF_TABLES[self.operator] * self.E * self.D
        if self.operator == "merged":
            return self.E * self.D * self.F
        return self.E * (3 * self.D * self.F + self.D)

    @property
    def active_parameters(self) -> int:
        """The weights that one token is multiplied with."""
        if self.operator in ROWS_OF_TABLES:
            return ROWS_OF_TABLES[self.operator] * self.K * self.D
        if self.operator == "merged":
            return self.K * self.D * self.F
        return self.K * 3 * self.D * self.F + self.E * self.D

    @property
    def promised_bytes(self) -> int:
        """What a forward without gradients may allocate beside its input and output: ``3 N (F + D)`` elements, N = TK."""
        return 3 * self.T * self.K * (self.F + self.D) * self.dtype.itemsize


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
_USES = (("forward", "default"), *(("training", allocator) for allocator in ALLOCATORS))

SUITES: dict[str, tuple[Cell, ...]] = {
    "quick": tuple(
        Cell(operator, T=512, D=128, F=512, E=E, K=8, dtype=dtype)
        for operator, E, dtype in product(("block", "merged"), (32, 128, 1024), DTYPES)
    ),
    "cpu": tuple(
        Cell("block", T, D, F, E, K, dtype, mode=mode, label=label, allocator=allocator)
        for (label, (T, D, F, E, K)), dtype, (mode, allocator) in product(_SHAPES.items(), DTYPES, _USES)
    ),
}
# Suites whose cells run in a process each.
ISOLATED_SUITES = ("cpu",)


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of a whole block, ``Cell.rotation`` of them over one set of weights.

    Attributes:
        xs: ``[T, D]`` each.
        router: ``[E, D]``.
        gate_up_proj: ``[E, 2F, D]``.
        down_proj: ``[E, D, F]``.
        experts: ``[T, K]`` ids each, the selection that every dtype agrees on.
        dys: ``[T, D]`` each, the gradients of the outputs; none in a forward cell.
    """

    xs: tuple[Tensor, ...]
    router: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    experts: tuple[Tensor, ...]
    dys: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class MergedInputs:
    """Inputs of the merged up-projection, ``Cell.rotation`` of them over one set of weights.

    Attributes:
        xs: ``[T, D]`` each.
        experts: ``[T, K]`` ids each.
        weights: ``[T, K]`` float32 each.
        proj: ``[E, D, F]``.
    """

    xs: tuple[Tensor, ...]
    experts: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    proj: Tensor


@dataclass(frozen=True)
class NeuronInputs:
    """Inputs of single-neuron experts, or of value memory, ``Cell.rotation`` of them over one pair of tables.

    Attributes:
        xs: ``[T, D]`` each.
        experts: ``[T, K]`` ids each.
        weights: ``[T, K]`` float32 each.
        down_table: ``[E, D]``; of value memory, empty.
        up_table: ``[E, D]``.
        dys: ``[T, D]`` each, the gradients of the outputs.
    """

    xs: tuple[Tensor, ...]
    experts: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    down_table: Tensor
    up_table: Tensor
    dys: tuple[Tensor, ...]


@dataclass(frozen=True)
class KeyInputs:
    """Inputs of the product-key router.

    Attributes:
        xs: logits ``[T, 2, G]`` each.
        experts: the best pairs, ``[T, K]`` ids each, best first.
    """

    xs: tuple[Tensor, ...]
    experts: tuple[Tensor, ...]


Inputs = BlockInputs | MergedInputs | NeuronInputs | KeyInputs


def make_inputs(cell: Cell) -> Inputs:
    """Draw the inputs of a cell; the same for every peer and every run."""
    sizes = (cell.T, cell.D, cell.F, cell.E, cell.K)
    if cell.operator == "merged":
        # Weights of later draws would be thrown away, so those are drawn for one small expert.
        first = make_merged_inputs(*sizes, dtype=cell.dtype, routing="distinct")
        draws = [first] + [
            make_merged_inputs(cell.T, cell.D, 1, cell.E, cell.K, dtype=cell.dtype, routing="distinct", seed=seed)
            for seed in range(1, cell.rotation)
        ]
        return MergedInputs(
            tuple(d.x for d in draws), tuple(d.experts for d in draws), tuple(d.weights for d in draws), first.proj
        )
    if cell.operator in ("neurons", "values"):
        return _neuron_inputs(cell)
    if cell.operator == "keys":
        return _key_inputs(cell)
    mlp = make_mlp_inputs(*sizes, dtype=cell.dtype)
    xs, experts, router = unambiguous_tokens(cell)
    generator = torch.Generator().manual_seed(8)
    count = cell.rotation if cell.mode == "training" else 0
    dys = tuple(torch.randn(cell.T, cell.D, generator=generator, device="cpu").to(cell.dtype) for _ in range(count))
    return BlockInputs(xs, router, mlp.up_proj, mlp.down_proj, experts, dys)


def unambiguous_tokens(cell: Cell) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Tokens whose top K is the same in float64, float32 and bfloat16 arithmetic; their experts; and the router.

    Args:
        cell: a block's; ``rotation`` of ``[T, D]`` and of ``[T, K]`` are drawn, and one ``[E, D]``.
    """
    generator = torch.Generator().manual_seed(7)
    wanted = cell.rotation * cell.T
    router_ED = (torch.randn(cell.E, cell.D, generator=generator, device="cpu") * cell.D**-0.5).to(cell.dtype)
    x_CD = torch.randn(CANDIDATES_PER_TOKEN * wanted, cell.D, generator=generator, device="cpu").to(cell.dtype)
    best = (x_CD.double() @ router_ED.double().t()).topk(min(cell.K + 1, cell.E), dim=1)
    if cell.K < cell.E:
        gap = best.values[:, cell.K - 1] - best.values[:, cell.K]
        clear = gap > LEAST_GAP * torch.finfo(torch.bfloat16).eps * best.values.abs().amax(1)
        kept = clear.nonzero().squeeze(1)[:wanted]
    else:
        kept = torch.arange(wanted, device="cpu")
    if kept.numel() < wanted:
        raise ValueError(f"{cell.name}: only {kept.numel()} of {wanted} tokens have an unambiguous top {cell.K}")
    xs = x_CD[kept].split(cell.T)
    experts = best.indices[kept, : cell.K].split(cell.T)
    return tuple(x.contiguous() for x in xs), tuple(e.contiguous() for e in experts), router_ED


def _neuron_inputs(cell: Cell) -> NeuronInputs:
    draw = torch.Generator().manual_seed(7)

    def normal(rows: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, cell.D, generator=draw, device="cpu") * scale).to(cell.dtype)

    rotation = range(cell.rotation)
    return NeuronInputs(
        tuple(normal(cell.T) for _ in rotation),
        tuple(make_experts(cell.T, cell.E, cell.K, routing="distinct", seed=seed) for seed in rotation),
        tuple(torch.rand(cell.T, cell.K, generator=draw, device="cpu") for _ in rotation),
        normal(cell.E if cell.operator == "neurons" else 0, cell.D**-0.5),
        normal(cell.E),
        tuple(normal(cell.T) for _ in rotation),
    )


def _key_inputs(cell: Cell) -> KeyInputs:
    """Logits whose best K + 1 sums are further apart than they round in float32: who adds them otherwise picks the same."""
    draw = torch.Generator().manual_seed(7)
    tokens, found = cell.rotation * cell.T, 0
    xs: list[Tensor] = []
    experts: list[Tensor] = []
    while found < tokens:
        x = torch.randn(512, 2, round(cell.E**0.5), generator=draw, device="cpu")
        best = (x[:, 0, :, None].double() + x[:, 1, None, :].double()).flatten(1).topk(min(cell.K + 1, cell.E))
        clear = (best.values.diff() < -1e-5).all(1)
        xs.append(x[clear])
        experts.append(best.indices[clear, : cell.K])
        found += int(clear.sum())
    return KeyInputs(*(torch.cat(parts)[:tokens].split(cell.T) for parts in (xs, experts)))


@dataclass(frozen=True)
class LeastWork:
    """What a cell cannot do without.

    Attributes:
        flops: operations of the matrix products over the routed rows; a gradient has two products for each of the forward.
        touched_bytes: forward, the weights of the experts hit, read once, the input and output, and a routing that is an input;
            training, those weights read twice, the gradient of every weight of every expert written once, and the input and
            both its gradients.
    """

    flops: int
    touched_bytes: int


def least_work(cell: Cell, *, experts_hit: int) -> LeastWork:
    """Count the work of one call.

    Args:
        cell: the shape.
        experts_hit: how many distinct experts the tokens chose.
    """
    T, D, F, E, N = cell.T, cell.D, cell.F, cell.E, cell.T * cell.K
    if cell.operator == "merged":
        # The routing is an input here: an int64 id and a float32 weight for each row.
        moved = experts_hit * D * F + T * D + T * F
        return LeastWork(flops=2 * N * D * F, touched_bytes=moved * cell.dtype.itemsize + N * (8 + 4))
    if cell.operator == "keys":  # both lists of logits in, an int64 id and a float32 weight for each pair out
        return LeastWork(flops=0, touched_bytes=T * 2 * round(E**0.5) * cell.dtype.itemsize + N * (8 + 4))
    if cell.operator in ("neurons", "values"):
        tables = 2 if cell.operator == "neurons" else 1
        rows = tables * experts_hit + tables * T  # of x and y; value memory has no x
        if cell.mode == "training":
            rows += tables * (experts_hit + E) + tables * T  # of dy and dx
        moved = rows * D * cell.dtype.itemsize + N * (8 + 4)
        return LeastWork(flops=2 * tables * N * D * (3 if cell.mode == "training" else 1), touched_bytes=moved)
    flops = 6 * N * D * F + 2 * T * D * E
    read = experts_hit * 3 * D * F + E * D
    if cell.mode == "training":
        return LeastWork(3 * flops, (2 * read + E * 3 * D * F + E * D + 3 * T * D) * cell.dtype.itemsize)
    return LeastWork(flops, (read + 2 * T * D) * cell.dtype.itemsize)


@dataclass(frozen=True)
class Floor:
    """The least time a machine with these ceilings needs.

    Attributes:
        seconds: the larger of the two quotients.
        bound_by: ``"flops"`` or ``"bytes"``, whichever it is.
    """

    seconds: float
    bound_by: str


def floor_of(work: LeastWork, *, flops_per_s: float, bytes_per_s: float) -> Floor:
    """``max(flops / rate, bytes / bandwidth)``.

    Args:
        work: from :func:`least_work`.
        flops_per_s: the machine's best matrix-product rate in the cell's dtype.
        bytes_per_s: the machine's read bandwidth.
    """
    by_flops, by_bytes = work.flops / flops_per_s, work.touched_bytes / bytes_per_s
    return Floor(by_flops, "flops") if by_flops >= by_bytes else Floor(by_bytes, "bytes")
