"""Inputs and error bounds shared by the tests, the benchmarks and the documentation.

Inputs are drawn in float32 on the CPU by a generator of their own and then rounded to the dtype asked for, so one
seed means the same numbers on every device and, up to rounding, in every dtype. No global random state is touched.

Shape legend: T tokens, D hidden size, F intermediate size, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "ROUTINGS",
    "ErrorNorms",
    "MLPInputs",
    "MergedInputs",
    "assert_within_budget",
    "error_norms",
    "exact_float64",
    "make_experts",
    "make_logits",
    "make_merged_inputs",
    "make_mlp_inputs",
]

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


@overload
def exact_float64(tensor: Tensor | None, /) -> Any: ...
@overload
def exact_float64(first: Tensor | None, second: Tensor | None, /, *rest: Tensor | None) -> tuple[Any, ...]: ...
def exact_float64(*tensors: Tensor | None) -> Any:
    """Copies tensors of any device to NumPy without loss, for a call of the oracle; None stays None.

    Returns:
        One array for one tensor, else a tuple: float64 for floating tensors, int64 for ids and masks.

    >>> exact_float64(torch.tensor([0.5], dtype=torch.bfloat16))
    array([0.5])
    """
    arrays = [
        None
        if tensor is None
        else tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else torch.int64, copy=True).numpy()
        for tensor in tensors
    ]
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


class ErrorNorms(NamedTuple):
    """Size of a tensor or of a difference: ``max |v|`` and ``sqrt(mean(v^2))``."""

    max_abs: float
    rms: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "ErrorNorms":
        """Both norms of an array; zero when it is empty."""
        if values.size == 0:
            return cls(0.0, 0.0)
        return cls(float(np.abs(values).max()), float(np.sqrt(np.mean(values**2))))


def error_norms(actual: Tensor, exact: Tensor | NDArray[np.float64]) -> ErrorNorms:
    """Measures ``actual - exact``, the second of the same shape and in float64.

    >>> error_norms(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0], dtype=torch.float64)).max_abs
    1.0
    """
    return ErrorNorms.of(exact_float64(actual) - _exact_array(exact))


def _exact_array(exact: Tensor | NDArray[np.float64]) -> NDArray[np.float64]:
    array: NDArray[Any] = exact.detach().cpu().numpy() if isinstance(exact, Tensor) else np.asarray(exact)
    if array.dtype != np.float64:
        raise TypeError(f"exact must be float64, got {array.dtype}")
    return array


def assert_within_budget(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor | NDArray[np.float64],
    *,
    factor: float = 2.0,
    slack: float = 2.0,
    name: str = "",
) -> None:
    """Asserts that a result is about as accurate as plain PyTorch in the same dtype.

    For both norms, ``max |v|`` and ``rms(v)`` over the whole tensor:
    ``norm(actual - exact) <= factor * norm(plain - exact) + slack * eps(dtype) * norm(exact)``.

    Args:
        actual: The result under test, any floating dtype.
        plain: The same quantity from plain PyTorch operations, the same shape and dtype.
        exact: The same quantity in float64.
        factor: How many times the error of plain is allowed.
        slack: How many units in the last place of exact's size are allowed beyond that. Plain's error is zero when
            its roundings happen to cancel, as in a tensor of a few elements.
        name: Names the tensor in messages.

    Raises:
        AssertionError: If actual has another shape or dtype than plain, is not finite, or misses the budget.
        TypeError: If exact is not float64.
        ValueError: If plain or exact is no yardstick: shapes differ, values are not finite, or the tolerance they
            give would accept an all-zero result although exact is not zero.

    >>> exact = torch.ones(3, dtype=torch.float64)
    >>> assert_within_budget(torch.ones(3), torch.ones(3), exact)
    >>> assert_within_budget(torch.zeros(3), torch.ones(3), exact, name="y")
    Traceback (most recent call last):
    AssertionError: y: max error 1 exceeds 2.38e-07 = 2 * 0 (plain) + 2 * 1.19e-07 * 1 (eps * scale)
    """
    label, exact_array = name or "actual", _exact_array(exact)
    if tuple(plain.shape) != exact_array.shape:
        raise ValueError(f"{label}: plain has shape {tuple(plain.shape)}, exact has {exact_array.shape}")
    if actual.shape != plain.shape:
        raise AssertionError(f"{label}: shape {tuple(actual.shape)}, expected {tuple(plain.shape)}")
    if actual.dtype != plain.dtype:
        raise AssertionError(f"{label}: dtype {actual.dtype}, expected {plain.dtype}")
    if not (torch.isfinite(plain).all() and np.isfinite(exact_array).all()):
        raise ValueError(f"{label}: plain and exact must be finite to be a yardstick")
    if bad := int((~torch.isfinite(actual)).sum()):
        raise AssertionError(f"{label}: {bad} of {actual.numel()} values are not finite")

    eps = torch.finfo(plain.dtype).eps
    scale, plain_error = ErrorNorms.of(exact_array), error_norms(plain, exact_array)
    tolerance = ErrorNorms(*(factor * e + slack * eps * s for e, s in zip(plain_error, scale, strict=True)))
    if scale.max_abs > 0 and scale.max_abs <= tolerance.max_abs and scale.rms <= tolerance.rms:
        raise ValueError(
            f"{label}: tolerance {tolerance.max_abs:.3g} (max), {tolerance.rms:.3g} (rms) would accept zeros: "
            f"exact has {scale.max_abs:.3g} (max), {scale.rms:.3g} (rms); plain is off by {plain_error.max_abs:.3g}, "
            f"{plain_error.rms:.3g}"
        )
    error = error_norms(actual, exact_array)
    for norm, off, allowed, plain_off, size in zip(("max", "rms"), error, tolerance, plain_error, scale, strict=True):
        if not off <= allowed:
            raise AssertionError(
                f"{label}: {norm} error {off:.3g} exceeds {allowed:.3g} = {factor:g} * {plain_off:.3g} (plain) + "
                f"{slack:g} * {eps:.3g} * {size:.3g} (eps * scale)"
            )
