"""LoRAExperts and add_lora: a frozen base, what trains, merging to the bit and back, compiling, checkpoints, messages."""

import copy
import io
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fusedonemoe import Experts, ExpertsForm, LoRAExperts, MoE, MoEConfig, add_lora, explain
from fusedonemoe.ops.cpu import native

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
D, F_, E, K = 16, 12, 6, 2
SIZES: dict[str, Any] = {"hidden_size": D, "intermediate_size": F_, "num_experts": E, "top_k": K}


def make(*, dtype: torch.dtype = torch.float32, fields: dict[str, Any] | None = None, **options: Any) -> Any:
    """Adapters that change something: B drawn too."""
    torch.manual_seed(0)
    module: Any = LoRAExperts(Experts(MoEConfig(**{**SIZES, **(fields or {})}), dtype=dtype), **{"r": 3, "alpha": 6, **options})
    for target in module.targets:
        nn.init.normal_(module.factors(target)[1], std=0.2)
    return module


def routed(T: int = 10, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(T, K, generator=generator)
    return torch.randn(T, D, generator=generator).to(dtype), torch.randint(E, (T, K), generator=generator), weights


def adapted_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[MoE(**SIZES) for _ in range(2)])
    for module in add_lora(model, **{"r": 4, "alpha": 8, **options}).values():
        for target in module.targets:
            nn.init.normal_(module.factors(target)[1], std=0.2)
    return model


