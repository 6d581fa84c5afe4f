"""The kernels of a wheel: which library a machine takes, and what the library tells torch by itself."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

import fusedonemoe.ops  # noqa: F401  defines the operators
from fusedonemoe.export import kernel_library
from fusedonemoe.ops.cpu import build, native
from fusedonemoe.ops.cpu.commands import VARIANTS

_REFUSAL = native.refusal(torch.float32, True)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A folder with an empty library for each instruction set, and a function that sets the features of the CPU."""
    for name in VARIANTS:
        (tmp_path / f"kernels-{name}.so").touch()
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    for variable in ("FUSEDONEMOE_CPU_ARCH", "FUSEDONEMOE_CXXFLAGS"):
        monkeypatch.delenv(variable, raising=False)
    return lambda features: monkeypatch.setattr(build, "_flags_of_cpu", lambda: frozenset(features))


def test_each_instruction_set_has_all_of_the_one_before():
    features = [needs for needs, _ in VARIANTS.values()]
    assert all(less < more for less, more in itertools.pairwise(features))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_machine_takes_the_best_library_that_it_can_run(wheel, name):
    needs, _ = VARIANTS[name]
    wheel(needs | {"fpu", "sse2"})
    path = build._prebuilt()
    assert path is not None and path.name == f"kernels-{name}.so"
    path.unlink()
    lower = list(VARIANTS)[: list(VARIANTS).index(name)]
    assert build._prebuilt() == (build.PREBUILT / f"kernels-{lower[-1]}.so" if lower else None)


def test_the_user_may_ask_for_another(wheel, monkeypatch):
    best, _ = VARIANTS["x86-64-v4-bf16"]
    wheel(best)
    monkeypatch.setenv("FUSEDONEMOE_CPU_ARCH", "x86-64-v3")
    assert build._prebuilt() == build.PREBUILT / "kernels-x86-64-v3.so"
    wheel({"sse2"})
    assert build._prebuilt() is None  # this CPU could not run it
    wheel(best)
    monkeypatch.delenv("FUSEDONEMOE_CPU_ARCH")
    monkeypatch.setenv("FUSEDONEMOE_CXXFLAGS", "-DMINE")
    assert build._prebuilt() is None  # flags ask for a compilation


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FUSEDONEMOE_CPU_ARCH", "x86-64-v5")
    with pytest.raises(build.Unavailable, match=r"FUSEDONEMOE_CPU_ARCH must be one of \('x86-64-v2', .*, got 'x86-64-v5'"):
        build._find()


def test_without_prebuilt_kernels_they_are_compiled(wheel):
    wheel({"sse2"})
    assert build._prebuilt() is None
    for path in build.PREBUILT.iterdir():
        path.unlink()
    wheel(VARIANTS["x86-64-v4-bf16"][0])
    assert build._prebuilt() is None


ALONE = """
import ctypes, json, sys, torch
library = ctypes.CDLL(sys.argv[1])
assert library.fusedonemoe_load() == 0
names = json.loads(sys.argv[2])
print(json.dumps({name: str(getattr(torch.ops.fusedonemoe, name).default._schema) for name in names}))
assert "fusedonemoe" not in sys.modules
rule = (2, "softmax", True, True, 1.0, 1, 1, "max", 0.0)
_, experts = torch.ops.fusedonemoe.route_cpu(torch.tensor([[0.0, 2.0, 1.0]]), None, *rule)
assert experts.tolist() == [[1, 2]]
assert library.fusedonemoe_load() != 0  # they are defined already
"""


@pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
def test_the_library_defines_the_operators_as_python_does():
    names = [name for name in dir(torch.ops.fusedonemoe) if not name.startswith("_")]
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    all_names = {
        schema.name.removeprefix("fusedonemoe::") for schema in torch._C._jit_get_all_schemas() if "fusedonemoe::" in schema.name
    }
    from_c = sorted(name for name in all_names if kernel(f"fusedonemoe::{name}", "CPU") and name not in PYTHON_ON_CPU)
    assert len(from_c) == 19 and set(names) <= all_names | {"name"}
    command = [sys.executable, "-c", ALONE, str(kernel_library()), json.dumps(from_c)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    defined = json.loads(ran.stdout)
    assert defined == {name: str(getattr(torch.ops.fusedonemoe, name).default._schema) for name in from_c}


# What Python serves on CPU, with torch's own operators.
PYTHON_ON_CPU = {"grouped_mm", "grouped_outer", "select_experts", "select_product_keys"}
