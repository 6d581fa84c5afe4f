"""From a checkpoint to a block's weights, one expert at a time."""

from collections.abc import Iterator
from functools import reduce
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from fusedonemoe.checks import check_integer, check_one_of
from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.blocks import Block, find_blocks
from fusedonemoe.integrations.checkpoints.files import FLOATS, Checkpoint, Source
from fusedonemoe.integrations.checkpoints.layouts import LAYOUTS, Layout, Part, home_shapes, stack_of
from fusedonemoe.integrations.checkpoints.weights import (
    ExpertWeights,
    check_apart,
    check_target,
    pieces,
    store_packed,
    weights_of,
)
from fusedonemoe.layers import Experts, MoE

Module = TypeVar("Module", Experts, MoE)
# E2M1: sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127  # of the shared E8M0 exponent
_NOT_A_NUMBER = 255  # the one E8M0 code that is no exponent


def list_blocks(checkpoint: Checkpoint, layout: str = "auto", *, num_experts: int | None = None) -> list[Block]:
    """Find every block of experts in a checkpoint, without reading a weight.

    The arguments are those of :func:`load_experts`.

    Returns:
        One :class:`Block` each, in the checkpoint's order; none for a checkpoint without experts.

    Raises:
        TypeError: an argument of the wrong type, or a torch file that holds no state dict.
        ValueError: an unknown or ambiguous layout, experts that are missing or numbered otherwise than 0, 1, 2; a damaged file,
            or an index that names files outside its folder. The message names the file.
        OSError: a file or shard that is not there (FileNotFoundError), or cannot be read.

    Example:
        >>> import torch
        >>> from fusedonemoe.integrations.checkpoints import list_blocks
        >>> shapes = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
        >>> one = "layers.0.mlp.experts.{}.{}.weight"
        >>> list_blocks({one.format(e, name): torch.randn(shapes[name]) for e in range(4) for name in shapes})
        [Block(prefix='layers.0.mlp', layout='hf', num_experts=4, hidden_size=16, intermediate_size=32, gated=True,
               bias=False)]
    """
    _check_layout(layout, num_experts)
    with Source(checkpoint) as source:
        return find_blocks(source, layout, num_experts)[0]


