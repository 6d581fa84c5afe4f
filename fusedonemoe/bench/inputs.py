"""Inputs of a cell, drawn on the device, and the tokens that are checked in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedonemoe.bench.workloads import Cell

# Of the forward of the tokens that are checked: tens of milliseconds, also where float64 runs at a 64th of the usual rate.
CHECKED_FLOPS = 2e11
# On a GPU every call has the first draw, with a cold cache; a graph is captured with the second and replayed with the first.
GPU_DRAWS = 2
# Logits of a token, which are an input, are spread over this range.
SPREAD = 6.0
# Tokens of a block are kept whose K-th and next logit are further apart than this many units of bfloat16 rounding at the size
# of the largest logit. Peers differ in the dtype of their logits, so on other tokens they may rightly pick different experts.
LEAST_GAP = 2.0
CANDIDATES_PER_TOKEN = 8
# The tensors that a call takes, by operator.
NAMES: dict[str, tuple[str, ...]] = {"block": ("x",), "router": ("logits",), "experts": ("x", "logits")}
NAMES |= dict.fromkeys(("merged", "quantized"), ("x", "experts", "weights"))


@dataclass(frozen=True)
class Inputs:
    """Inputs of a cell; the same for every peer and every run on a device of this kind."""

    # Of the tensors that a call takes: x ``[T, D]``, logits ``[T, E]`` float32, ids and weights ``[T, K]``, the latter float32.
    names: tuple[str, ...]
    draws: tuple[tuple[Tensor, ...], ...]  # those tensors for each draw
    weights: dict[str, Tensor]  # by name, over one memory for all draws and peers
    experts: tuple[Tensor, ...]  # ids ``[T, K]`` of each draw
    sample: Tensor  # the tokens that are checked, ascending
    dys: tuple[Tensor, ...] = ()  # gradients of the outputs; none unless the cell is a training step
    dy_checked: Tensor | None = None  # the first of them, zero outside the sample: then all gradients depend on the sample alone


def make_inputs(cell: Cell, device: torch.device, draws: int) -> Inputs:
    """Draw the inputs of a cell."""
    generator = torch.Generator(device).manual_seed(7)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(cell.dtype)

    # Weights of a product over n have the size n^-0.5; biases 0.5. The last axis of a matrix is summed over, or the one before.
    sums = {"gate_up_proj": cell.D, "down_proj": cell.F, "proj": cell.D}
    weights = {n: normal(*s, scale=sums[n] ** -0.5 if n in sums else 0.5) for n, s in cell.weight_shapes.items() if n != "router"}
    tensors: list[tuple[Tensor, ...]]
    if cell.operator == "block":
        xs, ids, router = unambiguous_tokens(cell, draws)
        weights = {"router": router.to(device)} | weights
        tensors, experts = [(x.to(device),) for x in xs], [e.to(device) for e in ids]
    else:
        popularity_E = torch.zeros(cell.E, device=device)
        if cell.routing == "skewed":
            popularity_E = -torch.log(torch.randperm(cell.E, generator=generator, device=device) + 1.0)
        logits = [_logits(cell, popularity_E, generator) for _ in range(draws)]
        experts = [logits_TE.topk(cell.K, dim=1).indices for logits_TE in logits]
        if cell.operator == "router":
            tensors = [(logits_TE,) for logits_TE in logits]
        elif cell.operator in ("merged", "quantized"):
            scores = [logits_TE.gather(1, ids).sigmoid() for logits_TE, ids in zip(logits, experts, strict=True)]
            tensors = [(normal(cell.T, cell.D), *pair) for pair in zip(experts, scores, strict=True)]
        else:
            tensors = [(normal(cell.T, cell.D), logits_TE) for logits_TE in logits]
    sample = sampled_tokens(cell, experts[0])
    width = cell.F if cell.operator == "merged" else cell.D
    dys = tuple(normal(cell.T, width) for _ in range(draws if cell.mode == "training" else 0))
    checked = torch.zeros_like(dys[0]).index_copy_(0, sample, dys[0][sample]) if dys else None
    return Inputs(NAMES[cell.operator], tuple(tensors), weights, tuple(experts), sample, dys, checked)


def _logits(cell: Cell, popularity_E: Tensor, generator: torch.Generator) -> Tensor:
    """Draw rankings of the experts in proportion to their popularity, as evenly spaced values: no two are close."""
    keys_TE = torch.empty(cell.T, cell.E, device=popularity_E.device).exponential_(generator=generator).log_().neg_()
    order_TE = keys_TE.add_(popularity_E).argsort(dim=1, descending=True)
    values_E = torch.linspace(SPREAD / 2, -SPREAD / 2, cell.E, device=popularity_E.device)
    return torch.empty_like(keys_TE).scatter_(1, order_TE, values_E.expand(cell.T, cell.E))


def unambiguous_tokens(cell: Cell, draws: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Draw tokens ``[T, D]`` whose top K is the same in float64, float32 and bfloat16 arithmetic, on the CPU.

    The result is the tokens of each draw, their experts ``[T, K]``, and the router ``[E, D]``.
    """
    generator = torch.Generator().manual_seed(7)
    wanted = draws * cell.T
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
    xs, experts = x_CD[kept].split(cell.T), best.indices[kept, : cell.K].split(cell.T)
    return tuple(x.contiguous() for x in xs), tuple(e.contiguous() for e in experts), router_ED


def sampled_tokens(cell: Cell, experts: Tensor) -> Tensor:
    """Choose the tokens to check, ascending: all where that is affordable, by the ids ``[T, K]`` of their experts.

    Else of each expert the first and the last row, where a wrong border shows, and evenly spaced ones.
    """
    affordable = int(CHECKED_FLOPS / max(2.0 * cell.active_parameters, 1.0))
    device = experts.device
    if affordable >= cell.T:
        return torch.arange(cell.T, device=device)
    ids, token_N = experts.flatten(), torch.arange(cell.T, device=device)[:, None].expand_as(experts).flatten()
    first_E = torch.full((cell.E,), cell.T - 1, device=device).scatter_reduce_(0, ids, token_N, "amin")
    last_E = torch.zeros(cell.E, dtype=torch.int64, device=device).scatter_reduce_(0, ids, token_N, "amax")
    step = max(1, cell.T // max(1, affordable - 2 * cell.E))
    return torch.cat((first_E, last_E, torch.arange(0, cell.T, step, device=device))).unique()
