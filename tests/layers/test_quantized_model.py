"""The module of quantised experts, quantising a model in place, and tensors of torchao."""

import copy
import io
from typing import Any

import pytest
import torch

from fusedonemoe import Experts, MoE, MoEConfig, QuantizedExperts, explain, explanation, quantize_
from fusedonemoe import functional as F
from fusedonemoe.ops import triton

FORMS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4", "group_size": 32},
    "int4 with zero points": {"dtype": "int4", "group_size": 32, "symmetric": False},
}
every_form = pytest.mark.parametrize("form", FORMS)


def relative_rms(difference, of):
    return float(difference.detach().double().norm() / of.detach().double().norm())


def config(**changes):
    return MoEConfig(**{"hidden_size": 64, "intermediate_size": 32, "num_experts": 6, "top_k": 2, "bias": True, **changes})


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(MoE(config(**changes)) for _ in range(2)))


@every_form
def test_quantize_replaces_experts_in_place_and_says_what_that_cost(form):
    moe, x = model(), torch.randn(3, 5, 64)
    before = copy.deepcopy(moe)
    report = quantize_(moe, **FORMS[form], inputs=x)
    assert all(isinstance(part.experts, QuantizedExperts) for part in moe)
    assert [layer.name for layer in report.layers] == ["0.experts", "1.experts"] and "1.experts" in str(report)
    for part, old, layer in zip(moe, before, report.layers, strict=True):
        up, down = part.experts.quantized_weights()
        exact = old.experts.gate_up_proj.double()
        assert layer.up_error == pytest.approx(relative_rms(F.dequantize_weight(up, torch.float64) - exact, exact))
        exact = old.experts.down_proj.double()
        assert layer.down_error == pytest.approx(relative_rms(F.dequantize_weight(down, torch.float64) - exact, exact))
        assert layer.bytes_after == part.experts.nbytes and layer.bytes_before == 4 * 6 * 3 * 64 * 32
    # Of the first layer, whose input is the model's own: the error of its experts' outputs, 15 tokens being fewer than 16.
    exact, actual = before[0].double()(x.double()), moe[0](x)
    assert report.layers[0].output_error == pytest.approx(relative_rms(actual - exact, exact), rel=1e-3)
    assert 0 < report.layers[0].output_error < (0.02 if form == "int8" else 0.3)


@pytest.mark.parametrize(
    "changes",
    [{"gated": False}, {"top_k": None}, {"transposed": True}, {"activation": "swiglu_oai", "gate_up_layout": "interleaved"}],
)
def test_quantize_without_inputs_takes_random_tokens(changes):
    moe = MoE(config(bias=False, **changes))
    report = quantize_(moe, "int4", group_size=32)
    assert 0 < report.layers[0].output_error < 0.5 and moe(torch.randn(4, 64)).shape == (4, 64)


def test_a_module_that_stands_in_two_places_is_quantised_once():
    shared = Experts(config())
    holder = torch.nn.ModuleDict({"a": shared, "b": shared})
    report = quantize_(holder)
    assert holder["a"] is holder["b"] and isinstance(holder["a"], QuantizedExperts) and len(report.layers) == 1


