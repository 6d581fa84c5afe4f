"""Checkpoint layouts: what a loaded block computes, and round trips to the last bit."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusedonemoe import Experts, MoE, MoEConfig
from fusedonemoe import functional as F
from fusedonemoe.integrations.checkpoints import LAYOUTS, ExpertWeights, list_blocks, load_experts, to_state_dict
from fusedonemoe.integrations.checkpoints.loading import dequantize_mxfp4
from tests.integrations import checkpoint_layouts
from tests.integrations.checkpoint_layouts import drawn, loaded, make, output, same

WRITABLE = [name for name, layout in LAYOUTS.items() if layout.writable]
SIZES = [(3, 5, 4), (2, 6, 6), (1, 1, 1), (4, 8, 4), (2, 4, 8)]  # square, and D = 2F, F = 2D, where other shapes collide
# Layouts whose blocks a MoE holds whole, and the fields of that MoE.
BLOCK_FIELDS: dict[str, dict[str, Any]] = {
    "lfm2": {"selection_bias": True, "scoring": "sigmoid"},
    "nemotron_h": {"gated": False, "activation": "relu2"},
    "hf_stacked_plain": {"gated": False, "activation": "relu2"},
    "gpt_oss": {"bias": True, "router_bias": True, "activation": "swiglu_oai", "score_first": False},
    "megablocks": {"gated": False, "activation": "gelu", "output_bias": True},
    "aria": {"score_first": False, "shared_intermediate_size": 4},
    "torchtitan": {"selection_bias": True, "scoring": "sigmoid", "shared_intermediate_size": 4},
}


def test_every_writable_layout_is_tested():
    assert sorted(checkpoint_layouts.LAYOUTS) == sorted(WRITABLE)
    assert sorted(set(LAYOUTS) - set(WRITABLE)) == ["gpt_oss_mxfp4"]


def computed(weights: ExpertWeights, activation: str, x: Tensor, experts: Tensor, w: Tensor) -> Tensor:
    y = F.experts_mlp(
        x,
        experts,
        w,
        weights.gate_up_proj,
        weights.down_proj,
        gate_up_bias=weights.gate_up_bias,
        down_bias=weights.down_bias,
        activation=activation,
        gated=weights.gated,
        gate_up_layout=weights.gate_up_layout,
        impl="dense",
    )
    return y + weights.block["output_bias"] if "output_bias" in weights.block else y


# Numbers


@pytest.mark.parametrize(("E", "D", "F_"), SIZES)
@pytest.mark.parametrize("layout", WRITABLE)
def test_loaded_weights_compute_the_layouts_own_formula(layout, E, D, F_):
    state = make(layout, E, D, F_)
    random = drawn(1)
    x, w = random(6, D), random(6, 2).abs()
    experts = torch.arange(12).reshape(6, 2) % E
    weights = loaded(state, layout)
    actual = computed(weights, checkpoint_layouts.LAYOUTS[layout].activation, x, experts, w)
    torch.testing.assert_close(actual, output(layout, state, x, experts, w, E), rtol=1e-12, atol=1e-12)


def test_numbers_tell_an_untransposed_w2_from_a_transposed_one():
    # The same names and shapes with D == F: only values can tell, and the test above must be able to fail.
    state = make("megablocks", 2, 6, 6)
    name = "encoder.layers.1.mlp.experts.mlp.w2"
    turned = state | {name: state[name].view(2, 6, 6).transpose(1, 2).reshape(12, 6)}
    x, w, experts = drawn(1)(6, 6), torch.ones(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.int64)
    actual = computed(loaded(turned, "megablocks"), "gelu", x, experts, w)
    assert not torch.allclose(actual, output("megablocks", state, x, experts, w, 2), rtol=1e-2)


@pytest.mark.parametrize("gate_up_layout", ["gate_up", "up_gate", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", WRITABLE)
def test_module_of_any_order_is_filled_and_computes_the_formula(layout, transposed, gate_up_layout):
    E, D, F_ = 3, 6, 4
    state = make(layout, E, D, F_)
    config = MoEConfig(
        hidden_size=D,
        intermediate_size=F_,
        num_experts=E,
        top_k=2,
        gate_up_layout=gate_up_layout,
        transposed=transposed,
        impl="dense",
        **{"activation": checkpoint_layouts.LAYOUTS[layout].activation} | BLOCK_FIELDS.get(layout, {}),
    )
    moe = load_experts(state, layout, into=MoE(config, dtype=torch.float64))
    assert isinstance(moe, MoE)
    random = drawn(1)
    x, w, experts = random(6, D), random(6, 2).abs(), torch.arange(12).reshape(6, 2) % E
    y = moe.experts(x, experts, w)
    if moe.output_bias is not None:
        y = y + moe.output_bias
    torch.testing.assert_close(y, output(layout, state, x, experts, w, E), rtol=1e-12, atol=1e-12)
    router = next(tensor for name, tensor in state.items() if name.endswith(("gate.weight", "router.weight", "layer.weight")))
    assert torch.equal(moe.gate.weight, router)
    prefix = checkpoint_layouts.LAYOUTS[layout].prefix
    written = to_state_dict(moe, layout, prefix=prefix)
    # The selection bias is float32 in memory whatever the checkpoint has.
    wide = {name: t.double() if t.dtype == torch.float32 else t for name, t in written.items()}
    narrow = {name: t.float().double() if name.endswith(("expert_bias", "expert_bias_E")) else t for name, t in state.items()}
    assert same(wide, narrow)


def test_megablocks_output_bias_is_added_once_whatever_the_weights():
    state = make("megablocks", 2, 4, 3)
    config = MoEConfig(
        hidden_size=4, intermediate_size=3, num_experts=2, top_k=2, gated=False, activation="gelu", output_bias=True,
        norm_topk_prob=False, routed_scaling_factor=3.0, impl="dense",
    )  # fmt: skip
    moe = load_experts(state, into=MoE(config, dtype=torch.float64))
    x = drawn(2)(5, 4)
    with torch.no_grad():
        logits = x @ state["encoder.layers.1.mlp.router.layer.weight"].T
        weights, experts = F.route(logits, 2, norm_topk_prob=False, routed_scaling_factor=3.0)
        torch.testing.assert_close(moe(x), output("megablocks", state, x, experts, weights, 2), rtol=1e-9, atol=1e-9)


# Round trips


@given(
    layout=st.sampled_from(WRITABLE),
    E=st.integers(1, 5),
    D=st.integers(1, 7),
    F_=st.integers(1, 7),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    prefix=st.sampled_from([None, "", "a", "model.layers.17.x"]),
    seed=st.integers(0, 99),
    special=st.booleans(),
)
def test_what_is_written_is_what_was_read(layout, E, D, F_, dtype, prefix, seed, special):
    state = make(layout, E, D, F_, seed=seed, dtype=dtype, prefix=prefix)
    if special:  # bits that arithmetic would not keep
        for tensor in state.values():
            tensor.view(-1)[0] = float("nan")
            tensor.view(-1)[-1] = -0.0
    weights = loaded(state, layout)
    assert same(to_state_dict(weights), state)
    assert same(to_state_dict(weights, layout, prefix=weights.prefix + "."), state)


@given(E=st.integers(1, 4), D=st.integers(1, 5), F_=st.integers(1, 5), biases=st.booleans(), data=st.data())
def test_layouts_of_the_same_kind_convert_into_each_other(E, D, F_, biases, data):
    gated = data.draw(st.booleans())
    kin = [name for name in WRITABLE if LAYOUTS[name].gated == gated]
    if biases:
        kin = [name for name in kin if any(part.target.endswith("bias") for part in LAYOUTS[name].parts)]
    else:
        kin = [name for name in kin if name != "gpt_oss"]
    path = data.draw(st.lists(st.sampled_from(kin), min_size=1, max_size=4))
    experts = Experts(MoEConfig(hidden_size=D, intermediate_size=F_, num_experts=E, top_k=1, gated=gated, bias=biases))
    name, before = kin[0], to_state_dict(experts, kin[0])
    state = before
    for after in [*path, kin[0]]:
        state = to_state_dict(load_experts(state, name, num_experts=E), after)
        name = after
    assert same(state, before)


def test_tensors_that_need_no_change_are_the_modules_own():
    moe = MoE(hidden_size=6, intermediate_size=4, num_experts=3, top_k=1)
    own = to_state_dict(moe, "hf_stacked")
    assert own["experts.gate_up_proj"].data_ptr() == moe.get_parameter("experts.gate_up_proj").data_ptr()
    assert not any(tensor.requires_grad for tensor in own.values())
    copied = to_state_dict(moe, "hf")
    assert copied["experts.0.gate_proj.weight"].untyped_storage().nbytes() == 4 * 6 * 4
    transposed = MoE(moe.config.replace(transposed=True))
    own = to_state_dict(transposed, "hf_transposed")
    assert own["experts.down_proj"].data_ptr() == transposed.experts.down_proj.data_ptr()


def test_block_names_are_those_asked_for():
    moe = MoE(hidden_size=6, intermediate_size=4, num_experts=3, top_k=1, selection_bias=True)
    ernie = {"gate.e_score_correction_bias": "moe_statics.e_score_correction_bias"}
    named = to_state_dict(moe, "hf", prefix="m", block_names=ernie)
    assert named["m.moe_statics.e_score_correction_bias"].shape == (1, 3) and "m.gate.weight" in named
    assert list_blocks(named)[0].block_names == {"gate.weight": "gate.weight"} | ernie
    assert same(to_state_dict(load_experts(named)), named)
    assert same(to_state_dict(load_experts(named, into=MoE(moe.config)), "hf", prefix="m", block_names=ernie), named)
    with pytest.raises(ValueError, match=r"block_names must be of \['gate.weight'\], got \['gate.bias'\]"):
        to_state_dict(MoE(hidden_size=6, intermediate_size=4, num_experts=3, top_k=1), "hf", block_names={"gate.bias": "b"})


# MXFP4


def test_mxfp4_is_dequantised_as_its_definition_says():
    # Every code under a few exponents, spelt out by the format's definition: sign, two exponent bits, one mantissa bit.
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)  # 16 blocks of 32 values
    scales = torch.tensor([127, 126, 130, 100, 1, 0, 254, 128, 120, 121, 122, 123, 124, 125, 127, 127], dtype=torch.uint8)
    actual = dequantize_mxfp4(codes, scales, torch.float64)
    for block in range(16):
        for byte in range(16):
            for half in (0, 1):
                code = int(codes[block, byte]) >> (4 * half) & 0xF
                sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
                magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
                exact = (-1) ** sign * magnitude * 2.0 ** (int(scales[block]) - 127)
                assert actual[32 * block + 2 * byte + half] == exact
    assert dequantize_mxfp4(codes[:1], torch.tensor([255], dtype=torch.uint8), torch.float32).isnan().all()


def test_gpt_oss_in_mxfp4_loads_as_transformers_dequantises_it():
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    E, D, F_ = 2, 64, 32
    generator = torch.Generator().manual_seed(0)

    def packed(rows, columns):
        blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        return blocks, torch.randint(110, 135, (E, rows, columns // 32), generator=generator, dtype=torch.uint8)

    up, down = packed(2 * F_, D), packed(D, F_)
    biases = {
        "experts.gate_up_proj_bias": torch.randn(E, 2 * F_).bfloat16(),
        "experts.down_proj_bias": torch.randn(E, D).bfloat16(),
        "router.weight": torch.randn(E, D).bfloat16(),
        "router.bias": torch.randn(E).bfloat16(),
    }
    names = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
    stored = {f"experts.{name}": t for name, t in zip(names, (*up, *down), strict=True)}
    plain = {"experts.gate_up_proj": convert(*up), "experts.down_proj": convert(*down)}
    assert [b.layout for b in list_blocks(stored | biases)] == ["gpt_oss_mxfp4"]
    weights = load_experts(stored | biases)
    assert same(to_state_dict(weights, "gpt_oss"), plain | biases)
    with pytest.raises(ValueError, match="layout must be one of"):
        to_state_dict(weights)
    stored["experts.down_proj_scales"] = stored["experts.down_proj_scales"][:, :-1]
    with pytest.raises(ValueError, match=r"experts.down_proj_scales must have shape"):
        load_experts(stored | biases)
