"""MoEConfig: every check and its message; and the parameters that a configuration leads to: names, shapes, first values."""

import dataclasses
import io
import math
import pickle
from typing import Any

import pytest
import torch

from fusedonemoe import Experts, FusedOneMoE, MoE, MoEConfig, TopKRouter

SIZES = {"hidden_size": 8, "intermediate_size": 6, "num_experts": 8, "top_k": 2}
MODULES: dict[str, Any] = {
    "moe": lambda **kw: MoE(**SIZES, bias=True, selection_bias=True, shared_intermediate_size=5, shared_gate=True, **kw),
    "fused_one_moe": lambda **kw: FusedOneMoE(8, 6, 5, is_sparse=True, topk=2, bias=True, **kw),
    "router": lambda **kw: TopKRouter(8, 5, 2, bias=True, selection_bias=True, **kw),
    "experts": lambda **kw: Experts(MoEConfig(**SIZES, bias=True), **kw),
}

INVALID = [
    ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ({"intermediate_size": -3}, ValueError, "intermediate_size must be at least 1, got -3"),
    ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
    ({"n_group": 0}, ValueError, "n_group must divide the number of experts (8), got 0"),
    ({"topk_group": 0}, ValueError, "topk_group must be from 1 to n_group (1), got 0"),
    ({"hidden_size": 8.0}, TypeError, "hidden_size must be an integer, got 8.0"),
    ({"num_experts": "8"}, TypeError, "num_experts must be an integer, got '8'"),
    ({"num_experts": True}, TypeError, "num_experts must be an integer, got True"),
    ({"intermediate_size": None}, TypeError, "intermediate_size must be an integer, got None"),
    ({"top_k": 0}, ValueError, "top_k must be from 1 to 8, the experts that can be picked, or None, got 0"),
    ({"top_k": -1}, ValueError, "top_k must be from 1 to 8, the experts that can be picked, or None, got -1"),
    ({"top_k": 2.0}, TypeError, "top_k must be an integer, got 2.0"),
    ({"top_k": True}, TypeError, "top_k must be an integer, got True"),
    ({"top_k": 9}, ValueError, "top_k must be from 1 to 8, the experts that can be picked, or None, got 9"),
    (
        {"top_k": 5, "n_group": 4, "topk_group": 2},
        ValueError,
        "top_k must be from 1 to 4, the experts that can be picked, or None, got 5",
    ),
    ({"n_group": 3}, ValueError, "n_group must divide the number of experts (8), got 3"),
    ({"n_group": 2, "topk_group": 3}, ValueError, "topk_group must be from 1 to n_group (2), got 3"),
    (
        {"top_k": None, "n_group": 2},
        ValueError,
        "top_k=None selects every expert: n_group must be 1, and there can be no selection bias",
    ),
    (
        {"top_k": None, "selection_bias": True},
        ValueError,
        "top_k=None selects every expert: n_group must be 1, and there can be no selection bias",
    ),
    (
        {"activation": "swish"},
        ValueError,
        "activation must be one of ('silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', 'sigmoid', 'identity', 'swiglu_oai'), "
        "got 'swish'",
    ),
    (
        {"gate_up_layout": "up"},
        ValueError,
        "gate_up_layout must be one of ('gate_up', 'up_gate', 'interleaved'), got 'up'",
    ),
    ({"scoring": "relu"}, ValueError, "scoring must be one of ('softmax', 'sigmoid'), got 'relu'"),
    ({"group_score": "sum"}, ValueError, "group_score must be one of ('top2_sum', 'max'), got 'sum'"),
    ({"scoring": "sigmoid", "norm_eps": -1e-6}, ValueError, "norm_eps must be positive and finite, got -1e-06"),
    ({"norm_eps": None}, TypeError, "norm_eps must be a number, got None"),
    ({"norm_eps": 1e-6}, ValueError, "norm_eps applies only to scoring='sigmoid', got 1e-06 with scoring='softmax'"),
    ({"impl": "fast"}, ValueError, "impl must be one of ('auto', 'dense', 'grouped', 'cpu', 'triton', 'portable'), got 'fast'"),
    ({"activation": "swiglu_oai", "gated": False}, ValueError, "activation 'swiglu_oai' is gated by definition, got gated=False"),
    ({"gated": "no"}, TypeError, "gated must be a bool, got 'no'"),
    ({"transposed": None}, TypeError, "transposed must be a bool, got None"),
    ({"output_bias": "yes"}, TypeError, "output_bias must be a bool, got 'yes'"),
    ({"selection_bias": 1}, TypeError, "selection_bias must be a bool, got 1"),
    ({"routed_scaling_factor": "2"}, TypeError, "routed_scaling_factor must be a number, got '2'"),
    ({"routed_scaling_factor": 0.0}, ValueError, "routed_scaling_factor must be positive and finite, got 0.0"),
    ({"swiglu_limit": -7.0}, ValueError, "swiglu_limit must be positive and finite, got -7.0"),
    ({"swiglu_alpha": math.nan}, ValueError, "swiglu_alpha must be positive and finite, got nan"),
    ({"save_percent": -1}, ValueError, "save_percent must be at least 0, got -1"),
    ({"save_percent": 101}, ValueError, "save_percent must be an integer from 0 to 100, got 101"),
    ({"save_percent": 50.0}, TypeError, "save_percent must be an integer, got 50.0"),
    ({"shared_intermediate_size": 0}, ValueError, "shared_intermediate_size must be at least 1, got 0"),
    ({"shared_intermediate_size": 1.5}, TypeError, "shared_intermediate_size must be an integer, got 1.5"),
    ({"shared_gate": True}, ValueError, "shared_gate needs a shared branch: set shared_intermediate_size"),
]


