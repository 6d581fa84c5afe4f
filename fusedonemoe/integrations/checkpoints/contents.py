"""The tensors of one block in an open checkpoint: checked before a number is read, then read one expert at a time."""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.blocks import Block
from fusedonemoe.integrations.checkpoints.files import FLOATS, Source
from fusedonemoe.integrations.checkpoints.layouts import LAYOUTS, Part, stack_of
from fusedonemoe.integrations.checkpoints.weights import ExpertWeights, pieces
from fusedonemoe.layers import Experts, MoE

# E2M1: sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127  # of the shared E8M0 exponent
_NOT_A_NUMBER = 255  # the one E8M0 code that is no exponent


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``value[i] * 2 ** (scale - 127)`` ``[..., C]``, which bfloat16 and float32 hold exactly.

    ``blocks`` ``[..., C / 32, 16]`` has two values in each byte, the even one in the lower half; ``scales`` are ``[..., C / 32]``
    exponents, both uint8. Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.3 and 6.3.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=compute, device=blocks.device)
    nibbles = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)
    exponent = scales.to(torch.int32) - _EXPONENT_BIAS
    # Two factors, each a normal float32: 2 ** -127 is none.
    half = exponent.div(2, rounding_mode="floor")
    wide = values[nibbles.to(torch.int32)]
    wide = wide * torch.exp2(half.to(compute))[..., None] * torch.exp2((exponent - half).to(compute))[..., None]
    wide = wide.masked_fill_((scales == _NOT_A_NUMBER)[..., None], float("nan"))
    return wide.flatten(-2).to(dtype)


