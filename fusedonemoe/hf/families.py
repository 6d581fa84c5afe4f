"""The routing, the experts and the shared branch of each family of Hugging Face models.

How a family routes is written in its model's code, not in its configuration, so each ``model_type`` has an entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusedonemoe.hf.reading import Fields, activation, flag, get, known_activation, number, refuse, whole

# Routers


def _softmax(config: Any) -> Fields:
    return {"norm_topk_prob": flag(config, "norm_topk_prob")}


def _softmax_normalised(config: Any) -> Fields:
    return {"norm_topk_prob": True}


def _softmax_as_it_is(config: Any) -> Fields:
    return {"norm_topk_prob": False}


def _softmax_of_the_picked(config: Any) -> Fields:
    return {"score_first": False}


def _groups(config: Any) -> Fields:
    """Expert groups; None and 1 both mean none."""
    n_group = getattr(config, "n_group", None) or 1
    topk_group = getattr(config, "topk_group", None) or 1
    # With as many open groups as there are, nothing is closed.
    return {} if n_group == topk_group else {"n_group": n_group, "topk_group": topk_group}


def _deepseek_v3(config: Any) -> Fields:
    return {
        "scoring": "sigmoid",
        "selection_bias": True,
        "norm_topk_prob": flag(config, "norm_topk_prob"),
        "routed_scaling_factor": number(config, "routed_scaling_factor"),
        **_groups(config),
    }


def _axk2(config: Any) -> Fields:
    if _groups(config):
        raise refuse(config, "experts of closed groups keep the score 0 and can be selected; here they cannot")
    return _deepseek_v3(config)


def _deepseek_v2(config: Any) -> Fields:
    method = get(config, "topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise refuse(config, f"topk_method {method!r} is neither 'greedy' nor 'group_limited_greedy'")
    groups = _groups(config) if method == "group_limited_greedy" else {}
    scale = number(config, "routed_scaling_factor")
    return {"norm_topk_prob": False, "routed_scaling_factor": scale, "group_score": "max", **groups}


def _mistral4(config: Any) -> Fields:
    norm = flag(config, "norm_topk_prob", default=True)
    return {"norm_topk_prob": norm, "routed_scaling_factor": number(config, "routed_scaling_factor"), **_groups(config)}


def _sigmoid_with_bias(*scale: str) -> Callable[[Any], Fields]:
    """Sigmoid, selection bias, normalisation, and a factor of one of these names."""

    def route(config: Any) -> Fields:
        factor = number(config, *scale) if scale else 1.0
        return {"scoring": "sigmoid", "selection_bias": True, "routed_scaling_factor": factor}

    return route


def _minimax_m2(config: Any) -> Fields:
    return _no_jitter(config) | _sigmoid_with_bias()(config)


def _no_jitter(config: Any) -> Fields:
    if getattr(config, "router_jitter_noise", 0.0):
        raise refuse(config, f"router_jitter_noise is {config.router_jitter_noise}, and MoE adds no noise in training")
    return {}


def _mixtral(config: Any) -> Fields:
    return _no_jitter(config) | _softmax_normalised(config)


def _flint(config: Any) -> Fields:
    return {"scoring": "sigmoid"} | _softmax(config)


def _kolibri1(config: Any) -> Fields:
    return {"scoring": "sigmoid", "score_first": False, "selection_bias": True} | _softmax(config)


def _laguna(config: Any) -> Fields:
    if getattr(config, "moe_router_logit_softcapping", 0.0) > 0:
        raise refuse(config, f"router logits are capped at {config.moe_router_logit_softcapping}")
    return _sigmoid_with_bias("moe_routed_scaling_factor")(config)


def _lfm2(config: Any) -> Fields:
    return {
        "scoring": "sigmoid",
        "selection_bias": flag(config, "use_expert_bias"),
        "norm_topk_prob": flag(config, "norm_topk_prob"),
        "norm_eps": 1e-6,
        "routed_scaling_factor": number(config, "routed_scaling_factor"),
    }


def _cohere2(config: Any) -> Fields:
    scoring = get(config, "expert_selection_fn")
    if scoring not in ("softmax", "sigmoid"):
        raise refuse(config, f"expert_selection_fn {scoring!r} is neither 'softmax' nor 'sigmoid'")
    # A softmax over the picked logits sums to 1 as it is.
    norm = scoring == "softmax" or flag(config, "norm_topk_prob")
    return {"scoring": scoring, "score_first": False, "norm_topk_prob": norm}


def _ernie(config: Any) -> Fields:
    return {"selection_bias": True}


def _longcat(config: Any) -> Fields:
    if getattr(config, "zero_expert_num", 0):
        raise refuse(config, f"{config.zero_expert_num} experts are identities without weights (zero_expert_num)")
    scale = number(config, "routed_scaling_factor")
    return {"selection_bias": True, "norm_topk_prob": False, "routed_scaling_factor": scale}


def _step3p7(config: Any) -> Fields:
    if any(getattr(config, name, None) and any(getattr(config, name)) for name in ("swiglu_limits", "swiglu_limits_shared")):
        raise refuse(config, "the gate is clamped after its activation in some layers (swiglu_limits)")
    return _sigmoid_with_bias("moe_router_scaling_factor")(config)


def _dbrx(config: Any) -> Fields:
    power = getattr(config, "moe_normalize_expert_weights", None)
    if power not in (None, 1):
        raise refuse(config, f"weights are normalised by their {power}-norm, not by their sum")
    if getattr(config, "moe_jitter_eps", None):
        raise refuse(config, f"moe_jitter_eps is {config.moe_jitter_eps}, and MoE adds no noise in training")
    return {"norm_topk_prob": power == 1}


# Shared branches: F of the branch, and whether it is scaled by a gate.


def _shared_times(count: str, width: str = "moe_intermediate_size") -> Callable[[Any], Fields]:
    def shared(config: Any) -> Fields:
        n = getattr(config, count, None) or 0
        return _branch(config, n * whole(config, width)) if n else {}

    return shared


def _shared_width(width: str, gate: bool = False) -> Callable[[Any], Fields]:
    def shared(config: Any) -> Fields:
        value = getattr(config, width, None) or 0
        return _branch(config, value) | {"shared_gate": gate} if value else {}

    return shared


def _branch(config: Any, width: int) -> Fields:
    for name in ("mlp_bias", "use_bias"):
        if getattr(config, name, False):
            raise refuse(config, f"its shared branch has biases ({name})")
    return {"shared_intermediate_size": width}


def _no_shared(config: Any) -> Fields:
    return {}


def _aria_shared(config: Any) -> Fields:
    fields = _shared_times("moe_num_shared_experts", "intermediate_size")(config)
    if fields and activation(config) != "silu":
        raise refuse(config, f"its shared branch has activation {config.hidden_act!r}, the experts 'silu'")
    return fields


def _cohere2_shared(config: Any) -> Fields:
    fields = _shared_times("num_shared_experts", "intermediate_size")(config)
    if fields and config.shared_expert_combination_strategy != "sum":
        raise refuse(config, f"shared_expert_combination_strategy is {config.shared_expert_combination_strategy!r}, not 'sum'")
    return fields


def _dots3_shared(config: Any) -> Fields:
    return _shared_times("n_shared_experts", "shared_experts_intermediate_size")(config)


# Experts beyond "gated, with the configuration's activation, stored [E, 2F, D]"


def _as_configured(config: Any) -> Fields:
    return {"activation": activation(config)}


def _clamped_swiglu(config: Any) -> Fields:
    alpha, limit = number(config, "swiglu_alpha"), number(config, "swiglu_limit")
    return {"activation": "swiglu_oai", "swiglu_alpha": alpha, "swiglu_limit": limit}


def _gpt_oss(config: Any) -> Fields:
    own = {"gate_up_layout": "interleaved", "transposed": True, "bias": True, "router_bias": True}
    return _clamped_swiglu(config) | own


def _privacy_filter(config: Any) -> Fields:
    # Weights are divided by K in the router, and the block's output is multiplied by it.
    return _clamped_swiglu(config) | {"transposed": True, "bias": True, "router_bias": True}


def _nemotron(config: Any) -> Fields:
    if getattr(config, "moe_latent_size", None) is not None:
        raise refuse(config, f"its experts live in a latent space of {config.moe_latent_size} (moe_latent_size)")
    return _as_configured(config) | {"gated": False}


def _aria(config: Any) -> Fields:
    return {"activation": "silu", "transposed": True}


def _silu(config: Any) -> Fields:
    return {"activation": "silu"}


def _jetmoe(config: Any) -> Fields:
    return _as_configured(config) | {"output_bias": True}


def _dbrx_experts(config: Any) -> Fields:
    return {"activation": known_activation(config, config.ffn_act_fn["name"])}


@dataclass(frozen=True)
class Family:
    """The readers of one family.

    Attributes:
        route: fields of the router.
        width: attributes that may hold ``F``, in this order.
        shared: fields of the shared branch.
        experts: fields of the experts.
    """

    route: Callable[[Any], Fields]
    width: tuple[str, ...] = ("moe_intermediate_size",)
    shared: Callable[[Any], Fields] = _no_shared
    experts: Callable[[Any], Fields] = _as_configured


_DENSE_WIDTH = ("intermediate_size",)
_N_SHARED = _shared_times("n_shared_experts")
_NUM_SHARED = _shared_times("num_shared_experts")
_GATED_SHARED = _shared_width("shared_expert_intermediate_size", gate=True)
_DEEPSEEK_V3 = Family(_deepseek_v3, shared=_N_SHARED)
_DEEPSEEK_V2 = Family(_deepseek_v2, shared=_N_SHARED)
_GRANITE = Family(_softmax_of_the_picked, _DENSE_WIDTH)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(_sigmoid_with_bias("route_scale"), shared=_NUM_SHARED),
    "aria_text": Family(_softmax_of_the_picked, _DENSE_WIDTH, _aria_shared, _aria),
    "axk2": Family(_axk2, shared=_N_SHARED),
    "bailing_hybrid": _DEEPSEEK_V3,
    "beam": Family(_deepseek_v3),
    "cohere2_moe": Family(_cohere2, _DENSE_WIDTH, _cohere2_shared),
    "dbrx": Family(_dbrx, ("ffn_hidden_size",), experts=_dbrx_experts),
    "deepseek_ocr2_text": _DEEPSEEK_V2,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "dots1": _DEEPSEEK_V3,
    "dots3_note_text": Family(_deepseek_v3, shared=_dots3_shared),
    "dots3_note_vision_encoder": Family(_sigmoid_with_bias("router_scaling_factor")),
    "ernie4_5_moe": Family(_ernie, shared=_shared_times("moe_num_shared_experts")),
    "exaone_moe": Family(_deepseek_v3, shared=_NUM_SHARED),
    "flex_olmo": Family(_softmax, _DENSE_WIDTH),
    "flint": Family(_flint, shared=_shared_width("shared_expert_intermediate_size")),
    "glm4_moe": _DEEPSEEK_V3,
    "glm4_moe_lite": _DEEPSEEK_V3,
    "glm4v_moe_text": _DEEPSEEK_V3,
    "glm_moe_dsa": _DEEPSEEK_V3,
    "gpt_oss": Family(_softmax_of_the_picked, _DENSE_WIDTH, experts=_gpt_oss),
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": Family(_softmax_normalised, _DENSE_WIDTH, _shared_width("intermediate_size")),
    "hy_v3": Family(_sigmoid_with_bias("router_scaling_factor"), shared=_NUM_SHARED),
    "jamba": Family(_softmax_as_it_is, _DENSE_WIDTH),
    "jetmoe": Family(_softmax_of_the_picked, _DENSE_WIDTH, experts=_jetmoe),
    "kimi_linear": _DEEPSEEK_V3,
    "kolibri1": Family(_kolibri1, shared=_shared_width("shared_expert_intermediate_size")),
    "laguna": Family(_laguna, shared=_shared_width("shared_expert_intermediate_size")),
    "lfm2_moe": Family(_lfm2, experts=_silu),
    "longcat_flash": Family(_longcat, ("expert_ffn_hidden_size",)),
    "mellum": Family(_softmax),
    "mimo_v2_flash": Family(_deepseek_v3),
    "minimax": Family(_mixtral, _DENSE_WIDTH),
    "minimax_m2": Family(_minimax_m2, _DENSE_WIDTH),
    "minimax_m3_vl_text": Family(
        _sigmoid_with_bias("routed_scaling_factor"), _DENSE_WIDTH, _shared_width("shared_intermediate_size"), _clamped_swiglu
    ),
    "mistral4": Family(_mistral4, shared=_N_SHARED),
    "mistral_large4_text": Family(_mistral4, shared=_N_SHARED),
    "mixtral": Family(_mixtral, _DENSE_WIDTH),
    "nemotron_h": Family(_deepseek_v3, shared=_shared_width("moe_shared_expert_intermediate_size"), experts=_nemotron),
    "olmoe": Family(_softmax, _DENSE_WIDTH),
    "openai_privacy_filter": Family(_softmax_of_the_picked, _DENSE_WIDTH, experts=_privacy_filter),
    "qwen2_moe": Family(_softmax, shared=_GATED_SHARED),
    "qwen3_5_moe_text": Family(_softmax_normalised, shared=_GATED_SHARED),
    "qwen3_moe": Family(_softmax),
    "qwen3_next": Family(_softmax, shared=_GATED_SHARED),
    "qwen3_omni_moe_talker_text": Family(_softmax, shared=_GATED_SHARED),
    "qwen3_omni_moe_text": Family(_softmax),
    "qwen3_vl_moe_text": Family(_softmax_normalised),
    "qwen4_exp_text": Family(_softmax, shared=_GATED_SHARED),
    "solar_open": _DEEPSEEK_V3,
    "step3p5": Family(_step3p7, shared=_shared_width("share_expert_dim")),
    "unlimited_ocr_text": _DEEPSEEK_V2,
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
