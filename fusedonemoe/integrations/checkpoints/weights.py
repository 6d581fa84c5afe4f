"""A block's weights in home's form, and the view of one expert's rows that every layout is read into and written from."""

from dataclasses import dataclass, field

from torch import Tensor

from fusedonemoe.checks import check_one_of
from fusedonemoe.hf import BLOCK_NAMES
from fusedonemoe.integrations.checkpoints.files import refusal
from fusedonemoe.integrations.checkpoints.layouts import Target
from fusedonemoe.layers import Experts, MoE
from fusedonemoe.layers.panels import home_of, packed_names, write_home
from fusedonemoe.ops.activation import split_gate_up
from fusedonemoe.ops.records import GATE_UP_LAYOUTS


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """A block's weights, as :func:`fusedonemoe.functional.experts_mlp` takes them.

    Attributes:
        gate_up_proj: ``[E, 2F, D]``, or the up rows ``[E, F, D]`` when plain.
        down_proj: ``[E, D, F]``.
        gate_up_bias: ``[E, 2F]``, ``[E, F]`` when plain, or None.
        down_bias: ``[E, D]`` or None.
        gated: whether ``gate_up_proj`` holds gate and up.
        gate_up_layout: order of its rows.
        block: what else the block has, by :class:`~fusedonemoe.MoE`'s names: ``gate.weight`` ``[E, D]``, ``gate.bias``,
            ``gate.e_score_correction_bias``, ``shared_expert.*``, ``shared_expert_gate.weight``; and ``output_bias`` ``[D]``,
            which is added to each token's sum once.
        layout: the layout that they were read in.
        prefix: what stood before their names.
        block_names: the names below the prefix that the tensors of ``block`` had.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gated: bool = True
    gate_up_layout: str = "gate_up"
    block: dict[str, Tensor] = field(default_factory=dict)
    layout: str = "hf"
    prefix: str = ""
    block_names: dict[str, str] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.down_proj.shape[0]

    def stack(self, target: Target) -> Tensor:
        """Return all experts' tensor that a part of a checkpoint belongs to."""
        names = ("down_proj", "down_bias") if target.startswith("down") else ("gate_up_proj", "gate_up_bias")
        return getattr(self, names[target.endswith("bias")])


def weights_of(module: Experts | MoE, *, to_write: bool = False) -> ExpertWeights:
    """A module's parameters without autograd: themselves, and of packed ones the home form in new tensors.

    ``to_write`` refuses tensors that are not the module's own parameters and buffers: what is written into others is lost.
    """
    experts = module.experts if isinstance(module, MoE) else module
    if not isinstance(experts, Experts):
        raise TypeError(f"experts must be Experts, with the plain weights that checkpoints hold, got {type(experts).__name__}")
    config = experts.config
    E, D, F, G = config.num_experts, config.hidden_size, config.intermediate_size, config.up_rows
    name = "gate_up_proj" if config.gated else "up_proj"
    shapes: dict[str, tuple[int, ...]] = {
        name: (E, D, G) if config.transposed else (E, G, D),
        "down_proj": (E, F, D) if config.transposed else (E, D, F),
    }
    if config.bias:
        shapes |= {f"{name}_bias": (E, G), "down_proj_bias": (E, D)}
    if to_write:
        own = {id(tensor) for tensor in (*experts.parameters(), *experts.buffers())}
        for key in shapes:
            if isinstance(weight := getattr(experts, key, None), Tensor) and id(weight) not in own:
                raise _computed(f"experts.{key}")
    names = packed_names(experts)
    tensors = {key: home_of(experts, key) if key in names else getattr(experts, key, None) for key in shapes}
    held = {key: _readable(f"experts.{key}", tensors[key], shape) for key, shape in shapes.items()}
    block = {}
    if isinstance(module, MoE):
        state = {key: value for key, value in _state(module, to_write).items() if not key.startswith("experts.")}
        block = {key: _readable(key, value, None) for key, value in state.items()}
        if unknown := sorted(block.keys() - BLOCK_NAMES.keys()):
            raise ValueError(f"module must have the tensors of a MoE, got {unknown} as well, which no checkpoint has")
    up, down = held[name], held["down_proj"]
    return ExpertWeights(
        gate_up_proj=up.transpose(1, 2) if config.transposed else up,
        down_proj=down.transpose(1, 2) if config.transposed else down,
        gate_up_bias=held.get(f"{name}_bias"),
        down_bias=held.get("down_proj_bias"),
        gated=config.gated,
        gate_up_layout=config.gate_up_layout,
        block=block,
    )


