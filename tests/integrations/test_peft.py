"""Adapters between this library, PEFT and vLLM's layout, on tiny transformers models: values, gradients, files, messages."""

import json
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

from fusedonemoe import LoRAExperts, MoE  # noqa: E402
from fusedonemoe.integrations import peft as adapters  # noqa: E402
from fusedonemoe.integrations.transformers.experts import form_of  # noqa: E402

E, D, F_ = 5, 16, 12
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": F_, "intermediate_size": 24, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": E, "intermediate_size": F_, "layer_types": ["full_attention"] * 2},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_layout = pytest.mark.parametrize("layout", adapters.LAYOUTS)
IDS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3))
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny(family: str) -> Any:
    """The same float32 model each time."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name or "experts" in name:  # some are left as they were found, or at zero
            nn.init.normal_(parameter, std=0.3)
    return model


def with_peft(family: str, targets: list[str] = BOTH, **options: Any) -> Any:
    """The model under PEFT, with B drawn too: an adapter that changes something."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **options}, target_modules=[], target_parameters=targets)
    model = peft.get_peft_model(tiny(family), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter that requires one."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    logits = model(input_ids=IDS).logits
    dy = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad(logits, list(wanted.values()), dy) if wanted else ()
    return logits.detach(), dict(zip(wanted, grads, strict=True))


def assert_near(actual: Tensor, expected: Tensor, name: str) -> None:
    """To the rounding of a deep float32 model; zeros would not do."""
    size = expected.abs().max()
    assert size > 0, f"{name}: nothing to compare with"
    assert actual.shape == expected.shape and (actual - expected).abs().max() <= 2e-5 * size, name


# Against PEFT's own path


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("rank", [1, 3, 4])
@every_family
def test_logits_and_every_gradient_are_pefts(family, rank, targets):
    theirs = with_peft(family, targets, r=rank)
    expected, gradients = run(theirs)
    assert len(gradients) == 2 * 2 * len(targets)
    found = adapters.from_peft(theirs)
    assert len(found) == 2 and all(isinstance(module, LoRAExperts) for module in found.values())
    logits, ours = run(theirs)
    assert_near(logits, expected, "logits")
    assert ours.keys() == gradients.keys()  # the parameters stay PEFT's
    for key, gradient in ours.items():
        assert_near(gradient, gradients[key], key)
    for name, module in found.items():
        wrapped = name + ".base_layer" * (len(targets) - 1)
        for target in module.targets:
            for letter, matrix in zip("AB", adapters.join_factors(*module.factors(target)), strict=True):
                assert torch.equal(matrix, theirs.get_parameter(f"{wrapped}.lora_{letter}.default.weight"))
            wrapped = wrapped.removesuffix(".base_layer")
    assert not any(p.requires_grad for n, p in theirs.named_parameters() if "lora" not in n)


@every_family
def test_the_experts_index_is_slow_in_A_and_fast_in_B(family):
    # By PEFT's own sum of weights, expert by expert: shapes alone would let the indices change places.
    model = with_peft(family, r=E)
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    for layer in (wrapper, wrapper.base_layer):
        delta = layer.get_delta_weight("default")
        A, B = adapters.split_factors(layer.lora_A["default"].weight, layer.lora_B["default"].weight, E)
        ours = layer.scaling["default"] * B @ A
        transposed = layer.get_base_layer().is_transposed
        assert transposed == (family == "gpt_oss")
        torch.testing.assert_close(ours.transpose(1, 2) if transposed else ours, delta)


def test_factors_split_and_join():
    lora_A, lora_B = torch.randn(4 * 3, 6), torch.randn(10, 3 * 4)
    A, B = adapters.split_factors(lora_A, lora_B, 4)
    assert A.data_ptr() == lora_A.data_ptr() and B.data_ptr() == lora_B.data_ptr()
    assert all(map(torch.equal, adapters.join_factors(A, B), (lora_A, lora_B)))
    with pytest.raises(ValueError, match=r"lora_A must have shape \[5 \* r, in\], got \(12, 6\)"):
        adapters.split_factors(lora_A, lora_B, 5)
    with pytest.raises(ValueError, match=r"lora_B must have shape \[out, 12\] to fit lora_A, got \(12, 10\)"):
        adapters.split_factors(lora_A, lora_B.t(), 4)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"rank_pattern": {"layers.1.mlp.experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}}],
)
def test_a_saved_peft_adapter_loads(options, tmp_path):
    theirs = with_peft("qwen3_moe", **options)
    expected, _ = run(theirs)
    theirs.save_pretrained(tmp_path)
    model = tiny("qwen3_moe")
    found = adapters.load_adapter(model, tmp_path)
    assert_near(run(model)[0], expected, "logits")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if "rank_pattern" in options:
        assert [m.r for m in found.values()] == [{"gate_up": 4, "down": 4}, {"gate_up": 4, "down": 2}]
        assert [m.alpha for m in found.values()] == [{"gate_up": 5, "down": 12}] * 2
    # The tensor file alone wants the configuration, and a state dict of the whole PeftModel has an adapter's name in its keys.
    again = tiny("qwen3_moe")
    adapters.load_adapter(again, tmp_path / "adapter_model.safetensors", config=theirs.peft_config["default"])
    assert torch.equal(run(again)[0], run(model)[0])
    whole = {key: value for key, value in theirs.state_dict().items() if "lora_" in key}
    assert any(".default.weight" in key for key in whole)
    third = tiny("qwen3_moe")
    adapters.load_adapter(third, whole, config=theirs.peft_config["default"].to_dict(), trainable=True)
    assert torch.equal(run(third)[0], run(model)[0]) and len(run(third)[1]) == 8


def trained(family: str, **options: Any) -> nn.Module:
    model = tiny(family)
    torch.manual_seed(2)
    for module in adapters.add_lora(model, **{"r": 4, "alpha": 12, **options}).values():
        for target in module.targets:
            nn.init.normal_(module.factors(target)[1], std=0.2)
    return model


FORMS = [
    {},
    {"targets": ("gate_up",)},
    {"targets": ("down",)},
    {"r": 3, "use_rslora": True},
    {"rank_pattern": {"layers.0.mlp.experts.down_proj": 2}, "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 1.5}},
]


@pytest.mark.parametrize("options", FORMS, ids=str)
@every_family
def test_peft_loads_what_is_saved_here(family, options, tmp_path):
    model = trained(family, **options)
    expected, _ = run(model)
    assert (expected - run(tiny(family))[0]).abs().max() > 1e-2, "the adapters must matter"
    adapters.save_adapter(model, tmp_path, base_model="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path)
    assert_near(run(theirs)[0], expected, "logits")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize("options", FORMS, ids=str)
@every_layout
@every_family
def test_every_layout_comes_back(family, layout, options, tmp_path):
    model = trained(family, **options)
    adapters.save_adapter(model, tmp_path, layout=layout)
    again = tiny(family)
    adapters.load_adapter(again, tmp_path)
    assert torch.equal(run(again)[0], run(model)[0])
    for (name, ours), (_, theirs) in zip(
        adapters.adapter_state_dict(model, layout=layout).items(),
        adapters.adapter_state_dict(again, layout=layout).items(),
        strict=True,
    ):
        assert torch.equal(ours, theirs), name


# vLLM's layout


@every_family
def test_vllm_layout_is_a_matrix_per_expert_of_plain_linear_layers(family):
    # What vLLM adds to expert e's gate_proj [F, D] is scale * B A of its keys; together they are the merged weights.
    model = trained(family)
    tensors = adapters.adapter_state_dict(model, layout="vllm")
    config = adapters.adapter_config(model, layout="vllm")
    scale = config["lora_alpha"] / config["r"]
    assert len(tensors) == 2 * E * 3 * 2 and all(t.dim() == 2 and t.is_contiguous() for t in tensors.values())
    name, e = "model.layers.1.mlp.experts", 3
    module: Any = model.get_submodule(name)

    def delta(proj: str) -> Tensor:
        key = f"base_model.model.{name}.{e}.{proj}.lora_"
        return scale * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]

    merged, base = module.merged_weights(), module.base
    up_delta, down_delta = (merged[n][e] - getattr(base, n)[e] for n in ("gate_up_proj", "down_proj"))
    if family == "gpt_oss":
        up_delta, down_delta = up_delta.t(), down_delta.t()
        gate, up = up_delta[0::2], up_delta[1::2]
    else:
        gate, up = up_delta.chunk(2)
    for proj, expected in {"gate_proj": gate, "up_proj": up, "down_proj": down_delta}.items():
        assert_near(delta(proj), expected, proj)


@every_family
def test_gate_and_up_with_factors_of_their_own_load_at_twice_the_rank(family):
    name, r = "model.layers.0.mlp.experts", 2
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for e in range(E):
        for proj, out, inner in (("gate_proj", F_, D), ("up_proj", F_, D), ("down_proj", D, F_)):
            for letter, shape in (("A", (r, inner)), ("B", (out, r))):
                tensors[f"base_model.model.{name}.{e}.{proj}.lora_{letter}.weight"] = torch.randn(shape, generator=generator)
    model = tiny(family)
    config = {"r": r, "lora_alpha": 3, "alpha_pattern": {"up_proj": 5}}
    (module,) = adapters.load_adapter(model, tensors, config=config).values()
    assert module.r == {"gate_up": 2 * r, "down": r}
    merged = module.merged_weights()
    form = form_of(module.base)
    assert form is not None
    for e in range(E):

        def delta(proj, alpha, e=e):
            key = f"base_model.model.{name}.{e}.{proj}.lora_"
            return alpha / r * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]

        halves = delta("gate_proj", 3), delta("up_proj", 5)
        up = torch.stack(halves, 1).flatten(0, 1) if form.gate_up_layout == "interleaved" else torch.cat(halves)
        for n, expected in (("gate_up_proj", up), ("down_proj", delta("down_proj", 3))):
            got = merged[n][e] - getattr(module.base, n)[e]
            torch.testing.assert_close(got.t() if form.transposed else got, expected, rtol=1e-4, atol=1e-5)


def test_mixtral_names_and_our_own_experts():
    moe = nn.Sequential(MoE(hidden_size=D, intermediate_size=F_, num_experts=E, top_k=2))
    tensors = {}
    for e in range(E):
        for proj, out, inner in (("w1", F_, D), ("w3", F_, D), ("w2", D, F_)):
            tensors[f"0.experts.{e}.{proj}.lora_A.weight"] = torch.randn(2, inner)
            tensors[f"0.experts.{e}.{proj}.lora_B.weight"] = torch.randn(out, 2)
    (module,) = adapters.load_adapter(moe, tensors, config={"r": 2, "lora_alpha": 2}).values()
    x, base = torch.randn(6, D), cast(Any, module.base)
    y = moe(x)
    gate_up, down = [], []
    for e in range(E):
        w1, w3, w2 = (
            tensors[f"0.experts.{e}.{p}.lora_B.weight"] @ tensors[f"0.experts.{e}.{p}.lora_A.weight"] for p in ("w1", "w3", "w2")
        )
        gate_up.append(base.gate_up_proj[e] + torch.cat((w1, w3)))
        down.append(base.down_proj[e] + w2)
    moe[0].experts = module.unload(merge=False)
    with torch.no_grad():
        base.gate_up_proj.copy_(torch.stack(gate_up))
        base.down_proj.copy_(torch.stack(down))
    torch.testing.assert_close(moe(x), y, rtol=1e-4, atol=1e-4)


# Other adapters of the same model, and what is refused


def test_adapters_of_attention_stay_with_peft():
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], target_parameters=BOTH)
    model = peft.get_peft_model(tiny("qwen3_moe"), config)
    expected, gradients = run(model)
    adapters.from_peft(model)
    logits, ours = run(model)
    assert_near(logits, expected, "logits")
    attention = [name for name in gradients if "q_proj" in name and "lora_B" in name]
    assert len(attention) == 2
    for name in attention:
        assert_near(ours[name], gradients[name], name)


