"""Damaged and hostile files: each loads the same values or is refused by name, with little memory, and the module unchanged."""

import json
import os
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from fusedonemoe import MoE
from fusedonemoe.integrations.checkpoints import files, list_blocks, load_experts
from tests.integrations.checkpoint_layouts import make

E, D, F_ = 3, 5, 4
MOST_MEMORY = 8 << 20  # bytes of Python's own, for a checkpoint of a few kilobytes
PREFIX = "model.layers.1.mlp"
UP = f"{PREFIX}.experts.1.up_proj.weight"
JSON_VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**30, "", "x", "a\0b", "\ud800", [], ["model.safetensors"], [[]], {}, {"a": 1},
    float("nan"), float("inf"), 10**400,
]  # fmt: skip
RAW = {
    "empty": b"",
    "blank": b" \n",
    "half": b'{"weight_map": {',
    "not JSON": b"weight_map",
    "two objects": b"{}{}",
    "UTF-16": '{"weight_map": {}}'.encode("utf-16"),
    "Latin-1": '{"é": 1}'.encode("latin-1"),
    "BOM": b"\xef\xbb\xbf{}",
    "NUL": b'{"weight_map": \0}',
    "NUL bytes": b"\0" * 64,
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "long integer": b'{"model_type": ' + b"9" * 10_000 + b"}",
    "NaN": b"NaN",
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return make("hf", E, D, F_, dtype=torch.float32)


@pytest.fixture(scope="module")
def shards(state, tmp_path_factory) -> Path:
    """A valid checkpoint of two shards, an index and a configuration, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("shards")
    names = sorted(state)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return folder


def fresh() -> MoE:
    torch.manual_seed(0)
    return MoE(hidden_size=D, intermediate_size=F_, num_experts=E, top_k=2)


class Trial:
    """Loads a path into one module again and again; a success must give the right values, a failure must change nothing."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.moe = fresh()
        self.old = {name: tensor.clone() for name, tensor in self.moe.state_dict().items()}
        self.new = {name: tensor.clone() for name, tensor in load_experts(state, into=fresh()).state_dict().items()}
        self.refusals = self.loads = 0

    def __call__(self, path: Path) -> None:
        self.moe.load_state_dict(self.old)
        tracemalloc.start()
        refusal: Exception | None = None
        try:
            list_blocks(path)
            load_experts(path, into=self.moe)
        except (ValueError, TypeError, OSError) as error:
            refusal = error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MOST_MEMORY, f"{peak / 2**20:.0f} MiB"
        self.loads += refusal is None
        self.refusals += refusal is not None
        if refusal is not None:
            # Not a subclass such as UnicodeDecodeError, which comes from the inside; and the file is named.
            assert type(refusal) in (ValueError, TypeError) or isinstance(refusal, OSError), repr(refusal)
            assert str(path) in str(refusal), repr(refusal)
        for name, tensor in self.moe.state_dict().items():
            assert torch.equal(tensor, (self.old if refusal else self.new)[name]), name


@pytest.fixture
def trial(state) -> Trial:
    return Trial(state)


def header_of(blob: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_safetensors_file_with_a_changed_byte_in_its_header(state, trial, tmp_path):
    blob, path = save(state), tmp_path / "model.safetensors"
    size = 8 + int.from_bytes(blob[:8], "little")
    chance = random.Random(0)
    for _ in range(300):
        changed = bytearray(blob)
        changed[chance.randrange(size)] = chance.choice((0, 0x22, 0x30, 0x39, 0x5B, 0x7D, 0xFF, chance.randrange(256)))
        path.write_bytes(changed)
        trial(path)
    assert trial.refusals > 200


def test_a_safetensors_file_that_ends_early_or_late(state, trial, tmp_path):
    blob, path = save(state), tmp_path / "model.safetensors"
    for length in {*range(0, len(blob), 37), 1, 7, 8, 9, len(blob) - 1}:
        path.write_bytes(blob[:length])
        trial(path)
    for more in (b"\0", blob):
        path.write_bytes(blob + more)
        trial(path)
    assert trial.loads == 0


def _entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header | {UP: header[UP] | changes}


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda header: {key: value for key, value in header.items() if key != name}


def _beside(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    """One more tensor without data, so that the rest of the file stays valid."""
    end = {"dtype": "F32", "data_offsets": None}
    return lambda header: (
        header
        | {name.replace("__", "."): end | {"shape": shape, "data_offsets": [_end(header)] * 2} for name, shape in entries.items()}
    )


def _end(header: dict[str, Any]) -> int:
    return max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry)


def _renamed(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda header: {key.replace(old, new): value for key, value in header.items()}


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda header: [],
    "no text": lambda header: b"\xff" * 32,
    "nothing": lambda header: b"",
    "nested": lambda header: b"[" * 50_000,
    "entries are lists": lambda header: {key: [] for key in header},
    "entry without a shape": lambda header: header | {UP: {"dtype": "F32", "data_offsets": [0, 80]}},
    "dtype unknown": _entry(dtype="F31"),
    "dtype a number": _entry(dtype=32),
    "dtype of integers": _entry(dtype="I32"),
    "dtype of float8": _entry(dtype="F8_E4M3", shape=[F_, 4 * D]),
    "shape negative": _entry(shape=[-4, -5]),
    "shape of floats": _entry(shape=[4.0, 5.0]),
    "shape huge": _entry(shape=[2**62, 2**62]),
    "shape transposed": _entry(shape=[D, F_]),
    "shape flat": _entry(shape=[D * F_]),
    "shape with zero": _entry(shape=[0, D]),
    "offsets reversed": _entry(data_offsets=[80, 0]),
    "offsets of another": _entry(data_offsets=[0, 80]),
    "offsets beyond": _entry(data_offsets=[10**15, 10**15 + 80]),
    "router missing": _without(f"{PREFIX}.gate.weight"),
    "expert missing": _without(UP),
    "number padded": _renamed("experts.1.", "experts.01."),
    "number signed": _renamed("experts.1.", "experts.+1."),
    "number negative": _renamed("experts.1.", "experts.-1."),
    "number with a space": _renamed("experts.1.", "experts. 1."),
    "number with a line": _renamed("experts.1.", "experts.1_0."),
    "number in other digits": _renamed("experts.1.", "experts.\uff11."),
    "number superscript": _renamed("experts.1.", "experts.\u00b9."),
    "number huge": _renamed("experts.1.", "experts.999999999."),
    "number enormous": _renamed("experts.1.", f"experts.{'9' * 5000}."),
    "gap": _renamed("experts.1.", "experts.7."),
    "layer's number enormous": _renamed("layers.1.", f"layers.{'9' * 5000}."),
    "layer's number superscript": _renamed("layers.1.", "layers.\u00b2."),
    "another expert without weights": _beside(**{f"{PREFIX}.experts.999999999.up_proj.bias".replace(".", "__"): [0]}),
    "another expert": _beside(**{f"{PREFIX}.experts.999999999.up_proj.weight".replace(".", "__"): [0, 0]}),
    "stack of no experts": _beside(m__experts__gate_up_proj=[0, 4, 2], m__experts__down_proj=[0, 2, 2]),
    "stack of endless experts": _beside(m__experts__gate_up_proj=[10**15, 4, 0], m__experts__down_proj=[10**15, 0, 2]),
    "stack without axes": _beside(m__experts__gate_up_proj=[0], m__experts__down_proj=[0]),
    "flat experts without a router": _beside(
        m__experts__mlp__w1=[0, 2], m__experts__mlp__w2=[0, 2], m__router__layer__weight=[0, 2]
    ),
    "flat experts with a flat router": _beside(m__experts__mlp__w1=[0, 2], m__experts__mlp__w2=[0, 2], m__router__weight=[0]),
    "scalar among them": lambda header: header | {f"{PREFIX}.gate.bias": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_safetensors_header_that_says_something_else(state, trial, tmp_path, change):
    header, data = header_of(save(state))
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(HEADERS[change](header), data))
    trial(path)
    # What stands beside the block and is no block of its own changes nothing; all else is refused.
    assert trial.loads == change.startswith(("stack", "flat", "layer's")), change


def _copies(shards: Path, folder: Path) -> Path:
    shutil.copytree(shards, folder, dirs_exist_ok=True)
    return folder


def test_the_valid_checkpoint_loads(shards, trial, tmp_path):
    trial(_copies(shards, tmp_path))
    assert trial.loads == 1


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "config.json"])
def test_json_of_other_bytes(shards, trial, tmp_path, file):
    folder = _copies(shards, tmp_path)
    for content in RAW.values():
        (folder / file).write_bytes(content)
        trial(folder)
    assert trial.loads == 0
    (folder / file).unlink()
    (folder / file).mkdir()
    trial(folder)
    assert trial.refusals == len(RAW) + 1


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "config.json"])
def test_json_that_is_no_regular_file_or_a_large_one(shards, trial, tmp_path, monkeypatch, file):
    folder = _copies(shards, tmp_path)
    (folder / file).write_text((folder / file).read_text() + " " * 1000)
    trial(folder)
    monkeypatch.setattr(files, "MOST_JSON", 1000)
    trial(folder)
    (folder / file).unlink()
    os.mkfifo(folder / file)  # which has no writer
    trial(folder)
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")  # which has no end
    trial(folder)
    assert (trial.loads, trial.refusals) == (1, 3)


