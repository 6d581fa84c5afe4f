"""The doctor: what it reports, and that it notices what is broken."""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import re
import sys
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch

from fusedonemoe import __version__, functional
from fusedonemoe.cli import doctor, probes
from fusedonemoe.ops import IMPLEMENTATIONS, dense, grouped, mlp, neurons, product_keys
from fusedonemoe.ops import route as routing
from fusedonemoe.ops.cpu import build, native
from fusedonemoe.ops.records import ExpertsGradients
from tests.interception import intercepted

IMPLEMENTATIONS_OF = {
    "route": ("dense", "auto"),
    "route_product_key": ("dense", "auto"),
    "experts_mlp": IMPLEMENTATIONS,
    "experts_mlp_lora": IMPLEMENTATIONS,
    "experts_mlp_quantized": IMPLEMENTATIONS,
    "experts_merged": IMPLEMENTATIONS,
    "experts_neurons": IMPLEMENTATIONS,
    "experts_values": IMPLEMENTATIONS,
}
# What has no form for a CPU, and says so.
LACKING = {
    ("experts_mlp_lora", "cpu"): "the compiled CPU kernels have no adapters",
    ("experts_mlp_lora", "portable"): "they have no portable form",
    ("experts_mlp_quantized", "portable"): "quantised weights have no portable form",
}


def examine(capsys, **options):
    """Exit code and report of ``doctor --json``."""
    code = doctor.run(argparse.Namespace(**{"json": True, "no_compile": True, **options}))
    return code, json.loads(capsys.readouterr().out)


def print_report(capsys, **options):
    """Exit code and text of ``doctor``."""
    code = doctor.run(argparse.Namespace(**{"json": False, "no_compile": True, **options}))
    return code, capsys.readouterr().out


@pytest.fixture
def no_self_test(monkeypatch):
    monkeypatch.setattr(doctor, "self_test", list)


@pytest.fixture
def no_compiler(monkeypatch):
    def search():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", search)


def test_options():
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert vars(parser.parse_args([])) == {"json": False, "no_compile": False}
    assert vars(parser.parse_args(["--json", "--no-compile"])) == {"json": True, "no_compile": True}


def test_a_sound_installation(capsys):
    code, report = examine(capsys)
    assert code == 0 and report["ok"] is True and report["failures"] == [] and report["compile"] == []
    rows = report["self_test"]
    on_cpu = [(r["operator"], r["impl"], r["dtype"], r["direction"]) for r in rows if r["device"] == "cpu"]
    assert sorted(on_cpu) == sorted(
        (operator, impl, dtype, direction)
        for operator, impls in IMPLEMENTATIONS_OF.items()
        for impl, dtype, direction in itertools.product(impls, probes.DTYPES, ("forward", "backward"))
        if impl != "triton"  # of a GPU
    )
    for row in rows:
        if row["device"] == "cpu" and (row["operator"], row["impl"]) in LACKING:
            assert row["ok"] is None and LACKING[row["operator"], row["impl"]] in row["note"]
        elif row["impl"] == "cpu" and row["dtype"] == "float64":
            assert row["ok"] is None and "the CPU kernels have float32, bfloat16 and float16" in row["note"]
        elif row["device"] == "cpu":
            # Exactly 0 would mean that the operator was compared with itself; but a sum of two terms has one way to round.
            two_terms = (row["operator"], row["dtype"], row["direction"]) == ("experts_values", "float64", "forward")
            assert row["ok"] is True and row["error"] <= row["budget"] and (row["error"] > 0 or two_terms), row
    assert report["environment"]["fusedonemoe"]["detail"] == __version__
    assert report["environment"]["torch"]["detail"].startswith(torch.__version__)
    assert {"python", "numpy", "triton", "transformers", "CPU", "threads", "C++ compiler", "CPU kernels"} < set(
        report["environment"]
    )
    assert {finding["status"] for finding in report["environment"].values()} <= {"ok", "absent"}


