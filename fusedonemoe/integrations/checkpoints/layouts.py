"""A table of the layouts that families of checkpoints have for a block's experts.

Home, to which every layout is read and from which it is written, is :class:`~fusedonemoe.Experts`' own form: per expert the
up-projection's rows ``[2F, D]`` (``[F, D]`` when plain) and the down-projection ``[D, F]``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Target = Literal["gate_up", "gate", "up", "down", "gate_up_bias", "gate_bias", "up_bias", "down_bias"]
Form = Literal["each", "stack", "flat", "mxfp4"]


@dataclass(frozen=True)
class Part:
    """One tensor of a layout, or one per expert.

    Attributes:
        target: what it holds; ``gate_up`` is both, in the layout's order of rows.
        name: its name below the block; ``{}`` stands for the expert's number.
        form: ``each``: one tensor per expert; ``stack``: the expert axis first; ``flat``: the experts' rows one below the other;
            ``mxfp4``: a stack in two tensors, ``_blocks`` and ``_scales``.
        transposed: whether an expert's matrix is the transpose of home's.
        required: whether a block without it is no block of this layout.
    """

    target: Target
    name: str
    form: Form
    transposed: bool = False
    required: bool = True

    def names(self) -> tuple[str, ...]:
        """The names below the block, with ``{}`` left in."""
        return (f"{self.name}_blocks", f"{self.name}_scales") if self.form == "mxfp4" else (self.name,)


@dataclass(frozen=True)
class Layout:
    """A family's form of the experts.

    Attributes:
        parts: the experts' tensors.
        rows: order of the rows of ``gate_up``, where there is such a part.
        block_names: names of the other tensors of a block, as this family writes them, by :class:`~fusedonemoe.MoE`'s names.
        writable: whether :func:`~fusedonemoe.integrations.checkpoints.to_state_dict` can write it.
    """

    parts: tuple[Part, ...]
    rows: str = "gate_up"
    block_names: tuple[tuple[str, str], ...] = ()
    writable: bool = True

    @property
    def gated(self) -> bool:
        """Return whether experts have a gate."""
        return any(part.target in ("gate", "gate_up") for part in self.parts)

    def names(self, required: bool = False) -> list[str]:
        """The names below the block of all parts, or of those that are required."""
        return [name for part in self.parts if part.required or not required for name in part.names()]


def stack_of(target: Target) -> str:
    """The name in :class:`~fusedonemoe.integrations.checkpoints.ExpertWeights` of the tensor that a part belongs to."""
    half = "down" if target.startswith("down") else "gate_up"
    return f"{half}_bias" if target.endswith("_bias") else f"{half}_proj"


def home_shapes(E: int, D: int, F: int, gated: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of home's tensors by the names of :func:`stack_of`."""
    G = 2 * F if gated else F
    return {"gate_up_proj": (E, G, D), "down_proj": (E, D, F), "gate_up_bias": (E, G), "down_bias": (E, D)}


