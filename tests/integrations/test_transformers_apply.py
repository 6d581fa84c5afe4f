"""enable, apply and their undoing: the registry, the report, routers proven before they are replaced, and other models."""

import copy
import subprocess
import sys
import types
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import moe as hf_moe

from fusedonemoe.functional import routing
from fusedonemoe.integrations.transformers import Report, apply, disable, enable, routers, unapply
from fusedonemoe.integrations.transformers.routers import find_router
from tests.integrations.transformers_families import build, experts_of, small_config, tiny_of

IDS = torch.arange(18).view(2, 9) + 3


@pytest.fixture(autouse=True)
def left_as_found(monkeypatch):
    monkeypatch.setattr(routers, "FEWEST_LOGITS", 0)  # route here at every size
    yield
    disable()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def test_enable_and_disable():
    disable()  # a test before it in this process may have left it enabled
    with pytest.raises(ValueError, match="fusedonemoe"):
        build("qwen3_moe").set_experts_implementation("fusedonemoe")
    enable()
    enable()  # again is harmless
    model = build("qwen3_moe")
    expected = logits(model)
    model.set_experts_implementation("fusedonemoe")
    assert model.get_experts_implementation() == {"": "fusedonemoe"}
    torch.testing.assert_close(logits(model), expected)
    disable()
    assert "fusedonemoe" not in hf_moe.ALL_EXPERTS_FUNCTIONS
    with pytest.raises(KeyError, match="fusedonemoe"):
        logits(model)


def test_from_pretrained_takes_the_name(tmp_path, monkeypatch):
    build("qwen3_moe").save_pretrained(tmp_path)
    enable()
    called = []

    def run_layer(x, *_):
        called.append(1)
        return x

    monkeypatch.setattr("fusedonemoe.integrations.transformers.experts.run_layer", run_layer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fusedonemoe")
    logits(model)
    assert len(called) == 2


def test_every_copy_of_the_registry_is_entered(monkeypatch):
    # transformers' lazy imports can leave two modules; a class asks the copy of its own decorator.
    class Other(hf_moe.ExpertsInterface):
        _global_mapping: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    other = Other()

    def decorator(cls: type, *, experts_interface: Any = other) -> type:
        return cls

    twin = types.ModuleType("twin.integrations.moe")
    twin.__dict__.update(vars(hf_moe) | {"use_experts_implementation": decorator})
    monkeypatch.setitem(sys.modules, twin.__name__, twin)
    enable()
    assert Other._global_mapping == {"fusedonemoe": hf_moe.ALL_EXPERTS_FUNCTIONS["fusedonemoe"]}
    disable()
    assert Other._global_mapping == {}


def test_report_and_undoing():
    model = build("qwen3_moe")
    before, expected = model.get_experts_implementation(), logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = apply(model)
    assert (report.total, report.used, report.routers_fused) == (2, 2, 2)
    assert str(report).splitlines() == [
        "2 of 2 MoE layers use fusedonemoe.",
        "  2 x Qwen3MoeExperts: silu, fused; router: softmax, top 3, fused",
    ]
    assert report.layers[1].name == "model.layers.1.mlp.experts"
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(model), expected)
    assert str(apply(model)) == str(report)  # again: the same, and one undoing is enough
    unapply(model)
    assert model.get_experts_implementation() == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(logits(model), expected)
    unapply(model)


def test_disable_undoes_what_apply_did():
    model = build("mixtral")
    expected = logits(model)
    apply(model)
    disable()
    assert torch.equal(logits(model), expected)


def test_experts_alone():
    model = build("qwen3_moe")
    report = apply(model, routers=False)
    assert (report.used, report.routers_fused) == (2, 0)
    assert report.layers[0].router == "its own, as asked"
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_copy_of_an_applied_model_has_its_own_parameters():
    model = build("qwen3_moe")
    apply(model)
    expected = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(twin), expected)


def test_an_applied_model_pickles(tmp_path):
    model = build("qwen3_moe")
    apply(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(logits(again), logits(model))
    assert apply(again).used == 2


# Models that have experts and no registry to ask, and what shows where they are.
IGNORING: dict[str, tuple[int, dict[str, Any]]] = {
    "dbrx": (
        2,
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0},
        },
    ),
    "doge": (2, {"is_moe": True, "num_experts": 16}),
    "jetmoe": (4, {"kv_channels": 8, "num_key_value_heads": 2}),  # two of them mixtures of attention heads
    "llama4": (2, {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 1}),
    "longcat_flash": (2, {"num_layers": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 24, "zero_expert_num": 2}),
    "nllb_moe": (
        2,
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
        },
    ),
    "step3p7": (1, {"mlp_layer_types": ["dense", "sparse"]}),
    "switch_transformers": (
        2,
        {
            "d_model": 32,
            "d_ff": 32,
            "d_kv": 8,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
    ),
    "vitpose_backbone": (2, {"num_experts": 4, "part_features": 8}),
}


