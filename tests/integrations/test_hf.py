"""MoEConfig.from_hf and MoE.from_hf against every mixture-of-experts block of the installed transformers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.0")
import transformers

from fusedonemoe import MoE, MoEConfig
from fusedonemoe.hf import FAMILIES, UNSUPPORTED
from fusedonemoe.integrations.checkpoints import load_experts
from tests.integrations.hf_blocks import D, E, F, K, build_block, config_classes, output_of, small_config

# Configurations whose blocks MoEConfig does not say, and the words of the reason. A new family of transformers fails the test
# until it is here or works.
REFUSED = {
    "AXK1Config": "a norm follows the sum",
    "DeepseekV4Config": "sqrt(softplus(logits))",
    "DiffusionGemmaTextConfig": "norms and scales its input",
    "DogeConfig": "product keys",
    "Ernie4_5_VLMoeTextConfig": "text and vision tokens",
    "Ernie4_5_VL_MoeTextConfig": "text and vision tokens",
    "Gemma4TextConfig": "norms and scales its input",
    "Glm5NextTextConfig": "clamped before its SiLU",
    "HYV4Config": "clamped before its SiLU",
    "Inkling2TextConfig": "soft-capped",
    "InklingTextConfig": "the shared experts take part in the normalisation",
    "Llama4TextConfig": "scales an expert's input",
    "LongcatFlashConfig": "identities without weights",
    "MuseSparkTextConfig": "latent space",
    "NllbMoeConfig": "capacity",
    "PhimoeConfig": "sparsemixer",
    "SwitchTransformersConfig": "capacity",
    "VitPoseBackboneConfig": "picked by the data set",
    "ZayaConfig": "state carried between layers",
}
# What a family's defaults lack of a block, or switch off.
FIELDS: dict[str, dict[str, Any]] = {
    "Dots1Config": {"n_shared_experts": 1},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": F + 4},
}
# Blocks that work, but whose weights are cut in other tensors than a MoE's: they can be copied, not shared.
NOT_SHARED = {"MiniMaxM3VLTextConfig": "shared_experts.gate_up_proj.weight", "DbrxConfig": "experts.mlp.w1"}

NAMES = sorted(({*config_classes()} - {"DbrxFFNConfig"}) | {"DbrxConfig"})
SUPPORTED = [name for name in NAMES if name not in REFUSED]


def config_class(name: str) -> type:
    return transformers.DbrxConfig if name == "DbrxConfig" else config_classes()[name]


def configured(name: str, **fields: Any) -> Any:
    """A small configuration that builds a block, and groups of two experts where the family has groups."""
    if name == "DbrxConfig":
        config: Any = transformers.DbrxConfig()
        for field, value in ({"hidden_size": D, "ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": K} | fields).items():
            setattr(config.ffn_config, field, value)
        return config
    if name == "Dots3NoteVisionConfig":
        return config_class(name)(
            hidden_size=D, moe_intermediate_size=F, num_hidden_layers=2, mlp_layer_types=["sparse", "dense"],
            num_local_experts=E, num_experts_per_tok=K, router_scaling_factor=1.5, adapter_in_dim=D,
        )  # fmt: skip
    config = small_config(config_class(name), **FIELDS.get(name, {}))
    if getattr(config, "n_group", None) is not None:
        config.n_group, config.topk_group = 4, 2
    for field, value in fields.items():
        setattr(config, field, value)
    return config


def built(name: str, config: Any) -> nn.Module:
    return build_block(config_class(name), config)


def copied(name: str, block: nn.Module, config: MoEConfig) -> MoE:
    """A MoE with the block's weights: shared where they can be, else copied by hand."""
    if name not in NOT_SHARED:
        return MoE.from_hf(block, config)
    state = block.state_dict()
    moe = MoE(config)
    if name == "DbrxConfig":
        return load_experts(state, into=moe).eval()
    fused = state.pop("shared_experts.gate_up_proj.weight")
    state |= {f"shared_expert.{part}_proj.weight": rows for part, rows in zip(("gate", "up"), fused.chunk(2), strict=True)}
    moe.load_state_dict({key.replace("shared_experts.", "shared_expert."): t for key, t in state.items()})
    return moe.eval()


