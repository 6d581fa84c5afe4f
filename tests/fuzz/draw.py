"""What a case is drawn with: everything follows from the seed and the number of the case.

:meth:`Draw.pick` goes through its options in shuffled rounds, one step with each case of the operator, so a few dozen cases
meet every option. It remembers what it offered and what it chose, which is how a run knows what it has not reached.
"""

import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


class Draw:
    """The draws of one case.

    Args:
        seed: of the run.
        index: of the case.
        operator: its name.
        turn: how many cases of this operator come before it.
        implementations: None for all, or a tuple that replaces what an operator offers.
    """

    def __init__(self, seed: int, index: int, operator: str, turn: int, implementations: tuple[str, ...] | None = None) -> None:
        self.seed, self.operator, self.turn = seed, operator, turn
        self.implementations = implementations
        self.rng = np.random.default_rng([seed, index])
        self.offered: dict[str, set[str]] = {}
        self.chosen: dict[str, Any] = {}
        self.computes_in_float16 = False  # then no input of whatever dtype may be larger than a float16 is

    def pick(self, name: str, options: Sequence[T]) -> T:
        """One of the options; an option that is listed twice comes twice as often."""
        round_, step = divmod(self.turn, len(options))
        shuffled = np.random.default_rng([self.seed, zlib.crc32(f"{self.operator}/{name}".encode()), round_])
        choice = options[shuffled.permutation(len(options))[step]]
        self.offered.setdefault(name, set()).update(map(str, options))
        self.chosen[name] = choice
        return choice

    def implementation(self, *names: str) -> str:
        """One of an operator's implementations."""
        return self.pick("impl", self.implementations or names)

    def dtype_for(self, impl: str) -> torch.dtype:
        """A dtype that an implementation computes in."""
        dtype = self.pick("dtype", DTYPES)
        if dtype not in legal_dtypes(impl):
            dtype = self.chosen["dtype"] = torch.float32
        self.computes_in_float16 |= dtype == torch.float16
        return dtype

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)

    def size(self, *options: int) -> int:
        """One of some sizes."""
        return int(self.rng.choice(options))

    def normal(self, *shape: int) -> Any:
        """float64 draws."""
        return self.rng.standard_normal(shape)


def legal_dtypes(impl: str) -> tuple[torch.dtype, ...]:
    """Return the dtype that an implementation computes in."""
    return (torch.float32, *HALVES) if impl in ("cpu", "triton") else DTYPES


def finite_cast(values: Any, dtype: torch.dtype) -> Tensor:
    """Rounded to the dtype; what would overflow becomes its largest number."""
    most = torch.finfo(dtype).max
    return torch.from_numpy(np.ascontiguousarray(values)).clamp(-most, most).to(dtype)