def test_json_keeps_stdout_to_itself(capsys, monkeypatch, no_self_test):
    honest = doctor.check_environment

    def chatty():
        print("a library says hello")
        return honest()

    monkeypatch.setattr(doctor, "check_environment", chatty)
    assert doctor.run(argparse.Namespace(json=True, no_compile=True)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is True and "a library says hello" in err


def test_inputs_have_empty_experts_and_foreign_ids(monkeypatch):
    seen = []

    def spy(x, experts, weights, proj, **options):
        seen.append(experts)
        return honest(x, experts, weights, proj, **options)

    honest = functional.experts_merged
    monkeypatch.setattr(functional, "experts_merged", spy)
    doctor.self_test()
    assert len(seen) >= len(probes.DTYPES) * 2
    for experts in seen:
        ids = set(experts.flatten().tolist())
        assert {-1, probes.E} < ids and set(range(probes.E)) - ids, ids


def times(factor, honest):
    """The body of an operator with its first result multiplied; autograd still sees through it."""

    def body(*args, **options):
        result = honest(*args, **options)
        if isinstance(result, ExpertsGradients):
            return result._replace(x=None if result.x is None else result.x * factor)
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    return body


PLACES = [
    # Module, the body in it, the operator and implementation that it serves, the direction that must fail.
    (dense, "experts_mlp_dense", "experts_mlp dense", "forward"),
    (dense, "experts_merged_dense", "experts_merged dense", "forward"),
    (mlp, "experts_mlp", "experts_mlp grouped", "forward"),
    (mlp, "experts_mlp_backward", "experts_mlp grouped", "backward"),
    (grouped, "experts_merged", "experts_merged grouped", "forward"),
    (grouped, "experts_merged_backward", "experts_merged grouped", "backward"),
    (routing, "route", "route auto", "forward"),
    (routing, "route_backward", "route auto", "backward"),
    (product_keys, "route_product_key", "route_product_key auto", "forward"),
    (product_keys, "route_product_key_backward", "route_product_key auto", "backward"),
    (neurons, "experts_neurons_dense", "experts_neurons dense", "forward"),
    (neurons, "experts_neurons", "experts_neurons grouped", "forward"),
    (neurons, "experts_neurons_backward", "experts_neurons grouped", "backward"),
    (neurons, "experts_values_dense", "experts_values dense", "forward"),
    (neurons, "experts_values", "experts_values grouped", "forward"),
    (neurons, "experts_values_backward", "experts_values grouped", "backward"),
]
# float64 has the bodies above; the other dtypes have kernels on CPU.
KERNELS = {"route": "route_cpu", "route_backward": "route_cpu_backward"}
IDS = [f"{module.__name__.rpartition('.')[2]}.{body}" for module, body, *_ in PLACES]
# One formulation serves plain, adapted and quantised experts.
SHARED = {"experts_mlp": {"experts_mlp", "experts_mlp_lora", "experts_mlp_quantized"}}


@pytest.fixture
def replace(monkeypatch):
    """A function that puts ``change(honest)`` in the place of a body, and of the kernel that serves it too."""
    with ExitStack() as stack:

        def put(module, body, change):
            monkeypatch.setattr(module, body, change(getattr(module, body)))
            if module is routing and native.refusal(torch.float32, True) is None:
                stack.enter_context(intercepted(KERNELS[body], change))

        yield put


@pytest.mark.parametrize(("module", "body", "label", "direction"), PLACES, ids=IDS)
def test_zeros_are_noticed_in_every_dtype(module, body, label, direction, capsys, replace):
    replace(module, body, partial(times, 0))
    code, report = examine(capsys)
    assert code == 1 and report["ok"] is False
    for dtype in probes.DTYPES:
        assert any(failure.startswith(f"{label} {dtype} cpu {direction}: error of ") for failure in report["failures"])
    # The other operators are not blamed.
    operator = label.split()[0]
    assert {failure.split()[0] for failure in report["failures"]} == SHARED.get(operator, {operator})


@pytest.mark.parametrize(("module", "body", "label", "direction"), PLACES, ids=IDS)
def test_one_percent_is_noticed_in_float32(module, body, label, direction, capsys, replace):
    replace(module, body, partial(times, 1.01))
    code, report = examine(capsys)
    assert code == 1
    assert any(failure.startswith(f"{label} float32 cpu {direction}: ") for failure in report["failures"])


def test_wrong_experts_are_noticed(capsys, replace):
    def off_by_one(honest):
        def body(logits, *args, **options):
            weights, experts = honest(logits, *args, **options)
            return weights, (experts + 1) % logits.shape[-1]

        return body

    replace(routing, "route", off_by_one)
    code, report = examine(capsys)
    assert code == 1
    assert "route auto float32 cpu forward: ValueError: other experts than the oracle's" in report["failures"]


def test_nan_is_noticed_and_the_report_stays_json(capsys, monkeypatch):
    monkeypatch.setattr(grouped, "experts_merged", times(math.nan, grouped.experts_merged))
    code, report = examine(capsys)
    assert code == 1
    assert any("float32 cpu forward: error of output not finite" in failure for failure in report["failures"])
    failed = [row for row in report["self_test"] if row["ok"] is False]
    assert all(row["operator"] == "experts_merged" and row["impl"] == "grouped" for row in failed)
    assert all(row["error"] is None for row in failed if row["direction"] == "forward")


def test_an_operator_that_raises_is_a_finding(capsys, monkeypatch):
    def body(*args):
        raise NotImplementedError("no such kernel\nand a long story")

    monkeypatch.setattr(dense, "experts_mlp_dense", body)
    code, report = examine(capsys)
    assert code == 1
    assert "experts_mlp dense float16 cpu backward: NotImplementedError: no such kernel" in report["failures"]
    assert len(report["failures"]) == 2 * len(probes.DTYPES) * len(SHARED["experts_mlp"])


def test_every_budget_refuses_zeros_and_allows_a_rounding():
    for (operator, ways), dtype in itertools.product(probes.BUDGETS.items(), probes.DTYPES.values()):
        for way in ways:
            assert way.of(dtype) < 0.25, (operator, dtype)
            assert way.of(dtype) > torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def test_relative_error():
    exact = np.array([3.0, 4.0])
    assert doctor.relative_error(torch.zeros(2), exact) == 1
    assert doctor.relative_error(torch.tensor([3.0, 4.5]), exact) == 0.1
    assert doctor.relative_error(torch.tensor([[3.0, 4.0]]), exact) == math.inf
    assert doctor.relative_error(torch.zeros(2), np.zeros(2)) == math.inf


def test_a_refused_implementation_is_absent_and_no_failure(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "refusal", lambda impl, **_: "no such unit" if impl != "dense" else None)
    code, report = examine(capsys)
    assert code == 0
    (row, *_) = [row for row in report["self_test"] if row["impl"] == "grouped"]
    assert row["ok"] is None and row["error"] is None and row["note"] == "no such unit"
    code, text = print_report(capsys)
    assert code == 0 and "absent" in text.partition("Self-test")[2]


def test_the_window_is_that_of_the_installed_requirement():
    (requirement,) = [line for line in importlib.metadata.requires("fusedonemoe") or [] if re.match("torch[<>=]", line)]
    window = doctor.torch_window()
    assert list(window) == [">=", "<"]
    assert sorted(f"{sign}{bound}" for sign, bound in window.items()) == sorted(requirement.removeprefix("torch").split(","))


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.10.1", False),
        ("2.9.1+cu128", False),
        ("2.11", True),
        ("2.11.0", True),
        ("2.15.9+cpu", True),
        ("2.16.0", False),
        ("2.16.0.dev20260801+cpu", False),
        ("3.0.0", False),
    ],
)
def test_torch_outside_the_window_fails(version, fits, capsys, monkeypatch, no_self_test):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(doctor, "torch_window", lambda: {">=": "2.11", "<": "2.16"})
    code, report = examine(capsys)
    assert code == (0 if fits else 1)
    verdict = f"{version} ({'' if fits else 'not '}in >=2.11,<2.16)"
    assert report["environment"]["torch"] == {"status": "ok" if fits else "FAIL", "detail": verdict}
    assert report["failures"] == ([] if fits else [f"torch: {verdict}"])


