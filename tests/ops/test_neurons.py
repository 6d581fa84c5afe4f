"""Single-neuron experts and value memory: values and gradients against the oracle, registration, compilation, edges, messages."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.ops import library, reference
from fusedonemoe.ops import neurons as formulation
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.reference import neurons as reference_neurons
from fusedonemoe.testing import assert_within_budget, exact_float64, make_experts

_REFUSAL = native.refusal(torch.float32, True)
IMPLS = ("dense", "grouped", "portable", "cpu")
NAMES = ("x", "weights", "down_table", "up_table")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
CPU = pytest.param("cpu", marks=needs_kernels)
every_impl = pytest.mark.parametrize("impl", ["dense", "grouped", CPU])
every_operator = pytest.mark.parametrize("impl", ["grouped", CPU])


@dataclass
class Inputs:
    """Arguments of experts_neurons; those of experts_values are among them."""

    x: Tensor
    experts: Tensor
    weights: Tensor
    down_table: Tensor
    up_table: Tensor


def make_inputs(T, D, E, K, *, dtype=torch.float32, weights_dtype=None, routing="uniform", seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(dtype)

    weights = torch.rand(T, K, generator=draw, dtype=torch.float64) + 0.1
    weights_dtype = weights_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    experts = make_experts(T, E, K, routing=routing, seed=seed + 1)
    return Inputs(normal(T, D), experts, weights.to(weights_dtype), normal(E, D, scale=D**-0.5), normal(E, D))


def neurons(inputs, impl, activation="silu"):
    return F.experts_neurons(*vars(inputs).values(), activation=activation, impl=impl)


def values(inputs, impl):
    return F.experts_values(inputs.experts, inputs.weights, inputs.up_table, impl=impl)


def random_like(tensor, seed=99):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


def gradients(function, inputs, wanted, **options):
    """The output and the gradients of ``wanted``, by name."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name in wanted) for name in NAMES}
    y = function(replace(inputs, **leaves), **options)
    return {
        "output": y.detach(),
        **dict(zip(wanted, torch.autograd.grad(y, [leaves[n] for n in wanted], random_like(y)), strict=True)),
    }


def both(inputs, impl, activation="silu"):
    """Outputs and gradients of both functions."""
    results = gradients(neurons, inputs, NAMES, impl=impl, activation=activation)
    of_values = gradients(values, inputs, ("weights", "up_table"), impl=impl)
    return results | {f"values of {name}": tensor for name, tensor in of_values.items()}


def oracle(inputs, activation="silu"):
    arrays = {name: exact_float64(value) for name, value in vars(inputs).items()}
    y = reference_neurons.experts_neurons(**arrays, activation=activation)
    dy = exact_float64(random_like(torch.empty(y.shape, dtype=inputs.x.dtype)))
    grads = reference_neurons.experts_neurons_backward(dy, **arrays, activation=activation)
    table = (arrays["experts"], arrays["weights"], arrays["up_table"])
    of_values = reference_neurons.experts_values_backward(dy, *table)
    return {
        "output": y,
        **vars(grads),
        "values of output": reference_neurons.experts_values(*table),
        "values of weights": of_values.weights,
        "values of up_table": of_values.table,
    }


def assert_equals_the_oracle(inputs, impl, activation="silu"):
    actual, exact = both(inputs, impl, activation), oracle(inputs, activation)
    plain = both(inputs, "dense", activation)
    for name, tensor in actual.items():
        # Which of two sound roundings is further off in one draw is chance.
        assert_within_budget(tensor, plain[name], exact[name], factor=4.0, slack=8.0, name=name)


# Values and gradients


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        *itertools.product(("dense", "grouped"), DTYPES),
        *(pytest.param("cpu", dtype, marks=needs_kernels) for dtype in DTYPES if dtype != torch.float64),  # the kernels have none
    ],
    ids=str,
)
def test_every_activation_equals_the_oracle(activation, dtype, impl):
    assert_equals_the_oracle(make_inputs(13, 21, 9, 4, dtype=dtype, routing="out_of_range"), impl, activation)


