"""Checkpoints that transformers saved, and checkpoints that transformers loads: every byte, every name, and the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers", minversion="5.0")
import transformers

from fusedonemoe import MoE, MoEConfig
from fusedonemoe.integrations.checkpoints import ExpertWeights, list_blocks, load_experts, to_state_dict
from tests.integrations.checkpoint_layouts import same

BASE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FINE = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 28}
# By the stem of its class names: the configuration's fields, the prefix of a block on disk and its layout.
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "Qwen3Moe": (FINE | {"head_dim": 8}, "model.layers.1.mlp", "hf"),
    "Qwen2Moe": (FINE | SHARED, "model.layers.1.mlp", "hf"),
    "Olmoe": ({"num_experts": 5, "num_experts_per_tok": 2}, "model.layers.1.mlp", "hf"),
    "DeepseekV3": (
        {
            "moe_intermediate_size": 20, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            "qk_nope_head_dim": 8, "num_key_value_heads": 4,
        },
        "model.layers.1.mlp",
        "hf",
    ),
    "Ernie4_5_Moe": (
        {"moe_intermediate_size": 20, "moe_num_experts": 5, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 2},
        "model.layers.1.mlp",
        "hf",
    ),
    "Mixtral": (LOCAL, "model.layers.1.block_sparse_moe", "mixtral"),
    "MiniMaxM2": (LOCAL | {"head_dim": 8}, "model.layers.1.block_sparse_moe", "mixtral"),
    "Lfm2Moe": (
        FINE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        "model.layers.1.feed_forward",
        "lfm2",
    ),
    "Jamba": (
        {
            "num_experts": 5, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 4,
            "mamba_dt_rank": 4, "expert_layer_period": 1, "expert_layer_offset": 0, "use_mamba_kernels": False,
        },
        "model.layers.1.feed_forward",
        "jamba",
    ),
    "NemotronH": (
        {
            "moe_intermediate_size": 20, "n_routed_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "n_groups": 1,
            "moe_shared_expert_intermediate_size": 28, "layers_block_type": ["mamba", "moe"], "mamba_num_heads": 8,
            "mamba_head_dim": 8, "ssm_state_size": 4, "chunk_size": 8,
        },
        "backbone.layers.1.mixer",
        "nemotron_h",
    ),
    "GptOss": (LOCAL | {"head_dim": 8}, "model.layers.1.mlp", "gpt_oss"),
    "GraniteMoe": (LOCAL, "model.layers.1.block_sparse_moe", "granite"),
}  # fmt: skip


def _fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and ("expert" in name or "gate" in name or "router" in name or "bias" in name):
                scale = 0.1 if tensor.dim() < 2 or "bias" in name else tensor.shape[-1] ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def _model(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(**(BASE | FAMILIES[family][0]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    _fill(model, seed=0)
    return model


def _block(model: nn.Module, layer: int) -> nn.Module:
    """The sparse block of a layer."""
    found = [
        module
        for name, module in model.named_modules()
        if hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router")) and f".{layer}." in name
    ]
    assert len(found) == 1
    return found[0]


def _output(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = block(x)
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)


def _on_disk(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    files = (load_file(path) for path in folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in file.items() if key.startswith(prefix)}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory) -> tuple[str, Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    model = _model(request.param)
    model.save_pretrained(folder, max_shard_size="30KB")  # shards that part an expert's tensors
    assert len(list(folder.glob("*.safetensors"))) > 1
    return request.param, model, folder


def test_what_transformers_saved_is_found_and_comes_back_to_the_byte(saved):
    family, _, folder = saved
    _, prefix, layout = FAMILIES[family]
    assert (prefix, layout) in [(b.prefix, b.layout) for b in list_blocks(folder)]
    weights = load_experts(folder, prefix=prefix)
    assert isinstance(weights, ExpertWeights)
    # Every tensor of the block on disk, router and shared branch too.
    assert same(to_state_dict(weights), _on_disk(folder, f"{prefix}."))


def test_what_transformers_saved_computes_what_its_block_computes(saved):
    _, model, folder = saved
    moe = load_experts(folder, layer=1, into=MoE(MoEConfig.from_hf(model.config)))
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = _output(_block(model, 1), x)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(moe(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_what_is_written_is_loaded_by_transformers_with_nothing_missing(saved, tmp_path):
    family, model, folder = saved
    _, prefix, layout = FAMILIES[family]
    (block,) = [b for b in list_blocks(folder) if b.prefix == prefix]
    moe = MoE(MoEConfig.from_hf(model.config))
    _fill(moe, seed=7)
    state: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        state |= load_file(path)
    new = to_state_dict(moe, layout, prefix=prefix, block_names=block.block_names)
    assert new.keys() == {key for key in state if key.startswith(f"{prefix}.")}
    save_file(
        {key: tensor.contiguous() for key, tensor in (state | new).items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    model.config.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = moe(x)
        torch.testing.assert_close(_output(_block(loaded, 1), x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3", "GptOss"])
def test_bfloat16_comes_back_to_the_byte(family, tmp_path):
    _model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    _, prefix, _ = FAMILIES[family]
    weights = load_experts(tmp_path, layer=1)
    assert weights.gate_up_proj.dtype == torch.bfloat16
    assert same(to_state_dict(weights), _on_disk(tmp_path, f"{prefix}."))
