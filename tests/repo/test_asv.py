"""asv's configuration and benchmarks: they load, run once, run at old commits, and track only quantities that should be small."""

import importlib
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedonemoe
from fusedonemoe.bench.catalogue import SUITES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "asv_bench"
# Units where smaller is better. asv reports every rise as a regression.
SMALLER_IS_BETTER = {"bytes", "relative error", "graphs"}
# A full run, and a quick one in CI, must stay short.
MOST_COMBINATIONS = 250


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def benchmark_classes() -> dict[str, Any]:
    # As asv does: the folder is a package whose parent is on the path.
    sys.path.insert(0, str(FOLDER))
    try:
        modules = [importlib.import_module(f"benchmarks.{path.stem}") for path in sorted(FOLDER.glob("benchmarks/bench_*.py"))]
    finally:
        sys.path.remove(str(FOLDER))
    return {
        f"{module.__name__.partition('.')[2]}.{cls.__name__}": cls
        for module in modules
        for cls in list(vars(module).values())
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
    }


CLASSES = benchmark_classes()


def benchmarks_of(cls):
    return [name for name in dir(cls) if name.startswith(("time_", "track_", "mem_", "peakmem_", "raw_", "timeraw_"))]


def cases_of(cls):
    return list(itertools.product(*getattr(cls, "params", ())))


@pytest.fixture
def configuration():
    json5 = pytest.importorskip("json5")
    return json5.loads((FOLDER / "asv.conf.json").read_text(encoding="utf-8"))


def test_configuration(configuration):
    assert configuration["project"] == "fusedonemoe"
    assert configuration["repo"] == ".." and configuration["branches"] == ["main"]
    assert configuration["launch_method"] == "forkserver" and configuration["environment_type"] == "virtualenv"
    assert (FOLDER / configuration["benchmark_dir"]).is_dir()
    assert configuration["results_dir"] == "results"  # committed
    for folder in ("env_dir", "html_dir"):
        assert configuration[folder].startswith(".asv/")  # the folder in .gitignore


