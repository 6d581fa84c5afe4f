"""Inputs of routing and of expert layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUTINGS = ("uniform", "distinct", "skewed", "one_expert", "some_empty", "out_of_range")


@dataclass(frozen=True)
class MLPInputs:
    """Arguments of a mixture of MLP experts.

    Attributes:
        x: ``[T, D]``.
        experts: Ids, ``[T, K]``, integer.
        weights: ``[T, K]``, positive, not normalised.
        up_proj: ``[E, 2F, D]`` when gated, else ``[E, F, D]``.
        down_proj: ``[E, D, F]``.
        up_bias: ``[E, 2F]`` or ``[E, F]``, or None.
        down_bias: ``[E, D]``, or None.
    """

    x: Tensor
    experts: Tensor
    weights: Tensor
    up_proj: Tensor
    down_proj: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True)
class MergedInputs:
    """Arguments of the merged up-projection: those of :class:`MLPInputs`, and ``proj`` ``[E, D, F]`` for the matrices."""

    x: Tensor
    experts: Tensor
    weights: Tensor
    proj: Tensor


class _Draw:
    """Draws float32 values on the CPU and hands them out in the dtype and on the device asked for."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str, requires_grad: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device, self.requires_grad = dtype, device, requires_grad

    def normal(self, *shape: int, scale: float) -> Tensor:
        return self._finish(torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu") * scale, self.dtype)

    def weights(self, T: int, K: int, dtype: torch.dtype | None) -> Tensor:
        # Not normalised: an operator that normalises once more must show.
        values = torch.rand(T, K, generator=self.generator, dtype=torch.float32, device="cpu")
        return self._finish((values + 0.25) / K**0.5, dtype or torch.promote_types(self.dtype, torch.float32))

    def _finish(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(self.device, dtype).requires_grad_(self.requires_grad)


def make_experts(
    T: int,
    E: int,
    K: int,
    *,
    routing: str = "uniform",
    dtype: torch.dtype = torch.int64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Draws expert ids ``[T, K]``.

    Args:
        T: Tokens.
        E: Experts.
        K: Experts per token.
        routing: "uniform", every slot drawn by itself, so that a token may name an expert twice; "distinct", as a
            top-k gives them; "skewed", distinct with popularity falling as 1 / rank; "one_expert", every slot
            ``E // 2``; "some_empty", odd ids only; "out_of_range", about a third of the slots, and the whole last
            token, are -1 or E and beyond.
        dtype: Of the ids.
        device: Of the ids.
        seed: Of the generator.

    Raises:
        ValueError: On an unknown routing, or when K distinct experts do not exist.

    >>> make_experts(2, 4, 3, routing="one_expert")
    tensor([[2, 2, 2],
            [2, 2, 2]])
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(end: int) -> Tensor:
        return torch.randint(end, (T, K), generator=generator, device="cpu")

    if routing in ("distinct", "skewed"):
        if K > E:
            raise ValueError(f"routing {routing!r} needs K <= E, got K={K} and E={E}")
        # Gumbel top-k: sampling without replacement in proportion to the popularity.
        popularity_E = torch.zeros(E, dtype=torch.float32, device="cpu")
        if routing == "skewed":
            rank_E = torch.randperm(E, generator=generator, device="cpu")
            popularity_E = -torch.arange(1.0, E + 1.0, dtype=torch.float32, device="cpu").log()[rank_E]
        gumbel_TE = -torch.empty(T, E, dtype=torch.float32, device="cpu").exponential_(generator=generator).log()
        experts = (popularity_E + gumbel_TE).topk(K, dim=1).indices
    elif routing == "one_expert":
        experts = torch.full((T, K), E // 2, device="cpu")
    elif routing == "some_empty":
        experts = integers(max(E // 2, 1)) * 2 + (1 if E > 1 else 0)
    elif routing in ("uniform", "out_of_range"):
        experts = integers(E)
        if routing == "out_of_range":
            outside = torch.tensor([-1, E, E + 5], device="cpu")[integers(3)]
            elsewhere = torch.rand(T, K, generator=generator, dtype=torch.float32, device="cpu") < 1 / 3
            elsewhere[-1:] = True
            experts = torch.where(elsewhere, outside, experts)
    else:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {routing!r}")
    return experts.to(device, dtype)


def make_mlp_inputs(
    T: int,
    D: int,
    F: int,
    E: int,
    K: int,
    *,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    experts_dtype: torch.dtype = torch.int64,
    device: torch.device | str = "cpu",
    gated: bool = True,
    bias: bool = False,
    routing: str = "uniform",
    seed: int = 0,
    requires_grad: bool = False,
) -> MLPInputs:
    """Makes contiguous arguments for a mixture of MLP experts whose outputs are of order one.

    x and the pre-activations have unit variance: ``x ~ N(0, 1)``, ``up_proj ~ N(0, 1/D)``,
    ``down_proj ~ N(0, 1/F)``, biases ``N(0, 1/4)``.

    Args:
        T: Tokens.
        D: Hidden size.
        F: Intermediate size.
        E: Experts.
        K: Experts per token.
        dtype: Of every floating tensor but weights.
        weights_dtype: Of weights; by default float32, as the routing computes, or float64 when dtype is.
        experts_dtype: Of the ids.
        device: Of every tensor.
        gated: Whether up_proj holds gate and up, 2F rows, or F rows.
        bias: Whether to make up_bias and down_bias.
        routing: One of ``ROUTINGS``, see ``make_experts``; it changes the ids and nothing else.
        seed: Of the generators.
        requires_grad: Whether every floating tensor is a leaf that requires a gradient.

    >>> inputs = make_mlp_inputs(T=5, D=8, F=4, E=3, K=2)
    >>> inputs.up_proj.shape, inputs.down_proj.shape
    (torch.Size([3, 8, 8]), torch.Size([3, 8, 4]))
    """
    draw, rows = _Draw(seed, dtype, device, requires_grad), 2 * F if gated else F
    return MLPInputs(
        x=draw.normal(T, D, scale=1.0),
        experts=make_experts(T, E, K, routing=routing, dtype=experts_dtype, device=device, seed=seed + 1),
        weights=draw.weights(T, K, weights_dtype),
        up_proj=draw.normal(E, rows, D, scale=D**-0.5),
        down_proj=draw.normal(E, D, F, scale=F**-0.5),
        # Drawn last, so that bias=True leaves the other values as they are.
        up_bias=draw.normal(E, rows, scale=0.5) if bias else None,
        down_bias=draw.normal(E, D, scale=0.5) if bias else None,
    )


def make_merged_inputs(
    T: int,
    D: int,
    F: int,
    E: int,
    K: int,
    *,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    experts_dtype: torch.dtype = torch.int64,
    device: torch.device | str = "cpu",
    routing: str = "uniform",
    seed: int = 0,
    requires_grad: bool = False,
) -> MergedInputs:
    """Makes contiguous arguments for the merged up-projection, ``proj ~ N(0, 1/D)``, from those of :func:`make_mlp_inputs`.

    >>> make_merged_inputs(T=5, D=8, F=4, E=3, K=2).proj.shape
    torch.Size([3, 8, 4])
    """
    draw = _Draw(seed, dtype, device, requires_grad)
    return MergedInputs(
        x=draw.normal(T, D, scale=1.0),
        experts=make_experts(T, E, K, routing=routing, dtype=experts_dtype, device=device, seed=seed + 1),
        weights=draw.weights(T, K, weights_dtype),
        proj=draw.normal(E, D, F, scale=D**-0.5),
    )


def make_logits(
    T: int,
    E: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ties: bool = False,
    seed: int = 0,
    requires_grad: bool = False,
) -> Tensor:
    """Makes router logits ``[T, E]``.

    Without ties a row is E distinct values, evenly spaced over [-3, 3] and shuffled: no two are so close that
    float32 and float64 scores could be ordered differently. With ties every value is -1, 0 or 1, exact in every
    dtype, so each row of four or more experts repeats one.

    Args:
        T: Tokens.
        E: Experts.
        dtype: Of the logits; float16 and bfloat16 round neighbours together once E is in the hundreds.
        device: Of the logits.
        ties: Whether rows hold exactly equal values.
        seed: Of the generator.
        requires_grad: Whether the result is a leaf that requires a gradient.

    >>> make_logits(2, 5, ties=True).unique().tolist()
    [-1.0, 0.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    if ties:
        logits = torch.randint(-1, 2, (T, E), generator=generator, device="cpu").to(torch.float32)
    else:
        order_TE = torch.rand(T, E, generator=generator, dtype=torch.float32, device="cpu").argsort(dim=1)
        # A shift per row, which moves every sigmoid and no softmax, keeps rows from being permutations of one.
        shift_T1 = torch.rand(T, 1, generator=generator, dtype=torch.float32, device="cpu")
        logits = torch.linspace(-3.0, 3.0, E, dtype=torch.float32, device="cpu")[order_TE] + shift_T1
    return logits.to(device, dtype).requires_grad_(requires_grad)