@pytest.mark.parametrize(("change", "error", "message"), INVALID, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_invalid_value_is_refused_naming_field_expectation_and_value(change, error, message):
    with pytest.raises(error) as caught:
        MoEConfig(**(SIZES | change))
    assert str(caught.value) == message
    with pytest.raises(error) as caught:
        MoEConfig(**SIZES).replace(**change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "edge",
    [
        {"hidden_size": 1, "intermediate_size": 1, "num_experts": 1, "top_k": 1},
        {"top_k": 8},
        {"top_k": None},
        {"top_k": 4, "n_group": 4, "topk_group": 2},
        {"n_group": 8, "topk_group": 8},
        {"save_percent": 0},
        {"save_percent": 100},
        {"shared_intermediate_size": 1, "shared_gate": True},
    ],
    ids=str,
)
def test_value_at_the_edge_of_its_range_is_accepted(edge):
    config = MoEConfig(**(SIZES | edge))
    assert {name: getattr(config, name) for name in edge} == edge


def test_fields_are_keyword_only_and_known():
    with pytest.raises(TypeError, match="positional"):
        MoEConfig(8, *SIZES.values())  # type: ignore[call-arg]  # the error under test
    with pytest.raises(TypeError, match="num_expert"):
        MoEConfig(**(SIZES | {"num_expert": 3}))
    with pytest.raises(TypeError, match="top_k"):  # no default: whoever wants every expert says None
        MoEConfig(**{name: SIZES[name] for name in SIZES if name != "top_k"})


def test_config_is_frozen():
    config: Any = MoEConfig(**SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.top_k


def test_replace_copies_and_leaves_the_original():
    config = MoEConfig(**SIZES)
    other = config.replace(top_k=3, bias=True)
    assert (config.top_k, config.bias) == (2, False)
    assert (other.top_k, other.bias, other.hidden_size) == (3, True, 8)
    assert config.replace() == config


def test_equal_configs_are_equal_keys():
    a, b = MoEConfig(**SIZES), MoEConfig(**SIZES)
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert a != a.replace(impl="dense")


def test_pickle_and_asdict_restore_an_equal_config():
    config = MoEConfig(**SIZES, shared_intermediate_size=5, shared_gate=True, activation="gelu")
    assert pickle.loads(pickle.dumps(config)) == config
    assert MoEConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(("gated", "rows"), [(True, 12), (False, 6)])
def test_up_rows(gated, rows):
    assert MoEConfig(**SIZES, gated=gated).up_rows == rows


@pytest.mark.parametrize(("top_k", "per_token"), [(2, 2), (None, 8)])
def test_experts_per_token_counts_none_as_every_expert(top_k, per_token):
    assert MoEConfig(**(SIZES | {"top_k": top_k})).experts_per_token == per_token


def test_module_takes_a_config_or_its_fields():
    config = MoEConfig(**SIZES, bias=True)
    assert MoE(config).config is config
    assert MoE(**SIZES, bias=True).config == config


def test_module_refuses_config_and_fields_together():
    with pytest.raises(TypeError, match=r"give either config or its fields, got both: \['bias', 'top_k'\]"):
        MoE(MoEConfig(**SIZES), top_k=3, bias=True)


@pytest.mark.parametrize("wrong", [8, SIZES, "auto"], ids=str)
def test_module_refuses_a_config_of_another_type(wrong):
    with pytest.raises(TypeError, match=f"config must be a MoEConfig, got {type(wrong).__name__}; give sizes by keyword"):
        MoE(wrong)


def test_module_passes_the_fields_through_validation():
    with pytest.raises(ValueError, match="top_k must be from 1 to 8"):
        MoE(**(SIZES | {"top_k": 9}))
    with pytest.raises(TypeError, match="missing"):
        MoE(hidden_size=8)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"intermediate_size": 2.5}, TypeError, "intermediate_size must be an integer, got 2.5"),
        ({"is_sparse": True, "topk": 5}, ValueError, "top_k must be from 1 to 4, the experts that can be picked, or None, got 5"),
        (
            {"impl": "fast"},
            ValueError,
            "impl must be one of ('auto', 'dense', 'grouped', 'cpu', 'triton', 'portable'), got 'fast'",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_fused_one_moe_checks_its_sizes(fields, error, message):
    with pytest.raises(error) as caught:
        FusedOneMoE(**({"hidden_size": 8, "intermediate_size": 6, "groups": 4} | fields))
    assert str(caught.value) == message


# Names and shapes


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({}, {"experts.gate_up_proj": (8, 12, 8)}),
        ({"gated": False}, {"experts.up_proj": (8, 6, 8)}),
        (
            {"bias": True},
            {
                "experts.gate_up_proj": (8, 12, 8),
                "experts.gate_up_proj_bias": (8, 12),
                "experts.down_proj_bias": (8, 8),
            },
        ),
        (
            {"bias": True, "gated": False, "router_bias": True},
            {
                "gate.bias": (8,),
                "experts.up_proj": (8, 6, 8),
                "experts.up_proj_bias": (8, 6),
                "experts.down_proj_bias": (8, 8),
            },
        ),
        (
            {"transposed": True, "output_bias": True},
            {"experts.gate_up_proj": (8, 8, 12), "experts.down_proj": (8, 6, 8), "output_bias": (8,)},
        ),
        (
            {"gated": False, "shared_intermediate_size": 5},
            {
                "experts.up_proj": (8, 6, 8),
                "shared_expert.up_proj.weight": (5, 8),
                "shared_expert.down_proj.weight": (8, 5),
            },
        ),
        (
            {"selection_bias": True, "shared_intermediate_size": 5, "shared_gate": True},
            {
                "gate.e_score_correction_bias": (8,),
                "experts.gate_up_proj": (8, 12, 8),
                "shared_expert.gate_proj.weight": (5, 8),
                "shared_expert.up_proj.weight": (5, 8),
                "shared_expert.down_proj.weight": (8, 5),
                "shared_expert_gate.weight": (1, 8),
            },
        ),
    ],
    ids=str,
)
def test_state_dict_keys_and_shapes_of_moe(fields, shapes):
    always = {"gate.weight": (8, 8), "experts.down_proj": (8, 8, 6)}
    assert {name: tuple(t.shape) for name, t in MoE(**SIZES, **fields).state_dict().items()} == always | shapes


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_keys_and_shapes_of_fused_one_moe(bias):
    shapes = {"gate.weight": (5, 8), "proj": (5, 8, 6), "down": (6, 8)}
    biases = {"up_bias": (6,), "down_bias": (8,)} if bias else {}
    assert {n: tuple(t.shape) for n, t in FusedOneMoE(8, 6, 5, bias=bias).state_dict().items()} == shapes | biases


