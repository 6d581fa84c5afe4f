"""The compiled CPU kernels (impl="cpu"): values and gradients against the oracle, edges, and the promises about bits.

test_cpu_build.py runs this file, test_cpu_precision.py and test_select.py again, for other instruction sets and under sanitizers.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import reference
from fusedonemoe.ops.cpu import commands, native
from fusedonemoe.testing import (
    ROUTINGS,
    ErrorNorms,
    MLPInputs,
    assert_within_budget,
    error_norms,
    exact_float64,
    make_merged_inputs,
    make_mlp_inputs,
)
from tests.ops.test_experts_merged import plain_merged
from tests.ops.test_experts_mlp_precision import plain_experts
from tests.strategies import activations, gate_up_layouts, merged_inputs, mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FLOATS = {MLPInputs: ("x", "weights", "up_proj", "down_proj", "up_bias", "down_bias")}
ALPHA, LIMIT = 1.3, 0.8  # neither is the default, and the limit clamps values of order one
FORMS = [
    *((name, True, layout) for name, layout in itertools.product(reference.GATED_ACTIVATIONS, reference.GATE_UP_LAYOUTS)),
    *((name, False, "gate_up") for name in reference.ACTIVATIONS),
]
# In float32 no sum here is longer than 600 terms, and a chain of fused multiply-adds is off by about eps sqrt(terms) / 2.
TIGHT = 4e-6
# As in test_experts_mlp_precision: which of two sound roundings is further off in one draw is chance.
FACTOR = 4.0
# A vector is 4, 8 or 16 tokens, a tile of the forward one or two vectors, one of the backward up to 6 rows.
TOKENS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65)
# A tile is at most 24 rows of weights; a task of the forward 256 KiB of them; a panel of the backward 64 columns, a
# strip of a gradient LANES.
WIDTHS = [(1, 1), (1, 37), (37, 1), (17, 33), (33, 17), (64, 48), (100, 37), (130, 515), (515, 130)]


def names_of(inputs):
    names = FLOATS.get(type(inputs), ("x", "weights", "proj"))
    return [name for name in names if getattr(inputs, name) is not None]


def run(inputs, impl="cpu", **options):
    """The public function on a set of inputs, or plain PyTorch, every step rounded to the dtype of x."""
    if impl == "plain":
        form = (options.get("activation", "silu"), options.get("gated", True), options.get("gate_up_layout", "gate_up"))
        return plain_experts(inputs, *form) if isinstance(inputs, MLPInputs) else plain_merged(inputs)
    if not isinstance(inputs, MLPInputs):
        return F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl=impl)
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
    return F.experts_mlp(*arguments, gate_up_bias=inputs.up_bias, down_bias=inputs.down_bias, impl=impl, **options)


def random_like(tensor, seed=99):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


def gradients(inputs, impl="cpu", *, wanted=None, dy=None, **options):
    """The output and, by name, the gradients of the tensors that are ``wanted``."""
    wanted = names_of(inputs) if wanted is None else wanted
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name in wanted) for name in names_of(inputs)}
    y = run(replace(inputs, **leaves), impl, **options)
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], random_like(y) if dy is None else dy)
    return {"output": y.detach(), **dict(zip(wanted, grads, strict=True))}


def oracle(inputs, **options):
    """As :func:`gradients`, in float64."""
    options = {name: value for name, value in options.items() if name != "save_percent"}
    name = "experts_mlp" if isinstance(inputs, MLPInputs) else "experts_merged"
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()}
    y = getattr(reference, name)(**arrays, **options)
    dy = random_like(torch.empty(y.shape, dtype=inputs.x.dtype))
    grads = getattr(reference, f"{name}_backward")(exact_float64(dy), **arrays, **options)
    return {"output": y, **{name: getattr(grads, name) for name in names_of(inputs)}}


def assert_as_exact_as_can_be(inputs, **options):
    """float32 within a few roundings of the oracle; half precision within a multiple of the error of impl="grouped".

    Of float16, of the error of plain PyTorch: grouped computes that in float32.
    """
    actual, exact = gradients(inputs, **options), oracle(inputs, **options)
    if inputs.x.dtype != torch.float32:
        plain = gradients(inputs, "plain" if inputs.x.dtype == torch.float16 else "grouped", **options)
        for name, tensor in actual.items():
            assert_within_budget(tensor, plain[name], exact[name], factor=FACTOR, name=name)
        return
    for name, tensor in actual.items():
        scale, error = ErrorNorms.of(exact[name]), error_norms(tensor, exact[name])
        assert tensor.dtype == (inputs.weights.dtype if name == "weights" else inputs.x.dtype)
        assert error.max_abs <= TIGHT * scale.max_abs and error.rms <= TIGHT * scale.rms, f"{name}: {error} of {scale}"


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Values and gradients


@pytest.mark.parametrize(("activation", "gated", "layout"), FORMS)
@every_dtype
def test_every_form_equals_the_oracle(activation, gated, layout, dtype):
    form: dict[str, Any] = {"activation": activation, "gated": gated, "gate_up_layout": layout}
    for bias in (False, True):
        if bias and activation == "relu" and dtype != torch.float32:
            continue  # relu's slope jumps at 0: where z is rounded to either side of it, no two results agree
        inputs = make_mlp_inputs(19, 21, 35, 4, 2, dtype=dtype, gated=gated, bias=bias, routing="out_of_range")
        assert_as_exact_as_can_be(inputs, **form, swiglu_alpha=ALPHA, swiglu_limit=LIMIT)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@every_dtype
def test_every_width_equals_the_oracle(widths, gated, dtype):
    D, F_ = widths
    inputs = make_mlp_inputs(9, D, F_, 3, 2, dtype=dtype, gated=gated, bias=True)
    assert_as_exact_as_can_be(inputs, gated=gated, gate_up_layout="interleaved" if gated else "gate_up")
    assert_as_exact_as_can_be(make_merged_inputs(9, D, F_, 3, 2, dtype=dtype))


@pytest.mark.parametrize("T", TOKENS)
@every_dtype
def test_every_number_of_tokens_on_one_expert_equals_the_oracle(T, dtype):
    assert_as_exact_as_can_be(make_mlp_inputs(T, 19, 23, 1, 1, dtype=dtype, bias=True))
    assert_as_exact_as_can_be(make_mlp_inputs(T, 19, 23, 3, 1, dtype=dtype, gated=False, routing="one_expert"), gated=False)
    assert_as_exact_as_can_be(make_merged_inputs(T, 19, 23, 3, 1, dtype=dtype, routing="one_expert"))


@pytest.mark.parametrize("T", [241, 500])
@every_dtype
def test_rows_beyond_one_packing_and_sums_beyond_one_chunk_equal_the_oracle(T, dtype):
    assert_as_exact_as_can_be(make_mlp_inputs(T, 530, 40, 1, 1, dtype=dtype))
    assert_as_exact_as_can_be(make_merged_inputs(T, 530, 40, 1, 1, dtype=dtype))


@pytest.mark.parametrize("widths", [(256, 272), (272, 256), (257, 273)], ids=str)
@every_dtype
def test_gradients_too_large_for_a_cache_equal_the_oracle(widths, dtype):
    # Written past the caches where rows are whole lines, and with a part of a tile at the end; (257, 273) are not.
    shape = (24, *widths, 64 if dtype == torch.float32 else 128, 4)
    assert_as_exact_as_can_be(make_mlp_inputs(*shape, dtype=dtype))
    assert_as_exact_as_can_be(make_merged_inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("EK", [(6, 3), (3, 3), (40, 4)], ids=str)
@every_dtype
def test_every_routing_equals_the_oracle(routing, EK, dtype):
    assert_as_exact_as_can_be(make_mlp_inputs(30, 20, 24, *EK, dtype=dtype, bias=True, routing=routing))
    assert_as_exact_as_can_be(make_merged_inputs(30, 20, 24, *EK, dtype=dtype, routing=routing))


@given(mlp_inputs(), st.data())
def test_any_mlp_equals_the_oracle(inputs, data):
    gated = inputs.up_proj.shape[1] == 2 * inputs.down_proj.shape[2]
    layout = data.draw(gate_up_layouts) if gated else "gate_up"
    options = {"activation": data.draw(activations), "gated": gated, "gate_up_layout": layout}
    actual = gradients(inputs, **options, save_percent=data.draw(st.integers(0, 100)))
    for name, exact in oracle(inputs, **options).items():
        # Of order one, but a single element may be a difference of such.
        assert_close(actual[name].double(), torch.from_numpy(exact), rtol=2e-5, atol=2e-5, msg=f"{name}: ".__add__)


@given(merged_inputs())
def test_any_merged_projection_equals_the_oracle(inputs):
    actual = gradients(inputs)
    for name, exact in oracle(inputs).items():
        assert_close(actual[name].double(), torch.from_numpy(exact), rtol=2e-5, atol=2e-5, msg=f"{name}: ".__add__)


@pytest.mark.parametrize("value", [1e-30, 1.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("activation", reference.GATED_ACTIVATIONS)
def test_activations_are_finite_and_right_far_from_zero(value, sign, activation):
    inputs = make_mlp_inputs(1, 1, 1, 1, 1)
    ones = {name: torch.ones_like(getattr(inputs, name)) for name in ("weights", "up_proj", "down_proj")}
    inputs = replace(inputs, x=torch.full((1, 1), sign * value), **ones)
    actual, exact = gradients(inputs, activation=activation), oracle(inputs, activation=activation)
    for name, tensor in actual.items():
        assert_close(tensor.double(), torch.from_numpy(exact[name]), rtol=2e-6, atol=1e-7 * value, msg=f"{name}: ".__add__)


def test_an_intermediate_size_of_zero_is_no_accident():
    mlp, merged = make_mlp_inputs(4, 5, 1, 3, 2, bias=True), make_merged_inputs(4, 5, 1, 3, 2)
    empty = {name: getattr(mlp, name)[:, :0] for name in ("up_proj", "up_bias")}
    mlp = replace(mlp, **empty, down_proj=mlp.down_proj[..., :0].contiguous())
    for inputs in (mlp, replace(merged, proj=merged.proj[..., :0].contiguous())):
        expected = gradients(inputs, "grouped")
        for name, tensor in gradients(inputs).items():
            assert_close(tensor, expected[name])


# Ids and weights of routing


@pytest.mark.parametrize("id_dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32, torch.uint64])
@pytest.mark.parametrize("E", [4, 130, 300])
def test_any_integer_dtype_of_ids(id_dtype, E):
    top = torch.iinfo(id_dtype).max
    ids = torch.tensor([[0, 3, min(top, 2**62)], [2**31, -1, 1], [2, 2, 0], [-(2**40), E % 100, 3]])
    experts = ids.clamp(torch.iinfo(id_dtype).min, min(top, 2**62)).to(id_dtype)
    wide = experts.to(torch.int64)
    for inputs in (make_mlp_inputs(4, 5, 3, E, 3, bias=True), make_merged_inputs(4, 5, 3, E, 3)):
        assert_as_exact_as_can_be(replace(inputs, experts=wide))
        assert_same_bits(gradients(replace(inputs, experts=experts)), gradients(replace(inputs, experts=wide)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_dtype
def test_a_weight_standing_at_an_id_out_of_range_is_never_read(value, dtype):
    shape, options = (20, 9, 7, 4, 3), {"dtype": dtype, "routing": "out_of_range"}
    for inputs in (make_mlp_inputs(*shape, **options, bias=True), make_merged_inputs(*shape, **options)):
        outside = (inputs.experts < 0) | (inputs.experts >= 4)
        poisoned = gradients(replace(inputs, weights=torch.where(outside, value, inputs.weights)))
        assert_same_bits(poisoned, gradients(inputs))
        assert (poisoned["output"][-1] == 0).all() and (poisoned["x"][-1] == 0).all()
        assert (poisoned["weights"][outside] == 0).all() and (poisoned["weights"][~outside] != 0).all()


def test_no_id_in_range_gives_zeros():
    experts = torch.tensor([[-1, 4], [4, 2**40], [-(2**40), 1000]])
    for inputs in (make_mlp_inputs(3, 5, 3, 4, 2, bias=True), make_merged_inputs(3, 5, 3, 4, 2)):
        nowhere = replace(inputs, experts=experts, weights=torch.full((3, 2), torch.nan))
        for save_percent in (0, 100) if isinstance(inputs, MLPInputs) else (None,):
            options = {} if save_percent is None else {"save_percent": save_percent}
            for name, tensor in gradients(nowhere, **options).items():
                assert (tensor == 0).all(), name


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@every_dtype
def test_an_expert_that_holds_no_numbers_poisons_nothing_where_it_is_not_routed(value, dtype):
    experts = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 7], [1, 1], [3, 3]])
    for inputs in (make_mlp_inputs(6, 9, 7, 4, 2, dtype=dtype, bias=True), make_merged_inputs(6, 9, 7, 4, 2, dtype=dtype)):
        routed = replace(inputs, experts=experts)
        clean = gradients(routed)
        for name in names_of(inputs)[2:]:
            getattr(inputs, name)[2] = value
        assert_same_bits(gradients(routed), clean)


@pytest.mark.parametrize("T", [3, 16, 40])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@every_dtype
def test_a_token_that_is_no_number_stays_by_itself(T, value, dtype):
    for inputs in (make_mlp_inputs(T, 9, 7, 3, 2, dtype=dtype, bias=True), make_merged_inputs(T, 9, 7, 3, 2, dtype=dtype)):
        clean = gradients(inputs)
        x = inputs.x.clone()
        x[1] = value
        poisoned = gradients(replace(inputs, x=x))
        others = torch.arange(T) != 1
        assert not torch.isfinite(poisoned["output"][1]).any()
        for name in ("output", "x", "weights"):
            assert torch.equal(poisoned[name][others], clean[name][others]), name


@pytest.mark.parametrize("weights_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_dtype
def test_every_dtype_of_routing_weights(weights_dtype, dtype):
    shape, options = (12, 9, 7, 4, 3), {"dtype": dtype, "weights_dtype": weights_dtype}
    for inputs in (make_mlp_inputs(*shape, **options, bias=True), make_merged_inputs(*shape, **options)):
        actual = gradients(inputs)
        assert actual["weights"].dtype == weights_dtype and actual["output"].dtype == dtype
        wide = gradients(replace(inputs, weights=inputs.weights.float()))
        assert_same_bits(actual, {**wide, "weights": wide["weights"].to(weights_dtype)})


# Strides


def restrided(tensor):
    """The same values: transposed storage, and every second element of a wider tensor."""
    swapped = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack((swapped, torch.full_like(swapped, 7)), dim=-1)[..., 0]


@every_dtype
def test_what_belongs_to_tokens_need_not_be_contiguous(dtype):
    for inputs in (make_mlp_inputs(10, 6, 4, 5, 3, dtype=dtype, bias=True), make_merged_inputs(10, 6, 4, 5, 3, dtype=dtype)):
        expected = gradients(inputs)
        names = [name for name in ("x", "experts", "weights", "up_bias", "down_bias") if hasattr(inputs, name)]
        strided = replace(inputs, **{name: restrided(getattr(inputs, name)) for name in names})
        assert not any(getattr(strided, name).is_contiguous() for name in names)
        dy = random_like(expected["output"])
        for given_ in (restrided(dy), dy):
            assert_same_bits(gradients(strided, dy=given_), expected)
        broadcast = gradients(inputs, dy=torch.ones((), dtype=dtype).expand_as(dy))
        assert_same_bits(broadcast, gradients(inputs, dy=torch.ones_like(dy)))


def test_expert_weights_have_to_be_contiguous():
    mlp, merged = make_mlp_inputs(10, 6, 4, 5, 3, bias=True), make_merged_inputs(10, 6, 4, 5, 3)
    changes: list[Any] = [(mlp, "up_proj"), (mlp, "down_proj"), (merged, "proj")]
    for inputs, name in changes:
        strided = replace(inputs, **{name: restrided(getattr(inputs, name))})
        with pytest.raises(ValueError, match=r"^impl='cpu' cannot run here: the CPU kernels read contiguous expert weights$"):
            run(strided)
        assert_same_bits(gradients(strided, "auto"), gradients(strided, "grouped"))
        assert_same_bits(gradients(inputs, "auto"), gradients(inputs))
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, not float64$"):
        run(make_merged_inputs(2, 3, 4, 2, 1, dtype=torch.float64))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0)])
def test_leading_dimensions_are_kept(leading):
    T = torch.Size(leading).numel()
    for flat in (make_mlp_inputs(T, 5, 3, 4, 2, bias=True), make_merged_inputs(T, 5, 3, 4, 2)):
        shapes = {"x": (*leading, 5), "experts": (*leading, 2), "weights": (*leading, 2)}
        shaped = replace(flat, **{name: getattr(flat, name).reshape(shape) for name, shape in shapes.items()})
        expected = gradients(flat)
        dy = random_like(expected["output"])
        for name, tensor in gradients(shaped, dy=dy.reshape(*leading, dy.shape[1])).items():
            of_tokens = name in ("output", *shapes)
            assert tensor.shape == ((*leading, expected[name].shape[1]) if of_tokens else expected[name].shape)
            assert torch.equal(tensor.reshape(expected[name].shape), expected[name])


# What is asked for, and what is kept


@every_dtype
def test_each_set_of_wanted_gradients_gets_the_bits_of_all(dtype):
    for inputs in (make_mlp_inputs(7, 9, 11, 3, 2, dtype=dtype, bias=True), make_merged_inputs(7, 9, 11, 3, 2, dtype=dtype)):
        names = names_of(inputs)
        everything = gradients(inputs)
        for count in range(1, len(names)):
            for wanted in itertools.combinations(names, count):
                assert_same_bits(gradients(inputs, wanted=wanted), {n: everything[n] for n in ("output", *wanted)})


@pytest.mark.parametrize(
    ("activation", "gated", "layout"), [("silu", True, "gate_up"), ("gelu", True, "interleaved"), ("relu2", False, "gate_up")]
)
@pytest.mark.parametrize("routing", ["uniform", "out_of_range", "one_expert"])
@every_dtype
def test_save_percent_changes_no_bit(activation, gated, layout, routing, dtype):
    inputs = make_mlp_inputs(61, 18, 25, 4, 3, dtype=dtype, gated=gated, bias=True, routing=routing)
    form: dict[str, Any] = {"activation": activation, "gated": gated, "gate_up_layout": layout}
    everything = gradients(inputs, **form, save_percent=100)
    for save_percent in (0, 1, 37, 99):
        assert_same_bits(gradients(inputs, **form, save_percent=save_percent), everything)
    with torch.no_grad():
        assert torch.equal(run(inputs, **form), everything["output"])


# Promises about bits


@pytest.fixture
def set_threads(small_thresholds):
    """Sets torch's number of threads, and lets the kernels use them for however little work."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(65, 33, 47, 8, 3), (130, 90, 515, 3, 2), (3, 64, 64, 16, 4)], ids=str)