def assert_same_block(name: str, config: Any) -> None:
    layer = 0 if name == "Dots3NoteVisionConfig" else None
    block = built(name, config)
    moe = copied(name, block, MoEConfig.from_hf(config, layer=layer))
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = output_of(block, x.clone()), moe(x)
    assert expected.abs().max() > 1e-2, "a result of zeros would show nothing"
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_every_family_that_asks_the_registry_is_seen():
    folder = Path(transformers.__file__).parent / "models"
    decorated = {
        file.parent.name
        for file in folder.glob("*/modeling_*.py")
        if "\n@use_experts_implementation" in file.read_text(encoding="utf-8")
    }
    assert decorated <= {cls.__module__.split(".")[-2] for cls in config_classes().values()}


def test_the_refused_are_exactly_these():
    refused = {}
    for name in NAMES:
        try:
            MoEConfig.from_hf(configured(name), layer=0 if name == "Dots3NoteVisionConfig" else None)
        except ValueError as error:
            refused[name] = str(error)
    assert sorted(refused) == sorted(REFUSED)
    assert [name for name, words in REFUSED.items() if words not in refused[name]] == []
    assert all("cannot express the block of" in message for message in refused.values())


@pytest.mark.parametrize("name", SUPPORTED)
def test_block_of_the_default_configuration_is_computed(name):
    assert_same_block(name, configured(name))


@pytest.mark.parametrize("name", [name for name in SUPPORTED if hasattr(config_class(name)(), "norm_topk_prob")])
def test_block_with_the_other_normalisation_is_computed(name):
    config = configured(name)
    config.norm_topk_prob = not config.norm_topk_prob
    assert_same_block(name, config)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("AXK2Config", {"n_group": 1, "topk_group": 1}),
    ("Cohere2MoeConfig", {"expert_selection_fn": "softmax"}),
    ("Cohere2MoeConfig", {"num_shared_experts": 2, "shared_expert_combination_strategy": "sum"}),
    ("DbrxConfig", {"moe_normalize_expert_weights": None}),
    ("DeepseekV2Config", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}),
    ("DeepseekV2Config", {"n_group": None, "topk_group": None}),
    ("DeepseekV3Config", {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    ("DeepseekV3Config", {"n_group": 2, "topk_group": 2}),
    ("DeepseekV3Config", {"n_shared_experts": 3}),
    ("Ernie4_5_MoeConfig", {"moe_num_shared_experts": 0}),
    ("GptOssConfig", {"swiglu_limit": 0.5, "swiglu_alpha": 1.2}),
    ("Lfm2MoeConfig", {"norm_topk_prob": False}),
    ("Lfm2MoeConfig", {"norm_topk_prob": False, "use_expert_bias": False}),
    ("Mistral4Config", {"n_group": 2, "topk_group": 1}),
    ("OlmoeConfig", {"hidden_act": "gelu_pytorch_tanh"}),
    ("Qwen3MoeConfig", {"hidden_act": "gelu"}),
    ("Qwen2MoeConfig", {"hidden_act": "relu"}),
    ("Qwen3MoeConfig", {"num_experts_per_tok": 1}),
    ("Qwen3MoeConfig", {"num_experts_per_tok": E}),
]


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=lambda value: str(value))
def test_block_of_another_configuration_is_computed(name, fields):
    assert_same_block(name, configured(name, **fields))