def test_without_installed_metadata_the_version_is_reported_only(capsys, monkeypatch, no_self_test):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    code, report = examine(capsys)
    assert code == 0 and "not compared" in report["environment"]["torch"]["detail"]


def test_optional_packages_may_be_absent(capsys, monkeypatch, no_self_test):
    for name in ("triton", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "numpy" else None)
    code, report = examine(capsys)
    assert code == 0
    assert [report["environment"][name]["status"] for name in ("numpy", "triton", "transformers")] == ["ok", "absent", "absent"]


def test_a_cache_that_cannot_be_written_fails(tmp_path, capsys, monkeypatch, no_self_test):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    code, report = examine(capsys)
    assert code == 1 and report["failures"][0].startswith(f"compile cache: {folder}: ")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
    assert examine(capsys)[0] == 0


def test_without_a_compiler_torch_compile_is_absent(capsys, no_compiler):
    code, report = examine(capsys, no_compile=False)
    assert code == 0
    assert report["environment"]["C++ compiler"]["status"] == "absent"
    assert "torch.compile on CPU will not work" in report["environment"]["C++ compiler"]["detail"]
    on_cpu = [row for row in report["compile"] if row["device"] == "cpu"]
    assert [(row["direction"], row["ok"], row["note"]) for row in on_cpu] == [
        ("forward", None, "no C++ compiler"),
        ("backward", None, "no C++ compiler"),
    ]