@every_dtype
def test_equal_inputs_give_equal_bits_on_any_number_of_threads(shape, dtype, set_threads):
    for inputs in (
        make_mlp_inputs(*shape, dtype=dtype, bias=True, routing="skewed"),
        make_merged_inputs(*shape, dtype=dtype, routing="skewed"),
    ):
        set_threads(1)
        alone = gradients(inputs)
        for threads in (1, 2, 2, 5):
            set_threads(threads)
            assert_same_bits(gradients(inputs), alone)


@pytest.mark.parametrize(("hidden", "inner"), [(33, 47), (64, 600)], ids=str)
@every_dtype
def test_an_expert_done_by_one_thread_gets_the_bits_of_one_done_by_all(hidden, inner, dtype, set_threads):
    # One thread does all of an expert where there are eight times as many, about equal ones, as threads.
    for count in (24, 200):
        inputs = make_mlp_inputs(count, hidden, inner, 24, 3, dtype=dtype, bias=True)
        inputs = replace(inputs, experts=(torch.arange(3 * count) % 23).reshape(count, 3))
        results = []
        for threads in (1, 2, 3, 5):
            set_threads(threads)
            results.append(gradients(inputs))
        for result in results[1:]:
            assert_same_bits(result, results[0])


def test_no_sum_is_left_to_chance():
    text = "".join(path.read_text() for path in Path(commands.SOURCES).iterdir())
    assert "omp atomic" not in text and "reduction(" not in text and "atomic<float" not in text and "atomic<double" not in text
    assert not any(flag in ("-ffast-math", "-Ofast", "-fassociative-math") for flag in commands.FLAGS)


