"""Checkpoint layouts: what a loaded block computes, round trips to the last bit, detection, strictness."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fusedonemoe import Experts, FusedOneMoE, MoE, MoEConfig
from fusedonemoe import functional as F
from fusedonemoe.integrations.checkpoints import LAYOUTS, ExpertWeights, list_blocks, load_experts, to_state_dict
from fusedonemoe.integrations.checkpoints.mxfp4 import dequantize_mxfp4
from tests import checkpoint_layouts
from tests.checkpoint_layouts import below, drawn, make, output

WRITABLE = [name for name, layout in LAYOUTS.items() if layout.writable]
SIZES = [(3, 5, 4), (2, 6, 6), (1, 1, 1), (4, 8, 4), (2, 4, 8)]  # square, and D = 2F, F = 2D, where other shapes collide
# What nothing but the layout's name can tell from it, so that "auto" has to be told.
AMBIGUOUS = {"gpt_oss"}
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


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Names, shapes, dtypes and every bit."""
    if a.keys() != b.keys():
        return False
    return all(
        a[name].shape == b[name].shape
        and a[name].dtype == b[name].dtype
        and torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name in a
    )


def loaded(state: Any, layout: str, **kwargs: Any) -> ExpertWeights:
    return load_experts(state, layout if layout in AMBIGUOUS else "auto", **kwargs)


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


# Files


@pytest.fixture
def two_layers() -> dict[str, Tensor]:
    first, second = (make("hf", 3, 5, 4, seed=s, dtype=torch.bfloat16, prefix=f"model.layers.{s}.mlp") for s in (0, 1))
    return first | second | {"model.embed_tokens.weight": torch.randn(7, 5), "lm_head.weight": torch.randn(7, 5)}


def _single(folder, state):
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def _directory(folder, state):
    _single(folder, state)
    return folder


def _shards(folder, state, suffix="safetensors", save=save_file, index="model.safetensors.index.json"):
    names = sorted(state)  # an expert's three tensors end up in different files
    files = {name: f"part-{i % 3}.{suffix}" for i, name in enumerate(names)}
    for file in set(files.values()):
        save({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder / index


def _sharded_directory(folder, state):
    _shards(folder, state)
    return folder


def _torch_file(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def _old_torch_file(folder, state):
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def _torch_shards(folder, state):
    _shards(folder, state, "bin", torch.save, "pytorch_model.bin.index.json")
    return str(folder)


def _several_files_without_index(folder, state):
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]}, folder / "a.safetensors")
    save_file({name: state[name] for name in names[1::2]}, folder / "b.safetensors")
    return folder


FILES = [
    _single, _directory, _shards, _sharded_directory, _torch_file, _old_torch_file, _torch_shards, _several_files_without_index,
]  # fmt: skip


@pytest.mark.parametrize("save", FILES, ids=lambda f: f.__name__[1:])
def test_files_give_what_the_dict_gives(two_layers, tmp_path, save):
    path = save(tmp_path, two_layers)
    assert sorted(list_blocks(path), key=lambda b: b.prefix) == sorted(list_blocks(two_layers), key=lambda b: b.prefix)
    for layer in (0, 1):
        expected = loaded(two_layers, "hf", layer=layer)
        actual = loaded(path, "hf", layer=layer)
        assert same(to_state_dict(actual), to_state_dict(expected))
        # Nothing points into the file any more.
        assert actual.gate_up_proj.untyped_storage().nbytes() == actual.gate_up_proj.nbytes
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in actual.block.values())


def test_list_blocks_tells_prefixes_and_sizes(two_layers):
    blocks = list_blocks(two_layers)
    assert [(b.prefix, b.layer, b.layout) for b in blocks] == [("model.layers.0.mlp", 0, "hf"), ("model.layers.1.mlp", 1, "hf")]
    assert {(b.num_experts, b.hidden_size, b.intermediate_size, b.gated, b.bias) for b in blocks} == {(3, 5, 4, True, False)}
    assert list_blocks({"lm_head.weight": torch.zeros(2, 2)}) == []


def test_missing_files_and_shards_are_named(tmp_path, two_layers):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        load_experts(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_experts(tmp_path)
    index = _shards(tmp_path, two_layers)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shards that are not there: \['part-1.safetensors'\]"):
        load_experts(index, layer=0)


def test_index_that_lies_is_refused(tmp_path, two_layers):
    index = _shards(tmp_path, two_layers)
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.gate.weight"] = "part-0.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tensors that their shards do not hold: \['model.layers.9.mlp.gate.weight'\]"):
        load_experts(index, layer=0)
    index.write_text("{}")
    with pytest.raises(ValueError, match="must have a weight_map"):
        load_experts(tmp_path, layer=0)


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a .safetensors, .bin, .pt, .pth or .index.json file or a directory"):
        load_experts(tmp_path / "weights.gguf")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(TypeError, match="must hold a state dict, got list"):
        load_experts(tmp_path / "list.pt")
    with pytest.raises(TypeError, match="checkpoint must be a state dict or a path, got int"):
        list_blocks(3)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"same name in several files and no index: \['x'\]"):
        load_experts(tmp_path)


def test_without_safetensors_the_message_says_what_to_install(tmp_path, monkeypatch):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'fusedonemoe\[hf\]'"):
        load_experts(tmp_path)


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


def test_packed_weights_are_refused_once_a_checkpoint_was_loaded_over_them():
    moe = _moe(hidden_size=16, intermediate_size=16)
    x = torch.randn(2, 16)
    try:
        moe.prepack()
    except ValueError as reason:
        pytest.skip(str(reason))
    load_experts(make("hf", 3, 16, 16, dtype=torch.float32), into=moe)
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed"):
        moe(x)


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
