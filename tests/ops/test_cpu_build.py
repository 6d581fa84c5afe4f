"""Compiling the CPU kernels: what is compiled when, what happens when nothing can be, other machines, sanitizers."""

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedonemoe import MoEConfig, explain
from fusedonemoe import functional as F
from fusedonemoe.ops.cpu import build, commands, native
from fusedonemoe.testing import make_merged_inputs, make_mlp_inputs

ROOT = Path(__file__).parents[2]
_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")

# build.py and what it imports need nothing but the standard library: without the packages' own imports, a process that only
# builds starts quickly.
BUILD = """
    import sys, types
    for name, path in (("fusedonemoe", "fusedonemoe"), ("fusedonemoe.ops", "ops"), ("fusedonemoe.ops.cpu", "ops/cpu")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    from fusedonemoe.ops.cpu import build
"""
LOAD = f"{BUILD}    print(build.load().fusedonemoe_lanes())\n"


def process(script, *arguments, **environment):
    """A process that runs a script, or the parts of one."""
    parts = [script] if isinstance(script, str) else script
    command = [sys.executable, "-c", "".join(map(textwrap.dedent, parts)), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    return subprocess.Popen(command, env={**os.environ, **environment}, text=True, cwd=ROOT, **pipes)


def load_in_a_process(**environment):
    return process(LOAD, **environment)


def finished(started):
    out, err = started.communicate(timeout=600)
    assert started.returncode == 0, err
    return out.strip(), err


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that logs its calls and, in no time, gives the kernels that are already compiled; and an empty cache."""
    path = tmp_path / "c++"
    log = tmp_path / "log"
    log.write_text("")
    script = 'echo "$@" >> "$LOG"; sleep ${SECONDS_IT_TAKES:-0}; for last; do :; done; cp "$COMPILED" "$last"'
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setenv("COMPILED", build.load()._name if _REFUSAL is None else "")
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSEDONEMOE_CXXFLAGS", raising=False)
    return log


def linked(log):
    """The calls of the compiler that made a library of what the others had compiled."""
    return [call for call in log.read_text().splitlines() if " -c " not in f" {call} "]


def cached(tmp_path):
    return sorted(path for path in (tmp_path / "cache").iterdir() if path.name != "lock")


# What is compiled when


@needs_kernels
def test_only_the_first_process_compiles(compiler, tmp_path):
    messages = [finished(load_in_a_process())[1] for _ in range(3)]
    assert len(linked(compiler)) == 1
    assert "compiling the CPU kernels for this machine, once" in messages[0] and messages[1:] == ["", ""]
    assert len(cached(tmp_path)) == 1 and (tmp_path / "cache").stat().st_mode & 0o077 == 0


@needs_kernels
def test_other_flags_are_another_library(compiler, tmp_path):
    for flags in ("", "-DA", "-DA -DB", "-DA"):
        finished(load_in_a_process(FUSEDONEMOE_CXXFLAGS=flags))
    calls = linked(compiler)
    assert [call.count("-D") for call in calls] == [0, 1, 2] and len(cached(tmp_path)) == 3


@needs_kernels
@pytest.mark.parametrize("kept", [0.0, 0.0003, 0.01, 0.5, 0.9, 0.9999])
def test_a_truncated_library_is_made_again(compiler, tmp_path, kept):
    lanes, _ = finished(load_in_a_process())
    (library,) = cached(tmp_path)
    whole = library.read_bytes()
    library.write_bytes(whole[: int(kept * len(whole))])
    assert finished(load_in_a_process())[0] == lanes
    assert len(linked(compiler)) == 2 and library.read_bytes() == whole


def test_the_digest_names_all_that_decides(tmp_path, monkeypatch):
    sources = tmp_path / "native"
    shutil.copytree(commands.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_text("a compiler")
    digests = [build._digest(str(one), ["-O3"])]
    assert digests == [build._digest(str(one), ["-O3"])]
    digests += [build._digest(str(other), ["-O3"]), build._digest(str(one), ["-O2"]), build._digest(str(one), ["-O", "3"])]
    one.write_text("a newer compiler")
    digests.append(build._digest(str(one), ["-O3"]))
    (sources / "tile.h").write_text((sources / "tile.h").read_text() + "\n")
    digests.append(build._digest(str(one), ["-O3"]))
    (sources / "tile.h").rename(sources / "tile_.h")
    digests.append(build._digest(str(one), ["-O3"]))
    monkeypatch.setattr(build, "_cpu_features", lambda: "another machine")
    digests.append(build._digest(str(one), ["-O3"]))
    assert len(set(digests)) == len(digests) == 8


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("FUSEDONEMOE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build.cache_directory() == tmp_path / ".cache" / "fusedonemoe"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_directory() == tmp_path / "xdg" / "fusedonemoe"
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", str(tmp_path / "mine"))
    assert build.cache_directory() == tmp_path / "mine"


# When nothing can be compiled


def turned_off(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDONEMOE_CPU_KERNELS", "0")


def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CXX")


def failing_compiler(monkeypatch, tmp_path):
    Path(os.environ["CXX"]).write_text("#!/bin/sh\nprintf 'moe.cpp:1: \\377 no such luck\\nmore\\n' >&2; exit 1\n")


def compiler_that_does_not_start(monkeypatch, tmp_path):
    Path(os.environ["CXX"]).write_text("#!/no/such/interpreter\n")


def compiler_that_never_ends(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SECONDS_TO_COMPILE", 0.2)
    Path(os.environ["CXX"]).write_text("#!/bin/sh\nexec sleep 60\n")


def compiler_that_makes_no_library(monkeypatch, tmp_path):
    Path(os.environ["CXX"]).write_text("#!/bin/sh\nexit 0\n")


def unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")  # no permission stops root, but a file is no directory
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", str(tmp_path / "file" / "cache"))


def cache_that_others_can_write(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)


def no_home(monkeypatch, tmp_path):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    for name in ("FUSEDONEMOE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (turned_off, "FUSEDONEMOE_CPU_KERNELS=0 turns them off"),
        (no_compiler, "no C++ compiler was found ($CXX, g++, c++, clang++)"),
        (failing_compiler, "failed: moe.cpp:1: \ufffd no such luck"),
        (compiler_that_does_not_start, "c++ could not be run: "),
        (compiler_that_never_ends, "timed out after 0.2 seconds"),
        (compiler_that_makes_no_library, "c++ failed: it made no f32.o"),
        (unwritable_cache, "the kernels could not be cached or loaded: "),
        (cache_that_others_can_write, "the kernels' cache is not safe: "),
        (no_home, "the kernels could not be cached or loaded: Could not determine home directory."),
    ],
)
def test_without_kernels_auto_does_without_and_cpu_says_why(compiler, tmp_path, monkeypatch, trouble, reason):
    trouble(monkeypatch, tmp_path)
    why = build._load.__wrapped__()
    assert isinstance(why, str) and reason in why
    monkeypatch.setattr(build, "_load", lambda: why)
    monkeypatch.setattr(build, "library", None)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("compiling-*"))

    mlp, merged = make_mlp_inputs(5, 6, 4, 3, 2), make_merged_inputs(5, 6, 4, 3, 2)
    calls: list[Any] = [(F.experts_mlp, tuple(vars(mlp).values())[:5]), (F.experts_merged, tuple(vars(merged).values()))]
    for call, arguments in calls:
        assert torch.equal(call(*arguments), call(*arguments, impl="grouped"))
        with pytest.raises(ValueError) as caught:
            call(*arguments, impl="cpu")
        assert str(caught.value) == f"impl='cpu' cannot run here: {why}"
    config = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=8, top_k=2)
    explanation = explain(config)
    assert explanation.impl == "grouped" and f"cannot run: {why}" in str(explanation)


def test_a_process_without_kernels_says_so_and_works():
    script = """
        import torch
        from fusedonemoe import functional as F
        from fusedonemoe.testing import make_merged_inputs
        arguments = vars(make_merged_inputs(5, 6, 4, 3, 2)).values()
        assert torch.equal(F.experts_merged(*arguments), F.experts_merged(*arguments, impl="grouped"))
        try:
            F.experts_merged(*arguments, impl="cpu")
        except ValueError as error:
            print(error)
    """
    out, err = finished(process(script, FUSEDONEMOE_CPU_KERNELS="0"))
    assert out == "impl='cpu' cannot run here: FUSEDONEMOE_CPU_KERNELS=0 turns them off" and "compiling" not in err


# Other machines, sanitizers: the tests of the kernels once more, with kernels compiled otherwise


GRAPHS_OF_TORCH = (
    "test_an_exported_graph_needs_no_operator_of_this_machine",
    "test_a_packaged_router_holds_torch_operators_only",
)


def run_the_kernels_tests(**environment):
    files = [
        f"tests/ops/test_{name}.py"
        for name in ("cpu_kernels", "cpu_precision", "packed", "select", "route_cpu", "neurons_cpu", "quantized_kernels")
    ]
    # What torch's exporter and its compiler make holds no kernel of ours.
    others = [f"--deselect=tests/ops/test_select.py::{name}" for name in GRAPHS_OF_TORCH]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *others, *files]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200
    )
    said = done.stdout + done.stderr
    report = "\n".join([*(line for line in said.splitlines() if "SUMMARY: " in line or "runtime error: " in line), said[-4000:]])
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, report


def features():
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


@needs_kernels
@pytest.mark.recompiles
@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
# -O1 takes a fifth of -O3's time to compile, and the level of most machines gets -O3.
@pytest.mark.parametrize(
    ("level", "feature", "lanes", "flags"), [("v2", "sse4_2", 4, "-O1"), ("v3", "avx2", 8, "-O3"), ("v4", "avx512vl", 16, "-O3")]
)
def test_every_instruction_set_computes_the_same(level, feature, lanes, flags, tmp_path):
    if feature not in features():
        pytest.skip(f"this machine has no {feature}")
    if build.load().fusedonemoe_lanes() == lanes:
        pytest.skip("all other tests run kernels with vectors of this width")
    environment = {"FUSEDONEMOE_CXXFLAGS": f"-march=x86-64-{level} {flags}", "FUSEDONEMOE_CACHE_DIR": str(tmp_path)}
    assert finished(load_in_a_process(**environment))[0] == str(lanes)
    run_the_kernels_tests(**environment)


@needs_kernels
@pytest.mark.recompiles
@pytest.mark.skipif(sys.platform != "linux", reason="preloads gcc's libraries")
def test_sanitizers_find_nothing(tmp_path):
    compiler = build._compiler()
    # With libstdc++, or the sanitizer finds no function that throws, and ends at torch's first C++ exception.
    asan, cpp = (
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    )
    if "clang" in compiler or not os.path.isabs(asan):
        pytest.skip("no libasan of gcc")
    # -O1 takes a fifth of -O3's time to compile.
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
    environment = {"FUSEDONEMOE_CXXFLAGS": flags, "FUSEDONEMOE_CACHE_DIR": str(tmp_path), "ASAN_OPTIONS": "detect_leaks=0"}
    # Compiles; then refuses to load, the sanitizer not being preloaded. The compiler itself is better off without.
    load_in_a_process(**environment).communicate(timeout=600)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".so"]  # the lock and the library
    run_the_kernels_tests(**environment, LD_PRELOAD=f"{asan} {cpp}")
