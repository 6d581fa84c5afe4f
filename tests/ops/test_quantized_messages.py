"""What quantised layers say of arguments that do not fit."""

import pytest
import torch

from fusedonemoe import Experts, MoE, MoEConfig, QuantizedExperts, add_lora, quantize_
from fusedonemoe import functional as F
from fusedonemoe.integrations.checkpoints import to_state_dict
from fusedonemoe.testing import make_mlp_inputs


def quantized(inputs, **form):
    return tuple(F.quantize_weight(w, **form) for w in (inputs.up_proj, inputs.down_proj))


def config(**changes):
    return MoEConfig(**{"hidden_size": 64, "intermediate_size": 32, "num_experts": 6, "top_k": 2, **changes})


def model():
    return torch.nn.Sequential(MoE(config()), MoE(config()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": "int3"}, ValueError, r"dtype must be one of \('int8', 'int4'\), got 'int3'"),
        ({"weight": torch.ones(3, 4)}, ValueError, r"weight must have 3 dimensions \[E, O, I\], got shape \(3, 4\)"),
        (
            {"weight": torch.ones(1, 1, 32, dtype=torch.int8)},
            TypeError,
            "weight must be float64, float32, bfloat16 or float16, got",
        ),
        (
            {"weight": torch.full((1, 1, 32), torch.inf)},
            ValueError,
            "weight must be finite to be quantised, got infinities or NaNs",
        ),
        ({"dtype": "int4", "group_size": 48}, ValueError, r"group_size must be one of \(32, 64, 128\), got 48"),
        (
            {"dtype": "int4"},
            ValueError,
            "weight must have rows of a multiple of group_size=128 inputs for int4, got 32; int8 takes any",
        ),
        (
            {"dtype": "int4", "weight": torch.ones(1, 1, 33), "group_size": 32},
            ValueError,
            "of a multiple of group_size=32 inputs",
        ),
    ],
)
def test_what_cannot_be_quantised_says_why(change, error, message):
    with pytest.raises(error, match=message):
        F.quantize_weight(**{"weight": torch.ones(1, 1, 32), **change})


def _wrong(name, **parts):
    return lambda given: {name: given[name]._replace(**{part: make(given[name]) for part, make in parts.items()})}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda given: {"gate_up_proj": torch.ones(3, 64, 32)},
            TypeError,
            "gate_up_proj must be a QuantizedWeight, as F.quantize_weight",
        ),
        (
            _wrong("down_proj", values=lambda w: w.values.int()),
            TypeError,
            "down_proj.values must be int8, or uint8 .* got torch.int32",
        ),
        (
            _wrong("gate_up_proj", values=lambda w: w.values[0]),
            ValueError,
            r"gate_up_proj.values must have 3 dimensions \[E, O, I / 2\]",
        ),
        (
            _wrong("gate_up_proj", scale=lambda w: w.scale.half()),
            TypeError,
            "gate_up_proj.scale must be float32, got torch.float16",
        ),
        (
            _wrong("gate_up_proj", scale=lambda w: w.scale[..., :0]),
            ValueError,
            r"gate_up_proj.scale must have shape \(3, 64, 1\), got \(3, 64, 0\)",
        ),
        (_wrong("down_proj", zero_point=lambda w: w.scale), TypeError, "down_proj.zero_point must be uint8, got torch.float32"),
        (
            _wrong("down_proj", zero_point=lambda w: w.values[:1]),
            ValueError,
            r"down_proj.zero_point must have shape \(3, 32, 1\)",
        ),
        (
            lambda given: {"down_proj": F.quantize_weight(torch.ones(3, 32, 32))},
            ValueError,
            "down_proj must have the bits and the group size",
        ),
        (
            lambda given: {"down_proj": F.quantize_weight(torch.ones(3, 32, 64), "int4", group_size=32)},
            ValueError,
            r"of shape \(3, 32, 32\)",
        ),
        (lambda given: {"x": torch.ones(2, 31)}, ValueError, r"x must have shape \[..., 32\] to fit gate_up_proj, got \(2, 31\)"),
        (
            lambda given: {"impl": "portable"},
            ValueError,
            "impl='portable' cannot run here: quantised weights have no portable form",
        ),
        (
            lambda given: {"impl": "triton", "x": given["x"].double()},
            ValueError,
            "impl='triton' cannot run here: (the Triton kernels have no float64|triton is not installed)",
        ),
        (lambda given: {"activation": "swiglu_oai", "gated": False}, ValueError, "'swiglu_oai' is gated by definition"),
        (lambda given: {"gate_up_bias": torch.ones(3, 63)}, ValueError, r"gate_up_bias must have shape \(3, 64\)"),
        (lambda given: {"down_bias": torch.ones(3, 32).half()}, TypeError, "down_bias must have the dtype of x"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    inputs = make_mlp_inputs(2, 32, 32, 3, 2)
    up, down = quantized(inputs, dtype="int4", group_size=32)
    given = {"x": inputs.x, "experts": inputs.experts, "weights": inputs.weights, "gate_up_proj": up, "down_proj": down}
    with pytest.raises(error, match=message):
        F.experts_mlp_quantized(**{**given, **change(given)})


def test_int8_has_a_scale_per_output_and_no_zero_points():
    inputs = make_mlp_inputs(2, 8, 8, 3, 2)
    up, down = quantized(inputs)
    for wrong, message in (
        (up._replace(scale=up.scale[:, :1]), r"gate_up_proj.scale must have shape \(3, 16\), got \(3, 1\)"),
        (up._replace(zero_point=up.values), "gate_up_proj.zero_point must be None beside int8 values"),
    ):
        with pytest.raises(ValueError, match=message):
            F.experts_mlp_quantized(inputs.x, inputs.experts, inputs.weights, wrong, down)


def adapted():
    moe = model()
    add_lora(moe, r=2)
    return moe


def exchanged():
    moe = model()
    moe[1].experts.exchange = lambda module, x, experts, weights: x
    return moe


def test_checkpoints_of_plain_layouts_refuse_quantised_experts():
    moe = MoE(config())
    quantize_(moe)
    with pytest.raises(TypeError, match=r"experts must be Experts, with the plain weights .* got QuantizedExperts"):
        to_state_dict(moe, "torchtitan")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_(Experts(config())), TypeError, "model must hold Experts, not be one, to have them replaced in place"),
        (
            lambda: quantize_(torch.nn.Linear(3, 3)),
            ValueError,
            "model must hold Experts to quantise; there are none in this Linear",
        ),
        (lambda: quantize_(torch.ones(3)), TypeError, "model must be a torch.nn.Module, got Tensor"),
        (lambda: quantize_(model(), "fp8"), ValueError, "dtype must be one of"),
        (
            lambda: quantize_(model(), "int4", group_size=128),
            ValueError,
            "gate_up_proj must have rows of a multiple of group_size=128",
        ),
        (
            lambda: QuantizedExperts(config(hidden_size=65), "int4", group_size=32),
            ValueError,
            "multiple of group_size=32 inputs .* got 65",
        ),
        (lambda: quantize_(adapted()), ValueError, "0.experts must not be adapters, which read plain weights: merge"),
        (lambda: quantize_(exchanged()), ValueError, "experts must all be held by this process to be quantised"),
        (lambda: QuantizedExperts(config(), "int2"), ValueError, "dtype must be one of"),
        (lambda: QuantizedExperts.from_experts(model()), TypeError, "experts must be an Experts module, got Sequential"),
    ],
)
def test_what_cannot_be_replaced_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
