"""Files, shards and directories give what the dictionary gives; what is broken is named."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fusedonemoe.integrations.checkpoints import list_blocks, load_experts, to_state_dict
from tests.integrations import checkpoint_layouts
from tests.integrations.checkpoint_layouts import loaded, same


@pytest.fixture
def two_layers() -> dict[str, Tensor]:
    return checkpoint_layouts.two_layers()


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