@every_form
def test_a_state_dict_goes_through_safetensors(form, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    first, second = model(), model()
    quantize_(first, **FORMS[form])
    safetensors.save_file(first.state_dict(), tmp_path / "model.safetensors")
    for part in second:
        part.experts = QuantizedExperts(part.config, **FORMS[form])
    second.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    x = torch.randn(5, 64)
    assert torch.equal(first(x), second(x))
    names = set(second[0].experts.state_dict())
    parts = ["", "_scale", "_bias"] + ["_zero_point"] * (form == "int4 with zero points")
    assert names == {f"{name}{part}" for name in ("gate_up_proj", "down_proj") for part in parts}


@every_form
def test_moving_and_casting_leaves_the_weights_as_they_are(form):
    moe = model()
    quantize_(moe, **FORMS[form])
    before = {name: tensor.clone() for name, tensor in moe[0].experts.state_dict().items()}
    for cast in (moe.bfloat16, moe.half, lambda: moe.to("cpu", torch.bfloat16), moe.float):
        cast()
        for name, tensor in moe[0].experts.state_dict().items():
            if "bias" not in name:
                assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name
    moe.bfloat16()
    assert moe[0].experts.down_proj_bias.dtype == torch.bfloat16
    assert moe(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    on_meta = moe.to("meta")[0].experts
    assert on_meta.gate_up_proj_scale.device.type == "meta" and on_meta.gate_up_proj_scale.dtype == torch.float32


def test_copies_and_pickles_compute_the_same():
    moe, x = model(), torch.randn(4, 64)
    quantize_(moe, "int4", group_size=32)
    file = io.BytesIO()
    torch.save(moe, file)
    file.seek(0)
    for other in (copy.deepcopy(moe), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), moe(x))


@pytest.mark.parametrize("save_percent", [0, 100])
def test_what_stands_before_quantised_experts_is_trained_through_them(save_percent):
    # As adapters are: gradients pass through two blocks whose experts are frozen and quantised.
    moe, x = model(save_percent=save_percent), torch.randn(40, 64)
    quantize_(moe, "int8")
    first = torch.nn.Linear(64, 64)
    compiled = torch.compile(lambda x: moe(first(x)), fullgraph=True, backend="aot_eager")
    for call in (lambda x: moe(first(x)), compiled):
        first.zero_grad()
        call(x).square().mean().backward()
        assert first.weight.grad is not None and first.weight.grad.abs().sum() > 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
        assert not any(buffer.requires_grad for buffer in moe.buffers())


def test_transposed_weights_are_turned_round():
    straight, turned = (MoE(config(transposed=transposed)) for transposed in (False, True))
    turned.load_state_dict(
        {name: t.transpose(1, 2) if name.endswith("_proj") else t for name, t in straight.state_dict().items()}
    )
    quantize_(straight)
    quantize_(turned)
    x = torch.randn(4, 64)
    assert torch.equal(turned(x), straight(x))


def test_explain_knows_quantised_experts():
    moe = MoE(config(bias=False))
    quantize_(moe)
    explanation = explain(moe, tokens=1)
    assert explanation.impl in ("cpu", "grouped")
    reasons = {candidate.impl: str(candidate.refusal) for candidate in explanation.candidates}
    assert reasons["triton"] == str(triton.refusal(torch.float32, "cpu")) and "no portable form" in reasons["portable"]
    assert explanation.candidates[0].work.weight_bytes == moe.experts.nbytes  # dense, which reads all


def test_explain_names_the_gpu_kernels(monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", True)
    monkeypatch.setattr(explanation, "architecture", lambda device: "sm90")
    moe = MoE(config(bias=False))
    quantize_(moe)
    told = explain(moe, tokens=1, dtype=torch.bfloat16, device="cuda")
    assert (told.impl, told.configuration) == ("triton", "")  # the tiles of plain weights are not those that run


def test_there_is_nothing_to_pack():
    moe, x = model(), torch.randn(4, 64)
    quantize_(moe)
    expected = moe(x)
    moe[0].prepack()
    assert torch.equal(moe(x), expected)
    moe[0].unpack()


def test_nothing_is_replaced_where_something_cannot_be():
    moe = model()
    with torch.no_grad():
        moe[1].experts.down_proj[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="down_proj must be finite to be quantised"):
        quantize_(moe)
    assert all(isinstance(part.experts, Experts) for part in moe)


# torchao


@pytest.fixture
def int8_tensor():
    return pytest.importorskip("torchao.quantization").Int8Tensor


def quantised_by_torchao(moe: Any, int8_tensor: Any, **options: Any) -> Any:
    granularity = pytest.importorskip("torchao.quantization.granularity").PerRow()
    for name in ("gate_up_proj", "down_proj"):
        made = int8_tensor.from_hp(getattr(moe.experts, name).detach(), granularity=granularity, **options)
        setattr(moe.experts, name, torch.nn.Parameter(made, requires_grad=False))
    return moe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_tensors_of_torchao_are_unwrapped_as_they_are(int8_tensor, dtype):
    moe = quantised_by_torchao(MoE(config(bias=False), dtype=dtype), int8_tensor)
    wide, x = copy.deepcopy(moe), torch.randn(9, 64, dtype=dtype)
    held: Any = moe.experts.gate_up_proj
    for name in ("gate_up_proj", "down_proj"):
        setattr(wide.experts, name, torch.nn.Parameter(getattr(wide.experts, name).dequantize()))
    report = quantize_(moe, inputs=x)
    up, _ = moe.experts.quantized_weights()
    assert torch.equal(up.values, held.qdata) and torch.equal(up.scale, held.scale.squeeze(-1).float())
    assert report.layers[0].up_error == report.layers[0].down_error == 0
    budget = 1e-5 if dtype == torch.float32 else 0.02
    assert report.layers[0].output_error < budget and relative_rms(moe(x) - wide(x), wide(x)) < budget


def test_what_torchao_holds_otherwise_is_refused(int8_tensor):
    moe = quantised_by_torchao(MoE(config(bias=False)), int8_tensor)
    with pytest.raises(
        ValueError, match="dtype must be 'int8' for gate_up_proj, which is torchao's Int8Tensor already, got 'int4'"
    ):
        quantize_(moe, "int4", group_size=32)
    moe.experts.down_proj.zero_point = torch.ones(6, 64, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="down_proj must be quantised symmetrically"):
        quantize_(moe)
    moe.experts.down_proj.zero_point = None
    moe.experts.down_proj.scale = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match=r"down_proj must have one scale per output, of shape \(6, 64, 1\), got \(1, 1, 1\)"):
        quantize_(moe)
    assert isinstance(moe.experts, Experts)


def test_another_class_of_tensors_is_refused():
    class Mine(torch.Tensor):
        pass

    moe = MoE(config())
    moe.experts.down_proj = torch.nn.Parameter(moe.experts.down_proj.detach().as_subclass(Mine))
    with pytest.raises(TypeError, match=r"down_proj must be a plain tensor or torchao's Int8Tensor, got .*Mine"):
        quantize_(moe)
