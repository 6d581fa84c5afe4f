"""The compiled kernels of single-neuron experts and value memory: widths, cache blocks, promises about bits, guarded memory."""

import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fusedonemoe.ops.cpu import build, native
from tests.test_cpu_build import GUARDED, ROOT, features, finished, process
from tests.test_neurons import assert_equals_the_oracle, both, gradients, make_inputs, neurons, oracle, values

_REFUSAL = native.refusal(torch.float32, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# A step of a sum is up to 256 columns, of a dot product 64 or 128; a vector 4, 8 or 16.
@pytest.mark.parametrize("D", [1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 100, 127, 128, 130, 255, 256, 257, 300, 544])
@every_dtype
def test_every_width_equals_the_oracle(D, dtype):
    assert_equals_the_oracle(make_inputs(5, D, 7, 3, dtype=dtype, routing="out_of_range"), "cpu")


@every_dtype
def test_tables_of_many_cache_blocks_equal_the_formulation(dtype):
    # 3 blocks of 4 MiB in float32 with a part of one at the end, and gradients that are written past the caches.
    for E, D in ((40_000, 64), (20_000, 257)):
        inputs = make_inputs(37, D, E, 50, dtype=dtype, routing="out_of_range")
        actual, plain = both(inputs, "cpu"), both(inputs, "grouped")
        for name, tensor in actual.items():
            error, scale = (tensor.double() - plain[name].double()).norm(), plain[name].double().norm()
            assert scale > 0 and error <= 4 * torch.finfo(dtype).eps * scale, name
        hit = torch.zeros(E, dtype=torch.bool)
        hit[inputs.experts[(inputs.experts >= 0) & (inputs.experts < E)]] = True
        for name in ("down_table", "up_table", "values of up_table"):
            assert torch.equal(actual[name].any(1), hit), name


def test_a_million_experts():
    inputs = make_inputs(3, 8, 1 << 20, 4)
    inputs = replace(inputs, experts=torch.tensor([[0, 1 << 19, (1 << 20) - 1, 1 << 20], [5, 5, 7, -1], [3, 1, 4, 1]]))
    actual, plain = both(inputs, "cpu"), both(inputs, "grouped")
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, plain[name], msg=f"{name}: ".__add__)


@pytest.fixture
def set_threads(monkeypatch):
    """Sets torch's number of threads, and lets the kernels use them for however little work."""
    monkeypatch.setattr(native, "PRODUCTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(65, 33, 40, 7), (3, 64, 9, 2), (40, 64, 40_000, 30)], ids=str)
@every_dtype
def test_equal_inputs_give_equal_bits_on_any_number_of_threads(shape, dtype, set_threads):
    inputs = make_inputs(*shape, dtype=dtype, routing="skewed" if shape[2] == 40 else "uniform")
    set_threads(1)
    alone = both(inputs, "cpu")
    for threads in (2, 2, 5):
        set_threads(threads)
        assert_same_bits(both(inputs, "cpu"), alone)


@every_dtype
def test_the_bits_of_a_token_depend_on_no_other_token(dtype):
    inputs = make_inputs(50, 70, 40_000, 20, dtype=dtype)
    everything = neurons(inputs, "cpu"), values(inputs, "cpu")
    kept = torch.tensor([7, 3, 49, 3])
    some = replace(inputs, x=inputs.x[kept], experts=inputs.experts[kept], weights=inputs.weights[kept])
    for actual, all_ in zip((neurons(some, "cpu"), values(some, "cpu")), everything, strict=True):
        assert torch.equal(actual, all_[kept])


def test_what_is_recorded_changes_no_bit():
    inputs = make_inputs(9, 20, 30, 4)
    assert torch.equal(gradients(neurons, inputs, ("x",), impl="cpu")["output"], neurons(inputs, "cpu"))


@pytest.mark.parametrize("value", [1e-30, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "sigmoid"])
def test_activations_are_finite_and_right_far_from_zero(value, activation):
    inputs = make_inputs(2, 1, 2, 1)
    inputs = replace(inputs, x=torch.tensor([[value], [-value]]), down_table=torch.ones(2, 1))
    actual, exact = both(inputs, "cpu", activation), oracle(inputs, activation)
    for name, tensor in actual.items():
        expected = torch.from_numpy(exact[name])
        torch.testing.assert_close(tensor.double(), expected, rtol=4e-6, atol=1e-6 * value, msg=f"{name}: ".__add__)


# Memory, as in test_cpu_build: each tensor between two pages that nobody may touch

NEURONS_GUARDED = (
    GUARDED[: GUARDED.index("    def check(")].replace(
        "from fusedonemoe.testing", "from fusedonemoe.ops.cpu import neurons\n    from fusedonemoe.testing"
    )
    + """
    def results(x, ids, w, down, up, dy):
        y, s = neurons.experts_neurons(x, ids, w, down, up, "silu")
        out = [y, s, *neurons.experts_neurons_backward(dy, s, x, ids, w, down, up, "silu", (True,) * 4)]
        return [*out, neurons.experts_values(ids, w, up), *neurons.experts_values_backward(dy, ids, w, up, (True,) * 2)]

    for D, T, dtype in itertools.product((1, 17, 33, 64, 100, 256, 270), (1, 9), (torch.float32, torch.bfloat16, torch.float16)):
        ids = torch.randint(-1, 12, (T, 5))
        x, down, up, dy = (torch.randn(n, D).to(dtype) for n in (T, 11, 11, T))
        arguments = (x, ids, torch.rand(T, 5), down, up, dy)
        before = results(*arguments)
        real, native._new = native._new, empty
        after = results(*map(guard, arguments))
        native._new = real
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        kept.clear()
    print("checked")
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux")
@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_is_read_or_written_outside_of_a_tensor(side):
    assert finished(process(NEURONS_GUARDED, side))[0] == "checked"


# Other machines, sanitizers: this file's values once more, with kernels compiled otherwise


def run_the_values_tests(**environment):
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_neurons_cpu.py", "-k", "width or bits or blocks"]
    script = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, *{command!r}]).returncode)"
    out, _ = finished(process(script, **environment))
    assert " passed" in out and "skipped" not in out, out


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
@pytest.mark.parametrize(("level", "feature"), [("v2", "sse4_2"), ("v3", "avx2"), ("v4", "avx512vl")])
def test_every_instruction_set_computes_the_same(level, feature, tmp_path):
    if feature not in features():
        pytest.skip(f"this machine has no {feature}")
    run_the_values_tests(FUSEDONEMOE_CXXFLAGS=f"-march=x86-64-{level}", FUSEDONEMOE_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads gcc's libraries")
def test_sanitizers_find_nothing(tmp_path):
    compiler = build._compiler()
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    if "clang" in compiler or not found.startswith("/"):
        pytest.skip("no libasan of gcc")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
    environment = {"FUSEDONEMOE_CXXFLAGS": flags, "FUSEDONEMOE_CACHE_DIR": str(tmp_path), "ASAN_OPTIONS": "detect_leaks=0"}
    # Compiles; then refuses to load, the sanitizer not being preloaded.
    process("from fusedonemoe.ops.cpu import build; build.load()", **environment).communicate(timeout=600)
    assert len(list(tmp_path.iterdir())) == 1 and ROOT
    run_the_values_tests(**environment, LD_PRELOAD=found)
