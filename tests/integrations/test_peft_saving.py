"""Files of experts' adapters that PEFT and transformers write, and their refusals of this library's adapters."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers: Any = pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft")
pytest.importorskip("safetensors.torch")

from fusedonemoe import LoRAExperts, MoE, add_lora  # noqa: E402
from fusedonemoe.integrations import peft as adapters  # noqa: E402
from tests.integrations.test_peft import BOTH, assert_near, tiny  # noqa: E402
from tests.integrations.test_peft_lifecycle import (  # noqa: E402, F401
    ALONE,
    EXPERTS,
    MIXED,
    base,
    draw,
    every_family,
    loaded,
    logits,
    pair,
    without_warnings_of_others,
    wrapped,
)


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
@every_family
def test_save_pretrained_writes_what_peft_loads(family, targets, tmp_path):
    theirs, ours = pair(family=family, targets=targets, second=True)
    assert list(ours.state_dict()) == [key for key in theirs.state_dict() if "lora_dropout" not in key]
    for model, folder in ((theirs, "theirs"), (ours, "ours")):
        model.save_pretrained(tmp_path / folder)
    files = [
        {name: peft.utils.load_peft_weights(str(tmp_path / folder / name)) for name in ("", "second")}
        for folder in ("theirs", "ours")
    ]
    for name in ("", "second"):
        assert list(files[1][name]) == list(files[0][name]) and any("experts" in key for key in files[1][name])
        assert all(torch.equal(tensor, files[0][name][key]) for key, tensor in files[1][name].items())
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    assert_near(logits(again), logits(ours), "loaded by PEFT")


def test_a_state_dict_of_adapters_goes_in_and_out(tmp_path):
    _, model = pair()
    saved = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(model).items()}
    expected = logits(model)
    draw(model, seed=7)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    result = peft.set_peft_model_state_dict(model, saved)
    assert not result.unexpected_keys and torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    draw(model, seed=8)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="not a valid target"):
        model.load_adapter(tmp_path, "another")


@pytest.mark.parametrize("layout", adapters.LAYOUTS)
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m), lambda m: m.base_model, lambda m: m.get_base_model()])
def test_save_adapter_names_modules_as_the_base_model_does(wrap, layout, tmp_path):
    _, model = pair(**ALONE)
    adapters.save_adapter(wrap(model), tmp_path, layout=layout)
    again = tiny("qwen3_moe")
    assert list(adapters.load_adapter(again, tmp_path)) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    assert_near(logits(again), logits(model), "loaded")


def test_transformers_own_switches(tmp_path):
    model = tiny("qwen3_moe")
    model.add_adapter(peft.LoraConfig(**MIXED, target_parameters=BOTH))
    draw(model)
    adapters.from_peft(model)
    adapted = logits(model)
    model.disable_adapters()
    assert_near(logits(model), base(), "disabled")
    model.enable_adapters()
    assert torch.equal(logits(model), adapted) and model.active_adapters() == ["default"]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny("qwen3_moe"), tmp_path)
    assert_near(logits(again), adapted, "loaded by PEFT")
    model.delete_adapter("default")
    assert_near(logits(model), base(), "deleted")


# Compiled, copied, pickled, trained


def own(family: str = "qwen3_moe") -> Any:
    model = tiny(family)
    adapters.add_lora(model, r=2)
    return model


@pytest.mark.parametrize("make", [own, lambda: copy.deepcopy(own()), lambda: loaded(own())], ids=["itself", "copy", "pickle"])
def test_save_pretrained_of_our_adapters_is_refused_by_name(make, tmp_path):
    model = make()
    parts: tuple[Any, ...] = (model, model.model, torch.compile(model))
    for part in parts:
        with pytest.raises(RuntimeError, match=r"save them|save_adapter\(model, directory\)"):
            part.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    adapters.save_adapter(model, tmp_path / "adapter")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRAExperts):
            model.set_submodule(name, module.unload())
    model.save_pretrained(tmp_path / "model")
    assert_near(logits(type(model).from_pretrained(tmp_path / "model")), logits(model), "saved without adapters")


def test_a_loaded_adapter_is_guarded_too(tmp_path):
    adapters.save_adapter(own(), tmp_path / "adapter")
    model = tiny("qwen3_moe")
    adapters.load_adapter(model, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="save_adapter"):
        model.save_pretrained(tmp_path / "model")


CALLS: dict[str, Callable[[Any], Any]] = {
    "get_peft_model": lambda m: peft.get_peft_model(m, peft.LoraConfig(**MIXED)),
    "add_adapter": lambda m: m.add_adapter(peft.LoraConfig(**MIXED)),
    "inject": lambda m: peft.inject_adapter_in_model(peft.LoraConfig(**MIXED), m),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("core", [False, True], ids=["integration", "core"])
def test_peft_around_our_adapters_is_refused(call, core):
    if core:
        model: Any = tiny("qwen3_moe")
        for layer in model.model.layers:
            layer.mlp.experts = LoRAExperts(layer.mlp.experts, form=_form(layer.mlp.experts))
    else:
        model = own()
    with pytest.raises(RuntimeError, match=r"not PEFT's: it would neither switch nor save them"):
        call(model)


def _form(experts: nn.Module) -> Any:
    from fusedonemoe.integrations.transformers.experts import form_of

    return form_of(experts)


@pytest.mark.parametrize("call", ["enable_adapters", "set_adapter", "set_requires_grad", "delete_adapter"])
def test_each_of_pefts_calls_is_refused(call):
    experts: Any = next(
        iter(adapters.add_lora(nn.Sequential(MoE(hidden_size=8, intermediate_size=8, num_experts=2, top_k=1))).values())
    )
    with pytest.raises(RuntimeError, match=rf"PEFT's {call}\("):
        getattr(experts, call)("default")
    with pytest.raises(RuntimeError, match="get_layer_status"):
        peft.peft_model.get_layer_status(nn.Sequential(experts))
    with pytest.raises(RuntimeError, match=r"unload\(\.\.\.\)"):
        experts.unload_and_optionally_merge_module(merge=True)


def test_our_adapters_inside_pefts_are_refused_and_nothing_has_changed(tmp_path):
    adapters.save_adapter(own(), tmp_path)
    for function in (adapters.add_lora, lambda m: adapters.load_adapter(m, tmp_path), lambda m: add_lora(m)):
        model = peft.get_peft_model(nn.Sequential(MoE(hidden_size=8, intermediate_size=8, num_experts=2, top_k=1)), _LINEAR)
        flags = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(ValueError, match=r"model must have no adapters of PEFT's.*from_peft\(model\)"):
            function(model)
        assert flags == [parameter.requires_grad for parameter in model.parameters()]


_LINEAR = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