def test_selection_bias_is_a_buffer_and_the_rest_are_parameters():
    moe = MoE(**SIZES, selection_bias=True)
    assert [name for name, _ in moe.named_buffers()] == ["gate.e_score_correction_bias"]
    assert set(dict(moe.named_parameters())) | {"gate.e_score_correction_bias"} == set(moe.state_dict())


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip_through_a_file(name):
    source, target = MODULES[name](), MODULES[name]()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    result = target.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))


# First values, dtype, device


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_that_of_every_parameter(name, dtype):
    module = MODULES[name](dtype=dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert {b.dtype for b in module.buffers()} <= {torch.float32}, "the selection bias is float32 whatever the model is"


@pytest.mark.parametrize("name", ["moe", "router"])
def test_selection_bias_is_float32_under_another_default_dtype(name):
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
    try:
        module = MODULES[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert [b.dtype for b in module.buffers()] == [torch.float32]


@pytest.mark.parametrize("name", MODULES)
def test_meta_device_then_to_empty_then_reset_parameters(name):
    module = MODULES[name](device="meta")
    assert all(t.is_meta for t in module.state_dict().values())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))  # what to_empty may leave behind
    for part in module.modules():
        getattr(part, "reset_parameters", lambda: None)()
    assert not [name for name, tensor in module.state_dict().items() if tensor.isnan().any()]
    fresh = MODULES[name]()
    assert {n: (t.shape, t.dtype) for n, t in module.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in fresh.state_dict().items()
    }