@overload
def load_experts(
    checkpoint: Checkpoint,
    layout: str = "auto",
    *,
    prefix: str | None = None,
    layer: int | None = None,
    into: None = None,
    num_experts: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ExpertWeights: ...
@overload
def load_experts(
    checkpoint: Checkpoint,
    layout: str = "auto",
    *,
    prefix: str | None = None,
    layer: int | None = None,
    into: Module,
    num_experts: int | None = None,
) -> Module: ...
def load_experts(
    checkpoint: Checkpoint,
    layout: str = "auto",
    *,
    prefix: str | None = None,
    layer: int | None = None,
    into: Experts | MoE | None = None,
    num_experts: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ExpertWeights | Experts | MoE:
    """Read one block of experts, one expert at a time, from whatever layout it is stored in.

    Rows, transposition and order of gate and up are converted to the library's own on the way. Everything is checked before the
    first weight is written: a call that raises ValueError or TypeError has changed nothing. A disk that fails or memory that
    runs out while weights are read is a RuntimeError that says that the module is partly filled.

    Weights, biases and the router may be float64, float32, bfloat16 or float16, and are rounded to the dtype of the module, or
    to ``dtype``. A selection bias stays float32 where ``dtype`` is narrower.

    Args:
        checkpoint: a state dict; a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file; the ``.index.json`` of a sharded one;
            or a directory that holds one of them.
        layout: a name of :data:`LAYOUTS`, or ``"auto"`` to go by names and shapes, and where needed by ``config.json``.
        prefix: the block's, as :func:`list_blocks` has it (``"model.layers.3.mlp"``). None is for a checkpoint with one block.
        layer: the block whose prefix has this as its last number, instead of ``prefix``.
        into: the module to fill: an :class:`~fusedonemoe.Experts`, or a :class:`~fusedonemoe.MoE` with its router and shared
            branch. None returns tensors.
        num_experts: ``E``, for a flat layout (``megablocks``, ``dbrx``) without a router beside the experts.
        dtype: of the tensors that are returned; if None the checkpoint's own, the narrowest that holds all experts of a tensor.
        device: of the tensors that are returned; the CPU if None.

    Returns:
        ``into``, filled; or :class:`ExpertWeights`.

    Raises:
        TypeError: as for :func:`list_blocks`; another dtype in the checkpoint or the module; sharded or quantised weights.
        ValueError: as for :func:`list_blocks`; no such block, or several; sizes that differ from the module's; missing or
            unexpected names; a module on the meta device, with tensors that share memory, or with weights that are computed
            (pruning, a parametrization).
        OSError: as for :func:`list_blocks`.
        RuntimeError: a module that was made in inference mode, outside of it; or reading failed in the middle.
        ImportError: a safetensors file without the package.

    Example:
        >>> import torch
        >>> from fusedonemoe import MoE
        >>> from fusedonemoe.integrations.checkpoints import load_experts, to_state_dict
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> saved = to_state_dict(moe, "mixtral", prefix="model.layers.0.block_sparse_moe")
        >>> sorted(saved)[:2]
        ['model.layers.0.block_sparse_moe.experts.0.w1.weight', 'model.layers.0.block_sparse_moe.experts.0.w2.weight']
        >>> other = load_experts(saved, into=MoE(moe.config))
        >>> torch.equal(other.experts.gate_up_proj, moe.experts.gate_up_proj)
        True
    """
    _check_layout(layout, num_experts)
    if into is not None and not isinstance(into, Experts | MoE):
        raise TypeError(f"into must be an Experts or a MoE, got {type(into).__name__}")
    if into is not None and (dtype is not None or device is not None):
        raise ValueError("dtype and device are those of the module: give them without into")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {prefix!r}")
    if layer is not None:
        check_integer("layer", layer)
    if prefix is not None and layer is not None:
        raise ValueError(f"give either prefix or layer, got both: {prefix!r} and {layer!r}")
    with Source(checkpoint) as source:
        contents = Contents(source, _pick(source, layout, num_experts, prefix, layer))
        home = None if into is None else weights_of(into, to_write=True)
        contents.check_names(into, {} if home is None else home.block)
        contents.check_dtypes()
        if into is None or home is None:
            home = _allocate(contents, dtype, device)
        else:
            extents = check_target(contents.block, into, home)
            contents.beside = {ours: key for ours, key in contents.beside.items() if ours in home.block}
            contents.check_beside({ours: tuple(tensor.shape) for ours, tensor in home.block.items()})
            for key, pairs in contents.pairs(home, in_memory=True):
                check_apart(key, pairs, extents)
        _copy(contents, home, into)
        if into is not None:
            store_packed(into, home)
    return home if into is None else into


def _check_layout(layout: str, num_experts: int | None) -> None:
    check_one_of("layout", layout, ("auto", *LAYOUTS))
    if num_experts is not None:
        check_integer("num_experts", num_experts)


def _pick(source: Source, layout: str, num_experts: int | None, prefix: str | None, layer: int | None) -> Block:
    blocks, misfits = find_blocks(source, layout, num_experts)
    prefix = None if prefix is None else prefix.removesuffix(".")
    fitting = [b for b in blocks if prefix in (None, b.prefix) and layer in (None, b.layer)]
    if len(fitting) == 1:
        return fitting[0]
    asked = f"prefix {prefix!r}" if prefix is not None else f"layer {layer}" if layer is not None else "prefix"
    if fitting:
        raise ValueError(f"{asked} must name one block of experts, give one of the prefixes {[b.prefix for b in fitting]}")
    if reasons := [f"{name or 'the checkpoint'}: {why}" for name, why in misfits.items() if prefix in (None, name)]:
        raise ValueError(f"no block of experts fits: {'; '.join(reasons)}")
    if blocks:
        raise ValueError(f"{asked} names no block of experts, the checkpoint has {[b.prefix for b in blocks]}")
    expected = "any known layout" if layout == "auto" else f"layout {layout!r}"
    raise ValueError(f"no experts of {expected} in the checkpoint; its names begin with {list(source)[:5]}")


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
        self.source = source
        self.block = block
        self.layout: Layout = LAYOUTS[block.layout]
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


def _allocate(contents: Contents, dtype: torch.dtype | None, device: torch.device | str | None) -> ExpertWeights:
    """Empty weights in home's form."""
    block, stored = contents.block, contents.stored_dtypes()
    E, D = block.num_experts, block.hidden_size
    # Shapes of other tensors that the experts' sizes decide; the shared branch has a width of its own.
    shapes = {"gate.weight": (E, D), "gate.bias": (E,), "gate.e_score_correction_bias": (E,), "output_bias": (D,)}
    shapes["shared_expert_gate.weight"] = (1, D)
    contents.check_beside(shapes)

    def empty(shape: tuple[int, ...], own: Any, wanted: torch.dtype | None) -> Tensor:
        return torch.empty(shape, dtype=wanted or own, device=device or "cpu")

    homes = home_shapes(E, D, block.intermediate_size, block.gated)
    held: dict[str, Any] = {name: empty(homes[name], own, dtype) for name, own in stored.items()}
    beside = {}
    for ours, key in contents.beside.items():
        # A selection bias is the sum of many small steps, which half precision would lose.
        narrow = ours == "gate.e_score_correction_bias" and dtype in (torch.bfloat16, torch.float16)
        tensor = contents.source[key]
        beside[ours] = empty(shapes.get(ours, tensor.shape), tensor.dtype, torch.float32 if narrow else dtype)
    described: dict[str, Any] = {"layout": block.layout, "prefix": block.prefix, "block_names": block.block_names}
    return ExpertWeights(**held, **described, gated=block.gated, gate_up_layout=contents.layout.rows, block=beside)


@torch.no_grad()
def _copy(contents: Contents, home: ExpertWeights, into: Experts | MoE | None) -> None:
    """Write everything. Only what the disk or the memory does can fail here, and then the error says what was left behind."""
    last = None
    try:
        for key, pairs in contents.pairs(home):
            for ours, theirs in pairs:
                ours.copy_(theirs)
            last = key
    except Exception as error:
        if into is None or last is None:
            raise
        raise RuntimeError(
            f"reading stopped after {last}, and {type(into).__name__} now holds a part of the checkpoint and a part of its old "
            f"weights: load again before you use it ({type(error).__name__}: {error})"
        ) from error
