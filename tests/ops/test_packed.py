"""Packed expert weights: the bits of the kernels that read home weights, the way back, and writes into panels."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedonemoe import functional as F
from fusedonemoe.ops import library
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import make_mlp_inputs
from tests.strategies import mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# A panel is 8, 16 or 32 columns, half of them gate; at most 12 rows go over one at once.
SHAPES = [(1, 1, 1, 2, 1), (3, 33, 17, 4, 2), (13, 16, 16, 2, 1), (25, 100, 37, 3, 2), (40, 37, 100, 2, 2), (130, 64, 48, 3, 3)]


FORMS = [(True, "gate_up"), (True, "up_gate"), (True, "interleaved"), (False, "gate_up")]
TRAINING = r"packed weights are for inference, and this call records gradients: .*torch.no_grad\(\).*unpack\(\)"


def run(inputs, packed=None, **form):
    options = {"gate_up_bias": inputs.up_bias, "down_bias": inputs.down_bias, "impl": "cpu", **form}
    weights = (inputs.up_proj, inputs.down_proj) if packed is None else ()
    return F.experts_mlp(inputs.x, inputs.experts, inputs.weights, *weights, packed=packed, **options)


def packed_of(inputs, **form):
    return F.pack_experts(inputs.up_proj, inputs.down_proj, **form)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
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


def bits_of(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@every_dtype
def test_every_bit_comes_back_from_panels_of_the_same_dtype(shape, form, dtype):
    gated, layout = form
    inputs = make_mlp_inputs(*shape, dtype=dtype, gated=gated)
    generator = torch.Generator().manual_seed(0)
    for weight in (inputs.up_proj, inputs.down_proj):  # every bit pattern: signalling NaNs and minus zeros, too
        whole = torch.iinfo(bits_of(weight).dtype)
        bits = torch.randint(whole.min, whole.max + 1, weight.shape, generator=generator, dtype=torch.int64)
        bits.flatten()[0] = whole.min  # minus zero
        bits_of(weight).copy_(bits)
    packed = packed_of(inputs, gated=gated, gate_up_layout=layout)
    assert packed.up.dtype == packed.down.dtype == dtype and packed.up.is_contiguous() and packed.down.is_contiguous()
    for home, weight in zip(packed.unpack(), (inputs.up_proj, inputs.down_proj), strict=True):
        assert torch.equal(bits_of(home), bits_of(weight))


@needs_kernels
@pytest.mark.parametrize("form", FORMS, ids=str)
@every_dtype
def test_a_write_into_panels_is_a_write_into_the_weights(form, dtype, packed_uses):
    gated, layout = form
    options = {"gated": gated, "gate_up_layout": layout}
    inputs = make_mlp_inputs(13, 37, 29, 4, 2, dtype=dtype, gated=gated, bias=True)
    packed = packed_of(inputs, **options)
    for panels, weight in ((packed.up, inputs.up_proj), (packed.down, inputs.down_proj)):
        for each in (panels, weight):
            each.mul_(-0.5)
            each.add_(0.25)
    for home, weight in zip(packed.unpack(), (inputs.up_proj, inputs.down_proj), strict=True):
        assert torch.equal(home, weight)
    assert torch.equal(run(inputs, packed, **options), run(inputs, **options)) and len(packed_uses) == 1


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -6e4])
@every_dtype
def test_what_is_written_into_padding_reaches_no_output(value, dtype):
    inputs = make_mlp_inputs(13, 37, 29, 4, 2, dtype=dtype)  # odd sizes: pairs, panels and columns have padding
    packed, clean = packed_of(inputs), packed_of(inputs)
    for panels, name in ((packed.up, "up_proj"), (packed.down, "down_proj")):
        ones = F.pack_experts(*(torch.ones_like(w) for w in (inputs.up_proj, inputs.down_proj)))
        padding = (ones.up if name == "up_proj" else ones.down) == 0
        assert padding.any()
        panels.masked_fill_(padding, value)
    assert torch.equal(run(inputs, packed), run(inputs)) and torch.equal(run(inputs, packed), run(inputs, clean))
    assert torch.equal(packed.unpack()[0], inputs.up_proj) and torch.equal(packed.unpack()[1], inputs.down_proj)


@needs_kernels
@pytest.mark.parametrize("which", ["x", "weights", "bias", "panels"])
def test_a_call_that_records_gradients_is_refused(which, packed_uses):
    inputs = make_mlp_inputs(5, 16, 8, 4, 2, bias=True)
    packed = packed_of(inputs)
    recorded = {"x": inputs.x, "weights": inputs.weights, "bias": inputs.down_bias, "panels": packed.down}[which]
    recorded.requires_grad_()
    with pytest.raises(RuntimeError, match=TRAINING):
        run(inputs, packed)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=TRAINING):
        torch.compile(run, fullgraph=True, backend="aot_eager")(inputs, packed)
    assert not packed_uses
    operator, act = torch.ops.fusedonemoe.experts_mlp_packed, ("silu", "gate_up", 1.0, 1.0)
    arguments = (inputs.x, inputs.experts, inputs.weights, packed.up, packed.down, inputs.up_bias, inputs.down_bias, 8)
    with pytest.raises(RuntimeError, match=TRAINING):
        operator(*arguments, *act, library.BUILD)
    if which == "panels":
        with pytest.raises(RuntimeError, match=TRAINING):
            torch.ops.fusedonemoe.unpack_weights(packed.down, 16, 8, "plain")
    with torch.no_grad():
        assert torch.equal(run(inputs, packed), run(inputs)) and packed_uses
        assert torch.equal(operator(*arguments, *act, library.BUILD), run(inputs))


@needs_kernels
def test_transforms_and_exporters_are_refused():
    inputs = make_mlp_inputs(5, 16, 8, 4, 2)
    packed = packed_of(inputs)
    with pytest.raises(RuntimeError, match="need impl='dense'"):
        torch.func.vmap(lambda x: run(replace(inputs, x=x), packed))(inputs.x[None])

    class Layer(torch.nn.Module):
        def forward(self, x):
            return run(replace(inputs, x=x), packed)

    with pytest.raises(RuntimeError, match=r"call unpack\(\) before exporting"):
        torch.export.export(Layer(), (inputs.x,), strict=False)


@needs_kernels
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_bits_are_those_of_home_weights(dtype, x_dtype, compiled, packed_uses):
    inputs = make_mlp_inputs(5, 16, 8, 4, 2, bias=True)
    weights = {name: getattr(inputs, name).to(dtype) for name in ("up_proj", "down_proj")}
    inputs = replace(inputs, x=inputs.x.to(x_dtype), **weights)
    packed = packed_of(inputs)
    torch._dynamo.reset()
    call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(inputs, packed), run(inputs))
    # In the dtype of autocast the panels are read as they are; in another they are unpacked for the call.
    assert len(packed_uses) == (dtype == torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_reads_what_the_panels_hold_now(dynamic, packed_uses):
    inputs = make_mlp_inputs(7, 24, 20, 4, 2, bias=True)
    packed = packed_of(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for scale in (1, 2):
        for weight in (packed.down, inputs.down_proj):
            weight.mul_(scale)
        assert torch.equal(compiled(inputs, packed), run(inputs))
    few = replace(inputs, x=inputs.x[:3], experts=inputs.experts[:3], weights=inputs.weights[:3])
    assert torch.equal(compiled(few, packed), run(few)) and len(packed_uses) == 3


@needs_kernels
@every_dtype
def test_the_operators_keep_what_torch_library_asks_of_them(dtype):
    inputs = make_mlp_inputs(5, 17, 9, 4, 2, bias=True, dtype=dtype)
    packed = packed_of(inputs)
    tensors = (inputs.x, inputs.experts, inputs.weights, packed.up, packed.down, inputs.up_bias, None)
    act = ("silu", "gate_up", 1.702, 7.0)
    torch.library.opcheck(torch.ops.fusedonemoe.experts_mlp_packed.default, (*tensors, 9, *act, library.BUILD))
    torch.library.opcheck(torch.ops.fusedonemoe.unpack_weights.default, (packed.up, 18, 17, "gate_up"))
    torch.library.opcheck(torch.ops.fusedonemoe.unpack_weights.default, (packed.down, 17, 9, "plain"))


@needs_kernels
def test_another_default_device_changes_nothing():
    inputs = make_mlp_inputs(5, 16, 8, 4, 2)
    expected = run(inputs)
    with torch.device("meta"):
        packed = packed_of(inputs)
        assert torch.equal(run(inputs, packed).to("cpu"), expected)
        for home, weight in zip(packed.unpack(), (inputs.up_proj, inputs.down_proj), strict=True):
            assert torch.equal(home, weight)


@needs_kernels
def test_panels_that_were_packed_in_inference_mode_can_be_written_into():
    inputs = make_mlp_inputs(5, 16, 8, 4, 2)
    with torch.inference_mode():
        packed = packed_of(inputs)
    for weight in (packed.up, inputs.up_proj):
        weight.mul_(2)
    assert torch.equal(run(inputs, packed), run(inputs))


@needs_kernels
def test_one_call_has_one_set_of_weights():
    inputs = make_mlp_inputs(5, 16, 8, 4, 2)
    packed, arguments = packed_of(inputs), (inputs.x, inputs.experts, inputs.weights)
    for both in ((inputs.up_proj, inputs.down_proj), (inputs.up_proj, None), (None, inputs.down_proj)):
        with pytest.raises(TypeError, match=r"give either gate_up_proj and down_proj or packed, .* got both"):
            F.experts_mlp(*arguments, *both, packed=packed)
    with pytest.raises(TypeError, match=r"gate_up_proj must be a torch\.Tensor, got NoneType"):
        F.experts_mlp(*arguments)
    with pytest.raises(TypeError, match=r"down_proj must be a torch\.Tensor, got NoneType"):
        F.experts_mlp(*arguments, inputs.up_proj)
    with pytest.raises(TypeError, match=r"packed must be PackedExperts, .* got tuple"):
        F.experts_mlp(*arguments, packed=(packed.up, packed.down))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"gate_up_layout": "interleaved"}, ValueError, "packed with gate_up_layout 'interleaved', got 'gate_up'"),
        ({}, {"gated": False}, ValueError, "packed with gate_up_layout 'plain', got 'gate_up'"),
        ({}, {"impl": "grouped"}, ValueError, r"for impl='auto' or 'cpu', got impl='grouped': call unpack\(\)"),
        ({}, {"transposed": True}, ValueError, "packed weights have no transposed form"),
        ({"intermediate_size": 24}, {}, ValueError, "packed_up must be panels of shape .* of 48 rows of 16"),
        ({"hidden_size": 15}, {}, ValueError, r"x must have shape \[..., 15\] to fit packed"),
        ({"down": torch.zeros(4, 16, 8)}, {}, ValueError, r"packed must hold panels, .*got shapes .*, \(4, 16, 8\)"),
        ({"up": torch.zeros(4, 1, 16, 4, 1)}, {}, ValueError, "packed_up must be panels of shape"),
        ({"down": torch.zeros(1, dtype=torch.bfloat16)}, {}, TypeError, "packed.down must have the dtype of x"),
        ({"down": torch.zeros(1, device="meta")}, {}, ValueError, "packed.down must be on the device of x"),
    ],
    ids=str,
)
def test_panels_that_do_not_fit_are_refused(change, options, error, message):
    inputs = make_mlp_inputs(5, 16, 8, 4, 2)
    with pytest.raises(error, match=message):
        run(inputs, replace(packed_of(inputs), **change), **options)


@needs_kernels
def test_panels_of_other_strides_or_experts_are_refused():
    inputs = make_mlp_inputs(5, 16, 8, 4, 2)
    packed = packed_of(inputs)
    with pytest.raises(ValueError, match=r"packed_down must be contiguous panels"):
        run(inputs, replace(packed, down=packed.down.transpose(2, 3).contiguous().transpose(2, 3)))
    with pytest.raises(ValueError, match="packed_down must have as many experts as packed_up \\(4\\), got 3"):
        run(inputs, replace(packed, down=packed.down[:3].contiguous()))
    arguments = (inputs.x, inputs.experts, inputs.weights, packed.up, packed.down[:3], None, None, 8)
    with pytest.raises(ValueError, match="as many experts as packed_up"):  # the operator trusts its caller no more
        torch.ops.fusedonemoe.experts_mlp_packed(*arguments, "silu", "gate_up", 1.0, 1.0, library.BUILD)


@needs_kernels
def test_sizes_that_panels_do_not_have_are_refused_before_memory_is_taken():
    packed = packed_of(make_mlp_inputs(5, 16, 8, 4, 2))
    for rows, width in ((16, 1 << 50), (1 << 50, 8)):
        with pytest.raises(ValueError, match=f"panels must be panels of shape .* of {rows} rows of {width}"):
            torch.ops.fusedonemoe.unpack_weights(packed.down, rows, width, "plain")


@needs_kernels
def test_an_odd_number_of_gate_and_up_rows_is_refused():
    # The last row would have no partner, and would be left unwritten.
    packed = packed_of(make_mlp_inputs(5, 16, 8, 4, 2))
    with pytest.raises(ValueError, match="as many rows of each, got 15"):
        torch.ops.fusedonemoe.unpack_weights(packed.up, 15, 16, "gate_up")
    with pytest.raises(ValueError, match="as many rows of each, got 15"):
        torch.ops.fusedonemoe.pack_weights_(packed.up, torch.zeros(4, 15, 16), "gate_up")


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
    with pytest.raises(ValueError, match="gate_up_proj cannot be packed: the CPU kernels do not run on device 'meta'"):
        F.pack_experts(inputs.up_proj.to("meta"), inputs.down_proj.to("meta"))


def test_without_kernels_packing_says_why(monkeypatch):
    monkeypatch.setattr("fusedonemoe.ops.choice.native.refusal", lambda *_: "no kernels here")
    inputs = make_mlp_inputs(2, 16, 8, 4, 2)
    with pytest.raises(ValueError, match="no kernels here"):
        F.pack_experts(inputs.up_proj, inputs.down_proj)
