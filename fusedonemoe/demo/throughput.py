"""How fast one MoE layer trains, beside the usual ways to write it in PyTorch: same weights, same input, same results."""

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fusedonemoe.layers import MoE

Layer = Callable[[MoE, Tensor], Tensor]
# Of the largest value. Float32 sums in another order differ by about 1e-6; a missing row, or zeros, by about 1.
TOLERANCE = 1e-4
# Tokens whose K-th and next logit are closer than this may be routed either way by rounding alone.
CLEAR_MARGIN = 1e-3


def library_layer(moe: MoE, x_TD: Tensor) -> Tensor:
    """This library."""
    return moe(x_TD)


def _route(moe: MoE, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids ``[T, K]``: softmax over the experts, the best K, normalised."""
    probability_TE = functional.linear(x_TD, moe.gate.weight).softmax(-1)
    weights_TK, experts_TK = probability_TE.topk(moe.config.experts_per_token, dim=-1)
    return weights_TK / weights_TK.sum(-1, keepdim=True) * moe.config.routed_scaling_factor, experts_TK


def _expert_weights(moe: MoE) -> tuple[Tensor, Tensor]:
    """``[E, 2F, D]`` and ``[E, D, F]``."""
    return moe.experts.get_parameter("gate_up_proj"), moe.experts.down_proj


def per_expert_loop(moe: MoE, x_TD: Tensor) -> Tensor:
    """The usual loop: for each expert, pick its tokens, run it, add the results back. Its shapes follow the data."""
    weights_TK, experts_TK = _route(moe, x_TD)
    gate_up_EGD, down_EDF = _expert_weights(moe)
    y_TD = torch.zeros_like(x_TD)
    for e in range(moe.config.num_experts):
        token, choice = torch.where(experts_TK == e)
        gate, up = functional.linear(x_TD[token], gate_up_EGD[e]).chunk(2, dim=-1)
        rows = functional.linear(functional.silu(gate) * up, down_EDF[e])
        y_TD.index_add_(0, token, rows * weights_TK[token, choice, None])
    return y_TD


def all_experts(moe: MoE, x_TD: Tensor) -> Tensor:
    """The static-graph formulation that the original used: every token through every expert, and a mask."""
    weights_TK, experts_TK = _route(moe, x_TD)
    weights_TE = x_TD.new_zeros(x_TD.shape[0], moe.config.num_experts).scatter(1, experts_TK, weights_TK)
    gate_up_EGD, down_EDF = _expert_weights(moe)
    gate_TEF, up_TEF = torch.einsum("td,egd->teg", x_TD, gate_up_EGD).chunk(2, dim=-1)
    h_TEF = functional.silu(gate_TEF) * up_TEF * weights_TE[:, :, None]
    return torch.einsum("tef,edf->td", h_TEF, down_EDF)


@dataclass(frozen=True)
class Peer:
    """One way to compute the layer.

    Attributes:
        name: as shown.
        layer: the function.
        compiled: through ``torch.compile(fullgraph=True)``.
    """

    name: str
    layer: Layer
    compiled: bool

    def build(self) -> Layer:
        """The function to call."""
        return torch.compile(self.layer, fullgraph=True, dynamic=False) if self.compiled else self.layer


LIBRARY = "fusedonemoe"
# The loop has no compiled row: how many tokens an expert gets is known only at run time, so it is no single graph.
PEERS = (
    Peer(LIBRARY, library_layer, True),
    Peer(LIBRARY, library_layer, False),
    Peer("per-expert loop", per_expert_loop, False),
    Peer("all experts, masked", all_experts, True),
    Peer("all experts, masked", all_experts, False),
)


@dataclass(frozen=True)
class Measurement:
    """What one peer did.

    Attributes:
        peer: which.
        error: the largest difference from float64, relative to the largest value, over output and gradients.
        tokens_per_second: forward and backward; None when the error is above :data:`TOLERANCE`, for then no time counts.
    """

    peer: Peer
    error: float
    tokens_per_second: float | None


def clear_tokens(moe: MoE, tokens: int, *, seed: int, device: torch.device) -> Tensor:
    """``[T, D]`` normal values whose routing does not hang on rounding, so that all peers must agree on it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * tokens, moe.config.hidden_size, generator=generator, device="cpu").to(device)
    K = moe.config.experts_per_token
    best = functional.linear(x, moe.gate.weight.detach()).topk(K + 1, dim=-1).values
    clear = x[best[:, K - 1] - best[:, K] > CLEAR_MARGIN][:tokens]
    assert clear.shape[0] == tokens, "nearly every token has a clear margin"
    return clear


def forward_backward(layer: Layer, moe: MoE, x_TD: Tensor, dy_TD: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    y_TD = layer(moe, x_TD)
    return [y_TD, *torch.autograd.grad(y_TD, [x_TD, *moe.parameters()], dy_TD)]


def largest_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference, each tensor's relative to its own largest value; NaN if there is one anywhere."""
    errors = [(a.detach() - b.detach()).abs().max() / b.detach().abs().max() for a, b in zip(actual, exact, strict=True)]
    return float(torch.stack(errors).max())  # Python's own max() can pass over a NaN


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def compare(moe: MoE, tokens: int, *, peers: tuple[Peer, ...] = PEERS, rounds: int, seed: int) -> list[Measurement]:
    """Check every peer against float64, then time those that pass.

    Args:
        moe: the layer, whose weights all peers use.
        tokens: ``T``.
        peers: whom to compare.
        rounds: timed calls per peer, taken in turn so that a change in the machine's load meets all alike; the median counts.
        seed: of the inputs.

    Returns:
        One :class:`Measurement` per peer, in their order.
    """
    device = moe.gate.weight.device
    seeds = itertools.count(seed)

    def fresh_input() -> Tensor:
        return clear_tokens(moe, tokens, seed=next(seeds), device=device).requires_grad_()

    x_TD = fresh_input()
    dy_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)
    exact = forward_backward(
        per_expert_loop, copy.deepcopy(moe).double(), x_TD.detach().double().requires_grad_(), dy_TD.double()
    )
    layers = [peer.build() for peer in peers]
    # These first calls compile and warm up as well.
    errors = [largest_error(forward_backward(layer, moe, x_TD, dy_TD), exact) for layer in layers]
    # Written so that NaN, which is not below anything, gets no time either.
    samples: dict[int, list[float]] = {i: [] for i, error in enumerate(errors) if error <= TOLERANCE}
    for _ in range(rounds):
        for i, seconds in samples.items():
            # An input of its own for every call, as in training: how many rows an expert gets changes from batch to
            # batch, and who has to prepare for new row counts must not be spared that, nor do it for the next peer.
            call = functools.partial(forward_backward, layers[i], moe, fresh_input(), dy_TD)
            seconds.append(_seconds(call, device))
    return [
        Measurement(peer, errors[i], tokens / statistics.median(samples[i]) if i in samples else None)
        for i, peer in enumerate(peers)
    ]
