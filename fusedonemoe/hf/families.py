"""Reading the routing, the experts and the shared branch of each family of Hugging Face models from its configuration.

How a family routes is written in its model's code, not in its configuration, so each ``model_type`` has an entry here.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Fields = dict[str, Any]
Reader = Callable[[Any], Fields]

# Names that mean the same, and attributes

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
ACTIVATIONS |= {"relu": "relu", "relu2": "relu2", "sigmoid": "sigmoid", "linear": "identity"}
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


def _reads(*readers: Reader, **fields: Any) -> Reader:
    """A reader of what other readers read, and of these fields: each a value, or a function that reads it."""

    def read(config: Any) -> Fields:
        found: Fields = {}
        for reader in readers:
            found |= reader(config)
        return found | {name: value(config) if callable(value) else value for name, value in fields.items()}

    return read


# What the fields of MoEConfig do not say, by the attribute of a configuration that says it.
_INEXPRESSIBLE = {
    "moe_jitter_eps": "moe_jitter_eps is {}, and MoE adds no noise in training",
    "moe_latent_size": "its experts live in a latent space of {} (moe_latent_size)",
    "moe_router_logit_softcapping": "router logits are capped at {}",
    "router_jitter_noise": "router_jitter_noise is {}, and MoE adds no noise in training",
    "zero_expert_num": "{} experts are identities without weights (zero_expert_num)",
}


def _without(name: str) -> Reader:
    """No fields, if this attribute is missing or 0; a cap below 0 is none, as in transformers."""

    def read(config: Any) -> Fields:
        value = getattr(config, name, None)
        if value and (name != "moe_router_logit_softcapping" or value > 0):
            raise refuse(config, _INEXPRESSIBLE[name].format(value))
        return {}

    return read


# Routers


def _groups(config: Any) -> Fields:
    """Expert groups; None and 1 both mean none."""
    n_group = getattr(config, "n_group", None) or 1
    topk_group = getattr(config, "topk_group", None) or 1
    # With as many open groups as there are, nothing is closed.
    return {} if n_group == topk_group else {"n_group": n_group, "topk_group": topk_group}


_nothing = _reads()
_NORM = partial(flag, name="norm_topk_prob")
_SCALE = partial(number, name="routed_scaling_factor")
_softmax = _reads(norm_topk_prob=_NORM)
_softmax_normalised = _reads(norm_topk_prob=True)
_softmax_of_the_picked = _reads(score_first=False)
_sigmoid_with_bias = _reads(scoring="sigmoid", selection_bias=True)
_mixtral = _reads(_without("router_jitter_noise"), _softmax_normalised)
_deepseek_v3 = _reads(_groups, _sigmoid_with_bias, norm_topk_prob=_NORM, routed_scaling_factor=_SCALE)
_mistral4 = _reads(_groups, norm_topk_prob=partial(flag, name="norm_topk_prob", default=True), routed_scaling_factor=_SCALE)
_lfm2 = _reads(
    scoring="sigmoid",
    selection_bias=partial(flag, name="use_expert_bias"),
    norm_topk_prob=_NORM,
    norm_eps=1e-6,
    routed_scaling_factor=_SCALE,
)


def _scaled_sigmoid(scale: str) -> Reader:
    """Sigmoid, selection bias, normalisation, and a factor of this name."""
    return _reads(_sigmoid_with_bias, routed_scaling_factor=partial(number, name=scale))


def _axk2(config: Any) -> Fields:
    if _groups(config):
        raise refuse(config, "experts of closed groups keep the score 0 and can be selected; here they cannot")
    return _deepseek_v3(config)


def _deepseek_v2(config: Any) -> Fields:
    method = get(config, "topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise refuse(config, f"topk_method {method!r} is neither 'greedy' nor 'group_limited_greedy'")
    groups = _groups(config) if method == "group_limited_greedy" else {}
    return {"norm_topk_prob": False, "routed_scaling_factor": _SCALE(config), "group_score": "max", **groups}


def _cohere2(config: Any) -> Fields:
    scoring = get(config, "expert_selection_fn")
    if scoring not in ("softmax", "sigmoid"):
        raise refuse(config, f"expert_selection_fn {scoring!r} is neither 'softmax' nor 'sigmoid'")
    # A softmax over the picked logits sums to 1 as it is.
    return {"scoring": scoring, "score_first": False, "norm_topk_prob": scoring == "softmax" or _NORM(config)}


def _step3p7(config: Any) -> Fields:
    if any(getattr(config, name, None) and any(getattr(config, name)) for name in ("swiglu_limits", "swiglu_limits_shared")):
        raise refuse(config, "the gate is clamped after its activation in some layers (swiglu_limits)")
    return _scaled_sigmoid("moe_router_scaling_factor")(config)


def _dbrx(config: Any) -> Fields:
    power = getattr(config, "moe_normalize_expert_weights", None)
    if power not in (None, 1):
        raise refuse(config, f"weights are normalised by their {power}-norm, not by their sum")
    return {"norm_topk_prob": power == 1} | _without("moe_jitter_eps")(config)


# Shared branches


def _shared(width: str = "shared_expert_intermediate_size", count: str = "", gate: bool = False) -> Reader:
    """The width of the branch, for each of as many shared experts as ``count`` says, and whether a gate scales it."""

    def read(config: Any) -> Fields:
        n = getattr(config, count or width, None) or 0
        if not n:
            return {}
        for name in ("mlp_bias", "use_bias"):
            if getattr(config, name, False):
                raise refuse(config, f"its shared branch has biases ({name})")
        return {"shared_intermediate_size": n * whole(config, width) if count else n, "shared_gate": gate}

    return read


def _aria_shared(config: Any) -> Fields:
    fields = _shared("intermediate_size", "moe_num_shared_experts")(config)
    if fields and activation(config) != "silu":
        raise refuse(config, f"its shared branch has activation {config.hidden_act!r}, the experts 'silu'")
    return fields


def _cohere2_shared(config: Any) -> Fields:
    fields = _shared("intermediate_size", "num_shared_experts")(config)
    if fields and config.shared_expert_combination_strategy != "sum":
        raise refuse(config, f"shared_expert_combination_strategy is {config.shared_expert_combination_strategy!r}, not 'sum'")
    return fields


# Experts beyond "gated, with the configuration's activation, stored [E, 2F, D]"

_as_configured = _reads(activation=activation)
_clamped_swiglu = _reads(
    activation="swiglu_oai", swiglu_alpha=partial(number, name="swiglu_alpha"), swiglu_limit=partial(number, name="swiglu_limit")
)
# The privacy filter's router divides weights by K, and its block multiplies the output by it.
_privacy_filter = _reads(_clamped_swiglu, transposed=True, bias=True, router_bias=True)


def _dbrx_experts(config: Any) -> Fields:
    return {"activation": known_activation(config, config.ffn_act_fn["name"])}


@dataclass(frozen=True)
class Family:
    """The readers of one family."""

    route: Reader
    width: tuple[str, ...] = ("moe_intermediate_size",)  # attributes that may hold F, in this order
    shared: Reader = _nothing
    experts: Reader = _as_configured


_LIKE_DEEPSEEK_V3 = (
    "bailing_hybrid", "deepseek_v3", "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm_moe_dsa",
    "kimi_linear", "solar_open",
)  # fmt: skip
_DENSE_WIDTH = ("intermediate_size",)
_N_SHARED = _shared("moe_intermediate_size", "n_shared_experts")
_NUM_SHARED = _shared("moe_intermediate_size", "num_shared_experts")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_LIKE_DEEPSEEK_V3, Family(_deepseek_v3, shared=_N_SHARED)),
    **dict.fromkeys(("deepseek_ocr2_text", "deepseek_v2", "unlimited_ocr_text"), Family(_deepseek_v2, shared=_N_SHARED)),
    **dict.fromkeys(("mistral4", "mistral_large4_text"), Family(_mistral4, shared=_N_SHARED)),
    **dict.fromkeys(
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), Family(_softmax_of_the_picked, _DENSE_WIDTH)
    ),
    **dict.fromkeys(("beam", "mimo_v2_flash"), Family(_deepseek_v3)),
    **dict.fromkeys(("flex_olmo", "olmoe"), Family(_softmax, _DENSE_WIDTH)),
    **dict.fromkeys(("mellum", "qwen3_moe", "qwen3_omni_moe_text"), Family(_softmax)),
    **dict.fromkeys(("minimax", "mixtral"), Family(_mixtral, _DENSE_WIDTH)),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_next", "qwen3_omni_moe_talker_text", "qwen4_exp_text"), Family(_softmax, shared=_shared(gate=True))
    ),
    "afmoe": Family(_scaled_sigmoid("route_scale"), shared=_NUM_SHARED),
    "aria_text": Family(_softmax_of_the_picked, _DENSE_WIDTH, _aria_shared, _reads(activation="silu", transposed=True)),
    "axk2": Family(_axk2, shared=_N_SHARED),
    "cohere2_moe": Family(_cohere2, _DENSE_WIDTH, _cohere2_shared),
    "dbrx": Family(_dbrx, ("ffn_hidden_size",), experts=_dbrx_experts),
    "dots3_note_text": Family(_deepseek_v3, shared=_shared("shared_experts_intermediate_size", "n_shared_experts")),
    "dots3_note_vision_encoder": Family(_scaled_sigmoid("router_scaling_factor")),
    "ernie4_5_moe": Family(_reads(selection_bias=True), shared=_shared("moe_intermediate_size", "moe_num_shared_experts")),
    "exaone_moe": Family(_deepseek_v3, shared=_NUM_SHARED),
    "flint": Family(_reads(_softmax, scoring="sigmoid"), shared=_shared()),
    "gpt_oss": Family(_softmax_of_the_picked, _DENSE_WIDTH, experts=_reads(_privacy_filter, gate_up_layout="interleaved")),
    "hunyuan_v1_moe": Family(_softmax_normalised, _DENSE_WIDTH, _shared("intermediate_size")),
    "hy_v3": Family(_scaled_sigmoid("router_scaling_factor"), shared=_NUM_SHARED),
    "jamba": Family(_reads(norm_topk_prob=False), _DENSE_WIDTH),
    "jetmoe": Family(_softmax_of_the_picked, _DENSE_WIDTH, experts=_reads(_as_configured, output_bias=True)),
    "kolibri1": Family(_reads(_softmax, _sigmoid_with_bias, score_first=False), shared=_shared()),
    "laguna": Family(
        _reads(_without("moe_router_logit_softcapping"), _scaled_sigmoid("moe_routed_scaling_factor")), shared=_shared()
    ),
    "lfm2_moe": Family(_lfm2, experts=_reads(activation="silu")),
    "longcat_flash": Family(
        _reads(_without("zero_expert_num"), selection_bias=True, norm_topk_prob=False, routed_scaling_factor=_SCALE),
        ("expert_ffn_hidden_size",),
    ),
    "minimax_m2": Family(_reads(_without("router_jitter_noise"), _sigmoid_with_bias), _DENSE_WIDTH),
    "minimax_m3_vl_text": Family(
        _scaled_sigmoid("routed_scaling_factor"), _DENSE_WIDTH, _shared("shared_intermediate_size"), _clamped_swiglu
    ),
    "nemotron_h": Family(
        _deepseek_v3,
        shared=_shared("moe_shared_expert_intermediate_size"),
        experts=_reads(_without("moe_latent_size"), _as_configured, gated=False),
    ),
    "openai_privacy_filter": Family(_softmax_of_the_picked, _DENSE_WIDTH, experts=_privacy_filter),
    "qwen3_5_moe_text": Family(_softmax_normalised, shared=_shared(gate=True)),
    "qwen3_vl_moe_text": Family(_softmax_normalised),
    "step3p5": Family(_step3p7, shared=_shared("share_expert_dim")),
}

# What these blocks do that the fields of MoEConfig do not say, whatever the configuration.
UNSUPPORTED: dict[str, str] = {
    "axk1": "a norm follows the sum of the experts and the shared branch",
    "deepseek_v4": "scores are sqrt(softplus(logits)), some layers route by token id, and the gate is clamped before its SiLU",
    "diffusion_gemma_text": "its router norms and scales its input, and has a scale for each expert",
    "doge": "its experts are one-neuron ones, picked by product keys: see FineGrainedMoE",
    "ernie4_5_vl_moe_text": "text and vision tokens have routers and experts of their own",
    "gemma4_text": "its router norms and scales its input, and has a scale for each expert",
    "glm5_next_text": "the gate is clamped before its SiLU",
    "hy_v4": "the gate is clamped before its SiLU",
    "inkling2_text": "scores are no softmax or sigmoid, and gate and up are soft-capped",
    "inkling_text": "the shared experts take part in the normalisation of the routing weights",
    "llama4_text": "the routing weight scales an expert's input, not its output",
    "muse_spark_text": "its experts live in a latent space and are normed before they are summed",
    "nllb-moe": "the router drops tokens beyond a capacity, and the experts are separate modules with biases",
    "phimoe": "its router masks logits by their distance to the best one (sparsemixer)",
    "switch_transformers": "the router drops tokens beyond a capacity, and the experts are separate modules",
    "vitpose_backbone": "its experts are picked by the data set, not by a router",
    "zaya": "its router is an MLP with a state carried between layers, and tokens may skip the experts",
}
