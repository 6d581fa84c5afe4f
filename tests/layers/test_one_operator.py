"""Calls of a block without gradients run one operator where nobody can see a difference, and the parts everywhere else."""

import copy
import warnings
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fusedonemoe import MoE, TopKRouter
from fusedonemoe.functional.calls import traced_build
from fusedonemoe.layers.moe import Experts
from fusedonemoe.layers.routers import RouterOutput
from fusedonemoe.ops import library
from fusedonemoe.ops.cpu import native
from tests.interception import intercepted

pytestmark = pytest.mark.skipif(native.refusal(torch.float32, True) is not None, reason="needs the CPU kernels")
D, E = 16, 6
FORMS = {
    "plain": {},
    "shared": {"shared_intermediate_size": 8, "shared_gate": True, "output_bias": True},
    "biases": {"bias": True, "router_bias": True, "selection_bias": True, "scoring": "sigmoid", "norm_topk_prob": False},
    "groups": {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5, "selection_bias": True, "scoring": "sigmoid"},
    "ungated": {"gated": False, "activation": "relu2", "score_first": False},
    "oai": {"activation": "swiglu_oai", "gate_up_layout": "interleaved", "impl": "cpu"},
    "all": {"top_k": None},
}


def make(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    moe = MoE(**{"hidden_size": D, "intermediate_size": 8, "num_experts": E, "top_k": 2} | fields).to(dtype)
    with torch.no_grad():
        for parameter in (*moe.parameters(), *moe.buffers()):
            parameter.copy_(torch.randn_like(parameter))
    return moe


@contextmanager
def uses(expected):
    """Check how often the operator of a whole block runs inside."""
    count = 0

    def counted(kernel):
        def run(*arguments):
            nonlocal count
            count += 1
            return kernel(*arguments)

        return run

    with intercepted("moe_inference_cpu", counted):
        yield
    assert count == expected


def in_parts(moe, x):
    logits, _, experts = moe.gate(x)
    with uses(0):
        y = moe(x, return_routing=True)
    assert torch.equal(y.experts, experts) and torch.equal(y.logits, logits)
    return y.output


@pytest.mark.parametrize("shape", [(1, D), (0, D), (7, D), (2, 3, D), (D,), (300, D)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_the_bits_are_those_of_the_parts(fields, dtype, shape):
    moe, x = make(dtype, **fields), torch.randn(shape).to(dtype)
    with uses(1):
        y = moe(x)
    assert y.dtype == dtype and torch.equal(y, in_parts(moe, x))


@torch.no_grad()
def test_strides_and_router_dtypes():
    moe, x = make(torch.bfloat16), torch.randn(D, 9).bfloat16().T
    moe.gate.float()
    moe.gate.weight = nn.Parameter(moe.gate.weight.T.contiguous().T)
    with uses(1):
        y = moe(x)
    assert torch.equal(y, in_parts(moe, x))


def _hook(moe):
    seen = []
    moe.gate.register_forward_hook(lambda module, arguments, output: seen.append(output.experts))
    return seen


def _pre_hook(moe):
    seen = []
    moe.experts.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    return seen


def _own_forward(moe):
    seen, forward = [], moe.gate.forward

    def recorded(x):
        seen.append(x)
        return forward(x)

    moe.gate.forward = recorded
    return seen


def _subclass(moe):
    seen = []

    class Recorded(Experts):
        def forward(self, x, experts, weights):
            seen.append(experts)
            return super().forward(x, experts, weights)

    moe.experts.__class__ = Recorded
    return seen


def _exchange(moe):
    seen = []

    def exchange(layer, x, experts, weights):
        seen.append(experts)
        return layer.compute(x, experts, weights, *layer.local_weights())

    moe.experts.exchange = exchange
    return seen


def twice(result):
    if isinstance(result, RouterOutput):
        return result._replace(weights=result.weights * 2)
    return tuple(t if t is None else t * 2 for t in result) if isinstance(result, tuple) else result * 2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("part", "method"), [("gate", "forward"), ("experts", "forward"), ("experts", "compute"), ("experts", "local_weights")]
)
def test_a_method_of_a_module_that_is_replaced_runs(part, method, after, grad):
    moe, x = make(), torch.randn(7, D)
    with torch.set_grad_enabled(grad):
        before = moe(x)
        torch._dynamo.reset()
        fast = torch.compile(moe, backend="aot_eager")
        if after:
            fast(x)
        module = getattr(moe, part)
        own = getattr(module, method)
        setattr(module, method, lambda *arguments: twice(own(*arguments)))
        changed = moe(x)
        assert not torch.equal(changed, before)
        assert torch.equal(fast(x), changed)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("kind", "method"), [(TopKRouter, "forward"), (Experts, "forward"), (Experts, "compute")])
def test_a_method_of_a_class_that_is_replaced_runs(kind, method, grad):
    moe, x, own = make(), torch.randn(7, D), getattr(kind, method)
    with torch.set_grad_enabled(grad):
        before = moe(x)
        torch._dynamo.reset()
        with mock.patch.object(kind, method, lambda *arguments: twice(own(*arguments))):
            changed = moe(x)
            assert not torch.equal(changed, before)
            assert torch.equal(torch.compile(moe, backend="aot_eager")(x), changed)


class TripleLinear(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 3 if func is nn.functional.linear else result


class TripleLinears(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 3 if func is nn.functional.linear else result


@pytest.mark.parametrize("grad", [False, True])
def test_functions_of_a_weight_and_of_a_mode_run(grad):
    moe, x = make(), torch.randn(7, D)
    with torch.set_grad_enabled(grad):
        before = moe(x)
        with TripleLinears():
            torch._dynamo.reset()
            expected = moe(x, return_routing=True).output
            assert not torch.equal(expected, before)
            assert torch.equal(moe(x), expected)
            assert torch.equal(torch.compile(moe, backend="aot_eager")(x), expected)
        moe.gate.weight = nn.Parameter(moe.gate.weight.detach().as_subclass(TripleLinear))
        torch._dynamo.reset()
        assert torch.equal(moe(x), expected)
        assert torch.equal(torch.compile(moe, backend="aot_eager")(x), expected)


@torch.no_grad()
def test_forms_that_the_operator_does_not_have_still_run():
    x = torch.randn(7, D)
    moe = make()
    moe.gate.register_parameter("bias", nn.Parameter(torch.randn(1)))  # broadcast
    torch._dynamo.reset()
    assert torch.equal(torch.compile(moe, backend="aot_eager")(x), in_parts(moe, x))
    moe = make()
    moe.gate.routed_scaling_factor = np.float32(2.5)
    assert torch.equal(moe(x), in_parts(moe, x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(moe, backend="aot_eager")(x), in_parts(moe, x))
    moe = make()
    expected = moe(x)
    with warnings.catch_warnings(action="ignore"):  # torch's, of sparse tensors
        moe.gate.weight = nn.Parameter(moe.gate.weight.detach().to_sparse_csr())
        torch.testing.assert_close(moe(x), expected)


@torch.no_grad()
def test_no_experts_and_a_router_without_memory_are_refused():
    moe, x = make(), torch.randn(7, D)
    moe.experts.gate_up_proj, moe.experts.down_proj = nn.Parameter(torch.zeros(0, 16, D)), nn.Parameter(torch.zeros(0, D, 8))
    torch._dynamo.reset()
    for run in (moe, torch.compile(moe, backend="aot_eager")):
        with pytest.raises(Exception, match="gate_up_proj must hold at least one expert, got E = 0"):
            run(x)
    moe = make()
    moe.gate.weight = nn.Parameter(moe.gate.weight.detach().to("meta"))
    with pytest.raises(ValueError, match=r"router's weight must be on the device of x \(cpu\), got meta"):
        moe(x)


def test_the_key_of_torchs_cache_tells_whether_there_are_kernels(monkeypatch):
    with_kernels = traced_build()
    monkeypatch.setattr(native, "refusal", lambda *_: "none here")
    assert traced_build() != with_kernels


@pytest.mark.parametrize("observe", [_hook, _pre_hook, _own_forward, _subclass, _exchange])
@torch.no_grad()
def test_whoever_looks_at_a_part_sees_it(observe):
    moe, x = make(), torch.randn(7, D)
    expected = moe(x)
    seen = observe(moe)
    torch._dynamo.reset()
    for run in (moe, torch.compile(moe, backend="aot_eager")):
        with uses(0):
            assert torch.equal(run(x), expected)
        assert len(seen) == 1
        seen.clear()


@torch.no_grad()
def test_global_hooks_see_the_parts():
    moe, x, seen = make(), torch.randn(7, D), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with uses(0):
            moe(x)
    finally:
        hook.remove()
    assert seen == ["TopKRouter", "Experts", "MoE"]


def test_calls_that_record_gradients_run_the_parts():
    moe, x = make(), torch.randn(7, D)
    with uses(0):
        moe(x).sum().backward()
    assert moe.gate.weight.grad is not None and moe.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "changed",
    [
        lambda moe: moe.double(),
        lambda moe: make(transposed=True),
        lambda moe: make(impl="grouped"),
        lambda moe: make(impl="dense"),
        lambda moe: setattr(moe.gate, "impl", "dense"),
        lambda moe: moe.prepack(),
        lambda moe: setattr(moe.experts, "down_proj", nn.Parameter(moe.experts.down_proj.mT.contiguous().mT)),
        lambda moe: parametrize.register_parametrization(moe.gate, "weight", nn.Identity()),
        lambda moe: parametrize.register_parametrization(moe.experts, "down_proj", nn.Identity()),
    ],
)  # fmt: skip
@torch.no_grad()
def test_other_forms_run_the_parts(changed):
    moe = make()
    result = changed(moe)
    moe = result if isinstance(result, MoE) else moe
    x = torch.randn(7, D, dtype=moe.gate.weight.dtype)
    with uses(0):
        assert torch.equal(moe(x), moe(x, return_routing=True).output)


@torch.no_grad()
def test_autocast_modes_and_transforms_run_the_parts():
    moe, x = make(), torch.randn(7, D)
    with uses(0):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(moe(x), moe(x, return_routing=True).output)
        with FlopCounterMode(display=False) as parts:
            moe(x)
        with warnings.catch_warnings(action="ignore"):
            torch.jit.trace(moe, x, check_trace=False)
        with pytest.raises(RuntimeError, match="impl='dense'"):
            torch.func.jvp(moe, (x,), (x,))
    assert parts.get_total_flops() == 2 * 7 * (E * D + 2 * 3 * 8 * D)


@torch.no_grad()
def test_flops_of_the_operator():
    moe, x = make(), torch.randn(7, D)
    gate, experts = moe.gate, moe.experts
    given = (x, gate.weight, None, None, *moe.config.route_rule, experts.gate_up_proj, experts.down_proj, None, None)
    with FlopCounterMode(display=False) as counter:
        torch.ops.fusedonemoe.moe_inference(*given, *moe.config.act, library.BUILD)
    assert counter.get_total_flops() == 2 * 7 * (E * D + 2 * 3 * 8 * D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_and_no_gradients(dtype):
    moe, x = make(dtype, **FORMS["biases"]), torch.randn(7, D).to(dtype)
    gate, experts = moe.gate, moe.experts
    tensors = [x, gate.weight, gate.bias, gate.e_score_correction_bias]
    tail = [experts.gate_up_proj, experts.down_proj, experts.gate_up_proj_bias, experts.down_proj_bias]
    given = [*tensors, *moe.config.route_rule, *tail, *moe.config.act, library.BUILD]
    frozen = [value.detach() if isinstance(value, torch.Tensor) else value for value in given]
    torch.library.opcheck(torch.ops.fusedonemoe.moe_inference.default, tuple(frozen))
    torch.library.opcheck(torch.ops.fusedonemoe.moe_inference_cpu.default, tuple(frozen[:-1]))
    y = torch.ops.fusedonemoe.moe_inference(*given)
    with pytest.raises(RuntimeError, match="moe_inference keeps nothing for a backward pass"):
        y.float().sum().backward()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(D), "x must have 2 dimensions"),
        (0, torch.zeros(3, D, dtype=torch.float64), "x must have a dtype of the CPU kernels"),
        (1, torch.zeros(E, D + 1), r"gate must have shape \(6, 16\), got \(6, 17\)"),
        (1, torch.zeros(E, D, dtype=torch.int64), "gate must have dtype torch.float32 or"),
        (2, torch.zeros(E + 1), r"gate_bias must have shape \(6,\), got \(7,\)"),
        (3, torch.zeros(E + 1), r"selection_bias must have shape \(6,\), got \(7,\)"),
        (4, E + 1, "top_k must be from 0 to 6, got 7"),
        (13, torch.zeros(E, 16, D + 1), "up_proj must have shape"),
        (14, torch.zeros(E, D + 1, 8), "down_proj must have shape"),
    ],
)
@torch.no_grad()
def test_the_operator_checks_its_arguments(place, value, message):
    moe = make()
    given = [torch.randn(3, D), moe.gate.weight, None, None, *moe.config.route_rule]
    given += [moe.experts.gate_up_proj, moe.experts.down_proj, None, None, *moe.config.act]
    given[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.fusedonemoe.moe_inference_cpu(*given)


@torch.no_grad()
def test_bad_calls_raise_what_the_parts_raise():
    moe, x = make(), torch.randn(3, D)
    cases = [(moe, torch.randn(3, D + 1)), (moe, x.double()), (moe, x.long())]
    for name, value in (("down_proj", torch.randn(E, D, 9)), ("gate_up_proj", torch.randn(E, 15, D)), ("down_proj", None)):
        broken = copy.deepcopy(moe)
        setattr(broken.experts, name, None if value is None else nn.Parameter(value))
        cases.append((broken, x))
    for broken, given in cases:
        texts = []
        for keywords in ({}, {"return_routing": True}):
            with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
                broken(given, **keywords)
            texts.append((type(raised.value), str(raised.value)))
        assert texts[0] == texts[1]


@torch.no_grad()
def test_a_changed_rule_is_checked_again():
    moe, x = make(), torch.randn(7, D)
    moe(x)
    moe.gate.top_k = 3
    assert torch.equal(moe(x), in_parts(moe, x))
    with uses(1):
        moe(x)
    moe.gate.top_k = E + 1
    for _ in range(2):
        with pytest.raises(ValueError, match=f"top_k must be from 1 to {E}, .* got {E + 1}"):
            moe(x)


@torch.no_grad()
def test_fewer_experts_than_the_router_names_contribute_nothing():
    moe, x = make(), torch.randn(20, D)
    moe.experts.gate_up_proj = nn.Parameter(moe.experts.gate_up_proj[:4].clone())
    moe.experts.down_proj = nn.Parameter(moe.experts.down_proj[:4].clone())
    with uses(1):
        y = moe(x)
    assert torch.equal(y, in_parts(moe, x))
