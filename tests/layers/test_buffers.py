"""Buffers that a cast of their module must not round: values, dtypes and what is computed with them afterwards."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedonemoe import MoE, ProductKeyRouter, TopKRouter
from fusedonemoe.balance import LossFreeBalance
from fusedonemoe.compat import momoe
from fusedonemoe.compat.flashmoe import FlashMoE, FlashMoEConfig
from fusedonemoe.layers.fine_grained import FineGrainedMoE
from fusedonemoe.layers.quantization import quantize_

E, D = 8, 32
# 8 values, of which bfloat16 makes 2: a cast that rounds cannot go unseen.
BIAS = 0.5 + torch.arange(E) * 2.0**-12

FLASHMOE: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": 16,
    "hidden_act": "silu",
    "num_experts": 16,
    "num_experts_per_tok": 2,
}


def with_bias(**fields: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(hidden_size=D, intermediate_size=16, num_experts=E, top_k=2, scoring="sigmoid", selection_bias=True, **fields)
    moe.gate.get_buffer("e_score_correction_bias").copy_(BIAS)
    return moe


def quantized(dtype: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(MoE(hidden_size=D, intermediate_size=32, num_experts=E, top_k=2, bias=True))
    quantize_(model, dtype, **options)
    return model


def with_statistics(module: nn.Module) -> nn.Module:
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(1 + torch.arange(buffer.numel()) * 2.0**-12)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(70_001)
    return module


def momoe_block() -> nn.Module:
    block = momoe.MoE(D, 16, num_experts=E, num_chosen_experts=3, num_shared_experts=1, device="cpu")
    block.biases_N[:-1] = BIAS[:-1]
    block.counts_N.copy_(70_001 + torch.arange(E))
    return block


MODULES: dict[str, Callable[[], nn.Module]] = {
    "router": lambda: with_bias().gate,
    "block": with_bias,
    "parent": lambda: nn.Sequential(nn.ModuleDict({"moe": with_bias()})),
    "int8": lambda: quantized("int8"),
    "int4": lambda: quantized("int4", group_size=32, symmetric=False),
    "product keys": lambda: with_statistics(ProductKeyRouter(D, 4, 2, input_norm="batch")),
    "its norm": lambda: with_statistics(nn.Sequential(ProductKeyRouter(D, 4, 2, input_norm="batch").norm)),
    "fine-grained": lambda: with_statistics(FineGrainedMoE(D, num_experts=16, top_k=2)),
    "flashmoe": lambda: with_statistics(FlashMoE(FlashMoEConfig(**FLASHMOE))),
    "momoe": momoe_block,
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "to like": lambda m: m.to(torch.empty(1, dtype=torch.float16)),
    "type": lambda m: m.type(torch.bfloat16),
    "float8": lambda m: m.to(torch.float8_e4m3fn),
    "there and back": lambda m: m.bfloat16().float(),
    "children": lambda m: [child.to(torch.bfloat16) for child in m.children()],
    "part by part": lambda m: m.apply(lambda part: part.half() and None),
}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    found = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert found
    return found


def assert_same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = dict(module.named_buffers())
    assert actual.keys() == expected.keys()
    for name, buffer in actual.items():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@every_module
def test_a_cast_leaves_them_as_they_are_to_the_bit(make, cast):
    module = make()
    expected = buffers(module)
    cast(module)
    assert_same(module, expected)


@every_module
def test_a_cast_leaves_copies_and_pickles_as_they_are(make):
    module = make()
    expected = buffers(module)
    assert_same(copy.deepcopy(module).half(), expected)
    assert_same(pickle.loads(pickle.dumps(module)).bfloat16(), expected)


@every_module
def test_weights_are_cast(make):
    module = make().bfloat16()
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


@every_module
def test_devices_and_empty_copies_keep_the_dtype(make):
    module = make()
    expected = {name: buffer.dtype for name, buffer in module.named_buffers()}
    for moved in (copy.deepcopy(module).to("meta"), copy.deepcopy(module).to("meta", torch.bfloat16)):
        assert {name: buffer.dtype for name, buffer in moved.named_buffers()} == expected
        assert all(buffer.is_meta for buffer in moved.buffers())
    empty = module.to("meta").bfloat16().to_empty(device="cpu")
    assert {name: buffer.dtype for name, buffer in empty.named_buffers()} == expected
    assert not any(buffer.is_meta for buffer in empty.buffers())


@every_module
def test_double_widens_what_may_be_wider_and_keeps_the_rest(make):
    module = make()
    expected = buffers(module)
    module.double()
    for name, buffer in module.named_buffers():
        wider = name.endswith(("e_score_correction_bias", "biases_N", "running_mean", "running_var"))
        assert buffer.dtype == (torch.float64 if wider else expected[name].dtype), name
        assert torch.equal(buffer, expected[name].to(buffer.dtype)), name
    assert_same(module.half(), expected)


@pytest.mark.parametrize("assign", [False, True])
@every_module
def test_a_checkpoint_in_half_precision_loads_as_float32(make, assign):
    module = make()
    expected = buffers(module)
    saved = {n: t.bfloat16() if t.is_floating_point() else t.clone() for n, t in module.state_dict().items()}
    module.load_state_dict(saved, assign=assign)
    for name, buffer in module.named_buffers():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, saved[name].to(buffer.dtype)), name


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_another_kind_of_number_is_refused(assign):
    model = quantized("int8")
    expected = buffers(model)
    saved = model.state_dict()
    saved["0.experts.down_proj"] = saved["0.experts.down_proj"].float()
    message = r"0\.experts\.down_proj must have a dtype like torch\.int8, got torch\.float32"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(saved, assign=assign)
    assert_same(model, expected)


def test_built_in_half_precision_it_is_float32():
    for module in (with_bias(dtype=torch.bfloat16), FineGrainedMoE(D, num_experts=16, top_k=2, dtype=torch.float16)):
        assert {b.dtype for b in module.buffers() if b.is_floating_point()} == {torch.float32}


def test_a_cast_changes_no_tokens_experts():
    # The weights keep their values, and the router computes in float32: the same experts. Rounded, 36 of 200 were others.
    moe = with_bias()
    with torch.no_grad():
        moe.gate.weight.copy_(1e-4 * moe.gate.weight.bfloat16())
        moe.gate.weight.copy_(moe.gate.weight.bfloat16())
    x = torch.randn(200, D).bfloat16()
    expected = moe.gate(x).experts
    assert torch.equal(moe.bfloat16().gate(x).experts, expected)
    assert not torch.equal(TopKRouter.forward(_rounded(moe.gate), x).experts, expected)


def _rounded(router: TopKRouter) -> TopKRouter:
    rounded = copy.deepcopy(router)
    rounded._buffers["e_score_correction_bias"] = BIAS.bfloat16()
    return rounded


def test_the_update_goes_on_past_a_half_after_a_cast():
    moe = MoE(hidden_size=D, intermediate_size=16, num_experts=E, top_k=1, selection_bias=True).bfloat16()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    balance = LossFreeBalance(moe, optimizer, rate=0.001)
    bias = moe.gate.get_buffer("e_score_correction_bias")
    with torch.no_grad():
        bias.fill_(0.5)
        bias[0] = -100.0  # never picked, so always raised
    x = torch.randn(16, D).bfloat16()
    before = bias.clone()
    for _ in range(5):
        moe(x)
        balance.update()
    assert moe.gate.e_score_correction_bias is bias
    moved = (bias - before)[1:]
    assert moved.abs().max() >= 0.001 and bias[0] > before[0]


def test_a_bias_that_something_else_made_half_is_refused_at_the_step():
    moe = with_bias()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    LossFreeBalance(moe, optimizer)
    moe(torch.randn(5, D)).sum().backward()
    bias = moe.gate.get_buffer("e_score_correction_bias")
    bias.data = bias.data.bfloat16()  # FSDP's MixedPrecision(buffer_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"gate\.e_score_correction_bias must be float32 to move by small steps, got torch\.b"):
        optimizer.step()
    block = momoe.MoE(D, 16, num_experts=E, num_chosen_experts=3, num_shared_experts=1, device="cpu")
    block.biases_N.data = block.biases_N.data.half()
    with pytest.raises(RuntimeError, match="biases_N must be float32"):
        block.update_biases()


def test_double_routes_in_float64():
    moe = with_bias().double()
    x = torch.randn(40, D, dtype=torch.float64)
    out = moe(x, return_routing=True)
    assert out.logits.dtype == torch.float64
    scores = torch.sigmoid(x @ moe.gate.weight.t()) + BIAS.double()
    assert torch.equal(out.experts.sort().values, scores.topk(2).indices.sort().values)


def test_running_statistics_move_on_after_a_cast():
    router = ProductKeyRouter(D, 4, 2, input_norm="batch").bfloat16()
    reference: Any = ProductKeyRouter(D, 4, 2, input_norm="batch")
    for step in range(30):
        x = (torch.randn(64, D, generator=torch.Generator().manual_seed(step)) + 3).bfloat16()
        router(x)
        reference(x)
    norm: Any = router.norm
    assert torch.equal(norm.running_mean, reference.norm.running_mean)
    assert torch.equal(norm.running_var, reference.norm.running_var)


def test_a_norm_of_another_class_is_refused():
    router = nn.SyncBatchNorm.convert_sync_batchnorm(ProductKeyRouter(D, 4, 2, input_norm="batch"))
    with pytest.raises(TypeError, match="norm must be BatchNorm1d, RMSNorm or None, got SyncBatchNorm"):
        router(torch.randn(5, D))


def test_a_block_over_a_transformers_block_shares_the_bias_after_a_cast_too():
    block = with_bias()
    shared = MoE.from_hf(block, config=block.config)
    ours, theirs = (module.gate.get_buffer("e_score_correction_bias") for module in (shared, block))
    assert ours.data_ptr() == theirs.data_ptr()
    shared.bfloat16()
    ours = shared.gate.get_buffer("e_score_correction_bias")
    assert ours.data_ptr() == theirs.data_ptr() and torch.equal(ours, BIAS)
