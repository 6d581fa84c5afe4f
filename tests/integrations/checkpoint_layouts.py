"""Random checkpoints in every layout, and for each the layout's own formula, written from its model's definition.

The formulas share nothing with what is tested: names are spelt out, and none goes through the library's home form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from fusedonemoe.integrations.checkpoints import ExpertWeights, load_experts

State = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """A layout as its users write and read it.

    Attributes:
        prefix: of a block in a real model.
        write: ``(random, E, D, F) -> state`` below the prefix; ``random(*shape)`` draws.
        expert: ``(state, x, e, E) -> y``, one expert of that state on rows x.
        activation: of the formula, as the library names it.
    """

    prefix: str
    write: Callable[..., State]
    expert: Callable[[State, Tensor, int, int], Tensor]
    activation: str = "silu"


def _each(gate: str | None, up: str, down: str, router: str) -> Callable[..., State]:
    def write(random: Callable[..., Tensor], E: int, D: int, F: int) -> State:
        state = {router: random(E, D)}
        for e in range(E):
            if gate:
                state[f"experts.{e}.{gate}.weight"] = random(F, D)
            state[f"experts.{e}.{up}.weight"] = random(F, D)
            state[f"experts.{e}.{down}.weight"] = random(D, F)
        return state

    return write


def _linears(gate: str, up: str, down: str) -> Callable[[State, Tensor, int, int], Tensor]:
    """Three nn.Linear per expert."""

    def expert(s: State, x: Tensor, e: int, E: int) -> Tensor:
        h = silu(x @ s[f"experts.{e}.{gate}.weight"].T) * (x @ s[f"experts.{e}.{up}.weight"].T)
        return h @ s[f"experts.{e}.{down}.weight"].T

    return expert


def _nemotron(s: State, x: Tensor, e: int, E: int) -> Tensor:
    return relu(x @ s[f"experts.{e}.up_proj.weight"].T).square() @ s[f"experts.{e}.down_proj.weight"].T


def _stacked(s: State, x: Tensor, e: int, E: int) -> Tensor:
    gate, up = (x @ s["experts.gate_up_proj"][e].T).chunk(2, dim=-1)
    return (silu(gate) * up) @ s["experts.down_proj"][e].T


def _stacked_plain(s: State, x: Tensor, e: int, E: int) -> Tensor:
    return relu(x @ s["experts.up_proj"][e].T).square() @ s["experts.down_proj"][e].T


def _transposed(s: State, x: Tensor, e: int, E: int) -> Tensor:
    gate, up = (x @ s["experts.gate_up_proj"][e]).chunk(2, dim=-1)
    return (silu(gate) * up) @ s["experts.down_proj"][e]


def _aria(s: State, x: Tensor, e: int, E: int) -> Tensor:
    gate, up = (x @ s["experts.fc1.weight"][e]).chunk(2, dim=-1)
    return (silu(gate) * up) @ s["experts.fc2.weight"][e]


def _gpt_oss(s: State, x: Tensor, e: int, E: int) -> Tensor:
    z = x @ s["experts.gate_up_proj"][e] + s["experts.gate_up_proj_bias"][e]
    gate, up = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ s["experts.down_proj"][e] + s["experts.down_proj_bias"][e]


def _granite(s: State, x: Tensor, e: int, E: int) -> Tensor:
    gate, up = (x @ s["input_linear.weight"][e].T).chunk(2, dim=-1)
    return (silu(gate) * up) @ s["output_linear.weight"][e].T


def _megablocks(s: State, x: Tensor, e: int, E: int) -> Tensor:
    w1, w2 = (s[f"experts.mlp.{name}"].view(E, -1, x.shape[-1])[e] for name in ("w1", "w2"))
    return gelu(x @ w1.T) @ w2


def _dbrx(s: State, x: Tensor, e: int, E: int) -> Tensor:
    w1, v1, w2 = (s[f"experts.mlp.{name}"].view(E, -1, x.shape[-1])[e] for name in ("w1", "v1", "w2"))
    return (silu(x @ w1.T) * (x @ v1.T)) @ w2


def _torchtitan(s: State, x: Tensor, e: int, E: int) -> Tensor:
    h = silu(x @ s["experts.w1_EFD"][e].T) * (x @ s["experts.w3_EFD"][e].T)
    return h @ s["experts.w2_EDF"][e].T


LAYOUTS: dict[str, Written] = {
    "hf": Written(
        "model.layers.1.mlp",
        _each("gate_proj", "up_proj", "down_proj", "gate.weight"),
        _linears("gate_proj", "up_proj", "down_proj"),
    ),
    "jamba": Written(
        "model.layers.1.feed_forward",
        _each("gate_proj", "up_proj", "down_proj", "router.weight"),
        _linears("gate_proj", "up_proj", "down_proj"),
    ),
    "mixtral": Written("model.layers.1.block_sparse_moe", _each("w1", "w3", "w2", "gate.weight"), _linears("w1", "w3", "w2")),
    "lfm2": Written(
        "model.layers.1.feed_forward",
        lambda random, E, D, F: _each("w1", "w3", "w2", "gate.weight")(random, E, D, F) | {"expert_bias": random(E)},
        _linears("w1", "w3", "w2"),
    ),
    "nemotron_h": Written("backbone.layers.1.mixer", _each(None, "up_proj", "down_proj", "gate.weight"), _nemotron, "relu2"),
    "hf_stacked": Written(
        "model.layers.1.mlp",
        lambda random, E, D, F: {
            "experts.gate_up_proj": random(E, 2 * F, D),
            "experts.down_proj": random(E, D, F),
            "gate.weight": random(E, D),
        },
        _stacked,
    ),
    "hf_stacked_plain": Written(
        "model.layers.1.mixer",
        lambda random, E, D, F: {
            "experts.up_proj": random(E, F, D),
            "experts.down_proj": random(E, D, F),
            "gate.weight": random(E, D),
        },
        _stacked_plain,
        "relu2",
    ),
    "hf_transposed": Written(
        "model.language_model.layers.1.mlp",
        lambda random, E, D, F: {
            "experts.gate_up_proj": random(E, D, 2 * F),
            "experts.down_proj": random(E, F, D),
            "gate.weight": random(E, D),
        },
        _transposed,
    ),
    "gpt_oss": Written(
        "model.layers.1.mlp",
        lambda random, E, D, F: {
            "experts.gate_up_proj": random(E, D, 2 * F),
            "experts.gate_up_proj_bias": random(E, 2 * F),
            "experts.down_proj": random(E, F, D),
            "experts.down_proj_bias": random(E, D),
            "router.weight": random(E, D),
            "router.bias": random(E),
        },
        _gpt_oss,
        "swiglu_oai",
    ),
    "aria": Written(
        "language_model.model.layers.1.mlp",
        lambda random, E, D, F: {
            "experts.fc1.weight": random(E, D, 2 * F),
            "experts.fc2.weight": random(E, F, D),
            "router.weight": random(E, D),
            "shared_experts.gate_proj.weight": random(F, D),
            "shared_experts.up_proj.weight": random(F, D),
            "shared_experts.down_proj.weight": random(D, F),
        },
        _aria,
    ),
    "granite": Written(
        "model.layers.1.block_sparse_moe",
        lambda random, E, D, F: {
            "input_linear.weight": random(E, 2 * F, D),
            "output_linear.weight": random(E, D, F),
            "router.layer.weight": random(E, D),
        },
        _granite,
    ),
    "megablocks": Written(
        "encoder.layers.1.mlp",
        lambda random, E, D, F: {
            "experts.mlp.w1": random(E * F, D),
            "experts.mlp.w2": random(E * F, D),
            "experts.bias": random(D),
            "router.layer.weight": random(E, D),
        },
        _megablocks,
        "gelu",
    ),
    "dbrx": Written(
        "transformer.blocks.1.ffn",
        lambda random, E, D, F: {
            "experts.mlp.w1": random(E * F, D),
            "experts.mlp.v1": random(E * F, D),
            "experts.mlp.w2": random(E * F, D),
            "router.layer.weight": random(E, D),
        },
        _dbrx,
    ),
    "torchtitan": Written(
        "layers.1.moe",
        lambda random, E, D, F: {
            "experts.w1_EFD": random(E, F, D),
            "experts.w3_EFD": random(E, F, D),
            "experts.w2_EDF": random(E, D, F),
            "router.gate.weight": random(E, D),
            "expert_bias_E": random(E),
            "shared_experts.w1.weight": random(F, D),
            "shared_experts.w3.weight": random(F, D),
            "shared_experts.w2.weight": random(D, F),
        },
        _torchtitan,
    ),
}


def below(prefix: str, state: State) -> State:
    """The state under a prefix."""
    return {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in state.items()}


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> Callable[..., Tensor]:
    """A source of random tensors, none of which repeats another's values."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make(
    layout: str, E: int, D: int, F: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, prefix: str | None = None
) -> State:
    """A block's checkpoint."""
    written = LAYOUTS[layout]
    return below(written.prefix if prefix is None else prefix, written.write(drawn(seed, dtype), E, D, F))


