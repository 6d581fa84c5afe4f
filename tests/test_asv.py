"""asv's configuration and benchmarks: they load, run once, and track nothing of which more is better."""

import inspect
import json
import re
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from fusedonemoe.bench.workloads import SUITES

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "asv_bench"
# Units of which less is better. asv reports a rise as a regression, whatever the unit.
SMALLER_IS_BETTER = {"bytes", "relative error"}
# One per case would be a process each; these are what a suite may cost.
MOST_COMBINATIONS = 40


def load(name):
    # By path, as asv does: asv_bench/ is no package.
    spec = spec_from_file_location(f"asv_benchmarks_{name}", FOLDER / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem: load(path.stem) for path in sorted((FOLDER / "benchmarks").glob("bench_*.py"))}
CLASSES: dict[str, Any] = {
    f"{name}.{cls.__name__}": cls
    for name, module in MODULES.items()
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
}


def benchmarks_of(cls):
    return [name for name in dir(cls) if name.startswith(("time_", "track_", "mem_", "peakmem_", "raw_", "timeraw_"))]


def cases_of(cls):
    """asv takes the values of one parameter, or a sequence of such for several; here there is always one."""
    return cls.params[0] if isinstance(cls.params[0], tuple) else cls.params


@pytest.fixture
def configuration():
    text = (FOLDER / "asv.conf.json").read_text(encoding="utf-8")
    return json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))


def test_configuration(configuration):
    assert configuration["project"] == "fusedonemoe"
    assert configuration["repo"] == ".." and configuration["branches"] == ["main"]
    assert configuration["launch_method"] == "spawn" and configuration["environment_type"] == "virtualenv"
    assert (FOLDER / configuration["benchmark_dir"]).is_dir()
    for folder in ("env_dir", "results_dir", "html_dir"):
        assert configuration[folder].startswith(".asv/")  # what .gitignore names


def test_the_pinned_versions_are_those_of_the_repository(configuration):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line)
    for package, versions in configuration["matrix"]["req"].items():
        assert versions == [pins[package]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert set(configuration["matrix"]["req"]) == needed


def test_asv_reads_the_configuration(configuration):
    config = pytest.importorskip("asv.config")
    read = config.Config.load(str(FOLDER / "asv.conf.json"))
    assert read.project == configuration["project"] and read.launch_method == "spawn"


@pytest.mark.parametrize("name", CLASSES)
def test_only_what_is_better_when_smaller_is_tracked(name):
    benchmarks = benchmarks_of(CLASSES[name])
    assert benchmarks
    for benchmark in benchmarks:
        assert benchmark.startswith(("time_", "track_"))
        if benchmark.startswith("track_"):
            assert getattr(CLASSES[name], benchmark).unit in SMALLER_IS_BETTER


def test_the_suite_stays_small():
    assert 0 < sum(len(cases_of(cls)) * len(benchmarks_of(cls)) for cls in CLASSES.values()) <= MOST_COMBINATIONS


def test_the_small_shapes_are_those_of_the_quick_suite():
    small = {shape for name, shape in MODULES["bench_experts"].SHAPES.items() if name.startswith("small")}
    assert small == {(cell.T, cell.D, cell.F, cell.E, cell.K) for cell in SUITES["quick"]}


@pytest.mark.parametrize("name", CLASSES)
def test_every_benchmark_runs(name, monkeypatch):
    cls = CLASSES[name]
    if name.startswith("bench_experts."):
        # The same dtypes and code over shapes that a test has time for.
        monkeypatch.setattr(MODULES["bench_experts"], "SHAPES", dict.fromkeys(MODULES["bench_experts"].SHAPES, (16, 32, 8, 8, 2)))
    for case in cases_of(cls):
        for benchmark in benchmarks_of(cls):
            instance = cls()
            instance.setup(case)
            value = getattr(instance, benchmark)(case)
            if benchmark.startswith("track_"):
                assert value > 0
            if "error" in benchmark:
                assert value < 0.1