def saved(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = trained("qwen3_moe", **options)
    return adapters.adapter_state_dict(model), adapters.adapter_config(model)


PREFIX = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(f"{PREFIX}.lora_A.weight"), r"experts must have both lora_A and lora_B, got \['B'\]"),
        (lambda t, c: [t.pop(f"{PREFIX}.lora_{x}.weight") for x in "AB"], r"want \[.*\], got those at depths \[1\]"),
        (lambda t, c: [t.pop(k) for k in list(t) if "layers.0" in k], r"target_parameters name \['model.layers.0.mlp.experts'\]"),
        (
            lambda t, c: t.update(
                {"model.q_proj.lora_A.weight": torch.ones(1, 1), "model.q_proj.lora_B.weight": torch.ones(1, 1)}
            ),
            "must hold adapters of experts alone",
        ),
        (lambda t, c: t.update({"model.norm.weight": torch.ones(1)}), r"experts alone, got \['model.norm.weight'\] of 1 others"),
        (lambda t, c: t.update({f"{PREFIX}.lora_A.other.weight": torch.ones(1, 1)}), "must hold one adapter, got"),
        (lambda t, c: t.clear(), "source must hold adapters of experts of this model"),
        (lambda t, c: c.update(r=3), r"must have rank 3 by the config, got 4"),
        (lambda t, c: c.update(use_dora=True), r"config asks for \['use_dora'\]"),
        (lambda t, c: c.pop("lora_alpha"), r"config must say \['lora_alpha'\]"),
        (lambda t, c: t.update({f"{PREFIX}.lora_A.weight": torch.ones(7, F_)}), r"lora_A must have shape \[5 \* r, in\]"),
        (
            lambda t, c: t.update({f"{PREFIX}.lora_A.weight": torch.ones(20, D)}),
            r"A of .*down_proj must have shape \(5, 4, 12\), got \(5, 4, 16\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays_as_it_was(change, message):
    tensors, config = saved()
    change(tensors, config)
    model = tiny("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        adapters.load_adapter(model, tensors, config=config)
    assert not any(isinstance(module, LoRAExperts) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_keys_are_left_alone_where_that_is_asked_for():
    tensors, config = saved()
    tensors["model.norm.weight"] = torch.ones(1)
    model = tiny("qwen3_moe")
    assert len(adapters.load_adapter(model, tensors, config=config, strict=False)) == 2


def test_a_missing_configuration_or_expert_or_projection_is_refused():
    model = trained("qwen3_moe")
    tensors, config = adapters.adapter_state_dict(model, layout="vllm"), adapters.adapter_config(model, layout="vllm")
    with pytest.raises(ValueError, match="config must be given beside a state dict"):
        adapters.load_adapter(tiny("qwen3_moe"), tensors)
    with pytest.raises(TypeError, match="config must be a mapping or a LoraConfig, got str"):
        adapters.load_adapter(tiny("qwen3_moe"), tensors, config="r=8")
    fewer = {key: t for key, t in tensors.items() if ".3.down_proj" not in key}
    with pytest.raises(ValueError, match=r"must have down_proj of the experts 0 to 4, got those of \[0, 1, 2, 4\]"):
        adapters.load_adapter(tiny("qwen3_moe"), fewer, config=config)
    halves = {key: t for key, t in tensors.items() if ".gate_proj" not in key}
    with pytest.raises(ValueError, match="adapters of both gate_proj and up_proj, or of neither"):
        adapters.load_adapter(tiny("qwen3_moe"), halves, config=config)
    with pytest.raises(ValueError, match="model must have no adapters yet"):
        adapters.load_adapter(model, tensors, config=config)


def test_models_without_adapters_or_experts_are_refused():
    for function in (adapters.adapter_state_dict, adapters.adapter_config):
        with pytest.raises(ValueError, match="model must hold modules of LoRAExperts inside"):
            function(tiny("qwen3_moe"))
        with pytest.raises(ValueError, match="layout must be one of"):
            function(tiny("qwen3_moe"), layout="tgi")
    with pytest.raises(ValueError, match="model must hold experts that can be adapted"):
        adapters.add_lora(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must hold adapters of experts"):
        adapters.from_peft(tiny("qwen3_moe"))
    merged = with_peft("qwen3_moe")
    merged.merge_adapter()
    with pytest.raises(ValueError, match="must not be merged"):
        adapters.from_peft(merged)
    with pytest.raises(ValueError, match=r"adapter must be one of \['default'\], got 'other'"):
        adapters.from_peft(with_peft("qwen3_moe"), "other")


def test_a_gate_of_its_own_that_the_operators_have_is_read_by_what_it_computes():
    experts = tiny("qwen3_moe").model.layers[1].mlp.experts

    def clamped(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
        return (up + 1) * gate * torch.sigmoid(self.swiglu_alpha * gate)

    experts.__class__ = type("Clamped", (type(experts),), {"_apply_gate": clamped, "swiglu_limit": 5.0, "swiglu_alpha": 1.5})
    form = form_of(experts)
    assert form is not None
    assert (form.activation, form.gate_up_layout, form.swiglu_alpha, form.swiglu_limit) == ("swiglu_oai", "gate_up", 1.5, 5.0)
    experts._apply_gate = lambda gate_up: gate_up  # replaced on the instance: whatever it computes, a constant cannot tell
    with pytest.raises(ValueError, match="Clamped has a gate of its own"):
        form_of(experts)


def test_experts_that_cannot_be_computed_are_refused_by_name():
    model = tiny("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    experts.act_fn = nn.Mish()
    with pytest.raises(ValueError, match="Qwen3MoeExperts has the activation Mish, which the operators do not"):
        adapters.add_lora(model)
    type(experts)  # the class stays as it is: a subclass gets the gate of its own
    experts.__class__ = type("Gated", (type(experts),), {"_apply_gate": lambda self, gate_up: gate_up})
    with pytest.raises(ValueError, match="Gated has a gate of its own"):
        adapters.add_lora(model)
