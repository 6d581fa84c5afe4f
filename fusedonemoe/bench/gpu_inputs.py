"""Inputs of the cells for GPUs, drawn on the device, and the tokens that are checked in float64."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fusedonemoe.bench.gpu_cells import GpuCell

# Of the forward of the tokens that are checked: tens of milliseconds, also where float64 runs at a 64th of the usual rate.
CHECKED_FLOPS = 2e11
# A call is made with the first draw; a graph is captured with the second and replayed with the first.
DRAWS = 2
# Logits of a token are this far apart from one rank to the next, at least.
SPREAD = 6.0


class _Normal(Protocol):
    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor: ...


@dataclass(frozen=True)
class GpuInputs:
    """Inputs of a cell.

    Attributes:
        draws: for each draw what a call takes: x ``[T, D]`` and logits ``[T, E]`` float32; for a merged up-projection x, ids
            ``[T, K]`` and weights ``[T, K]`` float32; for a router the logits.
        weights: by the names of :func:`fusedonemoe.functional.experts_mlp`; ``proj`` when merged.
        experts: ``[T, K]`` ids of the first draw, best first.
        sample: the tokens that are checked, ascending.
        dy: ``[T, D]`` gradient of the output.
        dy_checked: the same, zero outside the sample: then all gradients depend on the sample alone.
    """

    draws: tuple[tuple[Tensor, ...], ...]
    weights: dict[str, Tensor]
    experts: Tensor
    sample: Tensor
    dy: Tensor | None = None
    dy_checked: Tensor | None = None


def make_inputs(cell: GpuCell, device: torch.device) -> GpuInputs:
    """Draw the inputs of a cell; the same for every peer and every run on a device of this kind."""
    generator = torch.Generator(device).manual_seed(7)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=cell.dtype).mul_(scale)

    popularity_E = torch.zeros(cell.E, device=device)
    if cell.routing == "skewed":
        ranks_E = torch.randperm(cell.E, generator=generator, device=device)
        popularity_E = -torch.log(ranks_E + 1.0)
    logits = [_logits(cell, popularity_E, generator) for _ in range(DRAWS)]
    experts = [logits_TE.topk(cell.K, dim=1).indices for logits_TE in logits]
    draws: list[tuple[Tensor, ...]]
    if cell.operator == "router":
        draws = [(logits_TE,) for logits_TE in logits]
    elif cell.operator == "merged":
        weights = [logits_TE.gather(1, ids).sigmoid() for logits_TE, ids in zip(logits, experts, strict=True)]
        draws = [(normal(cell.T, cell.D), ids, w) for ids, w in zip(experts, weights, strict=True)]
    else:
        draws = [(normal(cell.T, cell.D), logits_TE) for logits_TE in logits]
    sample = sampled_tokens(cell, experts[0])
    dy = dy_checked = None
    if cell.mode == "training":
        dy = normal(cell.T, cell.F if cell.operator == "merged" else cell.D)
        dy_checked = torch.zeros_like(dy).index_copy_(0, sample, dy[sample])
    return GpuInputs(tuple(draws), _weights(cell, normal), experts[0], sample, dy, dy_checked)


def _logits(cell: GpuCell, popularity_E: Tensor, generator: torch.Generator) -> Tensor:
    """A ranking of the experts drawn in proportion to their popularity, as evenly spaced values: no two are close."""
    keys_TE = torch.empty(cell.T, cell.E, device=popularity_E.device).exponential_(generator=generator).log_().neg_()
    order_TE = keys_TE.add_(popularity_E).argsort(dim=1, descending=True)
    values_E = torch.linspace(SPREAD / 2, -SPREAD / 2, cell.E, device=popularity_E.device)
    return torch.empty_like(keys_TE).scatter_(1, order_TE, values_E.expand(cell.T, cell.E))


def _weights(cell: GpuCell, normal: _Normal) -> dict[str, Tensor]:
    E, D, F, G = cell.E, cell.D, cell.F, cell.G
    if cell.operator == "router":
        return {}
    if cell.operator == "merged":
        return {"proj": normal(E, D, F, scale=D**-0.5)}
    up, down = ((E, D, G), (E, F, D)) if cell.transposed else ((E, G, D), (E, D, F))
    weights = {"gate_up_proj": normal(*up, scale=D**-0.5), "down_proj": normal(*down, scale=F**-0.5)}
    if cell.bias:
        weights |= {"gate_up_bias": normal(E, G, scale=0.5), "down_bias": normal(E, D, scale=0.5)}
    return weights


def sampled_tokens(cell: GpuCell, experts: Tensor) -> Tensor:
    """The tokens to check: of each expert the first and the last row, where a wrong border shows, and evenly spaced ones.

    Args:
        cell: how many can be afforded.
        experts: ``[T, K]`` ids.

    Returns:
        Ascending ids of tokens; all of them where that is affordable.
    """
    per_token = 2 * cell.K * cell.weight_bytes / cell.dtype.itemsize / cell.E
    affordable = int(CHECKED_FLOPS / max(per_token, 1.0))
    device = experts.device
    if affordable >= cell.T:
        return torch.arange(cell.T, device=device)
    token_TK = torch.arange(cell.T, device=device)[:, None].expand_as(experts)
    first_E = torch.full((cell.E,), cell.T - 1, device=device).scatter_reduce_(0, experts.flatten(), token_TK.flatten(), "amin")
    last_E = torch.zeros(cell.E, dtype=torch.int64, device=device).scatter_reduce_(
        0, experts.flatten(), token_TK.flatten(), "amax"
    )
    step = max(1, cell.T // max(1, affordable - 2 * cell.E))
    return torch.cat((first_E, last_E, torch.arange(0, cell.T, step, device=device))).unique()