def test_one_repeated_name_costs_no_more_than_another(shards, tmp_path):
    folder = _copies(shards, tmp_path)
    names = ",".join(f'"{i}":"part-0.safetensors"' for i in range(15_000))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"0": "part-0.safetensors", {names}}}}}')
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"names that occur twice: \['0'\]"):
        list_blocks(folder)
    assert time.process_time() - begun < 3


def test_an_index_of_other_values(shards, trial, tmp_path):
    folder = _copies(shards, tmp_path)
    index = folder / "model.safetensors.index.json"
    valid = json.loads(index.read_text())
    for value in JSON_VALUES:
        for content in (value, {"weight_map": value}, valid | {"weight_map": valid["weight_map"] | {UP: value}}):
            index.write_text(json.dumps(content))
            trial(folder)
    assert trial.loads == 0
    index.write_text(json.dumps(valid | {"metadata": JSON_VALUES[:-1]}))  # which is not read
    trial(folder)
    assert trial.loads == 1


def test_an_index_that_disagrees_with_its_shards(shards, trial, tmp_path):
    folder = _copies(shards, tmp_path)
    index = folder / "model.safetensors.index.json"
    valid = json.loads(index.read_text())["weight_map"]
    other = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
    wrong = [
        valid | {UP: other[valid[UP]]},
        {name: file for name, file in valid.items() if name != UP},
        {name: file for name, file in valid.items() if not name.endswith("gate.weight")},
        valid | {"model.extra": "part-0.safetensors"},
        valid | {"model.extra": "part-9.safetensors"},
        {},
    ]
    for weight_map in wrong:
        index.write_text(json.dumps({"weight_map": weight_map}))
        trial(folder)
    # The same name twice, in the text of the index; and one tensor in two shards.
    text = json.dumps({"weight_map": valid})
    index.write_text(text.replace('"weight_map": {', f'"weight_map": {{"{UP}": "part-9.safetensors", '))
    trial(folder)
    header, data = header_of((folder / valid[UP]).read_bytes())
    (folder / "part-9.safetensors").write_bytes(with_header(header, data))
    index.write_text(json.dumps({"weight_map": valid | {name: "part-9.safetensors" for name in header if name == UP}}))
    trial(folder)
    assert trial.loads == 0