@pytest.mark.parametrize("shape", [(1, 8, 5, 2), (6, 1, 7, 3), (9, 16, 4, 4), (9, 5, 1, 1), (4, 3, 300, 2)], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "one_expert"])
@every_impl
def test_every_shape_equals_the_oracle(shape, routing, impl):
    if routing == "one_expert" and shape[3] > 1:
        routing = "skewed"
    assert_equals_the_oracle(make_inputs(*shape, routing=routing), impl)


@every_impl
def test_an_expert_twice_in_a_token_counts_twice(impl):
    inputs = replace(make_inputs(3, 7, 5, 3), experts=torch.tensor([[2, 2, 2], [0, 4, 0], [-1, 1, 1]]))
    assert_equals_the_oracle(inputs, impl)


@every_impl
def test_no_token_and_no_expert_in_range_give_zeros(impl):
    empty = both(make_inputs(0, 6, 5, 2), impl)
    assert empty["output"].shape == (0, 6) and empty["weights"].shape == (0, 2) and empty["x"].shape == (0, 6)
    assert empty["down_table"].shape == (5, 6) and not empty["down_table"].any() and not empty["up_table"].any()
    inputs = make_inputs(3, 6, 5, 2)
    nowhere = replace(inputs, experts=torch.tensor([[-1, 5], [5, 2**40], [-(2**40), 7]]), weights=torch.full((3, 2), torch.nan))
    for name, tensor in both(nowhere, impl).items():
        assert (tensor == 0).all(), name