def _readable(name: str, tensor: object, shape: tuple[int, ...] | None) -> Tensor:
    """A module's tensor without autograd, if its numbers are its own and lie in one piece of memory."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of the module, got {type(tensor).__name__}")
    if why := refusal(tensor):
        raise TypeError(f"{name} must be {why}: load before weights are sharded or quantised")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, as the configuration says, got {tuple(tensor.shape)}")
    if tensor.grad_fn is not None:
        raise _computed(name)
    return tensor.detach()


def _computed(name: str) -> ValueError:
    return ValueError(
        f"{name} must be a parameter, got the result of a computation: remove the parametrisation or the pruning first"
    )


def _state(module: MoE, to_write: bool) -> dict[str, object]:
    """Return a state dict of a module; to be written, of its parameters and buffers, where a hook would give copies of them."""
    state: dict[str, object] = module.state_dict(keep_vars=to_write)
    if not to_write:
        return state
    own: dict[str, object] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held = {id(tensor) for tensor in own.values()}
    for name, tensor in state.items():
        if name in own:
            state[name] = own[name]
        elif id(tensor) not in held and name in BLOCK_NAMES:
            raise _computed(name)
    return state


def check_weights(weights: ExpertWeights) -> None:
    """Weights that somebody put together fit each other."""
    down = _readable("down_proj", weights.down_proj, None)
    if down.dim() != 3:
        raise ValueError(f"down_proj must have 3 dimensions [E, D, F], got shape {tuple(down.shape)}")
    check_one_of("gate_up_layout", weights.gate_up_layout, GATE_UP_LAYOUTS)
    E, D, F = down.shape
    G = 2 * F if weights.gated else F
    if (weights.gate_up_bias is None) != (weights.down_bias is None):
        raise ValueError("gate_up_bias and down_bias must both be given, or neither")
    for name, shape in (("gate_up_proj", (E, G, D)), ("gate_up_bias", (E, G)), ("down_bias", (E, D))):
        if name == "gate_up_proj" or weights.down_bias is not None:
            _readable(name, getattr(weights, name), shape)
    if unknown := sorted(weights.block.keys() - BLOCK_NAMES.keys()):
        raise ValueError(f"block must have names of {sorted(BLOCK_NAMES)}, got {unknown}")
    for name, tensor in weights.block.items():
        _readable(name, tensor, None)


def store_packed(module: Experts | MoE, home: ExpertWeights) -> None:
    """Write what :func:`weights_of` returned back into the parameters that are packed, of which it holds copies."""
    experts = module.experts if isinstance(module, MoE) else module
    for name in packed_names(experts):
        write_home(experts, name, home.down_proj if name == "down_proj" else home.gate_up_proj)


def pieces(home: ExpertWeights, piece: Tensor, target: Target, expert: int, order: str) -> list[tuple[Tensor, Tensor]]:
    """Views that hold the same numbers, in home and in a checkpoint's piece of one expert, oriented as in home.

    ``order`` is that of the rows of ``gate_up`` in the checkpoint.
    """
    stored, half = home.stack(target)[expert], target.removesuffix("_bias")
    if half == "down" or not home.gated or (half == "gate_up" and order == home.gate_up_layout):
        return [(stored, piece)]
    if half == "gate_up":
        return list(zip(_gate_and_up(stored, home.gate_up_layout), _gate_and_up(piece, order), strict=True))
    return [(_gate_and_up(stored, home.gate_up_layout)[half == "up"], piece)]


def _gate_and_up(rows: Tensor, order: str) -> list[Tensor]:
    """Views of the gate's and the up-projection's rows (first axis) of one expert."""
    return [half.movedim(-1, 0) for half in split_gate_up(rows.movedim(0, -1), order)]
