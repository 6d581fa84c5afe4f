"""Packed expert weights: the bits of the kernels that read the weights themselves, and never a stale copy."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedonemoe import functional as F
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import make_mlp_inputs
from tests.strategies import mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
STALE = "changed or replaced after they were packed"
# A panel is 8, 16 or 32 columns, half of them gate; at most 12 rows go over one at once.
SHAPES = [(1, 1, 1, 2, 1), (3, 33, 17, 4, 2), (13, 16, 16, 2, 1), (25, 100, 37, 3, 2), (40, 37, 100, 2, 2), (130, 64, 48, 3, 3)]


def run(inputs, packed=None, **form):
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
    options = {"gate_up_bias": inputs.up_bias, "down_bias": inputs.down_bias, "impl": "cpu", **form}
    return F.experts_mlp(*arguments, packed=packed, **options)


def packed_of(inputs, **form):
    return F.pack_experts(inputs.up_proj, inputs.down_proj, **form)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [(True, "gate_up"), (True, "up_gate"), (True, "interleaved"), (False, "gate_up")], ids=str)
@every_dtype
def test_packed_weights_give_the_same_bits(shape, form, dtype, packed_uses):
    gated, layout = form
    inputs = make_mlp_inputs(*shape, dtype=dtype, gated=gated, bias=True, routing="out_of_range")
    options = {"gated": gated, "gate_up_layout": layout}
    assert torch.equal(run(inputs, packed_of(inputs, **options), **options), run(inputs, **options))
    assert len(packed_uses) == 1


@needs_kernels
@settings(max_examples=60)
@given(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)).flatmap(lambda dtype: mlp_inputs(dtype=dtype)))
def test_packed_weights_give_the_same_bits_for_any_routing(inputs):
    gated = inputs.up_proj.shape[1] == 2 * inputs.down_proj.shape[2]
    assert torch.equal(run(inputs, packed_of(inputs, gated=gated), gated=gated), run(inputs, gated=gated))


@needs_kernels
def test_one_and_two_threads_give_the_same_bits():
    inputs = make_mlp_inputs(65, 96, 200, 8, 3)
    packed, threads = packed_of(inputs), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(inputs, packed))
            assert torch.equal(packed.up, packed_of(inputs).up)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernels
def test_the_size_is_that_of_the_weights_in_whole_panels():
    inputs = make_mlp_inputs(2, 64, 96, 4, 2)
    assert packed_of(inputs).nbytes == inputs.up_proj.nbytes + inputs.down_proj.nbytes


@needs_kernels
def test_a_call_that_records_gradients_reads_the_weights(packed_uses):
    inputs = make_mlp_inputs(5, 16, 8, 4, 2)
    packed = packed_of(inputs)
    x = inputs.x.clone().requires_grad_()
    run(replace(inputs, x=x), packed).sum().backward()
    assert x.grad is not None and not packed_uses


@needs_kernels
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_weights_are_read(x_dtype, packed_uses):
    # The operator would get x or a bias in another dtype than what was packed.
    inputs = make_mlp_inputs(5, 16, 8, 4, 2, bias=True)
    weights = {name: getattr(inputs, name).bfloat16() for name in ("up_proj", "down_proj")}
    inputs = replace(inputs, x=inputs.x.to(x_dtype), **weights)
    packed = packed_of(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(inputs, packed), run(inputs))
        with pytest.raises(TypeError, match="down_proj must have the dtype of gate_up_proj"):
            F.pack_experts(inputs.up_proj.float(), inputs.down_proj)
    assert not packed_uses


@needs_kernels
def test_the_same_memory_as_another_dtype_is_refused():
    inputs = make_mlp_inputs(5, 16, 8, 4, 2, dtype=torch.bfloat16)
    halves = {name: getattr(inputs, name).view(torch.float16) for name in ("x", "up_proj", "down_proj")}
    with pytest.raises(RuntimeError, match=STALE):
        run(replace(inputs, **halves), packed_of(inputs))


@needs_kernels
@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_a_changed_weight_is_refused(name):
    inputs = make_mlp_inputs(5, 16, 8, 4, 2)
    packed = packed_of(inputs)
    getattr(inputs, name)[0, 0, 0] += 1
    with pytest.raises(RuntimeError, match=STALE):
        run(inputs, packed)
    assert torch.isfinite(run(inputs, packed_of(inputs))).all()


@needs_kernels
def test_other_weights_are_refused():
    inputs, others = make_mlp_inputs(5, 16, 8, 4, 2), make_mlp_inputs(5, 16, 8, 4, 2, seed=1)
    with pytest.raises(RuntimeError, match=STALE):
        run(others, packed_of(inputs))
    with pytest.raises(ValueError, match=r"packed must be of weights of shapes \(4, 16, 16\), \(4, 16, 8\), got \(\(3,"):
        run(inputs, packed_of(make_mlp_inputs(5, 16, 8, 3, 2)))
    with pytest.raises(ValueError, match="packed must have been packed with gate_up_layout 'interleaved', got 'gate_up'"):
        run(inputs, packed_of(inputs), gate_up_layout="interleaved")


@needs_kernels
def test_what_cannot_be_packed_says_why():
    inputs = make_mlp_inputs(2, 16, 8, 4, 2)
    with pytest.raises(ValueError, match="cannot be packed: the CPU kernels have"):
        F.pack_experts(inputs.up_proj.double(), inputs.down_proj.double())
    with pytest.raises(ValueError, match="cannot be packed: the CPU kernels read contiguous"):
        F.pack_experts(inputs.up_proj.transpose(1, 2).contiguous().transpose(1, 2), inputs.down_proj)
    with pytest.raises(ValueError, match=r"down_proj must have shape \(4, 16, 8\), got \(4, 16, 7\)"):
        F.pack_experts(inputs.up_proj, inputs.down_proj[..., :7])
    with pytest.raises(ValueError, match="at least one expert, got E = 0"):
        F.pack_experts(inputs.up_proj[:0], inputs.down_proj[:0])
    with pytest.raises(TypeError, match="down_proj must have the dtype of gate_up_proj"):
        F.pack_experts(inputs.up_proj, inputs.down_proj.bfloat16())
    with torch.inference_mode():
        frozen = inputs.up_proj.clone()
    with pytest.raises(ValueError, match="inference mode do not tell when they are changed"):
        F.pack_experts(frozen, inputs.down_proj)


def test_without_kernels_packing_says_why(monkeypatch):
    monkeypatch.setattr("fusedonemoe.ops.choice.native.refusal", lambda *_: "no kernels here")
    inputs = make_mlp_inputs(2, 16, 8, 4, 2)
    with pytest.raises(ValueError, match="no kernels here"):
        F.pack_experts(inputs.up_proj, inputs.down_proj)