def test_a_compilation_that_fails_fails(capsys, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("backend='inductor' raised")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(doctor, "find_cpp_compiler", lambda: "g++")
    code, report = examine(capsys, no_compile=False)
    assert code == 1
    assert "MoE compiled float32 cpu forward: RuntimeError: backend='inductor' raised" in report["failures"]


def test_a_compilation_to_something_else_fails(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda moe, **_: lambda x: moe(x) * 1.01)
    monkeypatch.setattr(doctor, "find_cpp_compiler", lambda: "g++")
    code, report = examine(capsys, no_compile=False)
    assert code == 1 and len(report["failures"]) >= 2
    assert report["failures"][0].startswith("MoE compiled float32 cpu forward: error of output 1.0e-02, budget ")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")
@pytest.mark.parametrize(("mode", "status"), [(0o777, "FAIL"), (0o700, "absent")])
def test_a_cache_that_others_can_write_is_a_failure(capsys, monkeypatch, no_self_test, tmp_path, mode, status):
    def load():
        raise build.Unavailable("a reason that names the folder")

    tmp_path.chmod(mode)
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "load", load)
    code, report = examine(capsys)
    assert report["environment"]["CPU kernels"] == {"status": status, "detail": "a reason that names the folder"}
    assert code == (status == "FAIL")


@pytest.mark.skipif(doctor.find_cpp_compiler() is None, reason="needs a C++ compiler")
def test_compilation():
    forward, backward = doctor.compile_smoke("cpu")
    assert forward.ok and backward.ok, (forward, backward)
    assert forward.error is not None and forward.error < 1e-6


@pytest.mark.gpu
def test_on_cuda(capsys):
    code, report = examine(capsys)
    rows = [row for row in report["self_test"] if row["device"] == "cuda"]
    assert code == 0, report["failures"]
    assert {row["dtype"] for row in rows if row["ok"]} == set(probes.DTYPES)
    absent = [row for row in rows if row["ok"] is None]
    assert all(row["impl"] in ("grouped", "triton") or (row["operator"], row["impl"]) in LACKING for row in absent)


def test_text_with_and_without_rich(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")  # rich wraps a long cache path
    with_rich = print_report(capsys)
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    without = print_report(capsys)
    assert with_rich[0] == without[0] == 0
    assert without[1].split() == with_rich[1].split(), "the words are the same; only their dress differs"
    assert without[1].rstrip().endswith("All fine.") and "left out" in without[1]
    table = without[1].partition("Self-test on cpu")[2].splitlines()
    assert table[1].split() == ["operator", "impl", *probes.DTYPES]
    assert max(map(len, without[1].partition("Self-test")[2].splitlines())) <= 80
    assert "\x1b" not in without[1]


def test_text_names_what_failed(capsys, monkeypatch):
    monkeypatch.setattr(grouped, "experts_merged", times(0, grouped.experts_merged))
    code, text = print_report(capsys)
    assert code == 1 and "FAIL 1e+00" in text
    assert "failed:\nexperts_merged grouped float64 cpu forward: error of output 1.0e+00, budget " in text
