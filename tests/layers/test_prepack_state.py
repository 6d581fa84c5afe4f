"""State dicts, copies, files and casts of modules with packed weights: all of them have the home form."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.layers.test_prepack import WEIGHTS, needs_kernels, output, small_block

pytestmark = needs_kernels


def test_a_state_dict_is_in_home_form_from_packed_to_packed():
    moe, other = small_block(), small_block(seed=1)
    expected, state = output(moe), {name: value.clone() for name, value in moe.state_dict().items()}
    moe.prepack()
    other.prepack()
    for assign in (False, True):
        assert not torch.equal(output(other), expected)
        own = {name: value.clone() for name, value in moe.state_dict().items()}  # assigned values are shared
        assert other.load_state_dict(own, assign=assign).missing_keys == []
        assert other.experts.packed_bytes and torch.equal(output(other), expected)
        other.load_state_dict(small_block(seed=2).state_dict())
    for keep_vars in (False, True):
        saved = moe.state_dict(keep_vars=keep_vars)
        assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
        assert all(value.requires_grad == keep_vars for value in saved.values())
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    plain = small_block(seed=3)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(output(plain), expected)


def test_loading_keeps_identity_and_converts_as_copying_does():
    moe, other = small_block(), small_block(seed=1, dtype=torch.bfloat16)
    moe.prepack()
    parameters = list(moe.parameters())
    moe.load_state_dict(other.state_dict())
    assert all(a is b for a, b in zip(parameters, moe.parameters(), strict=True))
    assert torch.equal(output(moe), output(other.float())) and moe.experts.packed_bytes
    strided = {name: value.t().contiguous().t() if value.dim() == 2 else value for name, value in moe.state_dict().items()}
    strided["experts.down_proj"] = strided["experts.down_proj"].transpose(0, 2).contiguous().transpose(0, 2)
    other = small_block(seed=2)
    other.prepack()
    other.load_state_dict(strided)
    assert torch.equal(output(other), output(moe))
    with torch.inference_mode():
        other.load_state_dict(small_block(seed=3).state_dict())
    assert torch.equal(output(other), output(small_block(seed=3)))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [torch.zeros(4, 24, 21), torch.zeros(4, 1, 24, 32, 1), "text"], ids=["shape", "panels", "type"])
def test_what_does_not_fit_changes_neither_weight(value, name, assign):
    moe = small_block()
    moe.prepack()
    before = [moe.experts.get_parameter(weight) for weight in WEIGHTS]
    panels = [parameter.clone() for parameter in before]
    state = small_block(seed=1).state_dict() | {f"experts.{name}": value}
    with pytest.raises(RuntimeError, match=f"size mismatch for experts.{name}: expected .*the shape of the unpacked weight"):
        moe.load_state_dict(state, assign=assign)
    for weight, parameter, panel in zip(WEIGHTS, before, panels, strict=True):
        assert moe.experts.get_parameter(weight) is parameter and torch.equal(parameter, panel)


def test_what_cannot_be_packed_is_not_loaded():
    moe = small_block()
    moe.prepack()
    expected, state = output(moe), small_block(seed=1).state_dict()
    state = {name: value.double() if "experts" in name else moe.state_dict()[name] for name, value in state.items()}
    with pytest.raises(RuntimeError, match=r"While packing experts\.\w+, .*cannot be packed: the CPU kernels have"):
        moe.load_state_dict(state, assign=True)
    assert torch.equal(output(moe), expected)
    moe.load_state_dict(state)  # copied into float32
    missing = moe.load_state_dict({"experts.down_proj": state["experts.down_proj"]}, strict=False).missing_keys
    assert "experts.gate_up_proj" in missing and "experts.down_proj" not in missing
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.gate_up_proj"):
        moe.load_state_dict({name: value for name, value in state.items() if "gate_up" not in name})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.more"):
        moe.load_state_dict(state | {"experts.more": torch.ones(1)})


# Copies, casts, files


def test_copies_and_files_compute_the_same():
    moe = small_block()
    moe.prepack()
    expected = output(moe)
    file = io.BytesIO()
    torch.save(moe, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(moe)), torch.load(file, weights_only=False)):
        assert other.experts.packed_bytes == 0 and other.experts.down_proj.shape == (4, 24, 20)
        assert torch.equal(output(other), expected)
        other.prepack()
        assert torch.equal(output(other), expected)
    shallow = copy.copy(moe.experts)
    assert shallow.down_proj is moe.experts.down_proj and shallow.packed_bytes == moe.experts.packed_bytes
    other, same = copy.deepcopy((moe, moe.experts.down_proj))  # as a module and its optimizer are copied
    assert other.experts.down_proj is same and other.experts.packed_bytes and torch.equal(output(other), expected)
    with torch.no_grad():
        other.experts.down_proj.zero_()
    assert torch.equal(output(moe), expected) and moe.experts.packed_bytes
    assert isinstance(pickle.loads(pickle.dumps(moe.experts.down_proj)), nn.Parameter)


@pytest.mark.parametrize(
    "change",
    [
        nn.Module.bfloat16,
        nn.Module.half,
        nn.Module.double,
        lambda moe: moe.to(torch.bfloat16),
        lambda moe: moe.to("meta"),
        lambda moe: moe.to_empty(device="cpu"),
        nn.Module.share_memory,
        lambda moe: moe.apply(lambda module: None)._apply(lambda t: t * 2),
    ],
    ids=["bfloat16", "half", "double", "to", "meta", "to_empty", "share_memory", "_apply"],
)
def test_moving_and_casting_unpack(change):
    moe, plain = small_block(impl="auto"), small_block(impl="auto")
    moe.prepack()
    change(moe), change(plain)
    assert moe.experts.packed_bytes == 0
    for actual, expected in zip(moe.parameters(), plain.parameters(), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype and actual.device == expected.device
    if not moe.gate.weight.is_meta and moe.gate.weight.dtype != torch.float64:
        for block in (moe, plain):
            block.load_state_dict(small_block(seed=2).state_dict())
        assert torch.equal(output(moe), output(plain))


def test_initialising_again_draws_what_a_plain_module_draws():
    moe, plain = small_block(), small_block()
    moe.prepack()
    for block in (moe, plain):
        torch.manual_seed(5)
        block.reset_parameters()
    assert moe.experts.packed_bytes and torch.equal(output(moe), output(plain))


# The tensor that is there decides