OUTSIDE = [
    "../part-0.safetensors", "{folder}/part-0.safetensors", "sub/../../part-0.safetensors", "..\\part-0.safetensors",
    "C:\\part-0.safetensors", "C:part-0.safetensors", "\\\\host\\share\\part-0.safetensors", "sub\\part-0.safetensors", ".", "..",
    "/", "part-0.safetensors\n", "/dev/zero", "/dev/stdin", "config.json", "x" * 5000 + ".safetensors", "pipe.safetensors",
    "sub.safetensors", "model.safetensors.index.json",
]  # fmt: skip


def test_an_index_may_name_files_of_its_folder_only(shards, trial, tmp_path):
    folder = _copies(shards, tmp_path / "inner")
    for file in shards.glob("*.safetensors"):
        shutil.copy(file, tmp_path)  # where it would be found
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "sub.safetensors").mkdir()
    index = folder / "model.safetensors.index.json"
    valid = json.loads(index.read_text())["weight_map"]
    for file in OUTSIDE:
        name = file.format(folder=tmp_path)
        weight_map = {key: name if value == "part-0.safetensors" else value for key, value in valid.items()}
        index.write_text(json.dumps({"weight_map": weight_map}))
        trial(folder)
    assert trial.loads == 0
    # Below the folder is inside; and links are followed, for a cache of Hugging Face consists of them.
    (folder / "sub").mkdir()
    (folder / "part-0.safetensors").rename(folder / "sub" / "part-0.safetensors")
    weight_map = {key: value.replace("part-0", "sub/part-0") for key, value in valid.items()}
    index.write_text(json.dumps({"weight_map": weight_map}))
    trial(folder)
    (folder / "part-0.safetensors").symlink_to(tmp_path / "part-0.safetensors")
    index.write_text(json.dumps({"weight_map": valid}))
    trial(folder)
    assert trial.loads == 2


