"""Damaged files of adapters: each loads the same values or is refused by name, and the model is left as it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fusedonemoe import LoRAExperts, MoE
from fusedonemoe.integrations.peft import adapter_config, adapter_state_dict, add_lora, load_adapter, save_adapter
from fusedonemoe.ops.cpu.native import refusal
from tests.integrations.test_checkpoints_hostile import JSON_VALUES, RAW

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(MoE(hidden_size=16, intermediate_size=8, num_experts=3, top_k=2))


@pytest.fixture(params=["peft", "vllm"])
def saved(request, tmp_path) -> Path:
    adapted = model()
    for module in add_lora(adapted, r=2).values():
        for target in module.targets:
            for factor in module.factors(target):
                nn.init.normal_(factor)
    save_adapter(adapted, tmp_path, layout=request.param)
    return tmp_path


def attempt(folder: Path, *, named: bool = True) -> bool:
    """Return whether the adapter loads; if not, the model has no adapter and is trained as before."""
    into = model()
    refusal: Exception | None = None
    try:
        load_adapter(into, folder)
    except (ValueError, TypeError, OSError) as error:
        refusal = error
    if refusal is None:
        return True
    assert type(refusal) in (ValueError, TypeError) or isinstance(refusal, OSError), repr(refusal)
    assert not named or str(folder) in str(refusal), repr(refusal)
    assert not any(isinstance(module, LoRAExperts) for module in into.modules())
    assert all(parameter.requires_grad for parameter in into.parameters())
    return False


def test_configurations_of_other_bytes_and_values(saved):
    valid = json.loads((saved / CONFIG).read_text())
    assert attempt(saved)
    for content in RAW.values():
        (saved / CONFIG).write_bytes(content)
        assert not attempt(saved)
    for value in JSON_VALUES:
        (saved / CONFIG).write_text(json.dumps(value))
        assert not attempt(saved)
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_parameters", "use_rslora"):
            (saved / CONFIG).write_text(json.dumps(valid | {field: value}))
            attempt(saved, named=False)  # a rank that does not fit is said with the module's name
    for pattern in ({"(": 2}, {"down": "2"}, {"down": -1}, {"down": 1.5}, {"down": True}, [["down", 2]]):
        (saved / CONFIG).write_text(json.dumps(valid | {"rank_pattern": pattern}))
        assert not attempt(saved)


def test_tensor_files_that_end_early_and_other_paths(saved):
    blob = (saved / TENSORS).read_bytes()
    for length in {*range(0, len(blob), 97), 1, 8, len(blob) - 1}:
        (saved / TENSORS).write_bytes(blob[:length])
        assert not attempt(saved)
    (saved / TENSORS).unlink()
    assert not attempt(saved)
    os.mkfifo(saved / TENSORS)
    assert not attempt(saved)
    (saved / TENSORS).unlink()
    (saved / TENSORS).mkdir()
    assert not attempt(saved)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_factors_of_other_dtypes_are_refused(saved, dtype):
    tensors = load_file(saved / TENSORS)
    for key, tensor in tensors.items():
        save_file(tensors | {key: tensor.to(dtype)}, saved / TENSORS)
        with pytest.raises(TypeError, match=f"{key} must be float64, float32, bfloat16 or float16, got {dtype}"):
            load_adapter(model(), saved)


@pytest.mark.parametrize("number", ["01", "+1", "\uff11", "999999999", "9" * 5000])
def test_experts_have_one_number(saved, number):
    tensors = load_file(saved / TENSORS)
    if not any(".1." in key for key in tensors):
        pytest.skip("PEFT's layout has no experts' numbers")
    save_file({key.replace("experts.1.", f"experts.{number}."): value for key, value in tensors.items()}, saved / TENSORS)
    assert not attempt(saved, named=False)
    save_file(
        tensors | {key.replace("experts.1.", "experts.01."): value.clone() for key, value in tensors.items()}, saved / TENSORS
    )
    assert not attempt(saved, named=False)


def test_a_call_that_raises_has_changed_nothing():
    """Gradients stay required, packed weights packed and modules in place, whichever step of the call raises."""
    source = model()
    add_lora(source, r=2)
    tensors, config = adapter_state_dict(source), adapter_config(source)
    last = list(tensors)[-1]
    wrong: Any = "float32"
    calls: list[tuple[Callable[[Any], object], type[Exception], str]] = [
        (lambda m: load_adapter(m, tensors, config=config, dtype=torch.int8), TypeError, "dtype must be float64"),
        (
            lambda m: load_adapter(m, tensors, config=config, dtype=wrong),
            TypeError,
            "dtype must be a torch.dtype",
        ),
        (lambda m: load_adapter(m, tensors, config=config, trainable=wrong), TypeError, "trainable must be a bool"),
        (lambda m: load_adapter(m, {f"{k}x": v for k, v in tensors.items()}, config=config), ValueError, "must"),
        (lambda m: load_adapter(m, {**tensors, last: tensors[last][:, :1]}, config=config), ValueError, "must"),
        (lambda m: load_adapter(m, tensors, config={**config, "lora_alpha": float("nan")}), ValueError, "lora_alpha"),
        (lambda m: add_lora(m, r=2, dtype=torch.int8), TypeError, "dtype must be float64"),
        (lambda m: add_lora(m, r=10**18), RuntimeError, "(?i)memory|overflow|size|alloc"),
        (lambda m: LoRAExperts(m[0].experts, r=10**18), RuntimeError, "(?i)memory|overflow|size|alloc"),
    ]
    for packed in (False, True):
        for call, error, text in calls:
            changed: Any = model()
            if packed and refusal(torch.float32, True) is None:
                changed[0].experts.prepack()
            before = [(name, type(module)) for name, module in changed.named_modules()]
            size = changed[0].experts.packed_bytes
            with pytest.raises(error, match=text):
                call(changed)
            assert [(name, type(module)) for name, module in changed.named_modules()] == before
            assert all(parameter.requires_grad for parameter in changed.parameters())
            assert changed[0].experts.packed_bytes == size
