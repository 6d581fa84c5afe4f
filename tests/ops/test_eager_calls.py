"""Eager calls: each mode, subclass, profiler and trace sees the operators, and the bits are those of the operators."""

import itertools
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fusedonemoe import functional as F
from fusedonemoe.ops import library
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import MLPInputs, make_logits, make_merged_inputs, make_mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
MAKERS = pytest.mark.parametrize("make", [make_mlp_inputs, make_merged_inputs], ids=["mlp", "merged"])
T, D, K, E = 6, 9, 2, 3


def make_inputs(make, **options):
    return make(T, D, 7, E, K, **{"routing": "out_of_range", **options})


def run(inputs):
    """The public function on a set of inputs."""
    if not isinstance(inputs, MLPInputs):
        return F.experts_merged(*vars(inputs).values(), impl="cpu")
    *arguments, up_bias, down_bias = vars(inputs).values()
    return F.experts_mlp(*arguments, gate_up_bias=up_bias, down_bias=down_bias, impl="cpu")


def name_of(inputs):
    return "experts_mlp" if isinstance(inputs, MLPInputs) else "experts_merged"


def names_of(inputs, recording):
    """The operators, one of which a call runs: the whole one or that of its kernel."""
    name = name_of(inputs)
    kinds = [name] if recording or name == "experts_merged" else [f"{name}_inference"]
    return {kernel for kind in kinds for kernel in (kind, f"{kind}_cpu")}


def leaves_of(inputs):
    return [tensor for tensor in vars(inputs).values() if tensor is not None and tensor.requires_grad]


def map_tensors(function, inputs):
    return replace(inputs, **{name: function(value) for name, value in vars(inputs).items() if value is not None})


class Spy(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name().removeprefix("fusedonemoe::"))
        return func(*args, **(kwargs or {}))


class FunctionSpy(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func).removeprefix("fusedonemoe.").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    """A subclass of the kind that quantised and distributed tensors are: its memory is its own affair."""

    seen: set[str]
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        wrapper.held = held
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        cls.seen.add(func.name().removeprefix("fusedonemoe::"))
        return func(*tree_map(lambda a: a.held if isinstance(a, Wrapper) else a, args), **(kwargs or {}))


