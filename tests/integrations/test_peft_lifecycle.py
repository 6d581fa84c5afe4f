"""What PEFT and transformers do to a model's adapters, with those of its experts taken over, or with adapters of this library."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers: Any = pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft")
pytest.importorskip("safetensors.torch")

from fusedonemoe import LoRAExperts, MoE, add_lora  # noqa: E402
from fusedonemoe.integrations import peft as adapters  # noqa: E402
from tests.integrations.test_peft import BOTH, FAMILIES, IDS, assert_near, tiny  # noqa: E402

EXPERTS = "base_model.model.model.layers.1.mlp.experts"
every_family = pytest.mark.parametrize("family", FAMILIES)
# With adapters of attention too, which PEFT switches by itself: half a switch would show.
MIXED: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"]}
ALONE = MIXED | {"target_modules": []}


def draw(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)


def wrapped(family: str = "qwen3_moe", targets: list[str] = BOTH, second: bool = False, **options: Any) -> Any:
    """A PeftModel whose adapters change something."""
    config = peft.LoraConfig(**{**MIXED, **options}, target_parameters=targets)
    model = peft.get_peft_model(tiny(family), config)
    if second:
        model.add_adapter("second", peft.LoraConfig(**{**MIXED, **options, "r": 2}, target_parameters=targets))
    draw(model)
    return model


def pair(**options: Any) -> tuple[Any, Any]:
    """The same model twice: with PEFT's own arithmetic, and taken over."""
    theirs, ours = wrapped(**options), wrapped(**options)
    adapters.from_peft(ours)
    return theirs, ours


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base(family: str = "qwen3_moe") -> Tensor:
    return logits(tiny(family))


@pytest.fixture(autouse=True)
def without_warnings_of_others() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Switches


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("options", [MIXED, ALONE], ids=["mixed", "alone"])
@every_family
def test_disable_adapter_gives_the_base_model(family, options, targets):
    _, model = pair(family=family, targets=targets, **options)
    adapted = logits(model)
    assert (adapted - base(family)).abs().max() > 1e-2
    with model.disable_adapter():
        assert_near(logits(model), base(family), "disabled")
        with model.disable_adapter():
            assert_near(logits(model), base(family), "nested")
        assert_near(logits(model), base(family), "still disabled")
    assert torch.equal(logits(model), adapted)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(logits(model), adapted)


def test_disabled_experts_equal_those_that_never_had_adapters_to_the_bit():
    # Fresh adapters, whose B is zero, and none: a reference pass and the policy before its first step.
    model = peft.get_peft_model(tiny("qwen3_moe"), peft.LoraConfig(**ALONE, target_parameters=BOTH))
    adapters.from_peft(model)
    plain: Any = MoE(hidden_size=16, intermediate_size=12, num_experts=5, top_k=2)
    experts: Any = model.get_submodule(EXPERTS)
    with torch.no_grad():
        plain.experts.gate_up_proj.copy_(experts.base.gate_up_proj)
        plain.experts.down_proj.copy_(experts.base.down_proj)
    call = torch.randn(9, 16), torch.randint(5, (9, 2)), torch.rand(9, 2)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(experts(*call), plain.experts(*call))


def test_the_model_says_of_itself_what_peft_says():
    theirs, ours = pair(second=True)
    for change in (
        lambda m: None,
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.set_adapter("second"),
        lambda m: m.delete_adapter("second"),
    ):
        for model in (theirs, ours):
            change(model)
        statuses = [model.get_model_status() for model in (theirs, ours)]
        for field in ("enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "trainable_params"):
            assert getattr(statuses[1], field) == getattr(statuses[0], field), field
        assert ours.active_adapters == theirs.active_adapters
        assert len(ours.get_layer_status()) == len(theirs.get_layer_status())
        flags = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (theirs, ours)]
        assert flags[0] == flags[1]
        assert_near(logits(ours), logits(theirs), "logits")