LAYOUTS = ("contiguous", "contiguous", "contiguous", "transposed", "stepped", "offset", "expanded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides; ``expanded`` repeats the first of the leading dimension."""
    if tensor.dim() == 0 or layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "stepped":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "offset":
        longer = torch.cat((tensor.new_full((3,), 5), tensor.reshape(-1)))
        return longer[3:].view(tensor.shape)
    return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor


def arranged(draw: Draw, name: str, tensor: Tensor, layouts: Sequence[str] = LAYOUTS) -> Tensor:
    """In drawn strides."""
    return laid_out(tensor, draw.pick(f"layout of {name}", layouts))


def leading(draw: Draw, T: int) -> tuple[int, ...]:
    """Dimensions whose product is T."""
    shapes: list[tuple[int, ...]] = [(T,), (T,), (1, T), (T, 1, 1)]
    if T % 2 == 0 and T:
        shapes.append((2, T // 2))
    if T == 1:
        shapes.append(())
    return shapes[int(draw.rng.integers(len(shapes)))]


def token_count(draw: Draw) -> int:
    """T, small, often 0 or 1."""
    return draw.pick("T", (0, 1, 1, 2, 3, 5, 8, 13, 20))


FLOAT_KINDS = ("normal",) * 5 + ("wide", "huge", "tiny", "zeros", "minus zero")


def floats(draw: Draw, name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Numbers of a drawn kind, rounded to the dtype."""
    kind = draw.pick(f"values of {name}", FLOAT_KINDS)
    values = scale * draw.normal(*shape)
    half = dtype == torch.float16 or draw.computes_in_float16
    if kind == "wide" and shape:
        values = values * 2.0 ** draw.rng.integers(-8, 7, (*shape[:-1], 1))
    elif kind == "huge":
        values = values * (300.0 if half else 1e6)
    elif kind == "tiny":
        values = values * (1e-5 if half else 1e-25)
    elif kind == "zeros":
        values = np.where(draw.rng.random(shape) < 0.7, 0.0, values)
    elif kind == "minus zero":
        values = np.where(draw.rng.random(shape) < 0.7, -0.0, values)
    return finite_cast(values, dtype)


ID_DTYPES = (torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ID_KINDS = ("valid", "distinct", "distinct", "repeated", "one expert", "some absent", "some absent", "all absent")


def absent_ids(dtype: torch.dtype, E: int) -> list[int]:
    """Ids of no expert that the dtype can hold; some are those of an expert in fewer bits."""
    limits = torch.iinfo(dtype)
    wanted = [-1, E, E + 1, limits.min, limits.max, -E, 1 << 8, (1 << 16) + 1, (1 << 31), 1 << 32, (1 << 32) + E - 1, -(1 << 32)]
    return [e for e in wanted if limits.min <= e <= limits.max and not 0 <= e < E]


def expert_ids(draw: Draw, T: int, K: int, E: int) -> Tensor:
    """``[T, K]`` ids of a drawn kind and dtype."""
    kind, dtype = draw.pick("ids", ID_KINDS), draw.pick("dtype of ids", ID_DTYPES)
    ids = draw.rng.integers(0, E, (T, K))
    if kind == "distinct" and K <= E:
        ids = np.argsort(draw.rng.random((T, E)), axis=1)[:, :K]
    elif kind == "repeated":
        ids[:] = ids[:, :1]
    elif kind == "one expert":
        ids[:] = int(draw.rng.integers(E))
    elif kind.endswith("absent"):
        absent = np.array(absent_ids(dtype, E), dtype=np.int64)[draw.rng.integers(0, len(absent_ids(dtype, E)), (T, K))]
        ids = np.where(draw.rng.random((T, K)) < (0.5 if kind == "some absent" else 2), absent, ids)
    return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(dtype)


def spoilt(draw: Draw, name: str, tensor: Tensor) -> Tensor:
    """With a NaN or an infinity in one row, now and then."""
    kind = draw.pick(f"spoilt {name}", ("no",) * 8 + ("nan", "inf"))
    if kind != "no" and tensor.numel():
        row = int(draw.rng.integers(tensor.shape[0]))
        tensor[row, int(draw.rng.integers(tensor.shape[1]))] = float(kind)
    return tensor


LOGIT_KINDS = (
    "normal",
    "normal",
    "around 30",
    "around 1e4",
    "around 1e6",
    "around 1e30",
    "largest",
    "equal",
    "few values",
    "masked",
    "tiny",
    "minus zero",
)


def router_logits(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Logits ``[..., E]`` of a drawn kind."""
    kind = draw.pick("logits", LOGIT_KINDS)
    values, unit = draw.normal(*shape), torch.finfo(dtype).eps
    most = torch.finfo(dtype).max
    if kind.startswith("around"):
        offset = min(float(kind.split()[1]), most / 4)
        # Neighbours of a large number: their differences are small beside it, and exact.
        values = offset + np.round(2 * values) * max(offset * unit, 0.25)
    elif kind == "largest":
        values = np.where(np.abs(values) < 0.5, np.round(values, 1), np.sign(values) * most)
    elif kind == "equal":
        values = np.broadcast_to(values[..., :1], shape).copy()
    elif kind == "few values":
        values = np.round(values)
    elif kind == "masked":
        hidden = draw.rng.random(shape) < 0.4
        hidden[..., :1] = False
        logits = finite_cast(values, dtype)
        logits[torch.from_numpy(hidden)] = -torch.inf
        return logits
    elif kind == "tiny":
        values = values * (1e-4 if dtype == torch.float16 else 1e-20)
    elif kind == "minus zero":
        values = np.where(draw.rng.random(shape) < 0.6, np.where(draw.rng.random(shape) < 0.5, 0.0, -0.0), values)
    return finite_cast(values, dtype)
