"""The extras: every package that is not required belongs to one, and whoever misses it is told which."""

import argparse
import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from asv_bench import suites
from fusedonemoe import bench
from fusedonemoe.balance.counting import Usage
from fusedonemoe.cli import demo
from fusedonemoe.integrations import peft as adapters
from fusedonemoe.integrations import transformers as models
from fusedonemoe.integrations.checkpoints import load_experts
from fusedonemoe.integrations.distributed.transformers import register_expert_parallel

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What users install beside the library to use it; the other extras are for working on it.
FOR_USERS = ("bench", "cli", "hf", "plot")
# Compared with where they are installed, each row of a benchmark naming its own; and Triton, which torch brings or does not.
BESIDE = {"onnx", "onnxruntime", "sonicmoe", "triton", "triton_kernels", "vllm", "zentorch"}
WITH_TORCH = {"filelock"}  # torch itself requires it


def packages_of(requirements):
    return {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in requirements}


def third_party(path):
    """Line, top-level name, and whether the import runs with the module's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "find_spec"):
            literals = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names = [literal for literal in literals if not literal.startswith(".")]
        else:
            continue
        for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"fusedonemoe", "numpy", "torch"}:
            yield node.lineno, name, node in tree.body


IMPORTS = [
    (path.relative_to(ROOT).as_posix(), *found)
    for folder in ("fusedonemoe", "ops")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ROOT / "fusedonemoe" / "ops" not in path.parents
    for found in third_party(path)
]


def test_every_imported_package_is_in_an_extra():
    known = set().union(*(packages_of(EXTRAS[extra]) for extra in FOR_USERS))
    assert {name for _, _, name, _ in IMPORTS} >= {"rich", "matplotlib", "transformers", "safetensors"}  # the search finds
    assert [found for found in IMPORTS if found[2] not in known | BESIDE | WITH_TORCH] == []
    assert packages_of(metadata.requires("torch") or []) >= WITH_TORCH


def test_only_commands_and_kernels_import_extras_at_once():
    # The commands look first whether the package is there; a kernel's module is imported where Triton is, and the module of a
    # subclass of PEFT's layers where a model of PEFT came in.
    early = {(path.split("/")[1], name) for path, _, name, at_once in IMPORTS if at_once}
    commands = {(command, package) for command in ("bench", "cli") for package in ("rich", "matplotlib")}
    assert early == commands | {("triton", "triton"), ("integrations", "peft")}


def suite(*options, of=bench):
    parser = argparse.ArgumentParser()
    of.add_arguments(parser)
    return of.run(parser.parse_args(options))


def run_demo():
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args(["--quick"]))


def read_safetensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    load_experts(tmp_path)


COMMANDS = {
    "demo without rich": ("rich", "cli,plot", run_demo),
    "demo without matplotlib": ("matplotlib", "cli,plot", run_demo),
    "benchmark": ("rich", "bench", suite),
    "picture of a benchmark": ("matplotlib", "plot", lambda: suite("--picture", "bench.png")),
    "suite of a model": ("transformers", "bench", lambda: suite("transformers", of=suites)),
    "suite of adapters": ("peft", "bench", lambda: suite("lora", of=suites)),
}
FUNCTIONS = {
    "picture of the usage": ("matplotlib", "plot", lambda tmp_path: Usage(torch.tensor([1, 2])).picture(tmp_path / "usage.png")),
    "checkpoint": ("safetensors", "hf", read_safetensors),
    "adapter": ("safetensors", "hf", lambda tmp_path: adapters.load_adapter(nn.Module(), tmp_path, config={})),
    "model": ("transformers", "hf", lambda tmp_path: models.enable()),
    "expert-parallel model": ("transformers", "hf", lambda tmp_path: register_expert_parallel()),
}


def without(monkeypatch, package):
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_names_the_extra_that_is_missing(case, monkeypatch, capsys):
    package, extra, run = COMMANDS[case]
    assert package in packages_of(requirement for name in extra.split(",") for requirement in EXTRAS[name])
    without(monkeypatch, package)
    assert run() == 2
    assert f"pip install 'fusedonemoe[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_names_the_extra_that_is_missing(case, monkeypatch, tmp_path):
    package, extra, call = FUNCTIONS[case]
    assert package in packages_of(EXTRAS[extra])
    without(monkeypatch, package)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'fusedonemoe[{extra}]'")):
        call(tmp_path)
