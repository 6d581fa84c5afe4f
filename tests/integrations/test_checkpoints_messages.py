"""Which block and which layout are meant, and strictness: every refusal, with its message."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fusedonemoe import Experts, FusedOneMoE, MoE
from fusedonemoe.integrations.checkpoints import LAYOUTS, list_blocks, load_experts, to_state_dict
from fusedonemoe.ops.cpu import native
from tests.integrations import checkpoint_layouts
from tests.integrations.checkpoint_layouts import AMBIGUOUS, below, loaded, make, same

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
WRITABLE = [name for name, layout in LAYOUTS.items() if layout.writable]
SIZES = [(3, 5, 4), (2, 6, 6), (1, 1, 1), (4, 8, 4), (2, 4, 8)]  # square, and D = 2F, F = 2D, where other shapes collide


@pytest.fixture
def two_layers() -> dict[str, Tensor]:
    return checkpoint_layouts.two_layers()


# Which block, which layout


def test_one_of_several_blocks_has_to_be_named(two_layers):
    with pytest.raises(ValueError, match=r"prefix must name one block .*\['model.layers.0.mlp', 'model.layers.1.mlp'\]"):
        load_experts(two_layers)
    with pytest.raises(ValueError, match="layer 7 names no block of experts, the checkpoint has"):
        load_experts(two_layers, layer=7)
    with pytest.raises(ValueError, match=r"prefix 'model.layers.0' names no block"):
        load_experts(two_layers, prefix="model.layers.0")
    with pytest.raises(ValueError, match="either prefix or layer"):
        load_experts(two_layers, prefix="model.layers.0.mlp", layer=0)
    by_layer, by_prefix = loaded(two_layers, "hf", layer=1), loaded(two_layers, "hf", prefix="model.layers.1.mlp.")
    assert same(to_state_dict(by_layer), to_state_dict(by_prefix))


def test_layer_number_of_two_towers_has_to_be_told_apart(two_layers):
    both = two_layers | below("vision", {n: t for n, t in two_layers.items() if ".mlp." in n})
    with pytest.raises(ValueError, match=r"layer 0 must name one block .*'vision.model.layers.0.mlp'"):
        load_experts(both, layer=0)


def test_unknown_names_are_shown():
    with pytest.raises(ValueError, match=r"no experts of any known layout .* begin with \['a.b'\]"):
        load_experts({"a.b": torch.zeros(2)})
    with pytest.raises(ValueError, match="no experts of layout 'mixtral'"):
        load_experts(make("hf", 2, 3, 4), "mixtral")
    with pytest.raises(ValueError, match="layout must be one of"):
        load_experts({}, "megatron")


def test_gpt_oss_and_the_privacy_filter_cannot_be_told_apart_by_their_tensors(tmp_path):
    state = make("gpt_oss", 3, 6, 4)
    with pytest.raises(ValueError, match=r"ambiguous: .* fit \['gpt_oss', 'hf_transposed'\], which mean different things"):
        load_experts(state)
    one, other = load_experts(state, "gpt_oss"), load_experts(state, "hf_transposed")
    assert one.gate_up_layout == "interleaved" and other.gate_up_layout == "gate_up"
    save_file(state, tmp_path / "model.safetensors")
    for model_type, layout in (("gpt_oss", "gpt_oss"), ("openai_privacy_filter", "hf_transposed")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert [b.layout for b in list_blocks(tmp_path)] == [layout]


@pytest.mark.parametrize(("E", "D", "F_"), SIZES)
@pytest.mark.parametrize("layout", [name for name in WRITABLE if name not in AMBIGUOUS])
def test_auto_finds_the_layout_at_every_shape(layout, E, D, F_):
    assert [b.layout for b in list_blocks(make(layout, E, D, F_))] == [layout]


def test_flat_layout_needs_to_know_how_many_experts():
    state = {name: t for name, t in make("megablocks", 3, 4, 2).items() if "router" not in name}
    with pytest.raises(ValueError, match="give num_experts"):
        load_experts(state)
    weights = loaded(state, "megablocks", num_experts=3)
    assert weights.gate_up_proj.shape == (3, 2, 4)
    with pytest.raises(ValueError, match=r"no block of experts fits: .*is not 4 experts' up"):
        load_experts(state, num_experts=4)
    with pytest.raises(ValueError, match=r"num_experts must be 3, as encoder.layers.1.mlp has it, got 2"):
        load_experts(make("megablocks", 3, 4, 2), num_experts=2)


def test_granites_shared_branch_is_no_block_of_experts():
    state = make("granite", 2, 4, 3) | {
        "model.layers.1.shared_mlp.input_linear.weight": torch.randn(6, 4),
        "model.layers.1.shared_mlp.output_linear.weight": torch.randn(4, 3),
    }
    assert [b.prefix for b in list_blocks(state)] == ["model.layers.1.block_sparse_moe"]
    assert loaded(state, "granite").gate_up_proj.shape == (2, 6, 4)


# Strictness


def _moe(**fields: Any) -> MoE:
    return MoE(**{"hidden_size": 5, "intermediate_size": 4, "num_experts": 3, "top_k": 2} | fields)


def test_missing_experts_are_listed():
    state = make("hf", 3, 5, 4)
    del state["model.layers.1.mlp.experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"has no experts.{}.up_proj.weight of experts \[1\]"):
        load_experts(state)


def test_unexpected_names_below_the_experts_are_listed():
    key = "model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv"
    state = make("hf", 3, 5, 4) | {key: torch.ones(1)}
    with pytest.raises(ValueError, match=rf"missing \[\], unexpected \['{key}'\]"):
        load_experts(state)


def test_missing_and_unexpected_names_of_a_moe_are_listed():
    state = make("hf", 3, 5, 4) | {"model.layers.1.mlp.gate.extra": torch.ones(1)}
    moe = _moe(selection_bias=True)
    before = {name: t.clone() for name, t in moe.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_experts(state, into=moe)
    assert "missing ['model.layers.1.mlp.gate.e_score_correction_bias']" in str(caught.value)
    assert "unexpected ['model.layers.1.mlp.gate.extra']" in str(caught.value)
    assert same(before, moe.state_dict())
    shared = make("hf", 3, 5, 4) | {"model.layers.1.mlp.shared_expert.up_proj.weight": torch.ones(4, 5)}
    with pytest.raises(ValueError, match=r"unexpected \['model.layers.1.mlp.shared_expert.up_proj.weight'\]"):
        load_experts(shared, into=_moe())


def test_experts_alone_leave_the_router_and_refuse_a_bias_of_the_block():
    experts = Experts(_moe().config, dtype=torch.float64)
    assert load_experts(make("hf", 3, 5, 4), into=experts) is experts
    plain = Experts(_moe(gated=False).config)
    with pytest.raises(ValueError, match=r"encoder.layers.1.mlp.experts.bias is a bias of the whole block"):
        load_experts(make("megablocks", 3, 5, 4), into=plain)


def test_block_that_is_the_layer_itself_leaves_the_layers_other_tensors_alone():
    state = make("mixtral", 3, 5, 4, prefix="layers.7") | {"layers.7.attention.wq.weight": torch.ones(5, 5)}
    assert load_experts(state, into=_moe()).config.num_experts == 3
    with pytest.raises(ValueError, match=r"unexpected \['layers.7.gate.extra'\]"):
        load_experts(state | {"layers.7.gate.extra": torch.ones(5)}, into=_moe())
    with pytest.raises(ValueError, match=r"unexpected \['layers.7.shared_experts.w1.weight'\]"):
        load_experts(state | {"layers.7.shared_experts.w1.weight": torch.ones(4, 5)}, into=_moe())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 6}, "into must have hidden_size = 5, as model.layers.1.mlp has, got 6"),
        ({"intermediate_size": 5}, "into must have intermediate_size = 4"),
        ({"num_experts": 4}, "into must have num_experts = 3"),
        ({"gated": False}, "into must have gated = True"),
        ({"bias": True}, "into must have bias = False"),
    ],
    ids=str,
)
def test_module_of_another_size_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        load_experts(make("hf", 3, 5, 4), into=_moe(**fields))


def test_expert_of_another_shape_is_named():
    state = make("hf", 3, 5, 4)
    state["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"experts.2.up_proj.weight must have shape \(4, 5\), as .* has, got \(5, 4\)"):
        load_experts(state)


def test_quantised_weights_are_refused():
    state = {name: t.to(torch.float8_e4m3fn) if "experts" in name else t for name, t in make("hf", 2, 4, 4).items()}
    with pytest.raises(TypeError, match="float8_e4m3fn: dequantise it first"):
        load_experts(state)


def test_half_of_the_biases_is_refused():
    state = make("hf_stacked", 2, 4, 3) | {"model.layers.1.mlp.experts.down_proj_bias": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=r"some of the experts' biases, but not \['experts.gate_up_proj_bias'\]"):
        load_experts(state)


def test_arguments_that_do_not_fit_are_refused():
    state: Any = make("hf", 3, 5, 4)
    load: Any = load_experts  # these calls do not type-check either
    write: Any = to_state_dict
    with pytest.raises(TypeError, match="into must be an Experts or a MoE, got FusedOneMoE"):
        load(state, into=FusedOneMoE(5, 4, 3))
    with pytest.raises(ValueError, match="dtype and device are those of the module"):
        load(state, into=_moe(), dtype=torch.float32)
    with pytest.raises(TypeError, match="dtype must be float64"):
        load(state, dtype=torch.int8)
    for prefix in (3, b"x", ["x"]):
        with pytest.raises(TypeError, match="prefix must be a string, got "):
            load(state, prefix=prefix)
    for layer in ("0", False, torch.tensor([0, 1])):
        with pytest.raises(TypeError, match="layer must be an integer, got "):
            load(state, layer=layer)
    with pytest.raises(TypeError, match="num_experts must be an integer"):
        load(state, num_experts=3.0)
    with pytest.raises(ValueError, match="into is on the meta device"):
        load(state, into=_moe(device="meta"))
    with pytest.raises(TypeError, match="layout must be one of"):
        write(_moe())
    with pytest.raises(TypeError, match="block must be an Experts, a MoE or ExpertWeights, got dict"):
        write({}, "hf")
    with pytest.raises(ValueError, match="layout must be one of"):
        write(_moe(), "gpt_oss_mxfp4")
    with pytest.raises(ValueError, match="layout 'megablocks' is of plain experts, the block's are gated"):
        write(_moe(), "megablocks")
    with pytest.raises(ValueError, match="layout 'torchtitan' has no place for the experts' biases"):
        write(_moe(bias=True), "torchtitan")
    with pytest.raises(ValueError, match="layout 'gpt_oss' has biases, the block's experts have none"):
        write(_moe(), "gpt_oss")
    with pytest.raises(ValueError, match="layout 'nemotron_h' has no place for output_bias"):
        write(_moe(gated=False, output_bias=True), "nemotron_h")


def test_dtype_is_the_checkpoints_or_the_one_asked_for():
    state = make("hf", 2, 4, 3, dtype=torch.bfloat16)
    assert loaded(state, "hf").down_proj.dtype == torch.bfloat16
    wide = loaded(state, "hf", dtype=torch.float32)
    assert {t.dtype for t in (wide.gate_up_proj, wide.down_proj, *wide.block.values())} == {torch.float32}
    assert torch.equal(wide.down_proj, loaded(state, "hf").down_proj.float())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_is_read_into_packed_weights_and_written_from_them(dtype):
    moe = _moe(hidden_size=16, intermediate_size=16, dtype=dtype)
    plain = _moe(hidden_size=16, intermediate_size=16, dtype=dtype)
    x, state = torch.randn(2, 16, dtype=dtype), make("hf", 3, 16, 16, dtype=dtype)
    moe.prepack()
    parameters = list(moe.parameters())
    for block in (moe, plain):
        load_experts(state, into=block)
    assert moe.experts.packed_bytes and all(a is b for a, b in zip(parameters, moe.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(moe(x), plain(x))
    written, expected = to_state_dict(moe, "hf"), to_state_dict(plain, "hf")
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in written)
    before = moe.experts.down_proj.clone()
    with pytest.raises((ValueError, TypeError)):
        load_experts(state | {next(key for key in state if "down_proj" in key): torch.zeros(3, 3)}, into=moe)
    assert torch.equal(moe.experts.down_proj, before)