@every_family
def test_adapters_are_chosen_by_name(family):
    theirs, ours = pair(family=family, second=True)
    seen = []
    for name in ("default", "second", "default"):
        for model in (theirs, ours):
            model.set_adapter(name)
        seen.append(logits(ours))
        assert_near(seen[-1], logits(theirs), name)
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=1e-2)
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    assert_near(logits(ours), logits(theirs), "both at once")
    assert not torch.allclose(logits(ours), seen[0], atol=1e-2)
    for model in (theirs, ours):
        model.set_adapter("second", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_an_adapter_that_the_experts_do_not_have_leaves_them_as_they_are():
    models = []
    for take in (False, True):
        model = peft.get_peft_model(tiny("qwen3_moe"), peft.LoraConfig(**MIXED, target_parameters=BOTH))
        model.add_adapter("attention", peft.LoraConfig(**MIXED))
        draw(model)
        if take:
            adapters.from_peft(model)
        model.set_adapter("attention")
        models.append(model)
    assert_near(logits(models[1]), logits(models[0]), "attention")


def test_an_adapter_can_be_named():
    _, model = pair(second=True)
    other = wrapped(second=True)
    adapters.from_peft(other, "second")
    assert not torch.allclose(logits(other), logits(model), atol=1e-2)
    with other.disable_adapter():
        assert_near(logits(other), base(), "disabled")
    other.set_adapter("second")
    model.set_adapter("second")
    assert torch.equal(logits(other), logits(model))


def test_scales_are_pefts():
    from peft.helpers import rescale_adapter_scale

    theirs, ours = pair()
    with rescale_adapter_scale(theirs, 0.3), rescale_adapter_scale(ours, 0.3):
        assert_near(logits(ours), logits(theirs), "rescaled")
    assert_near(logits(ours), logits(theirs), "restored")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scales_are_set_and_reset_as_by_peft(use_rslora):
    theirs, ours = pair(use_rslora=use_rslora, second=True)

    def each_layer(call: Callable[[Any], None]) -> None:
        for model in (theirs, ours):
            for module in model.modules():
                if hasattr(module, "unscale_layer") and hasattr(module, "lora_A"):
                    call(module)

    for call in (
        lambda layer: layer.set_scale("default", 0.5),
        lambda layer: layer.set_scale("nobody", 7.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
    ):
        each_layer(call)
        assert_near(logits(ours), logits(theirs), "scaled")


def test_rows_cannot_choose_adapters():
    _, model = pair(second=True)
    model.eval()
    with pytest.raises(ValueError, match="one choice of adapters for all rows"):
        model(input_ids=IDS, adapter_names=["default", "second"])


# Merging


@every_family
def test_merging_and_back(family):
    theirs, ours = pair(family=family)
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    adapted = logits(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    assert_near(logits(ours), logits(theirs), "merged")
    assert_near(logits(ours), adapted, "merged, against before")
    assert ours.get_model_status().merged_adapters == ["default"]
    ours.merge_adapter()  # again: a warning of PEFT's, and nothing
    assert_near(logits(ours), adapted, "merged twice")
    with pytest.raises(ValueError, match="merged"):
        ours.delete_adapter("default")
    ours.unmerge_adapter()
    ours.unmerge_adapter()
    experts = {name: tensor for name, tensor in ours.state_dict().items() if "experts" in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in experts.items())


def test_merged_adapters_are_disabled_too():
    _, model = pair()
    model.merge_adapter()
    with model.disable_adapter():
        assert_near(logits(model), base(), "disabled")


def test_adapters_that_are_merged_while_disabled_stay_disabled():
    theirs, ours = pair(second=True)
    for change in (
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.merge_adapter(["second"]),
        lambda m: m.base_model.enable_adapter_layers(),
    ):
        change(theirs)
        change(ours)
        assert_near(logits(ours), logits(theirs), "the same as PEFT")
    ours.base_model.disable_adapter_layers()
    ours.merge_adapter()
    assert_near(logits(ours), base(), "disabled")


def test_enabling_leaves_merged_adapters_merged():
    for names in (["second"], ["default", "second"], None):
        theirs, ours = pair(second=True)
        for change in (
            lambda m, names=names: m.merge_adapter(names),
            lambda m: m.base_model.enable_adapter_layers(),
            lambda m: m.unmerge_adapter(),
        ):
            change(theirs)
            change(ours)
            assert_near(logits(ours), logits(theirs), "the same as PEFT")


def test_one_of_two_is_merged_and_then_the_other():
    theirs, ours = pair(second=True)
    for names in (["second"], ["default"]):
        for model in (theirs, ours):
            model.merge_adapter(adapter_names=names)
        assert_near(logits(ours), logits(theirs), f"after {names}")
    for model in (theirs, ours):
        model.unmerge_adapter()
    assert_near(logits(ours), logits(theirs), "unmerged")


def test_safe_merge_refuses_what_is_not_finite():
    _, model = pair()
    experts: Any = model.get_submodule(EXPERTS)
    with torch.no_grad():
        experts.lora_B["default"].weight[0, 0] = torch.inf
    before = experts.base.down_proj.detach().clone()
    with pytest.raises(ValueError, match="must be finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(experts.base.down_proj, before)


@pytest.mark.parametrize("merged_before", [False, True])
@every_family
def test_merge_and_unload_and_unload(family, merged_before):
    theirs, ours = pair(family=family)
    if merged_before:
        ours.merge_adapter()
    merged = ours.merge_and_unload()
    assert type(merged) is type(tiny(family)) and merged.state_dict().keys() == tiny(family).state_dict().keys()
    assert_near(logits(merged), logits(theirs.merge_and_unload()), "merged")
    _, again = pair(family=family)
    plain = again.unload()
    assert_near(logits(plain), base(family), "unloaded")
    assert not any(isinstance(module, LoRAExperts) for module in plain.modules())


# Adding, deleting, saving, loading


def test_an_adapter_is_deleted():
    theirs, ours = pair(second=True)
    for model in (theirs, ours):
        model.delete_adapter("default")
    assert ours.active_adapters == theirs.active_adapters == ["second"]
    assert_near(logits(ours), logits(theirs), "the second is left")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    model = ours.base_model.model
    ours.delete_adapter("second")
    assert_near(logits(model), base(), "none is left")  # a PeftModel without any adapter raises in its own forward
    with pytest.raises(ValueError, match="must hold modules of LoRAExperts inside"):
        adapters.adapter_state_dict(model)


def test_adding_one_to_experts_is_refused_and_one_to_attention_is_not():
    _, model = pair()
    expected = logits(model)
    with pytest.raises(ValueError, match="not a valid target"):
        model.add_adapter("second", peft.LoraConfig(**ALONE, target_parameters=BOTH))
    assert "second" not in model.peft_config
    model.add_adapter("attention", peft.LoraConfig(**MIXED))
    assert torch.equal(logits(model), expected)
    assert all(p.requires_grad == ("default" in n) for n, p in model.named_parameters() if "lora_" in n)


def loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, loaded], ids=["deepcopy", "torch.save"])
def test_copies_have_switches_of_their_own(again: Callable[[nn.Module], Any]):
    _, model = pair()
    adapted, twin = logits(model), again(model)
    with twin.disable_adapter():
        assert_near(logits(twin), base(), "disabled")
        assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(twin), adapted)
    assert list(peft.get_peft_model_state_dict(twin)) == list(peft.get_peft_model_state_dict(model))


def test_compiled_experts_follow_every_switch():
    _, model = pair(**ALONE, second=True)
    experts: Any = model.get_submodule(EXPERTS)
    call = torch.randn(9, 16), torch.randint(5, (9, 2)), torch.rand(9, 2)
    compiled, seen = torch.compile(experts, backend="eager", fullgraph=True), []

    def look() -> None:
        with torch.no_grad():
            seen.append(experts(*call))
            torch.testing.assert_close(compiled(*call), seen[-1])

    look()
    with model.disable_adapter():
        look()
    model.set_adapter("second")
    look()
    model.merge_adapter()
    look()
    model.unmerge_adapter()
    look()
    model.delete_adapter("default")
    look()
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2])))


