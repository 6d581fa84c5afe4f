"""Tiny random models of every family in the installed transformers whose experts ask its registry, found by looking.

A family is a modelling module that decorates a class with ``use_experts_implementation``. Its model is the first class in
it, causal language models first, that has experts when it is built from its own configuration with every size made small.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fusedonemoe.integrations.transformers.registry import interface_of

VOCABULARY = 96
D, F, E, K = 32, 24, 8, 3
MOST_PARAMETERS = 500_000
# Fields of configurations, by what they mean there; what a configuration does not have is not set.
_SIZES: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "moe_hidden_size", "text_hidden_size", "ple_embed_dim"), D)
    | dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), E)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), K)
    | dict.fromkeys(("moe_intermediate_size", "intermediate_size", "dense_intermediate_size", "shared_intermediate_size"), F)
    | dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), F)
    | dict.fromkeys(("shared_experts_intermediate_size", "projection_intermediate_size"), F)
    | dict.fromkeys(("num_attention_heads", "swa_num_attention_heads", "linear_num_heads", "index_n_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 4)
    | dict.fromkeys(("head_dim", "swa_head_dim", "linear_head_dim", "index_head_dim", "v_head_dim", "qk_nope_head_dim"), 8)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 8)
    | dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "router_hidden_size", "hc_lowrank"), 8)
    | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "codebook_size"), VOCABULARY)
    | dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_nextn_predict_layers"), 0)
    | dict.fromkeys(("n_group", "num_expert_group", "n_groups"), 2)
    | {
        "topk_group": 1,
        "num_hidden_layers": 2,
        "hidden_size_per_layer_input": 4,
        "qk_rope_head_dim": 8,
        "rotary_dim": 4,
        "max_position_embeddings": 64,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "mamba_n_heads": 8,
        "mamba_num_heads": 8,
        "ssm_state_size": 4,
        "chunk_size": 8,
        "mamba_chunk_size": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# What a family's configuration needs beside its sizes to have experts in a model of two layers.
_FIELDS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [F, F], "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
    "glm5_next": {
        "qk_rope_head_dim": 0,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["linear_attention", "deepseek_sparse_attention"],
    },
    "granitemoehybrid": _HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": _HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen3_5_moe": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": _HYBRID
    | {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 32, "indexer_compress_ratio": 4},
    "zaya": {"num_experts_per_tok": 1},
}


@functools.cache
def families() -> tuple[str, ...]:
    """Names of the families, by the folder of their modelling module."""
    folder = Path(transformers.__file__).parent / "models"
    files = sorted(folder.glob("*/modeling_*.py"))
    return tuple(f.parent.name for f in files if "\n@use_experts_implementation" in f.read_text(encoding="utf-8"))


def small_config(config_class: type[PretrainedConfig], **fields: Any) -> PretrainedConfig:
    """A configuration with every size made small that it has."""
    has = inspect.signature(config_class).parameters
    return config_class(**{name: size for name, size in (_SIZES | fields).items() if name in has})


def _model_classes(family: str) -> Iterator[type[PreTrainedModel]]:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, PreTrainedModel) and inspect.isclass(getattr(c, "config_class", None))
    ]
    classes = [c for c in classes if not c.__name__.endswith("PreTrainedModel") and c.__module__ == module.__name__]
    order = ("ForCausalLM", "TextModel", "DecoderModel", "Model", "ForConditionalGeneration", "")
    yield from sorted(classes, key=lambda c: next(i for i, end in enumerate(order) if c.__name__.endswith(end)))


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ask the registry, by name."""
    return {name: module for name, module in model.named_modules() if interface_of(module) is not None}


def build(family: str, **fields: Any) -> PreTrainedModel:
    """A tiny random model of a family, float32, in evaluation mode.

    Raises:
        RuntimeError: none of the family's classes could be built; why, for each.
    """
    tried = []
    for cls in _model_classes(family):
        try:
            config = small_config(cls.config_class, **_FIELDS.get(family, {}), **fields)
            with torch.device("meta"):
                skeleton = cls(config)
            count = sum(p.numel() for p in skeleton.parameters())
            if not experts_of(skeleton):
                tried.append(f"{cls.__name__}: has no experts")
            elif count > MOST_PARAMETERS:
                big = sorted(((p.numel(), n, tuple(p.shape)) for n, p in skeleton.named_parameters()), reverse=True)[:4]
                tried.append(f"{cls.__name__}: {count} parameters {big}")
            else:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    return randomised(cls(config)).eval()
        except Exception as error:
            tried.append(f"{cls.__name__}: {type(error).__name__}: {str(error)[:300]}")
    raise RuntimeError(f"{family}: " + "; ".join(tried))


def tiny_of(family: str, **fields: Any) -> PreTrainedModel:
    """A tiny model of a family whose experts ask nothing: its first class that its small configuration builds."""
    for cls in _model_classes(family):
        if "Vision" not in cls.__name__:
            return cls(small_config(cls.config_class, **fields))
    raise RuntimeError(f"{family} has no model")


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with expert and router weights that are neither zero nor too small to matter."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model