CONDITIONS: list[tuple[str, dict[str, Any], str]] = [
    ("AriaTextConfig", {"mlp_bias": True}, r"shared branch has biases \(mlp_bias\)"),
    ("AriaTextConfig", {"hidden_act": "gelu"}, "shared branch has activation 'gelu', the experts 'silu'"),
    ("AXK2Config", {"n_group": 4, "topk_group": 2}, "experts of closed groups keep the score 0"),
    ("Cohere2MoeConfig", {"num_shared_experts": 1, "shared_expert_combination_strategy": "average"}, "not 'sum'"),
    ("DbrxConfig", {"moe_normalize_expert_weights": 2.0}, "2.0-norm"),
    ("DbrxConfig", {"moe_jitter_eps": 0.1}, "moe_jitter_eps is 0.1"),
    ("DeepseekV2Config", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    ("DeepseekV2Config", {"num_experts_per_tok": None}, "no num_experts_per_tok or .*, or it is None"),
    ("LagunaConfig", {"moe_router_logit_softcapping": 30.0}, "router logits are capped at 30.0"),
    ("MixtralConfig", {"router_jitter_noise": 0.01}, "router_jitter_noise is 0.01"),
    ("NemotronHConfig", {"moe_latent_size": 8}, "latent space of 8"),
    ("Qwen3MoeConfig", {"hidden_act": "mish"}, "activation 'mish' is none of"),
    ("Qwen3MoeConfig", {"num_experts": 7.5, "num_local_experts": 7.5}, "must be an integer, got 7.5"),
    ("Step3p7TextConfig", {"swiglu_limits": [0, 7.0]}, r"clamped after its activation in some layers \(swiglu_limits\)"),
]


@pytest.mark.parametrize(("name", "fields", "message"), CONDITIONS, ids=lambda value: str(value))
def test_setting_that_moe_lacks_is_named(name, fields, message):
    config = configured(name)
    if fields:  # on a plain copy, for not every value passes the configuration's own checks
        inner = config.ffn_config if name == "DbrxConfig" else config
        names = {n for n in dir(inner) if not n.startswith("_") and not callable(getattr(type(inner), n, None))}
        config = SimpleNamespace(**({n: getattr(inner, n, None) for n in names} | fields))
        if name == "DbrxConfig":
            config = SimpleNamespace(model_type="dbrx", ffn_config=config)
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_hf(config)


def test_layers_that_differ_are_told_apart_by_number():
    vision: Any = config_class("Dots3NoteVisionConfig")
    config = vision(num_hidden_layers=3, pyramid_num_routed=[0, 4, 8])
    with pytest.raises(ValueError, match="differs between layers: give layer"):
        MoEConfig.from_hf(config)
    assert [MoEConfig.from_hf(config, layer=i).num_experts for i in (1, 2)] == [4, 8]


def test_unknown_family_is_named_with_the_known():
    with pytest.raises(ValueError, match=r"does not know the block of SimpleNamespace \(model_type 'bert'\).* 'qwen3_moe'"):
        MoEConfig.from_hf(SimpleNamespace(model_type="bert"))
    with pytest.raises(ValueError, match=r"does not know the block of dict \(model_type None\)"):
        MoEConfig.from_hf({"model_type": "qwen3_moe"})


def test_no_family_is_both_known_and_refused():
    assert not FAMILIES.keys() & UNSUPPORTED.keys()


def test_text_model_of_several_towers_is_found():
    config = configured("Qwen3VLMoeTextConfig")
    outer = SimpleNamespace(model_type="qwen3_vl_moe", text_config=config)
    assert MoEConfig.from_hf(outer) == MoEConfig.from_hf(config)


def test_changes_are_set_beside_what_the_configuration_says():
    config = MoEConfig.from_hf(configured("Qwen3MoeConfig"), impl="dense", save_percent=0)
    assert (config.impl, config.save_percent, config.num_experts) == ("dense", 0, E)
    with pytest.raises(ValueError, match="impl must be one of"):
        MoEConfig.from_hf(configured("Qwen3MoeConfig"), impl="fast")


# Sharing


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in NOT_SHARED])
def test_every_tensor_is_shared_and_none_is_copied(name):
    config = configured(name)
    block = built(name, config)
    moe = MoE.from_hf(block, MoEConfig.from_hf(config, layer=0 if name == "Dots3NoteVisionConfig" else None))
    theirs = {id(p) for p in block.parameters() if p.requires_grad}
    assert {id(p) for p in moe.parameters()} == theirs, "a parameter of one is a parameter of the other, the very object"
    storages = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    assert {t.untyped_storage().data_ptr() for t in (*moe.parameters(), *moe.buffers())} == storages


@pytest.mark.parametrize(("name", "key"), NOT_SHARED.items())
def test_weights_that_cannot_be_shared_are_named(name, key):
    config = configured(name)
    with pytest.raises(ValueError, match=rf"so it cannot share them: missing .*, unexpected .*'{key}'"):
        MoE.from_hf(built(name, config), MoEConfig.from_hf(config))