def test_the_pinned_versions_are_those_of_the_repository(configuration):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line)
    for package, versions in configuration["matrix"]["req"].items():
        assert versions == [pins[package]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert set(configuration["matrix"]["req"]) == needed


def test_runs_that_are_not_kept_have_results_of_their_own(configuration, tmp_path, monkeypatch):
    config = pytest.importorskip("asv.config")
    module = importlib.import_module("configuration")

    (tmp_path / "asv.conf.json").write_text((FOLDER / "asv.conf.json").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    read = config.Config.load(str(module.scratch("smoke")))
    assert read.project == configuration["project"] and read.launch_method == "forkserver"
    assert read.results_dir == str(tmp_path / ".asv" / "smoke") and read.html_dir == str(tmp_path / ".asv" / "html")
    assert Path(read.repo) == tmp_path.parent and Path(read.benchmark_dir) == tmp_path / "benchmarks"


@pytest.mark.parametrize("name", CLASSES)
def test_only_what_is_better_when_smaller_is_tracked(name):
    benchmarks = benchmarks_of(CLASSES[name])
    assert benchmarks
    for benchmark in benchmarks:
        assert benchmark.startswith(("time_", "timeraw_", "track_"))
        if benchmark.startswith("track_"):
            assert getattr(CLASSES[name], benchmark).unit in SMALLER_IS_BETTER


def test_the_suite_stays_small():
    assert 0 < sum(len(cases_of(cls)) * len(benchmarks_of(cls)) for cls in CLASSES.values()) <= MOST_COMBINATIONS


def test_the_small_shapes_are_those_of_the_quick_suite():
    shapes = importlib.import_module("benchmarks.subjects").SHAPES
    assert {shapes[name] for name in ("E32", "E128", "E1024")} == {(c.T, c.D, c.F, c.E, c.K) for c in SUITES["quick"]}


def test_a_gpu_has_parameters_of_its_own_where_there_is_one():
    devices = importlib.import_module("benchmarks.subjects").DEVICES
    assert devices == (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))


@pytest.mark.skipif(sys.platform != "linux", reason="asv forks, and /proc tells of threads, on Linux")
def test_a_fork_of_the_imported_benchmarks_may_compute():
    program = """
import importlib, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
modules = [importlib.import_module(f"benchmarks.{path.stem}") for path in sorted(folder.glob("benchmarks/bench_*.py"))]
import torch
assert len(os.listdir("/proc/self/task")) == 1, "a thread has started while the benchmarks were imported"
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    y = torch.randn(400, 400) @ torch.randn(400, 400)
    os._exit(0 if len(os.listdir("/proc/self/task")) > 1 and bool(y.isfinite().all()) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the fork did not compute on two threads"
"""
    # NumPy's BLAS starts threads, which would count in /proc/self/task.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(FOLDER)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stderr


TINY = {"E4096": (16, 16, 64, 4), "E16384": (16, 16, 64, 4), "E102400": (16, 16, 64, 4)}


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith("bench_compile.") and "Compiled" not in name])
def test_every_benchmark_runs(name, monkeypatch):
    """The same dtypes and code with small shapes; at this commit nothing is n/a."""
    subjects = importlib.import_module("benchmarks.subjects")
    monkeypatch.setattr(importlib.import_module("benchmarks.bench_fine_grained"), "SHAPES", TINY)
    for shape in subjects.SHAPES:
        monkeypatch.setitem(subjects.SHAPES, shape, (16, 128, 128, 8, 2))
    cls = CLASSES[name]
    for case in cases_of(cls):
        for benchmark in benchmarks_of(cls):
            instance = cls()
            instance.setup(*case)
            value = getattr(instance, benchmark)(*case)
            if benchmark.startswith("track_"):
                assert value >= 0 if "peak_forward" in benchmark else value > 0
            if "error" in benchmark:
                assert value < 0.1


@pytest.mark.parametrize("layer", ["MoE", "FineGrainedMoE"])
def test_a_layer_is_one_graph(layer):
    cls = CLASSES["bench_compile.Graphs"]
    instance = cls()
    instance.setup("cpu", layer)
    assert instance.track_graphs("cpu", layer) == 1


def test_the_import_is_timed_beside_torch():
    assert CLASSES["bench_compile.Import"]().timeraw_import() == ("import fusedonemoe", "import torch")


def test_what_an_old_commit_has_not_got_is_not_applicable():
    subjects = importlib.import_module("benchmarks.subjects")

    assert subjects.present("functional.route") is fusedonemoe.functional.route
    with pytest.raises(NotImplementedError, match=r"no fusedonemoe\.functional\.experts_of_the_future"):
        subjects.present("functional.experts_of_the_future")
    with pytest.raises(NotImplementedError, match="route of this commit has no tomorrow"):
        subjects.needs(fusedonemoe.functional.route, "scoring", "tomorrow")
    subjects.needs(fusedonemoe.functional.route, "scoring")
    with pytest.raises(NotImplementedError, match="impl must be one of"):
        CLASSES["bench_experts.MLP"]().setup("cpu", "unheard-of call float32")


def test_a_wrong_result_has_an_error():
    subjects = importlib.import_module("benchmarks.subjects")
    x = torch.linspace(1, 2, 9)
    right = subjects.Subject(lambda x: x * x, (x,), lambda x: x * x)
    assert subjects.relative_error(right.forward(), right.in_float64().forward()) < 1e-6
    wrong = subjects.Subject(lambda x: x * x * 1.5, (x,), lambda x: x * x)
    assert subjects.relative_error(wrong.forward(), wrong.in_float64().forward()) == pytest.approx(0.5)
    assert subjects.relative_error(wrong.gradients()[0], wrong.in_float64().gradients()[0]) == pytest.approx(0.5)


