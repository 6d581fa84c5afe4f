"""Reading a Hugging Face configuration: names that mean the same, and refusals that name the configuration."""

import sys
from typing import Any

Fields = dict[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "linear": "identity",
}
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "num_experts_per_token")
ACTIVATION_NAMES = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function")


def get(config: Any, *names: str) -> Any:
    """The first of these attributes that is there and not None."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError as error:  # transformers' answer where layers differ
            raise ValueError(f"{name} of {title(config)} differs between layers: give layer") from error
        if value is not None:
            return value
    raise ValueError(f"{title(config)} has no {' or '.join(names)}, or it is None")


def title(config: Any) -> str:
    """Return the name of a configuration for messages."""
    return f"{type(config).__name__} (model_type {getattr(config, 'model_type', None)!r})"


def refuse(config: Any, reason: str) -> ValueError:
    """The error to raise: what the block does that MoEConfig does not say."""
    return ValueError(f"MoEConfig cannot express the block of {title(config)}: {reason}")


def whole(config: Any, *names: str) -> int:
    """A whole number; where there is one for each layer, they have to be equal."""
    value = get(config, *names)
    if isinstance(value, list | tuple):
        if not value or any(other != value[0] for other in value):
            raise refuse(config, f"{names[0]} differs between layers: {list(value)}")
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{names[0]} of {title(config)} must be an integer, got {value!r}")
    if abs(value) > sys.maxsize:
        raise ValueError(
            f"{names[0]} of {title(config)} must be at most {sys.maxsize}, got a number of {value.bit_length()} bits"
        )
    return value


def flag(config: Any, name: str, *, default: bool | None = None) -> bool:
    """A yes or a no. Another value's truth would turn ``"false"`` into a yes.

    With a ``default``, which counts where the attribute is missing, None is a no.
    """
    value = get(config, name) if default is None else getattr(config, name, default) or False
    if not isinstance(value, bool):
        raise ValueError(f"{name} of {title(config)} must be a bool, got {value!r}")
    return value


def number(config: Any, name: str) -> float:
    """A factor."""
    value = get(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} of {title(config)} must be a finite number, got {value!r}")
    return float(value)


def activation(config: Any) -> str:
    """The library's name of the configuration's activation."""
    return known_activation(config, get(config, *ACTIVATION_NAMES))


def known_activation(config: Any, name: str) -> str:
    """The library's name of an activation."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise refuse(config, f"activation {name!r} is none of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]