@pytest.mark.parametrize("name", ["Qwen2MoeConfig", "GptOssConfig", "DeepseekV3Config", "AriaTextConfig", "JetMoeConfig"])
def test_training_one_trains_the_other(name):
    config = configured(name)
    block = built(name, config).train()
    moe = MoE.from_hf(block, MoEConfig.from_hf(config))
    assert moe.training
    x = torch.randn(2, 9, D)
    output_of(block, x).square().sum().backward()
    theirs = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    assert all(p.grad is None for p in moe.parameters())
    before = output_of(block, x).detach()
    moe(x).square().sum().backward()
    assert theirs.keys() == {n for n, p in block.named_parameters() if p.grad is not None}
    for n, p in block.named_parameters():
        if n in theirs:
            torch.testing.assert_close(p.grad, theirs[n], rtol=1e-4, atol=1e-4 * float(theirs[n].abs().max()))
    torch.optim.SGD(moe.parameters(), lr=0.01).step()
    with torch.no_grad():
        after = output_of(block, x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(moe(x), after, rtol=1e-4, atol=1e-4)


def test_selection_bias_is_shared_by_its_storage():
    block = built("Ernie4_5_MoeConfig", configured("Ernie4_5_MoeConfig"))  # [1, E], and a parameter without gradient
    moe = MoE.from_hf(block)
    assert moe.gate.e_score_correction_bias is not None
    moe.gate.e_score_correction_bias.fill_(3.0)
    assert (block.get_parameter("gate.moe_statics.e_score_correction_bias") == 3).all()


def test_configuration_is_the_modules_own_unless_given():
    config = configured("Qwen3MoeConfig")
    block = built("Qwen3MoeConfig", config)
    assert MoE.from_hf(block).config == MoEConfig.from_hf(config)
    assert MoE.from_hf(block, MoEConfig.from_hf(config, impl="dense")).config.impl == "dense"
    with pytest.raises(ValueError, match="module JetMoeMoE keeps no configuration: give config"):
        MoE.from_hf(built("JetMoeConfig", configured("JetMoeConfig")))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got dict"):
        MoE.from_hf({})


def test_configuration_that_is_not_the_modules_is_refused():
    config = configured("Qwen3MoeConfig")
    block, fits = built("Qwen3MoeConfig", config), MoEConfig.from_hf(config)
    with pytest.raises(ValueError, match=r"must have shape \(8, 34, 24\) to be experts.gate_up_proj, got \(8, 32, 24\)"):
        MoE.from_hf(block, fits.replace(intermediate_size=17))
    with pytest.raises(ValueError, match=r"missing \['gate.e_score_correction_bias'\], unexpected \[\]"):
        MoE.from_hf(block, fits.replace(selection_bias=True))
    with pytest.raises(ValueError, match=r"missing \[\], unexpected .*'shared_expert_gate.weight'"):
        MoE.from_hf(built("Qwen2MoeConfig", configured("Qwen2MoeConfig")), fits)


def test_shared_parameters_follow_a_cast_of_either():
    block = built("Qwen2MoeConfig", configured("Qwen2MoeConfig"))
    moe = MoE.from_hf(block)
    block.double()
    assert {p.dtype for p in moe.parameters()} == {torch.float64}
    x = torch.randn(3, 2, D, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), output_of(block, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "value", [[], {}, "x", "false", "1", -1, 0, 1.5, True, float("nan"), float("inf"), 10**400, b"1"], ids=repr
)
def test_fields_of_another_type_are_refused_by_name(value):
    """What JSON can hold in a field: each is refused by the field's name, or means what it says."""
    fields: dict[str, Any] = {
        "model_type": "qwen3_moe", "hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "hidden_act": "silu",
    }  # fmt: skip
    valid = MoEConfig.from_hf(SimpleNamespace(**fields))
    said = {"moe_intermediate_size": "intermediate_size", "num_experts_per_tok": "top_k", "hidden_act": "activation"}
    said |= {"num_experts": "num_(local_)?experts", "model_type": "model_type|MoEConfig does not know the block"}
    for name in fields:
        changed = SimpleNamespace(**(fields | {name: value}))
        if name == "norm_topk_prob" and value is True:
            assert MoEConfig.from_hf(changed) == valid
            continue
        with pytest.raises((ValueError, TypeError), match=f"{name}|{said.get(name, name)}"):
            MoEConfig.from_hf(changed)
    deepseek = fields | {"model_type": "glm4_moe", "n_routed_experts": 4, "n_shared_experts": None, "n_group": 1, "topk_group": 1}
    with pytest.raises((ValueError, TypeError), match="routed_scaling_factor"):
        MoEConfig.from_hf(SimpleNamespace(**deepseek, routed_scaling_factor="x" if value in (0, 1.5) else value))


def test_layers_that_a_configuration_does_not_have_are_refused():
    empty: list[Any] = [[], {}, None, 3]
    for per_layer in empty:
        with pytest.raises(ValueError, match="layer must be one of per_layer_config of SimpleNamespace"):
            MoEConfig.from_hf(SimpleNamespace(model_type="qwen3_moe", per_layer_config=per_layer), layer=7)
