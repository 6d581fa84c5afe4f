"""Modules with packed weights: one copy, in the parameters. What reads the home form gets it; the rest is refused."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize, prune

from fusedonemoe import Experts, MoE, MoEConfig, QuantizedExperts, explain, quantize_
from fusedonemoe.export import portable
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import make_mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
pytestmark = needs_kernels
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TRAINING = r"packed weights are for inference, and this call records gradients: .*torch.no_grad\(\).*unpack\(\)"
WEIGHTS = ("gate_up_proj", "down_proj")


def small_block(seed=0, **options):
    torch.manual_seed(seed)
    return MoE(hidden_size=24, intermediate_size=20, num_experts=4, top_k=2, **{"impl": "cpu", **options})


def tokens(dtype=torch.float32):
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def output(moe):
    return moe(tokens(moe.gate.weight.dtype))


def plain_of(moe):
    """A fresh module in home form with the weights that the state dict has."""
    plain = MoE(moe.config, dtype=moe.gate.weight.dtype)
    plain.load_state_dict(moe.state_dict())
    return plain


@pytest.mark.parametrize(
    "form", [{}, {"gate_up_layout": "up_gate", "bias": True}, {"gated": False, "activation": "relu"}], ids=str
)
@every_dtype
def test_a_block_packs_and_unpacks_in_the_same_parameters(form, dtype, packed_uses):
    moe = small_block(dtype=dtype, **form)
    expected, parameters = output(moe), dict(moe.named_parameters())
    home = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for _ in range(2):
        for _ in range(2):  # the second time there is nothing to do
            moe.prepack()
            panels = moe.experts.down_proj.data_ptr()
        assert torch.equal(output(moe), expected)
        assert all(parameter is parameters[name] for name, parameter in moe.named_parameters())
        assert moe.experts.down_proj.dim() == 5 and moe.experts.down_proj.dtype == dtype
        assert moe.experts.packed_bytes >= moe.experts.down_proj.nbytes and moe.experts.down_proj.data_ptr() == panels
        assert "packed for inference" in str(explain(moe)) and explain(moe).packed_bytes == moe.experts.packed_bytes
        for _ in range(2):
            moe.unpack()
        assert all(torch.equal(parameter, home[name]) for name, parameter in moe.named_parameters())
        assert torch.equal(output(moe), expected) and moe.experts.packed_bytes == explain(moe).packed_bytes == 0
    assert len(packed_uses) == 2


def test_calls_that_record_gradients_are_refused_and_unpacking_trains(packed_uses):
    moe, x = small_block(), tokens()
    moe.prepack()
    calls = (moe, torch.compile(moe, fullgraph=True, backend="aot_eager"))
    for call in calls:
        with pytest.raises(RuntimeError, match=TRAINING):
            call(x)
    frozen = copy.deepcopy(moe).requires_grad_(False)
    assert torch.equal(frozen(x), output(moe))  # nothing to record
    with pytest.raises(RuntimeError, match=TRAINING):
        frozen(x.clone().requires_grad_())
    moe.unpack()
    reference = plain_of(moe)
    for block in (moe, reference):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        block(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moe.prepack()
    assert torch.equal(output(moe), output(reference)) and len(packed_uses) == 3


def test_a_graph_that_was_recorded_before_packing_refuses_its_backward():
    moe = small_block()
    for change in (moe.prepack, moe.unpack):
        moe.unpack()
        y = moe(tokens())
        moe.prepack()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_home_form_leaves_memory():
    moe = small_block()
    expected = output(moe)
    home = [StorageWeakRef(moe.experts.get_parameter(name).untyped_storage()) for name in WEIGHTS]
    assert not any(reference.expired() for reference in home)
    moe.prepack()
    assert all(reference.expired() for reference in home) and torch.equal(output(moe), expected)
    assert len(list(moe.experts.parameters())) == 2 and not list(moe.experts.buffers())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_under_fake_tensors_nothing_is_packed():
    moe = small_block()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises((RuntimeError, AssertionError)):
        moe.prepack()
    assert not moe.experts.packed_bytes and torch.equal(output(moe), output(small_block()))


# State dicts


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_that_was_replaced_is_what_is_read(name, compiled):
    moe, other = small_block(), small_block(seed=1)
    call = torch.compile(moe, fullgraph=True, backend="aot_eager") if compiled else moe
    with torch.no_grad():
        moe.prepack()
        call(tokens())
        setattr(moe.experts, name, other.experts.get_parameter(name))
        plain = plain_of(moe)
        assert torch.equal(plain.experts.get_parameter(name), other.experts.get_parameter(name))
        assert torch.equal(call(tokens()), output(plain))
        moe.prepack() if name == "nothing" else moe.unpack()
        assert torch.equal(call(tokens()), output(plain))
    moe.prepack()
    setattr(moe.experts, name, nn.Parameter(other.experts.get_parameter(name).detach().clone()))
    moe.requires_grad_(False)
    moe.experts.get_parameter(name).requires_grad_()
    with pytest.raises(RuntimeError, match=TRAINING):
        call(tokens())
    with torch.no_grad():
        moe.prepack()
        assert moe.experts.packed_bytes and torch.equal(call(tokens()), output(plain))


def test_functional_calls_compute_with_the_tensors_that_they_are_given():
    moe, other, x = small_block(), small_block(seed=1), tokens()
    moe.prepack()
    with torch.no_grad():
        home = dict(other.named_parameters())
        assert torch.equal(torch.func.functional_call(moe, home, (x,)), output(other))
        one = {"experts.down_proj": home["experts.down_proj"]}
        mixed = plain_of(moe)
        mixed.load_state_dict(one, strict=False)
        assert torch.equal(torch.func.functional_call(moe, one, (x,)), output(mixed))
        panels = {name: value.detach() * 2 for name, value in moe.named_parameters() if "experts" in name}
        twice = plain_of(moe)
        for name in WEIGHTS:
            twice.experts.get_parameter(name).mul_(2)
        assert torch.equal(torch.func.functional_call(moe, panels, (x,)), output(twice))
        with pytest.raises(ValueError, match="must be panels of shape"):
            torch.func.functional_call(moe, {"experts.down_proj": torch.zeros(1, 2, 3, 4, 5)}, (x,))


def test_another_order_of_rows_in_the_config_is_refused():
    moe = small_block()
    moe.prepack()
    expected = {name: value.clone() for name, value in moe.state_dict().items()}
    moe.experts.config = replace(moe.config, gate_up_layout="interleaved")
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"packed with gate_up_layout 'gate_up', and config has 'interleaved'"),
    ):
        moe(tokens())
    moe.unpack()
    assert all(torch.equal(value, expected[name]) for name, value in moe.state_dict().items())


def test_a_parametrized_weight_is_refused_or_computed():
    moe = small_block()
    parametrize.register_parametrization(moe.experts, "down_proj", nn.Identity())
    with pytest.raises(RuntimeError, match="down_proj must be a parameter of the module itself"):
        moe.prepack()
    assert moe.experts.packed_bytes == 0
    moe = small_block()
    moe.prepack()
    twice, expected = nn.Module(), plain_of(moe)
    twice.forward = lambda weight: weight * 2
    parametrize.register_parametrization(moe.experts, "down_proj", twice)
    with torch.no_grad():
        expected.experts.down_proj.mul_(2)
    assert torch.equal(output(moe), output(expected))
    for refused in (moe.unpack, moe.float):
        with pytest.raises(RuntimeError, match="down_proj must be a parameter of the module itself"):
            refused()
    moe = small_block()
    moe.prepack()
    prune.identity(moe.experts, "down_proj")
    assert torch.equal(output(moe), output(small_block()))
    with pytest.raises(RuntimeError, match=r"down_proj_orig is packed .*no state dict"):
        moe.state_dict()


def test_other_implementations_refuse():
    with pytest.raises(RuntimeError, match="packed weights are for impl='auto' or 'cpu', got impl='grouped'"):
        small_block(impl="grouped").prepack()
    moe = small_block()
    moe.prepack()
    with portable(moe), torch.no_grad(), pytest.raises(ValueError, match=r"got impl='portable': call unpack\(\) for the others"):
        moe(tokens())


@every_dtype
def test_a_gradient_that_was_given_to_panels_is_unpacked_with_them(dtype):
    moe, plain = small_block(dtype=dtype), small_block(dtype=dtype)
    moe.prepack()
    for block in (moe, plain):
        for name in WEIGHTS:
            parameter = block.experts.get_parameter(name)
            parameter.grad = parameter.detach() * 2
    moe.bfloat16(), plain.bfloat16()
    for actual, expected in zip(moe.experts.parameters(), plain.experts.parameters(), strict=True):
        assert torch.equal(actual, expected) and torch.equal(actual.grad, expected.grad)


@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_exporting_is_refused_and_works_unpacked(impl):
    moe, x = small_block(impl=impl), tokens()
    moe.prepack()
    with torch.no_grad():
        for strict in (False, True):
            with pytest.raises(RuntimeError, match=r"call unpack\(\) before exporting"):
                torch.export.export(moe, (x,), strict=strict)
        moe.unpack()
        torch.testing.assert_close(torch.export.export(moe, (x,)).module()(x), moe(x))


def test_a_block_that_shares_the_parameters_fails_loudly_until_they_are_unpacked():
    pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from fusedonemoe.integrations.transformers import disable, enable

    enable()
    try:
        for implementation in ("eager", "grouped_mm", "batched_mm", "fusedonemoe"):
            config = Qwen3MoeConfig(
                hidden_size=24, moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1
            )
            config._experts_implementation = implementation
            block = Qwen3MoeSparseMoeBlock(config)
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.1)
            moe, x = MoE.from_hf(block, MoEConfig.from_hf(config)), tokens()[None]
            with torch.no_grad():
                expected, plain = block(x), moe(x)
                moe.prepack()
                assert torch.equal(moe(x), plain)
                for use in (lambda: block(x), block.state_dict, nn.Sequential(block).state_dict, block.experts.state_dict):  # noqa: B023
                    with pytest.raises(RuntimeError, match=r"are packed, by prepack\(\) of a MoE .*call its unpack\(\) first"):
                        use()
                for handle in moe.experts._guards:
                    handle.remove()  # without the hooks the shapes are wrong, which no implementation overlooks
                with pytest.raises((RuntimeError, ValueError, IndexError)):
                    block(x)
                moe.unpack()
                assert torch.equal(block(x), expected) and set(block.state_dict())
                assert not block.experts._forward_pre_hooks
    finally:
        disable()


# The rest of the library


def test_quantising_reads_what_the_panels_hold():
    moe, plain = small_block(), small_block()
    moe.prepack()
    for actual, expected in zip(
        QuantizedExperts.from_experts(moe.experts).quantized_weights(),
        QuantizedExperts.from_experts(plain.experts).quantized_weights(),
        strict=True,
    ):
        assert torch.equal(actual.values, expected.values) and torch.equal(actual.scale, expected.scale)
    assert moe.experts.packed_bytes
    assert str(quantize_(moe)) == str(quantize_(plain)) and torch.equal(output(moe), output(plain))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_module_follows_packing_and_unpacking(dynamic, packed_uses):
    torch._dynamo.reset()
    experts = Experts(MoEConfig(hidden_size=24, intermediate_size=20, num_experts=4, top_k=2, impl="cpu"))
    inputs = make_mlp_inputs(7, 24, 20, 4, 2)
    compiled = torch.compile(experts, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    few = (inputs.x[:3], inputs.experts[:3], inputs.weights[:3])
    with torch.no_grad():
        plain = compiled(inputs.x, inputs.experts, inputs.weights)
        experts.prepack()
        assert torch.equal(compiled(inputs.x, inputs.experts, inputs.weights), plain) and len(packed_uses) == 1
        assert torch.equal(compiled(*few), plain[:3]) and len(packed_uses) == 2
        experts.down_proj.mul_(2)
        assert torch.equal(compiled(inputs.x, inputs.experts, inputs.weights), 2 * plain) and len(packed_uses) == 3
        experts.unpack()
        assert torch.equal(compiled(inputs.x, inputs.experts, inputs.weights), 2 * plain) and len(packed_uses) == 3
        experts.prepack()
        assert torch.equal(compiled(inputs.x, inputs.experts, inputs.weights), 2 * plain) and len(packed_uses) == 4


def test_inductor_and_inference_mode_too(packed_uses):
    moe, x = small_block(), tokens()
    with torch.inference_mode():
        moe.prepack()
        assert torch.equal(moe(x), moe(x.clone()))
        torch.testing.assert_close(torch.compile(moe, fullgraph=True)(x), moe(x))
    assert len(packed_uses) == 4
    with torch.no_grad():
        moe.experts.down_proj.mul_(2)  # an inference tensor would refuse
    moe.unpack()
    assert not moe.experts.down_proj.is_inference() and moe(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_the_bits_are_those_of_home_weights(dtype, compiled):
    torch._dynamo.reset()
    moe, plain = small_block(dtype=dtype, bias=True), small_block(dtype=dtype, bias=True)
    moe.prepack()
    call = torch.compile(moe, fullgraph=True, backend="aot_eager") if compiled else moe
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(tokens(dtype)), plain(tokens(dtype)))


@pytest.mark.parametrize("context", [True, False])
def test_another_default_device_changes_nothing(context):
    moe = small_block()
    expected, x = output(moe), tokens()
    try:
        if not context:
            torch.set_default_device("meta")
        with torch.device("meta") if context else torch.no_grad():
            moe.prepack()
            assert moe.experts.down_proj.device.type == "cpu"
            for reached in (moe, copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
                with torch.no_grad():
                    assert (reached(x) == expected).all()
            moe.load_state_dict(moe.state_dict())
            moe.unpack()
            assert moe.experts.down_proj.device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert torch.equal(output(moe), expected)