@pytest.mark.parametrize("family", IGNORING)
def test_models_that_ignore_the_registry_are_reported(family):
    layers, fields = IGNORING[family]
    model = tiny_of(family, **fields)
    report = apply(model)
    assert (report.used, report.total) == (0, layers), report
    assert f"0 of {layers} MoE layers" in str(report) and "do not ask transformers' registry" in str(report)
    names = dict(model.named_modules())
    assert all(layer.name in names for layer in report.layers)


def test_a_dense_model_has_nothing_to_replace():
    config = small_config(transformers.LlamaConfig)
    assert str(apply(transformers.LlamaForCausalLM(config))).startswith("0 MoE layers found")
    assert apply(nn.Linear(2, 2)) == Report(())


@pytest.mark.parametrize(("tokens", "routed_here"), [(3, False), (5, True)])
def test_few_tokens_on_cpu_are_routed_by_the_routers_own_forward(tokens, routed_here, monkeypatch):
    monkeypatch.setattr(routers, "FEWEST_LOGITS", 4 * 8)
    model: Any = build("qwen3_moe")
    apply(model)
    called, real = [], routing.route_by

    def route(*args, **named):
        called.append(1)
        return real(*args, **named)

    monkeypatch.setattr(routers, "route_by", route)
    model.model.layers[0].mlp.gate(torch.randn(tokens, 32))
    assert bool(called) == routed_here


def test_apply_wants_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        apply("qwen")


def test_quantised_experts_are_reported():
    model = build("qwen3_moe")
    experts: Any = experts_of(model)["model.layers.0.mlp.experts"]
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)
    report = apply(model)
    assert report.used == 1
    assert "model.layers.0.mlp.experts (Qwen3MoeExperts): its gate_up_proj is quantised (torch.int8)" in str(report)


@pytest.mark.parametrize("change", ["input noise", "other weights", "replaced"])
def test_a_router_that_does_something_else_keeps_its_forward(change):
    model = build("qwen3_moe")
    block: Any = model.model.layers[0].mlp
    own = type(block.gate).forward
    if change == "replaced":
        block.gate.forward = types.MethodType(own, block.gate)
    else:

        class Changed(type(block.gate)):  # type: ignore[misc]
            def forward(self, x):
                first, weights, ids = own(self, x + 0.1 * torch.randn_like(x) if change == "input noise" and self.training else x)
                return first, weights if change == "input noise" else weights.sqrt(), ids

        block.gate.__class__ = Changed
    before = block.gate.forward
    why = {"input noise": "no plain product", "other weights": "none of this library's rules", "replaced": "replaced already"}
    report = apply(model)
    assert report.used == 2 and report.routers_fused == 1
    assert why[change] in report.layers[0].router
    assert block.gate.forward == before


def test_a_selection_bias_of_zeros_is_still_seen():
    # As it is before training; a plan that left it out would be found wrong only later.
    model = build("deepseek_v3")
    block: Any = model.model.layers[1].mlp
    assert not block.gate.e_score_correction_bias.any()
    plan: Any = find_router(block, block.experts)[1]
    rule = plan.rule
    assert (plan.bias, rule.n_group, rule.topk_group, rule.group_score) == ("buffer", 2, 1, "top2_sum")
    block.gate.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.4, 8))
    expected = logits(model)
    apply(model)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize(("family", "norm_eps"), [("lfm2_moe", 1e-6), ("deepseek_v3", 1e-20)])
def test_the_constant_in_the_normalisation_is_found(family, norm_eps):
    model = build(family)
    report = apply(model)
    assert report.routers_fused == report.used > 0
    (rule,) = {vars(module)[routers._PLAN].rule for module in model.modules() if routers.is_fused(module)}
    assert (rule.scoring, rule.norm_topk_prob, rule.norm_eps) == ("sigmoid", True, norm_eps)


def test_without_transformers_the_message_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None\nfrom fusedonemoe.integrations.transformers import enable\nenable()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.stderr.strip().splitlines()[-1] == (
        "ImportError: fusedonemoe.integrations.transformers needs transformers 5 or newer, which has the registry of experts "
        "functions: pip install 'fusedonemoe[hf]'"
    )


def test_importing_the_library_imports_no_transformers():
    code = "import sys, fusedonemoe, fusedonemoe.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