@st.composite
def batches(draw):
    """A layer, a batch of up to 80 tokens, and another batch made of some of its tokens in some order."""
    E, T = draw(st.integers(1, 6)), draw(st.integers(1, 80))
    shape = (T, draw(st.integers(1, 70)), draw(st.integers(1, 70)), E, draw(st.integers(1, 3)))
    options = {"dtype": draw(st.sampled_from(DTYPES)), "seed": draw(st.integers(0, 2**16))}
    options["routing"] = draw(st.sampled_from(["uniform", "one_expert", "out_of_range"]))
    if draw(st.booleans()):
        inputs: Any = make_mlp_inputs(*shape, **options, gated=draw(st.booleans()), bias=draw(st.booleans()))
    else:
        inputs = make_merged_inputs(*shape, **options)
    return inputs, draw(st.lists(st.integers(0, T - 1), min_size=1, max_size=80))


@given(batches(), st.sampled_from(["silu", "gelu", "sigmoid"]))
@settings(max_examples=200)
def test_the_bits_of_a_token_depend_on_no_other_token(batch, activation):
    inputs, kept = batch
    form: dict[str, Any] = {}
    if isinstance(inputs, MLPInputs):
        form = {"activation": activation, "gated": inputs.up_proj.shape[1] == 2 * inputs.down_proj.shape[2]}
    some = replace(inputs, **{name: getattr(inputs, name)[kept] for name in ("x", "experts", "weights")})
    assert torch.equal(run(some, **form), run(inputs, **form)[kept])
