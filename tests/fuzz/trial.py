"""A case: tensors, a call of the library, and the exact answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.bounds import PRECISIONS, Array, Bounded, work_dtype
from tests.fuzz.draw import HALVES, Draw


@dataclass
class Given:
    """What the exact side may look at.

    Attributes:
        inputs: of the call, by name.
        outputs: what the library gave, by name. Only ids are taken from it, after they were checked.
        upstream: the gradient of each output that has one, by name.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    upstream: dict[str, Tensor]

    def array(self, name: str, *shape: int, cast: torch.dtype | None = None) -> Array:
        """An input, rounded to the dtype that autocast casts it to and then widened."""
        return widened(self.inputs[name], cast).reshape(*(shape or self.inputs[name].shape))

    def bounded(self, name: str, dtype: torch.dtype, *shape: int, cast: torch.dtype | None = None) -> Bounded:
        """An input of a computation in a dtype, which rounds what is wider than its working precision."""
        work = PRECISIONS[work_dtype(dtype)]
        array = self.array(name, *shape, cast=cast)
        rounds = (cast or self.inputs[name].dtype) == torch.float64 and work_dtype(dtype) != torch.float64
        return Bounded(array, work.unit * np.abs(array) if rounds else None, work)

    def optional(self, name: str, dtype: torch.dtype, cast: torch.dtype | None = None) -> Bounded | None:
        """An input that may be missing."""
        return self.bounded(name, dtype, cast=cast) if name in self.inputs else None

    def gradient(self, name: str, dtype: torch.dtype, *shape: int) -> Bounded | None:
        """The upstream gradient of an output; None where no gradient is asked for."""
        if name not in self.upstream:
            return None
        return Bounded(widened(self.upstream[name]).reshape(shape), None, PRECISIONS[work_dtype(dtype)])

    def ids(self, name: str, *shape: int) -> Array:
        """Ids among the inputs or the outputs."""
        tensor = self.inputs.get(name, self.outputs.get(name))
        assert tensor is not None
        return tensor.to(torch.int64).numpy().reshape(*shape)


@dataclass
class Expected:
    """The exact answer.

    Attributes:
        outputs: by name; an array of integers has to be met exactly, None is not looked at here.
        gradients: of the inputs, by name.
        wrong: what was found wrong on the way.
    """

    outputs: dict[str, Bounded | Array | None]
    gradients: dict[str, Bounded] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


Like = tuple[torch.dtype, tuple[int, ...]]


def like(dtype: torch.dtype, shape: Sequence[int], *last: int) -> Like:
    """A dtype, and a shape with other last dimensions."""
    return dtype, (*shape, *last)


def routed_like(x: Tensor, K: int, row_dims: int = 1) -> dict[str, Like]:
    """Weights and ids ``[..., K]`` of routing ``x``, whose last dimensions are a token's own."""
    leading = x.shape[: x.dim() - row_dims]
    return {"weights": like(work_dtype(x.dtype), leading, K), "experts": like(torch.int64, leading, K)}


@dataclass
class Trial:
    """One case, ready to run.

    Attributes:
        call: the library's function of the inputs; returns a tensor for each name in ``outputs``.
        inputs: by name.
        exact: the answer.
        outputs: by name, of which dtype and shape each has to be.
        differentiable: inputs that have gradients.
        impl: the implementation that was asked for.
        autocast: the dtype of ``torch.autocast`` around the call, if any.
        tokens: inputs whose leading dimensions are those of the tokens, with the number of the other dimensions.
        batch_invariant: whether a token alone has to give the bits that it gives among others.
        compiles: whether the call can be compiled as it is.
    """

    call: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    exact: Callable[[Given], Expected]
    outputs: dict[str, Like]
    differentiable: tuple[str, ...]
    impl: str
    autocast: torch.dtype | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    batch_invariant: bool = False
    compiles: bool = True


def widened(tensor: Tensor, cast: torch.dtype | None = None) -> Array:
    """float64 of what the tensor holds, after a cast."""
    return tensor.detach().to(cast or tensor.dtype).to(torch.float64).numpy()


def autocast_of(draw: Draw, dtype: torch.dtype) -> tuple[torch.dtype | None, torch.dtype]:
    """The dtype of autocast, if it is on, and the dtype that experts then compute in."""
    enabled = draw.pick("autocast", ("off",) * 6 + ("bfloat16", "float16"))
    if enabled == "off" or draw.implementations:
        return None, dtype
    cast = HALVES[0] if enabled == "bfloat16" else HALVES[1]
    draw.computes_in_float16 |= enabled == "float16"
    return cast, dtype if dtype == torch.float64 else cast