def test_a_model_of_compiled_blocks_is_disabled():
    _, model = pair(**ALONE)
    adapted = logits(model)
    for layer in model.get_base_model().model.layers:
        layer.mlp.compile(backend="eager", fullgraph=True)
    assert_near(logits(model), adapted, "enabled")
    with model.disable_adapter():
        assert_near(logits(model), base(), "disabled")
    assert_near(logits(model), adapted, "enabled again")


def test_compiled_adapters_of_ours_follow_a_merge():
    # torch.compile guards on the length of a dict, and not on bool(dict) or not dict: adapters may not be added twice.
    moe = MoE(hidden_size=8, intermediate_size=8, num_experts=2, top_k=1)
    experts = add_lora(moe, r=2)["experts"]
    nn.init.normal_(experts.factors("down")[1])
    x, compiled = torch.randn(5, 8), torch.compile(moe, backend="eager", fullgraph=True)
    expected = compiled(x)
    experts.merge()
    torch.testing.assert_close(compiled(x), expected)
    experts.unmerge()
    assert torch.equal(compiled(x), expected)


def test_training_goes_on_with_the_same_parameters():
    theirs, ours = wrapped(), wrapped()
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (theirs, ours)
    ]  # made before
    adapters.from_peft(ours)
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=name)
    experts: Any = ours.get_submodule(EXPERTS)
    experts.reset_parameters()
    assert not experts.down_lora_B.any() and experts.gate_up_lora_A.any()


# Adapters of this library's own, which PEFT does not know
