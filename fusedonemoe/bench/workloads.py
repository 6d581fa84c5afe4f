"""What is measured: cells, their inputs, their exact outputs, and the least work that they ask of a machine.

Shape legend: T tokens, D hidden size, F intermediate size, E experts, K experts per token.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fusedonemoe.testing import make_merged_inputs, make_mlp_inputs

# As many inputs as the timing rotates through, so that no call finds exactly its own last token rows in the cache.
ROTATION = 3
# Tokens are kept whose K-th and (K+1)-th logit lie further apart than this many units of bfloat16 rounding at the size of
# the largest logit. Peers differ in the dtype of their logits (transformers: that of the model; we: float32), so on an
# unselected token they may rightly pick different experts, and whole blocks could not be compared.
LEAST_GAP = 2.0
CANDIDATES_PER_TOKEN = 8


@dataclass(frozen=True)
class Cell:
    """One line of the benchmark: an operator at a shape.

    Attributes:
        operator: ``"block"``, router and SwiGLU experts; or ``"merged"``, the merged up-projection of the original.
        T: tokens.
        D: hidden size.
        F: intermediate size.
        E: experts.
        K: experts per token.
        dtype: of the input and the weights.
    """

    operator: str
    T: int
    D: int
    F: int
    E: int
    K: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What ``--cells`` matches."""
        return f"{self.operator}-T{self.T}-D{self.D}-F{self.F}-E{self.E}-K{self.K}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def promised_bytes(self) -> int:
        """What a forward without gradients may allocate beside its input and output: ``3 N (F + D)`` elements, N = TK."""
        return 3 * self.T * self.K * (self.F + self.D) * self.dtype.itemsize


SUITES: dict[str, tuple[Cell, ...]] = {
    "quick": tuple(
        Cell(operator, T=512, D=128, F=512, E=E, K=8, dtype=dtype)
        for operator, E, dtype in product(("block", "merged"), (32, 128, 1024), (torch.float32, torch.bfloat16))
    )
}


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of a whole block, ``ROTATION`` of them over one set of weights.

    Attributes:
        xs: ``[T, D]`` each.
        router: ``[E, D]``.
        gate_up_proj: ``[E, 2F, D]``.
        down_proj: ``[E, D, F]``.
        experts: ``[T, K]`` ids each, the selection that every dtype agrees on.
    """

    xs: tuple[Tensor, ...]
    router: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    experts: tuple[Tensor, ...]


@dataclass(frozen=True)
class MergedInputs:
    """Inputs of the merged up-projection, ``ROTATION`` of them over one set of weights.

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


Inputs = BlockInputs | MergedInputs


def make_inputs(cell: Cell) -> Inputs:
    """Draw the inputs of a cell; the same for every peer and every run."""
    sizes = (cell.T, cell.D, cell.F, cell.E, cell.K)
    if cell.operator == "merged":
        # Weights of later draws would be thrown away, so those are drawn for one small expert.
        first = make_merged_inputs(*sizes, dtype=cell.dtype, routing="distinct")
        draws = [first] + [
            make_merged_inputs(cell.T, cell.D, 1, cell.E, cell.K, dtype=cell.dtype, routing="distinct", seed=seed)
            for seed in range(1, ROTATION)
        ]
        return MergedInputs(
            tuple(d.x for d in draws), tuple(d.experts for d in draws), tuple(d.weights for d in draws), first.proj
        )
    mlp = make_mlp_inputs(*sizes, dtype=cell.dtype)
    xs, experts, router = _unambiguous_tokens(cell)
    return BlockInputs(xs, router, mlp.up_proj, mlp.down_proj, experts)


def _unambiguous_tokens(cell: Cell) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Tokens whose top K is the same in float64, float32 and bfloat16 arithmetic; their experts; and the router."""
    generator = torch.Generator().manual_seed(7)
    wanted = ROTATION * cell.T
    router_ED = (torch.randn(cell.E, cell.D, generator=generator) * cell.D**-0.5).to(cell.dtype)
    x_CD = torch.randn(CANDIDATES_PER_TOKEN * wanted, cell.D, generator=generator).to(cell.dtype)
    best = (x_CD.double() @ router_ED.double().t()).topk(min(cell.K + 1, cell.E), dim=1)
    if cell.K < cell.E:
        gap = best.values[:, cell.K - 1] - best.values[:, cell.K]
        clear = gap > LEAST_GAP * torch.finfo(torch.bfloat16).eps * best.values.abs().amax(1)
        kept = clear.nonzero().squeeze(1)[:wanted]
    else:
        kept = torch.arange(wanted)
    if kept.numel() < wanted:
        raise ValueError(f"{cell.name}: only {kept.numel()} of {wanted} tokens have an unambiguous top {cell.K}")
    xs = x_CD[kept].split(cell.T)
    experts = best.indices[kept, : cell.K].split(cell.T)
    return tuple(x.contiguous() for x in xs), tuple(e.contiguous() for e in experts), router_ED


def exact_output(cell: Cell, inputs: Inputs) -> Tensor:
    """The output for the first input in float64, from the weights as rounded to the cell's dtype. One expert at a time."""
    x_TD, experts_TK = inputs.xs[0].double(), inputs.experts[0]
    if isinstance(inputs, MergedInputs):
        weights_TK = inputs.weights[0].double()
        y = x_TD.new_zeros(cell.T, cell.F)
    else:
        weights_TK = (x_TD @ inputs.router.double().t()).gather(1, experts_TK).softmax(1)
        y = x_TD.new_zeros(cell.T, cell.D)
    for e in experts_TK.unique().tolist():
        token, choice = (experts_TK == e).nonzero(as_tuple=True)
        rows = x_TD[token]
        if isinstance(inputs, MergedInputs):
            out = rows @ inputs.proj[e].double()
        else:
            gate, up = (rows @ inputs.gate_up_proj[e].double().t()).chunk(2, dim=1)
            out = (gate * torch.sigmoid(gate) * up) @ inputs.down_proj[e].double().t()
        y.index_add_(0, token, out * weights_TK[token, choice, None])
    return y


@dataclass(frozen=True)
class LeastWork:
    """What a cell's forward cannot do without.

    Attributes:
        flops: operations of the matrix products over the routed rows.
        touched_bytes: the weights of the experts hit, read once, and the input and output.
    """

    flops: int
    touched_bytes: int


def least_work(cell: Cell, *, experts_hit: int) -> LeastWork:
    """Count the work of one forward.

    Args:
        cell: the shape.
        experts_hit: how many distinct experts the tokens chose.
    """
    T, D, F, E, N = cell.T, cell.D, cell.F, cell.E, cell.T * cell.K
    if cell.operator == "merged":
        # The routing is an input here: an int64 id and a float32 weight for each row.
        moved = experts_hit * D * F + T * D + T * F
        return LeastWork(flops=2 * N * D * F, touched_bytes=moved * cell.dtype.itemsize + N * (8 + 4))
    moved = experts_hit * 3 * D * F + E * D + 2 * T * D
    return LeastWork(flops=6 * N * D * F + 2 * T * D * E, touched_bytes=moved * cell.dtype.itemsize)


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