def output(layout: str, state: State, x: Tensor, experts: Tensor, weights: Tensor, E: int) -> Tensor:
    """The weighted sum over each token's experts, token by token; a block's own bias is added once."""
    written = LAYOUTS[layout]
    local = {name.removeprefix(f"{written.prefix}."): tensor for name, tensor in state.items()}
    rows = []
    for t in range(x.shape[0]):
        row = sum(weights[t, j] * written.expert(local, x[t], int(experts[t, j]), E) for j in range(experts.shape[1]))
        rows.append(row + local["experts.bias"] if "experts.bias" in local else row)
    return torch.stack(rows)


# What nothing but the layout's name can tell from it, so that "auto" has to be told.
AMBIGUOUS = {"gpt_oss"}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Names, shapes, dtypes and every bit."""
    if a.keys() != b.keys():
        return False
    return all(
        a[name].shape == b[name].shape
        and a[name].dtype == b[name].dtype
        and torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name in a
    )


def loaded(state: Any, layout: str, **kwargs: Any) -> ExpertWeights:
    return load_experts(state, layout if layout in AMBIGUOUS else "auto", **kwargs)


def two_layers() -> State:
    """Two blocks of one model, and what stands around them."""
    first, second = (make("hf", 3, 5, 4, seed=s, dtype=torch.bfloat16, prefix=f"model.layers.{s}.mlp") for s in (0, 1))
    return first | second | {"model.embed_tokens.weight": torch.randn(7, 5), "lm_head.weight": torch.randn(7, 5)}
