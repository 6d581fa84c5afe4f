"""A training step as every peer hands it over, and how a block's forward becomes the call that a cell times."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedonemoe.bench.workloads import BlockInputs, Cell

# Stacked with the expert axis first; or a gradient for each expert, None where the step wrote none.
ExpertGradients = Tensor | Sequence[Tensor | None]


class Step(NamedTuple):
    """Output and gradients of one training step.

    Attributes:
        output: ``[T, D]``.
        x: gradient of the input, ``[T, D]``.
        router: gradient ``[E, D]``.
        gate_up_proj: gradient ``[E, 2F, D]``.
        down_proj: gradient ``[E, D, F]``.
    """

    output: Tensor
    x: Tensor
    router: Tensor
    gate_up_proj: ExpertGradients
    down_proj: ExpertGradients

    def tensors(self) -> list[Tensor]:
        """Every tensor that the step wrote."""
        found = [self.output, self.x, self.router]
        for gradients in (self.gate_up_proj, self.down_proj):
            found += [gradients] if isinstance(gradients, Tensor) else [g for g in gradients if g is not None]
        return found

    @property
    def is_stacked(self) -> bool:
        """Whether the gradients of all experts are whole tensors, whose every element was written."""
        return isinstance(self.gate_up_proj, Tensor) and isinstance(self.down_proj, Tensor)


# What every tensor is called, of an answer that is no block's; "outputs" among them.
Named = dict[str, Tensor]
Call = Callable[[int], Tensor | Step | Named]


class Weights(NamedTuple):
    """The parameters of one peer's block, over the memory that all peers share.

    Attributes:
        router: ``[E, D]``.
        gate_up_proj: ``[E, 2F, D]``, or one ``[2F, D]`` for each expert.
        down_proj: ``[E, D, F]``, or one ``[D, F]`` for each expert.
    """

    router: nn.Parameter
    gate_up_proj: nn.Parameter | list[nn.Parameter]
    down_proj: nn.Parameter | list[nn.Parameter]


def parameter(weight: Tensor, cell: Cell) -> nn.Parameter:
    """A parameter over the very same memory, so that no peer has a copy in fresher or hotter pages."""
    return nn.Parameter(weight, requires_grad=cell.mode == "training")


def stacked_weights(cell: Cell, inputs: BlockInputs) -> Weights:
    """One parameter for all experts."""
    return Weights(*(parameter(w, cell) for w in (inputs.router, inputs.gate_up_proj, inputs.down_proj)))


def call_of(cell: Cell, inputs: BlockInputs, weights: Weights, forward: Callable[[Tensor], Tensor]) -> Call:
    """What a cell times of a block that autograd can differentiate.

    Args:
        cell: in whose mode.
        inputs: that the call's index picks from.
        weights: of the block.
        forward: the block, from ``[T, D]`` to ``[T, D]``.

    Returns:
        A call that returns the output; in a training cell, a :class:`Step`.
    """
    if cell.mode == "forward":
        return lambda i: forward(inputs.xs[i])
    xs = [x.detach().requires_grad_() for x in inputs.xs]
    experts = [[p] if isinstance(p, Tensor) else p for p in weights[1:]]

    def step(i: int) -> Step:
        with torch.enable_grad():
            y = forward(xs[i])
            wanted = [xs[i], weights.router, *experts[0], *experts[1]]
            dx, drouter, *rest = torch.autograd.grad(y, wanted, inputs.dys[i], allow_unused=True)
        gate_up, down = rest[: len(experts[0])], rest[len(experts[0]) :]
        return Step(
            y.detach(),
            dx,
            drouter,
            gate_up[0] if isinstance(weights.gate_up_proj, Tensor) else gate_up,
            down[0] if isinstance(weights.down_proj, Tensor) else down,
        )

    return step
