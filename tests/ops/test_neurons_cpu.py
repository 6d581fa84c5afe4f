"""The compiled kernels of single-neuron experts and value memory: widths, cache blocks, promises about bits.

tests/ops/test_cpu_build.py runs this file again, for other instruction sets and under sanitizers.
"""

from dataclasses import replace

import pytest
import torch

from fusedonemoe.ops.cpu import native
from tests.ops.test_neurons import assert_equals_the_oracle, both, gradients, make_inputs, neurons, oracle, values

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
def set_threads(small_thresholds):
    """Sets torch's number of threads, and lets the kernels use them for however little work."""
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