class Contents:
    """The tensors of a block: the experts' by parts of the layout, and the keys of the others by :class:`MoE`'s names."""

    def __init__(self, source: Source, block: Block) -> None:
        self.source, self.block, self.layout = source, block, LAYOUTS[block.layout]
        self.where: str = block.prefix or "the checkpoint"
        self.parts: list[Part] = [part for part in self.layout.parts if part.names()[0] in block.names]
        self.beside: dict[str, str] = {ours: block.key(theirs) for ours, theirs in block.block_names.items()}
        lost = [part.name for part in self.layout.parts if part not in self.parts]
        if block.bias and lost:
            raise ValueError(f"{self.where} has some of the experts' biases, but not {lost}")
        for part in self.parts:
            self._check_shapes(part)

    def _keys(self, part: Part) -> list[str]:
        experts = range(self.block.num_experts) if part.form == "each" else range(1)
        return [self.block.key(name.format(expert)) for name in part.names() for expert in experts]

    def _check_shapes(self, part: Part) -> None:
        """Check that all experts have what was found for the first."""
        first, *others = self._keys(part)
        shape = self.source[first].shape
        for key in others:  # other experts; of MXFP4, the scales
            got = self.source[key].shape
            if part.form == "mxfp4" and got != shape[:-1]:
                raise ValueError(f"{key} must have shape {shape[:-1]} to fit {first}, got {got}")
            if part.form != "mxfp4" and got != shape:
                raise ValueError(f"{key} must have shape {shape}, as {first} has, got {got}")

    def check_names(self, into: Experts | MoE | None, held: dict[str, Tensor]) -> None:
        """Check that nothing is missing and nothing is left over; ``held`` is what a module has beside its experts."""
        block, beside, source = self.block, self.beside, self.source
        used = {key for part in self.parts for key in self._keys(part)} | {*beside.values()}
        missing: list[str] = []
        scopes = {block.key(part.name.partition(".")[0]) + "." for part in self.layout.parts}
        if isinstance(into, MoE):
            missing = [block.key(BLOCK_NAMES[ours][0]) for ours in sorted(held.keys() - beside.keys())]
            used -= {key for ours, key in beside.items() if ours not in held}
            # Where the block has no module of its own, its neighbours in the layer are none of its tensors.
            is_layer = block.prefix.rpartition(".")[2].isdigit()
            modules = {alias.partition(".")[0] for aliases in BLOCK_NAMES.values() for alias in aliases if "." in alias}
            scopes |= {block.key(module) + "." for module in modules} if is_layer else {block.key("")}
        elif into is not None and "output_bias" in beside:
            raise ValueError(
                f"{beside['output_bias']} is a bias of the whole block, which Experts does not have: load into a MoE with "
                "output_bias=True"
            )
        unexpected = [key for key in source if key not in used and key.startswith(tuple(scopes))]
        if hidden := {key: file for key, file in source.unlisted.items() if key.startswith(tuple(scopes))}:
            raise ValueError(
                f"the index and the shards must agree on {self.where}, got tensors in files that the index does not name for "
                f"them: {dict(list(hidden.items())[:5])}"
            )
        if missing or unexpected:
            what = "the checkpoint" if into is None else type(into).__name__
            raise ValueError(
                f"{self.where}, read as layout {block.layout!r}, does not match {what}: missing {missing}, unexpected "
                f"{unexpected}"
            )

    def check_dtypes(self) -> None:
        """Check that the experts' tensors have numbers that can be converted."""
        for part in self.parts:
            for key in self._keys(part):
                if part.form != "mxfp4":
                    self._check_floats(key)
                elif why := self.source[key].refusal():
                    raise TypeError(f"{key} must be {why}")
                elif self.source[key].dtype != torch.uint8:
                    raise TypeError(f"{key} must be uint8, as MXFP4 is stored, got {self.source[key].dtype}")

    def _check_floats(self, key: str, purpose: str = "") -> None:
        tensor = self.source[key]
        if why := tensor.refusal():
            raise TypeError(f"{key} must be {why}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{key} must be float64, float32, bfloat16 or float16{purpose}, got {tensor.dtype}: dequantise it first"
            )

    def check_beside(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Check that router, shared branch and biases have these shapes, and numbers that can be rounded."""
        for ours, key in self.beside.items():
            self._check_floats(key, f" to be {ours}")
            # Ernie's selection bias has a leading axis of one.
            if ours in shapes and self.source[key].shape not in (shape := shapes[ours], (1, *shape)):
                raise ValueError(f"{key} must have shape {shape}, as {ours} has, got {self.source[key].shape}")

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Return a dtype that holds all that is stored for each stack of home, once :meth:`check_dtypes` has allowed them."""
        stored: dict[str, set[torch.dtype]] = {}
        for part in self.parts:
            dtypes = {torch.bfloat16} if part.form == "mxfp4" else {self.source[key].dtype for key in self._keys(part)}
            stored.setdefault(stack_of(part.target), set()).update(dtypes)  # type: ignore[arg-type]
        return {stack: reduce(torch.promote_types, dtypes) for stack, dtypes in stored.items()}

    def _read(self, part: Part, dtype: torch.dtype) -> Iterator[Tensor]:
        """Each expert's tensor, in the part's own orientation."""
        for expert in range(self.block.num_experts):
            first, *scales = (self.source[self.block.key(name.format(expert))] for name in part.names())
            one = slice(expert, expert + 1)
            match part.form:
                case "each":
                    yield first.read()
                case "stack":
                    yield first.read(one)[0]
                case "flat":
                    size = first.shape[0] // self.block.num_experts
                    yield first.read(slice(expert * size, (expert + 1) * size))
                case "mxfp4":
                    yield dequantize_mxfp4(first.read(one)[0], scales[0].read(one)[0], dtype)

    def pairs(self, home: ExpertWeights, *, in_memory: bool = False) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
        """A checkpoint's tensor, and pairs of a view of home and the numbers that go there; one expert at a time.

        ``in_memory`` leaves out tensors that are read from a file.
        """
        for part in self.parts:
            keys = self._keys(part)
            if in_memory and not any(self.source[key].in_memory for key in keys):
                continue
            for expert, piece in enumerate(self._read(part, home.stack(part.target).dtype)):
                oriented = piece.T if part.transposed else piece
                yield keys[expert if part.form == "each" else 0], pieces(home, oriented, part.target, expert, self.layout.rows)
        for ours, key in self.beside.items():
            if not in_memory or self.source[key].in_memory:
                yield key, [(home.block[ours], self.source[key].read().reshape(home.block[ours].shape))]
