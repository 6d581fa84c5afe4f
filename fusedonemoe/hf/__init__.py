"""Descriptions of the mixture-of-experts blocks of Hugging Face's models, without importing transformers.

Only attributes are read, so a configuration or a block of another library with the same names works as well.
"""

from typing import Any

from fusedonemoe.hf.block import BLOCK_NAMES, config_of, tensors_of
from fusedonemoe.hf.families import FAMILIES, NUM_EXPERTS, TOP_K, UNSUPPORTED, Fields, refuse, title, whole

__all__ = ["BLOCK_NAMES", "FAMILIES", "UNSUPPORTED", "config_of", "fields_of", "tensors_of"]


def fields_of(config: Any, layer: int | None = None) -> Fields:
    """The fields of ``MoEConfig`` for the block of a model's configuration, or of its text model's, in a layer if these differ.

    Raises:
        ValueError: the family is not known, or its block does something that the fields do not say.
    """
    if layer is not None:
        per_layer = getattr(config, "per_layer_config", {layer: config})
        try:
            config = per_layer[layer]
        except (LookupError, TypeError) as error:
            raise ValueError(f"layer must be one of per_layer_config of {title(config)}, got {layer!r}") from error
    model_type = getattr(config, "model_type", None)
    if model_type is not None and not isinstance(model_type, str):
        raise ValueError(f"model_type of {type(config).__name__} must be a string, got {model_type!r}")
    family = FAMILIES.get(model_type or "")
    if model_type in UNSUPPORTED:
        raise refuse(config, UNSUPPORTED[model_type])
    if model_type == "dbrx":
        config = config.ffn_config
    if family is None:
        # A model of several towers keeps its language model's configuration inside.
        inner = getattr(config, "text_config", None)
        if inner is not None and inner is not config:
            return fields_of(inner, layer)
        raise ValueError(
            f"MoEConfig does not know the block of {title(config)}: give its fields yourself; known are {sorted(FAMILIES)}"
        )
    return {
        "hidden_size": whole(config, "hidden_size"),
        "intermediate_size": whole(config, *family.width),
        "num_experts": whole(config, *NUM_EXPERTS),
        "top_k": whole(config, *TOP_K),
        **family.route(config),
        **family.shared(config),
        **family.experts(config),
    }