class Overriding(torch.Tensor):
    """A subclass that hears of functions only."""

    seen: set[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.add(str(func).removeprefix("fusedonemoe.").removesuffix(".default"))
        return super().__torch_function__(func, types, args, kwargs)


# Whoever watches sees the operator


def seen_by_dispatch_mode(inputs):
    with Spy() as spy:
        run(inputs)
    return spy.seen


def seen_by_function_mode(inputs):
    with FunctionSpy() as spy:
        run(inputs)
    return spy.seen


def seen_by_fake_tensors(inputs):
    mode = FakeTensorMode()
    fakes = map_tensors(mode.from_tensor, inputs)
    with Spy() as spy:
        assert type(run(fakes)) is type(fakes.x)  # the mode is off; the tensors bring it
    with mode:
        assert type(run(fakes)) is type(fakes.x)
    return spy.seen


def seen_by_flop_counter(inputs):
    with FlopCounterMode(display=False) as counter:
        run(inputs)
    return {str(name).removeprefix("fusedonemoe.") for counts in counter.get_flop_counts().values() for name in counts}


def seen_by_profiler(inputs):
    with torch.profiler.profile() as profile:
        run(inputs)
    return {event.key.removeprefix("fusedonemoe::") for event in profile.key_averages()}


def seen_by_autograd_profiler(inputs):
    with torch.autograd.profiler.profile() as profile:
        run(inputs)
    return {event.key.removeprefix("fusedonemoe::") for event in profile.key_averages()}


def traced_by_jit(inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks of shapes become constants of the trace, as it says
        traced = torch.jit.trace(lambda x: run(replace(inputs, x=x)), inputs.x, check_trace=False)
    return {node.kind().removeprefix("fusedonemoe::") for node in traced.graph.nodes()}


def _graph_of(inputs, **options):
    graph = make_fx(lambda x: run(replace(inputs, x=x)), **options)(inputs.x)
    return {str(node.target).removeprefix("fusedonemoe.").removesuffix(".default") for node in graph.graph.nodes}


def traced_by_make_fx(inputs):
    return _graph_of(inputs)


def traced_by_make_fx_before_dispatch(inputs):
    return _graph_of(inputs, pre_dispatch=True)


def traced_by_compile(inputs):
    seen: set[str] = set()

    def backend(graph, example_inputs):
        seen.update(str(node.target).removeprefix("fusedonemoe.") for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(run, backend=backend, fullgraph=True)(inputs)
    return seen


def seen_by_dispatching_subclass(inputs):
    Wrapper.seen = set()
    run(replace(inputs, x=Wrapper(inputs.x)))
    return Wrapper.seen


def seen_by_subclass_of_a_weight(inputs):
    Wrapper.seen = set()
    name = "up_proj" if isinstance(inputs, MLPInputs) else "proj"
    run(replace(inputs, **{name: Wrapper(getattr(inputs, name))}))
    return Wrapper.seen


def seen_by_overriding_subclass(inputs):
    Overriding.seen = set()
    run(replace(inputs, x=inputs.x.as_subclass(Overriding)))
    return Overriding.seen


WATCHERS = [value for name, value in list(globals().items()) if name.startswith(("seen_by", "traced_by"))]


@pytest.mark.parametrize("recording", [True, False], ids=["recording", "not recording"])
@pytest.mark.parametrize("watcher", WATCHERS, ids=lambda watcher: watcher.__name__)
@MAKERS
@needs_kernels
def test_every_watcher_sees_the_operator(make, watcher, recording):
    refuses_constants_that_require_gradients = watcher.__name__.startswith(("traced_by_make_fx", "traced_by_jit"))
    inputs = make_inputs(make, requires_grad=recording and not refuses_constants_that_require_gradients)
    with nullcontext() if recording else torch.no_grad():
        assert names_of(inputs, recording and not refuses_constants_that_require_gradients) & watcher(inputs)


@pytest.mark.parametrize("recording", [True, False], ids=["recording", "not recording"])
def test_a_mode_sees_routing(recording):
    logits = make_logits(T, E).requires_grad_(recording)
    with Spy() as spy:
        weights, _ = F.route(logits, K)
    assert spy.seen & {"route", "route_cpu"}
    if recording:
        with Spy() as spy:
            weights.sum().backward()
        assert spy.seen & {"route_backward", "route_cpu_backward"}


@MAKERS
@needs_kernels
def test_a_mode_that_comes_for_the_backward_sees_it(make):
    inputs = make_inputs(make, requires_grad=True)
    y = run(inputs)
    with Spy() as spy:
        y.sum().backward()
    assert spy.seen & {f"{name_of(inputs)}_backward", f"{name_of(inputs)}_cpu_backward"}


@MAKERS
@needs_kernels
def test_grad_fn_is_called_the_same(make):
    inputs = make_inputs(make, requires_grad=True)
    with torch.autocast("cpu"):  # which calls the whole operator
        expected = run(inputs).grad_fn.name()
    assert run(inputs).grad_fn.name() == expected == f"GeneratedBackwardFor_fusedonemoe_{name_of(inputs)}_defaultBackward"


@pytest.mark.parametrize(
    "context",
    [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", enabled=False)],
    ids=["grad", "no_grad", "inference", "autocast off"],
)
@MAKERS
@needs_kernels
def test_eager_calls_run_no_python_of_torch_library(make, context):
    inputs = make_inputs(make, requires_grad=True)
    files = set()

    def note(frame, event, argument):
        files.add(Path(frame.f_code.co_filename).as_posix())

    with context():
        run(inputs)
        sys.setprofile(note)
        try:
            run(inputs)
        finally:
            sys.setprofile(None)
    assert any(file.endswith("ops/library/registration.py") for file in files)
    assert not any("torch/_library/" in file for file in files)


# The same bits


@contextmanager
def operators_only():
    """Have calls and backward passes run the whole operators, as tracing does."""
    with patch("torch._C._is_tracing", lambda: True):
        yield


def no_tokens(inputs):
    return replace(inputs, **{name: getattr(inputs, name)[:0] for name in ("x", "experts", "weights")})


def leading_dimensions(inputs):
    return replace(inputs, **{name: getattr(inputs, name).unflatten(0, (2, -1)) for name in ("x", "experts", "weights")})


def one_token_without_leading_dimensions(inputs):
    return replace(inputs, **{name: getattr(inputs, name)[0] for name in ("x", "experts", "weights")})


def scattered(inputs):
    """Nothing but the expert weights is contiguous."""
    return replace(
        inputs, **{name: getattr(inputs, name).repeat_interleave(2, dim=-1)[:, ::2] for name in ("x", "experts", "weights")}
    )


def negated(inputs):
    """x with the negative bit set, which the dispatcher resolves."""
    return replace(inputs, x=torch.complex(inputs.x, inputs.x).conj().imag)


FORMS = {
    "plain": lambda inputs: inputs,
    "int32 ids": lambda inputs: replace(inputs, experts=inputs.experts.int()),
    "bfloat16 weights": lambda inputs: replace(inputs, weights=inputs.weights.bfloat16()),
    "no tokens": no_tokens,
    "leading dimensions": leading_dimensions,
    "one token": one_token_without_leading_dimensions,
    "scattered": scattered,
    "negative": negated,
}


@pytest.mark.parametrize("recording", [True, False], ids=["recording", "not recording"])
@pytest.mark.parametrize(
    ("form", "dtype"),
    # A tensor gets its negative bit through complex numbers, and there is no complex bfloat16.
    [case for case in itertools.product(FORMS, (torch.float32, torch.bfloat16)) if case != ("negative", torch.bfloat16)],
    ids=str,
)
@MAKERS
@needs_kernels
def test_the_bits_are_the_operator_s(make, form, dtype, recording):
    options = {"bias": True} if make is make_mlp_inputs else {}
    # Leaves are made first, so that gradients come back through what the form does.
    leaves = make_inputs(make, dtype=dtype, requires_grad=recording, **options)
    inputs = FORMS[form](leaves)

    def values():
        y = run(inputs)
        if not recording:
            return [y]
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves_of(leaves), retain_graph=True)]

    actual = values()
    with operators_only():
        expected = values()
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
    with torch.inference_mode():
        y = run(inputs)
    assert y.is_inference() and torch.equal(y, expected[0])


@pytest.mark.parametrize("top_k", [1, 2, None])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(T, E), (0, E), (2, 3, E), (E,)], ids=str)
def test_routing_has_the_operator_s_bits(shape, scoring, top_k):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def values():
        weights, experts = F.route(logits, top_k, scoring=scoring)
        return weights.detach(), experts, torch.autograd.grad(weights.square().sum(), logits)[0]

    actual = values()
    with operators_only():
        expected = values()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(F.route(logits, top_k, scoring=scoring), expected[:2], strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@MAKERS
@needs_kernels
def test_checkpoints_may_be_taken_one_way_and_redone_the_other(make, use_reentrant):
    inputs = make_inputs(make, requires_grad=True)
    expected = torch.autograd.grad(run(inputs).sum(), inputs.x)[0]
    for forward, backward in ((nullcontext(), operators_only()), (operators_only(), nullcontext())):
        inputs.x.grad = None
        with forward:
            y = checkpoint(lambda x: run(replace(inputs, x=x)), inputs.x, use_reentrant=use_reentrant)
        with backward:
            y.sum().backward()
        assert torch.equal(inputs.x.grad, expected)


@MAKERS
@needs_kernels
def test_compiled_autograd_reads_the_formula(make):
    inputs = make_inputs(make, requires_grad=True)
    expected = torch.autograd.grad(run(inputs).sum(), leaves_of(inputs))
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        run(inputs).sum().backward()
    for leaf, exact in zip(leaves_of(inputs), expected, strict=True):
        assert_close(leaf.grad, exact)


def test_the_functions_take_what_the_operators_take():
    logits = make_logits(T, E)
    rule = (K, "softmax", True, True, 1.0, 1, 1, "top2_sum", 1e-20, library.BUILD)
    for a, b in zip(library.route(logits, None, *rule), torch.ops.fusedonemoe.route(logits, None, *rule), strict=True):
        assert torch.equal(a, b)