def test_a_configuration_of_other_values(shards, trial, tmp_path):
    folder = _copies(shards, tmp_path)
    for value in JSON_VALUES:
        for content in (value, {"model_type": value}, {"architectures": value, "hidden_size": value}):
            (folder / "config.json").write_text(json.dumps(content))
            trial(folder)
    # A string or nothing for the model's type, and anything in fields that are not read; 10**400 is no JSON that Python reads.
    strings = sum(value is None or isinstance(value, str) for value in JSON_VALUES)
    objects = sum(isinstance(value, dict) for value in JSON_VALUES)
    assert trial.loads == strings + objects + len(JSON_VALUES)


def _torch_files(state: dict[str, Tensor]) -> Iterator[Any]:
    first = next(iter(state))
    yield [state]
    yield 3
    yield None
    yield {"state_dict": state}
    yield dict(enumerate(state.values()))
    yield state | {3: torch.zeros(1)}
    yield state | {first: state[first].to_sparse()}
    yield state | {first: torch.quantize_per_tensor(state[first], 0.1, 0, torch.qint8)}
    yield state | {first: state[first].to("meta")}
    yield state | {first: state[first][:1].clone().expand(state[first].shape)}  # one number may be called a billion


def test_torch_files_of_other_contents(state, trial, tmp_path):
    path = tmp_path / "model.bin"
    for content in _torch_files(state):
        torch.save(content, path)
        trial(path)
    torch.save(state, path)
    blob = path.read_bytes()
    for length in {*range(0, len(blob), 211), 1, 3, len(blob) - 1}:
        path.write_bytes(blob[:length])
        trial(path)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    blob = path.read_bytes()
    for length in {*range(0, len(blob), 211), 1, 3, len(blob) - 1}:
        path.write_bytes(blob[:length])
        trial(path)
    for content in (b"\x80\x02}q\x00.", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueR.", b"PK\x03\x04" + bytes(64)):
        path.write_bytes(content)
        trial(path)
    assert trial.loads == 0


def test_paths_that_are_no_checkpoint(trial, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for name in (
        "pipe.safetensors",
        "folder.safetensors",
        "folder.bin",
        "dangling.safetensors",
        "loop.safetensors",
        "x.index.json",
    ):
        trial(tmp_path / name)
    assert trial.loads == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(shards, trial, tmp_path):
    folder = _copies(shards, tmp_path)
    for file in ("config.json", "model.safetensors.index.json", "part-0.safetensors"):
        (folder / file).chmod(0)
        trial(folder)
        (folder / file).chmod(0o600)
    assert trial.refusals == 3