@pytest.mark.parametrize("id_dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32], ids=str)
@every_impl
def test_any_integer_dtype_of_ids(id_dtype, impl):
    inputs = replace(make_inputs(2, 5, 200, 3), experts=torch.tensor([[0, 100, 127], [3, 3, 20]]))
    expected = both(inputs, impl)
    for name, tensor in both(replace(inputs, experts=inputs.experts.to(id_dtype)), impl).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@every_operator
def test_a_row_without_numbers_reaches_nobody_it_was_not_routed_to(value, impl):
    inputs = replace(make_inputs(4, 9, 6, 2), experts=torch.tensor([[1, 3], [-1, 6], [3, -1], [9, 5]]))
    clean = both(inputs, impl)
    for table in (inputs.down_table, inputs.up_table):
        table[[0, 2, 4]] = value
    for name, tensor in both(inputs, impl).items():
        assert torch.equal(tensor, clean[name]), name
    inputs.x[1] = value  # a token that goes nowhere
    for name, tensor in both(inputs, impl).items():
        assert torch.equal(tensor, clean[name]), name


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_in_dense_a_row_of_the_down_table_without_numbers_reaches_no_token_that_was_not_routed_to_it(value):
    inputs = replace(make_inputs(4, 9, 6, 2), experts=torch.tensor([[1, 3], [-1, 6], [3, -1], [9, 5]]))
    clean = gradients(neurons, inputs, NAMES, impl="dense")
    inputs.down_table[[0, 2, 4]] = value
    for name, tensor in gradients(neurons, inputs, NAMES, impl="dense").items():
        assert torch.equal(tensor, clean[name]), name


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("impl", ["dense", "portable", "grouped", CPU])
def test_a_token_without_numbers_reaches_the_gradients_of_its_own_experts_alone(value, impl):
    inputs = replace(make_inputs(4, 9, 6, 2), experts=torch.tensor([[1, 3], [-1, 6], [3, -1], [0, 5]]))
    clean = gradients(neurons, inputs, NAMES, impl=impl)
    inputs.x[0] = value
    for name, tensor in gradients(neurons, inputs, NAMES, impl=impl).items():
        touched = [1, 3] if name.endswith("table") else [0]
        others = [row for row in range(tensor.shape[0]) if row not in touched]
        assert torch.equal(tensor[others], clean[name][others]), name


@pytest.mark.parametrize("weights_dtype", [torch.float64, torch.bfloat16], ids=str)
@every_impl
def test_routing_weights_of_another_dtype(weights_dtype, impl):
    inputs = make_inputs(5, 8, 6, 3, weights_dtype=weights_dtype)
    actual, exact = both(inputs, impl), oracle(inputs)
    assert actual["weights"].dtype == weights_dtype and actual["output"].dtype == torch.float32
    tolerance = 1e-2 if weights_dtype == torch.bfloat16 else 1e-5
    for name, tensor in actual.items():
        assert torch.allclose(tensor.double(), torch.from_numpy(exact[name]), rtol=tolerance, atol=tolerance / 10), name


@every_impl
def test_leading_dimensions_and_strides(impl):
    inputs = make_inputs(6, 8, 5, 2)
    expected = both(inputs, impl)
    shaped = replace(
        inputs,
        x=inputs.x.t().contiguous().t().reshape(2, 3, 8),
        experts=inputs.experts.reshape(2, 3, 2),
        weights=torch.stack((inputs.weights, inputs.weights), -1)[..., 0].reshape(2, 3, 2),
    )
    # A plain product may round otherwise for other strides.
    torch.testing.assert_close(neurons(shaped, impl).reshape(6, 8), expected["output"])
    torch.testing.assert_close(values(shaped, impl).reshape(6, 8), expected["values of output"])


@every_operator
def test_each_wanted_gradient_gets_the_bits_of_all(impl):
    inputs = make_inputs(7, 9, 5, 3)
    everything = both(inputs, impl)
    for name in NAMES:
        assert torch.equal(gradients(neurons, inputs, (name,), impl=impl)[name], everything[name]), name
    for name in ("weights", "up_table"):
        assert torch.equal(gradients(values, inputs, (name,), impl=impl)[name], everything[f"values of {name}"]), name


# Derivatives, registration, compilation


@pytest.mark.parametrize("impl", ["dense", "grouped"])
def test_gradcheck(impl):
    inputs = make_inputs(4, 5, 6, 3, dtype=torch.float64, routing="out_of_range")
    leaves = [getattr(inputs, name).requires_grad_() for name in NAMES]

    def run(x, weights, down, up):
        return F.experts_neurons(x, inputs.experts, weights, down, up, activation="gelu", impl=impl)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(lambda w, t: F.experts_values(inputs.experts, w, t, impl=impl), [leaves[1], leaves[3]])
    if impl == "dense":
        assert torch.autograd.gradgradcheck(run, leaves)
        return
    (grad,) = torch.autograd.grad(run(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@every_operator
@pytest.mark.parametrize("T", [0, 5])
def test_opcheck(impl, T):
    inputs = make_inputs(T, 6, 5, 3)
    for name in NAMES:
        getattr(inputs, name).requires_grad_()
    ops, arguments = torch.ops.fusedonemoe, vars(inputs).values()
    torch.library.opcheck(ops.experts_neurons.default, (*arguments, "silu", library.BUILD, impl))
    torch.library.opcheck(ops.experts_values.default, (inputs.experts, inputs.weights, inputs.up_table, library.BUILD, impl))
    fixed = [a.detach() for a in arguments]
    dy, s = torch.randn(T, 6), torch.randn(T, 3)
    for needs in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(ops.experts_neurons_backward.default, (dy, s, *fixed, "silu", needs, library.BUILD, impl))
    backward: Any = (dy, fixed[1], fixed[2], fixed[4], [True, False], library.BUILD, impl)
    torch.library.opcheck(ops.experts_values_backward.default, backward)


@every_impl
def test_compiles_without_breaks_and_for_any_number_of_tokens(impl):
    def run(x, experts, weights, down, up):
        y = F.experts_neurons(x, experts, weights, down, up, impl=impl)
        return y + F.experts_values(experts, weights, up, impl=impl)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    torch.compiler.reset()
    for T in (5, 9):
        inputs = make_inputs(T, 8, 7, 3)
        for name in NAMES:
            getattr(inputs, name).requires_grad_()
        leaves = [getattr(inputs, name) for name in NAMES]
        outputs = [function(*vars(inputs).values()) for function in (compiled, run)]
        torch.testing.assert_close(*outputs)
        grads = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in outputs]
        torch.testing.assert_close(*grads)


def test_autocast_computes_in_its_dtype():
    inputs = make_inputs(5, 8, 6, 3)
    half = replace(inputs, **{name: getattr(inputs, name).bfloat16() for name in ("x", "down_table", "up_table")})
    for impl in IMPLS if _REFUSAL is None else IMPLS[:-1]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, v = neurons(inputs, impl), values(inputs, impl)
        assert y.dtype == v.dtype == torch.bfloat16
        assert torch.equal(y, neurons(half, impl)) and torch.equal(v, values(half, impl))


def test_no_tensor_of_gathered_rows_exists():
    # T * K * D elements would be 128 MiB; the largest tensor an operator makes here is the table's.
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    inputs = make_inputs(64, 128, 200, 64)
    ids, weights = inputs.experts, inputs.weights
    with Largest() as seen:
        _, s = formulation.experts_neurons(inputs.x, ids, weights, inputs.down_table, inputs.up_table, "silu")
        formulation.experts_neurons_backward(
            inputs.x,
            s,
            inputs.x,
            ids,
            weights,
            inputs.down_table,
            inputs.up_table,
            "silu",
            formulation.NeuronNeeds(*[True] * 4),
        )
    assert 0 < seen.elements <= 200 * 128


# Messages


def test_messages():
    good: dict[str, Any] = vars(make_inputs(5, 8, 6, 3))

    def call(**changed):
        return F.experts_neurons(**{**good, **changed})

    for changed, error, message in [
        (
            {"impl": "fast"},
            ValueError,
            "impl must be one of ('auto', 'dense', 'grouped', 'cpu', 'triton', 'portable'), got 'fast'",
        ),
        ({"activation": "swiglu_oai"}, ValueError, "activation must be one of ('silu', "),
        ({"down_table": torch.zeros(6, 7)}, ValueError, "up_table must have shape (6, 7), got (6, 8)"),
        ({"down_table": torch.zeros(6)}, ValueError, "down_table must have 2 dimensions [E, D], got shape (6,)"),
        ({"down_table": torch.zeros(0, 8)}, ValueError, "down_table must have shape [E, D] with E >= 1 and D >= 1, got (0, 8)"),
        ({"x": torch.zeros(5, 9)}, ValueError, "x must have shape [..., 8] to fit down_table, got (5, 9)"),
        ({"weights": torch.zeros(5, 2)}, ValueError, "weights must have shape (5, 3), got (5, 2)"),
        ({"experts": torch.zeros(5, 3)}, TypeError, "experts must have an integer dtype, got torch.float32"),
        (
            {"up_table": torch.zeros(6, 8).double()},
            TypeError,
            "up_table must have the dtype of x (torch.float32), got torch.float64",
        ),
    ]:
        with pytest.raises(error) as caught:
            call(**changed)
        assert str(caught.value).startswith(message), str(caught.value)
    for arguments, error, message in [
        ((good["experts"], good["weights"][:4], good["up_table"]), ValueError, "weights must have shape (5, 3), got (4, 3)"),
        ((good["experts"], good["weights"], torch.zeros(6)), ValueError, "table must have 2 dimensions [E, D], got shape (6,)"),
        ((good["experts"], good["weights"], torch.zeros(6, 8).int()), TypeError, "table must be float64, float32, bfloat16"),
        (
            (torch.tensor(1), good["weights"], good["up_table"]),
            ValueError,
            "experts must have shape [..., K] with K >= 1, got ()",
        ),
    ]:
        with pytest.raises(error) as caught:
            F.experts_values(*arguments)
        assert str(caught.value).startswith(message), str(caught.value)


def test_a_named_implementation_that_cannot_run_says_why():
    wide = make_inputs(2, 4, 3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^impl='cpu' cannot run here: .*"):
        neurons(wide, "cpu")
    with pytest.raises(ValueError, match=r"^impl='triton' cannot run here: "):
        values(wide, "triton")
    assert torch.equal(neurons(wide, "auto"), neurons(wide, "grouped"))
    with pytest.raises(RuntimeError, match="need impl='dense'"):
        torch.func.vmap(lambda x: F.experts_neurons(x[None], wide.experts[:1], wide.weights[:1], wide.down_table, wide.up_table))(
            wide.x
        )