@pytest.mark.parametrize("name", ["moe", "fused_one_moe"])
def test_reset_parameters_of_the_block_redraws_all_of_it(name):
    module = MODULES[name]()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))
    module.reset_parameters()
    assert not [name for name, tensor in module.state_dict().items() if tensor.isnan().any()]


def test_weights_start_uniform_by_fan_in():
    sizes = {"hidden_size": 64, "intermediate_size": 36, "num_experts": 32, "top_k": 2}
    moe: Any = MoE(**sizes, bias=True, router_bias=True, selection_bias=True)
    one: Any = FusedOneMoE(64, 36, 32, bias=True)
    fan_in = {
        moe.gate.weight: 64,
        moe.gate.bias: 64,
        moe.experts.gate_up_proj: 64,
        moe.experts.gate_up_proj_bias: 64,
        moe.experts.down_proj: 36,
        moe.experts.down_proj_bias: 36,
        one.gate.weight: 64,
        one.proj: 64,
        one.down: 36,
        one.up_bias: 64,
        one.down_bias: 36,
    }
    for parameter, fan in fan_in.items():
        bound = 1 / math.sqrt(fan)
        assert parameter.abs().max() <= bound
        if parameter.numel() > 1000:
            assert parameter.abs().max() > 0.99 * bound
            assert float(parameter.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert abs(float(parameter.detach().mean())) < 0.1 * bound
        assert parameter.unique().numel() > 0.9 * parameter.numel(), "experts start different from each other"
    assert torch.equal(moe.gate.e_score_correction_bias, torch.zeros(32))