def asv_table(before, after):
    """Print the table of the pinned version of asv for two sets of values."""
    compare = pytest.importorskip("asv.commands.compare")
    config = pytest.importorskip("asv.config")

    def results(values):
        for name, value in values.items():
            yield name, [["'cpu'", "'mlp (4)'"]], value, [None] * 2, [None] * 2, "1", "local", "env"

    units = {name: {"unit": "seconds"} for name in before}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Benchmarks, "load", classmethod(lambda cls, conf: units))
        patch.setattr(compare, "get_environments", lambda *args, **kwargs: [], raising=False)
        compare.Compare.print_table(
            config.Config(),
            "a" * 40,
            "b" * 40,
            factor=1.15,
            split=False,
            resultset_1=results(before),
            resultset_2=results(after),
            commit_names={},
            only_changed=False,
        )


def test_the_check_reads_asvs_table(capsys):
    check = importlib.import_module("check")

    asv_table(
        {"bench.Same.time_x": [1.0, 1.0], "bench.Slow.time_x": [1.0, 1.0], "bench.Fast.time_x": [1.0, 1.0]},
        {"bench.Same.time_x": [1.1, 1.0], "bench.Slow.time_x": [1.0, 1.3], "bench.Fast.time_x": [0.5, None]},
    )
    table = capsys.readouterr().out
    assert sorted(check.marked(table)) == ["bench.Fast.time_x('mlp (4)')", "bench.Slow.time_x('mlp (4)')"]
    assert re.match(check.exactly("bench.Slow.time_x('mlp (4)')"), "bench.Slow.time_x('mlp (4)')")


def table_of(*names):
    rows = "".join(f"| +        | 1.00±0ms | 1.50±0ms | 1.50 | {name} |\n" for name in names)
    return f"| Change   | Before | After | Ratio | Benchmark (Parameter) |\n|----------|---|---|---|---|\n{rows}"


def test_the_check_counts_what_is_slower_twice(capsys):
    check = importlib.import_module("check")

    asked = []

    def measure(benchmarks, rounds):
        asked.append((list(benchmarks), rounds))
        return table_of("a.time_x", "b.time_x(1)") if len(asked) == 1 else table_of("b.time_x(1)")

    assert check.slower(measure, ["time"]) == ["b.time_x(1)"]
    assert asked == [(["time"], check.ROUNDS), ([r"^a\.time_x$", r"^b\.time_x\(1\)$"], check.ROUNDS_AGAIN)]
    assert check.ROUNDS_AGAIN > check.ROUNDS and check.FACTOR == 1.15


def test_the_check_measures_once_where_nothing_is_slower():
    check = importlib.import_module("check")

    asked = []

    def measure(benchmarks, rounds):
        asked.append(rounds)
        return table_of()

    assert check.slower(measure, ["time"]) == []
    assert asked == [check.ROUNDS]


def test_milestones_are_commits_of_the_main_line():
    milestones = (FOLDER / "milestones.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split()[0] for line in milestones if not line.startswith("#")]
    assert len(listed) == len(set(listed)) and all(re.fullmatch(r"[0-9a-f]{7,40}", commit) for commit in listed)
    # A branch that has merged main has main's newer commits outside its own line.
    command = ["git", "rev-list", "--first-parent", "--reverse"]
    runs = [
        subprocess.run([*command, branch, "--"], cwd=ROOT, capture_output=True, text=True, check=False)
        for branch in (("main", "origin/main", "HEAD") if shutil.which("git") else ())
    ]
    whole = [line for line in (run.stdout.split() for run in runs) if any(commit.startswith(listed[0]) for commit in line)]
    if not whole:
        pytest.skip("no clone with the whole history")
    orders = [[i for commit in listed for i, found in enumerate(line) if found.startswith(commit)] for line in whole]
    assert any(order == sorted(order) and len(order) == len(listed) for order in orders)