FIELDS = [
    {},
    {"bias": True, "activation": "swiglu_oai", "gate_up_layout": "interleaved"},
    {"gated": False, "activation": "gelu"},
    {"transposed": True},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("targets", [("gate_up", "down"), ("down",), ("gate_up",)], ids=str)
def test_equals_the_base_with_merged_weights(targets, fields):
    module, inputs = make(targets=targets, fields=fields), routed()
    expected = copy.deepcopy(module.base)
    with torch.no_grad():
        for target in module.targets:
            A, B = module.factors(target)
            delta = 6 / 3 * B @ A
            getattr(expected, module.form.name(target)).add_(delta.mT if module.form.transposed else delta)
    torch.testing.assert_close(module(*inputs), expected(*inputs), rtol=1e-5, atol=1e-5)
    assert (module(*inputs) - module.base(*inputs)).abs().max() > 1e-2


def test_starts_as_the_base_with_factors_as_peft_draws_them():
    torch.manual_seed(0)
    module: Any = LoRAExperts(Experts(MoEConfig(**SIZES, impl="grouped")), r=64)
    assert torch.equal(module(*routed()), module.base(*routed()))
    for target, inner in (("gate_up", D), ("down", F_)):
        A, B = module.factors(target)
        torch.manual_seed(3)
        reference = torch.empty(A.shape[0] * A.shape[1], inner)
        nn.init.kaiming_uniform_(reference, a=5**0.5)
        assert not B.any() and 0.95 < A.std() / reference.std() < 1.05 and A.abs().max() <= inner**-0.5


def test_parameters_and_their_names():
    module = make(r={"gate_up": 3, "down": 5}, targets=("down", "gate_up"))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    assert shapes == {
        "gate_up_lora_A": (E, 3, D),
        "gate_up_lora_B": (E, 2 * F_, 3),
        "down_lora_A": (E, 5, F_),
        "down_lora_B": (E, D, 5),
    }
    assert module.state_dict().keys() == shapes.keys() | {"base.gate_up_proj", "base.down_proj"}
    assert "gate_up: r=3, scale=2" in repr(module) and "not merged" in repr(module)
    half = make(dtype=torch.bfloat16)
    assert half.gate_up_lora_A.dtype == torch.float32 and half(*routed(dtype=torch.bfloat16)).dtype == torch.bfloat16
    same: Any = LoRAExperts(Experts(MoEConfig(**SIZES), dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert same.down_lora_B.dtype == torch.bfloat16


def test_scale():
    assert make(r=4, alpha=8).scale == {"gate_up": 2, "down": 2}
    assert make(r=4, alpha={"gate_up": 8, "down": 2}, use_rslora=True).scale == {"gate_up": 4, "down": 1}


def test_only_adapters_train_and_the_loss_falls():
    model = adapted_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, target = torch.randn(64, D), torch.randn(64, D)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = (x + model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == (parameter.grad is not None) == (not torch.equal(parameter, before[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_and_back_to_the_bit(transposed, dtype):
    if transposed:
        base = nn.Module()
        base.up, base.down = (nn.Parameter(torch.randn(s).to(dtype)) for s in ((E, D, 2 * F_), (E, F_, D)))
        module: Any = LoRAExperts(base, r=3, form=ExpertsForm(up="up", down="down", transposed=True))
        nn.init.normal_(module.gate_up_lora_B)
    else:
        module = make(dtype=dtype)
    inputs = routed(dtype=dtype)
    expected = module(*inputs)
    originals = dict(module.base.named_parameters())
    bits, addresses = ({n: f(p) for n, p in originals.items()} for f in (lambda p: p.detach().clone(), Tensor.data_ptr))
    separate = module.merged_weights()
    for _ in range(2):
        module.merge()
        assert module.merged and "merged" in repr(module)
        merged = module(*inputs)
        assert (merged.float() - expected.float()).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
        for name, parameter in module.base.named_parameters():
            assert parameter is originals[name] and torch.equal(parameter, separate[name])
        assert not torch.equal(next(module.base.parameters()), next(iter(bits.values())))
        module.unmerge()
        assert not module.merged
        for name, parameter in module.base.named_parameters():
            assert torch.equal(parameter, bits[name]) and parameter.data_ptr() == addresses[name]
        assert torch.equal(module(*inputs), expected)


def test_merging_is_exact_to_one_rounding():
    module = make(dtype=torch.bfloat16)
    A, B = module.factors("down")
    exact = module.base.down_proj.double() + module.scale["down"] * B.double() @ A.double()
    merged = module.merged_weights()["down_proj"]
    assert ((merged.double() - exact).abs() <= 0.5001 * torch.finfo(torch.bfloat16).eps * exact.abs() * 2).all()


def test_what_is_merged_is_neither_merged_again_nor_saved_nor_loaded():
    module = make()
    state = module.state_dict()
    with pytest.raises(RuntimeError, match="nothing is merged"):
        module.unmerge()
    module.merge()
    for refused in (module.merge, module.merged_weights, module.state_dict, lambda: module.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"the base holds the adapters, which would count twice: call unmerge\(\) first"):
            refused()
    module.unmerge()
    module.load_state_dict(state)


def test_moving_a_merged_module_moves_the_originals_too():
    module, inputs = make(), routed(dtype=torch.float64)
    module.merge()
    module.double()
    module.unmerge()
    assert module.base.down_proj.dtype == torch.float64
    fresh = make().double()
    assert torch.equal(module(*inputs), fresh(*inputs))


def test_a_merged_module_can_be_copied_and_pickled():
    module, inputs = make(), routed()
    expected = module(*inputs)
    module.merge()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        other.unmerge()
        assert torch.equal(other(*inputs), expected) and module.merged


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("merged_before", [True, False])
def test_unload_gives_the_base_back(merged_before, merge):
    module, inputs = make(), routed()
    base, weights = module.base, module.base.down_proj.detach().clone()
    adapted = module.merged_weights()["down_proj"]
    if merged_before:
        module.merge()
    plain = module.unload(merge=merge)
    assert plain is base and torch.equal(base.down_proj, adapted if merge else weights)
    assert isinstance(plain(*inputs), Tensor)


@needs_kernels
def test_merging_drops_packed_weights():
    module, inputs = make(), routed()
    module.base.prepack()
    with torch.no_grad():
        module.merge()
        merged = module(*inputs)
        assert module.base.packed_bytes == 0
        module.base.prepack()
        module.unmerge()
        assert module.base.packed_bytes == 0
        torch.testing.assert_close(merged, module(*inputs), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_adapters_never_compute_with_panels():
    module, inputs = make(), routed()
    module.base.prepack()
    for use in (lambda: module(*inputs), module.merged_weights):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"the weights of the base are packed, .*call unpack\(\) first"):
            use()
    module.unpack()
    expected = module(*inputs)
    base = module.unload(merge=False)
    base.prepack()
    adapted = LoRAExperts(base, r=module.r, alpha=module.alpha)  # unpacks
    adapted.load_state_dict(module.state_dict())
    assert base.packed_bytes == 0 and torch.equal(adapted(*inputs), expected)


def test_a_state_dict_comes_back_and_adapters_alone_can_be_taken_from_it():
    source, other = make(), make()
    other.reset_parameters()
    assert not torch.equal(source(*routed()), other(*routed()))
    alone = {name: tensor for name, tensor in source.state_dict().items() if "lora_" in name}
    assert other.load_state_dict(alone, strict=False).unexpected_keys == []
    assert torch.equal(source(*routed()), other(*routed()))


def test_from_the_meta_device():
    module: Any = LoRAExperts(Experts(MoEConfig(**SIZES, impl="grouped"), device="meta"))
    assert module.down_lora_A.device.type == "meta"
    module.to_empty(device="cpu")
    module.base.reset_parameters()
    module.reset_parameters()
    assert torch.equal(module(*routed()), module.base(*routed()))


# In a model


def test_patterns_name_projections_as_in_peft():
    model = nn.Sequential(*[MoE(**SIZES) for _ in range(2)])
    found = add_lora(
        model, r=4, rank_pattern={"1.experts.down_proj": 2, "down_proj": 3}, alpha_pattern={r"\d.experts.gate_up_proj": 1}
    )
    assert [module.r for module in found.values()] == [{"gate_up": 4, "down": 3}, {"gate_up": 4, "down": 2}]
    assert [module.alpha for module in found.values()] == [{"gate_up": 1, "down": 16}] * 2
    assert list(found) == ["0.experts", "1.experts"] and model[1].experts is found["1.experts"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_are_the_same_bits(use_reentrant):
    model, x = adapted_model(), torch.randn(12, D, requires_grad=True)
    wanted = [p for p in model.parameters() if p.requires_grad]
    runs = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        forward(x).square().sum().backward()
        runs.append([cast(Tensor, p.grad).clone() for p in wanted])
    assert all(map(torch.equal, *runs)) and all(g.any() for g in runs[0])


@pytest.mark.parametrize("save_percent", [100, 0])
def test_compiles_whole_with_one_static_and_one_dynamic_graph(save_percent):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*[MoE(**SIZES, save_percent=save_percent) for _ in range(2)])
    for module in add_lora(model, r=4).values():
        nn.init.normal_(module.down_lora_B)
    wanted = [p for p in model.parameters() if p.requires_grad]
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    for T in (16, 24, 7, 33, 5):
        x = torch.randn(T, D)
        expected = torch.autograd.grad(model(x).square().mean(), wanted)
        for got, right in zip(torch.autograd.grad(fast(x).square().mean(), wanted), expected, strict=True):
            assert (got - right).abs().max() <= 1e-5 * right.abs().max()
    assert counter.frame_count == 2


def test_a_symbolic_scale_is_no_break():
    # dynamic=True makes a symbol of every number, a default argument's too.
    torch._dynamo.reset()
    module, inputs = make(targets=("down",)), routed()
    fast = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(fast(*inputs), module(*inputs))


def test_autocast_computes_in_half_and_trains_in_float32():
    model = adapted_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(9, D))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            grad = cast(Tensor, parameter.grad)
            assert grad.dtype == torch.float32 and grad.any(), name


def test_a_named_cpu_base_runs_where_its_adapters_can():
    module, inputs = make(fields={"impl": "cpu"}), routed()
    torch.testing.assert_close(module(*inputs), make()(*inputs), rtol=1e-5, atol=1e-5)


def test_explain_names_the_operator_that_runs():
    moe: Any = adapted_model()[0]  # type: ignore[index]
    found = explain(moe)
    assert (found.operator, found.impl) == ("experts_mlp_lora", "grouped")
    assert {c.impl: c.refusal for c in found.candidates}[
        "cpu"
    ] == "the compiled CPU kernels have no adapters, impl='grouped' has them"
    moe.experts.merge()
    assert explain(moe).operator == "experts_mlp"


def test_packing_is_for_plain_experts():
    moe: Any = adapted_model()[0]  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"packed weights are of plain experts: put unload\(\) in this module's place"):
        moe.prepack()
    moe.unpack()


# Messages


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be an integer above 0, got 0"),
        ({"r": 2.5}, ValueError, "r must be an integer above 0, got 2.5"),
        ({"r": {"down": 2}}, ValueError, r"r must have a value for each of \('gate_up', 'down'\), got \{'down': 2\}"),
        ({"alpha": -1}, ValueError, "alpha must be a number above 0, got -1"),
        ({"alpha": float("inf")}, ValueError, "alpha must be a number above 0, got inf"),
        ({"targets": "down"}, ValueError, r"targets must be some of \('gate_up', 'down'\), each once, got 'down'"),
        ({"targets": ()}, ValueError, "targets must be some of"),
        ({"targets": ("down", "down")}, ValueError, "targets must be some of"),
        ({"targets": ("up",)}, ValueError, "targets must be some of"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        LoRAExperts(Experts(MoEConfig(**SIZES)), **options)


def test_bad_modules():
    with pytest.raises(TypeError, match="base must be an Experts, or come with a form=, got Linear"):
        LoRAExperts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must hold experts that can be adapted, got Linear without any"):
        add_lora(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="for experts alone call LoRAExperts"):
        add_lora(Experts(MoEConfig(**SIZES)))
    with pytest.raises(ValueError, match="model must have no adapters yet"):
        add_lora(adapted_model())
    with pytest.raises(ValueError, match=r"target must be one of \('down',\), got 'gate_up'"):
        make(targets=("down",)).factors("gate_up")