def module_names(gated: bool) -> dict[str, str]:
    """:class:`~fusedonemoe.Experts`' names of home's tensors."""
    up = "gate_up_proj" if gated else "up_proj"
    return {"gate_up_proj": up, "down_proj": "down_proj", "gate_up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}


def piece_shape(target: Target, D: int, F: int) -> tuple[int, ...]:
    """Shape of one expert's tensor in home's orientation."""
    shape = {"gate_up": (2 * F, D), "gate": (F, D), "up": (F, D), "down": (D, F)}[target.removesuffix("_bias")]
    return shape[:1] if target.endswith("_bias") else shape


def _parts(form: Form, names: Mapping[str, str], *transposed: str, required: bool = True) -> tuple[Part, ...]:
    """A part for each target that has a name."""
    return tuple(Part(t, name, form, t in transposed, required) for t, name in names.items())  # type: ignore[arg-type]


def _per_expert(**names: str) -> tuple[Part, ...]:
    weights = {target: f"experts.{{}}.{name}.weight" for target, name in names.items()}
    biases = {f"{target}_bias": f"experts.{{}}.{name}.bias" for target, name in names.items()}
    return _parts("each", weights) + _parts("each", biases, required=False)


def _stacked(up: str, *, transposed: bool = False, biases_required: bool = False, form: Form = "stack") -> tuple[Part, ...]:
    weights = {"gate_up" if up == "gate_up_proj" else "up": f"experts.{up}", "down": "experts.down_proj"}
    biases = {f"{target}_bias": f"{name}_bias" for target, name in weights.items()}
    return _parts(form, weights, *(weights if transposed else ())) + _parts("stack", biases, required=biases_required)


def _shared(module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[tuple[str, str], ...]:
    names = (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
    return tuple((f"shared_expert.{ours}.weight", f"{module}.{theirs}.weight") for ours, theirs in names)


_ROUTER = (("gate.weight", "router.weight"), ("gate.bias", "router.bias"))
_ROUTER_LAYER = (("gate.weight", "router.layer.weight"), ("gate.bias", "router.layer.bias"))

LAYOUTS: dict[str, Layout] = {
    # Qwen, OLMoE, DeepSeek, GLM, Hunyuan and most others on disk.
    "hf": Layout(_per_expert(gate="gate_proj", up="up_proj", down="down_proj")),
    "jamba": Layout(_per_expert(gate="gate_proj", up="up_proj", down="down_proj"), block_names=_ROUTER[:1]),
    "mixtral": Layout(
        _per_expert(gate="w1", up="w3", down="w2"), block_names=(("gate.e_score_correction_bias", "e_score_correction_bias"),)
    ),
    "lfm2": Layout(_per_expert(gate="w1", up="w3", down="w2"), block_names=(("gate.e_score_correction_bias", "expert_bias"),)),
    "nemotron_h": Layout(_per_expert(up="up_proj", down="down_proj"), block_names=_shared("shared_experts")[1:]),
    # The form that transformers has in memory.
    "hf_stacked": Layout(_stacked("gate_up_proj")),
    "hf_stacked_plain": Layout(_stacked("up_proj")),
    # Qwen3-VL and Llama 4 on disk; with biases, OpenAI's privacy filter.
    "hf_transposed": Layout(_stacked("gate_up_proj", transposed=True)),
    "gpt_oss": Layout(_stacked("gate_up_proj", transposed=True, biases_required=True), "interleaved", _ROUTER),
    "gpt_oss_mxfp4": Layout(_stacked("gate_up_proj", biases_required=True, form="mxfp4"), "interleaved", _ROUTER, writable=False),
    "aria": Layout(
        _parts("stack", {"gate_up": "experts.fc1.weight", "down": "experts.fc2.weight"}, "gate_up", "down"),
        block_names=(*_ROUTER[:1], *_shared("shared_experts")),
    ),
    "granite": Layout(
        _parts("stack", {"gate_up": "input_linear.weight", "down": "output_linear.weight"}), block_names=_ROUTER_LAYER
    ),
    # nomic-embed-text-v2-moe. w2 has the rows of w1, so it is used untransposed; `experts.bias` is added once.
    "megablocks": Layout(
        _parts("flat", {"up": "experts.mlp.w1", "down": "experts.mlp.w2"}, "down"),
        block_names=(*_ROUTER_LAYER, ("output_bias", "experts.bias")),
    ),
    "dbrx": Layout(
        _parts("flat", {"gate": "experts.mlp.w1", "up": "experts.mlp.v1", "down": "experts.mlp.w2"}, "down"),
        block_names=(*_ROUTER_LAYER, ("output_bias", "experts.bias")),
    ),
    "torchtitan": Layout(
        _parts("stack", {"gate": "experts.w1_EFD", "up": "experts.w3_EFD", "down": "experts.w2_EDF"}),
        block_names=(
            ("gate.weight", "router.gate.weight"),
            ("gate.bias", "router.gate.bias"),
            ("gate.e_score_correction_bias", "expert_bias_E"),
            *_shared("shared_experts", "w1", "w3", "w2"),
        ),
    ),
}

# Same names, same shapes, another order of rows: only the model's type tells them apart.
LAYOUT_OF_MODEL_TYPE = {"gpt_oss": "gpt_oss", "openai_privacy_filter": "hf_transposed"}
