"""The modules against the oracle composed by hand and against transformers, and everyday module manners."""

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fusedonemoe import Experts, FusedOneMoE, MoE, MoEConfig, MoEOutput, RouterOutput, TopKRouter, explain
from fusedonemoe.ops import reference
from fusedonemoe.testing import assert_within_budget, exact_float64

SIZES = {"hidden_size": 8, "intermediate_size": 6, "num_experts": 8, "top_k": 3}
GROUPS = {"scoring": "sigmoid", "selection_bias": True, "n_group": 4, "topk_group": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain_relu2": {"gated": False, "activation": "relu2"},
    "qwen3": {},
    "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "gelu_up_gate_bias": {"activation": "gelu", "gate_up_layout": "up_gate", "bias": True},
    "plain_bias": {"gated": False, "activation": "gelu_tanh", "bias": True},
    "gpt_oss": {
        "activation": "swiglu_oai",
        "gate_up_layout": "interleaved",
        "bias": True,
        "router_bias": True,
        "score_first": False,
        "swiglu_alpha": 1.5,
        "swiglu_limit": 0.5,
    },
    "deepseek_v3": GROUPS | {"routed_scaling_factor": 2.5, "shared_intermediate_size": 5},
    "deepseek_v2": {"n_group": 2, "group_score": "max", "norm_topk_prob": False},
    "qwen2": {"shared_intermediate_size": 5, "shared_gate": True, "norm_topk_prob": False},
    "every_expert": {"top_k": None, "scoring": "sigmoid", "norm_topk_prob": False},
    "save_half": {"save_percent": 50},
    "lfm2": {"scoring": "sigmoid", "selection_bias": True, "norm_eps": 0.3},
    "nemotron_h": GROUPS | {"gated": False, "activation": "relu2", "shared_intermediate_size": 5},
    "megablocks": {"gated": False, "activation": "gelu", "norm_topk_prob": False, "output_bias": True},
    "minimax_m3": {
        "scoring": "sigmoid",
        "activation": "swiglu_oai",
        "swiglu_limit": 0.5,
        "shared_intermediate_size": 5,
        "output_bias": True,
    },
    "privacy_filter": {"activation": "swiglu_oai", "bias": True, "transposed": True, "swiglu_limit": 0.5},
}
IMPLS = ("auto", "dense", "grouped", "portable")
MODULES: dict[str, Any] = {
    "moe": lambda **kw: MoE(**SIZES, bias=True, selection_bias=True, shared_intermediate_size=5, shared_gate=True, **kw),
    "fused_one_moe": lambda **kw: FusedOneMoE(8, 6, 5, is_sparse=True, topk=2, bias=True, **kw),
    "router": lambda **kw: TopKRouter(8, 5, 2, bias=True, selection_bias=True, **kw),
    "experts": lambda **kw: Experts(MoEConfig(**SIZES, bias=True), **kw),
}


def make_moe(*, dtype=torch.float64, seed=0, **fields):
    torch.manual_seed(seed)
    moe = MoE(**(SIZES | fields), dtype=dtype)
    with torch.no_grad():
        if moe.gate.e_score_correction_bias is not None:
            moe.gate.e_score_correction_bias.normal_(std=0.1)
        if moe.output_bias is not None:
            moe.output_bias.normal_()
        moe.gate.weight.mul_(3)  # logits of order one, so that experts' weights differ
    return moe


def oracle_router(gate, x_TD):
    weight, bias, selection_bias = exact_float64(gate.weight, gate.bias, gate.e_score_correction_bias)
    logits = x_TD @ weight.T + (0.0 if bias is None else bias)
    weights, experts = reference.route(
        logits,
        gate.top_k,
        scoring=gate.scoring,
        score_first=gate.score_first,
        norm_topk_prob=gate.norm_topk_prob,
        routed_scaling_factor=gate.routed_scaling_factor,
        selection_bias=selection_bias,
        n_group=gate.n_group,
        topk_group=gate.topk_group,
        group_score=gate.group_score,
        norm_eps=gate.norm_eps,
    )
    return logits, weights, experts


def oracle_experts(layer, x_TD, experts, weights):
    config, name = layer.config, "gate_up_proj" if layer.config.gated else "up_proj"
    up, down, up_bias, down_bias = (getattr(layer, n) for n in (name, "down_proj", f"{name}_bias", "down_proj_bias"))
    if config.transposed:
        up, down = up.mT, down.mT
    return reference.experts_mlp(
        x_TD,
        experts,
        weights,
        *exact_float64(up, down),
        up_bias=exact_float64(up_bias),
        down_bias=exact_float64(down_bias),
        activation=config.activation,
        gated=config.gated,
        gate_up_layout=config.gate_up_layout,
        swiglu_alpha=config.swiglu_alpha,
        swiglu_limit=config.swiglu_limit,
    )


def oracle_moe(moe, x):
    """``y``, logits, weights and experts, flat over tokens, in float64."""
    x_TD = exact_float64(x).reshape(-1, x.shape[-1])
    logits, weights, experts = oracle_router(moe.gate, x_TD)
    y = oracle_experts(moe.experts, x_TD, experts, weights)
    if moe.shared_expert is not None:
        config, branch = moe.config, moe.shared_expert
        up, down = exact_float64(branch.up_proj.weight, branch.down_proj.weight)
        gate = x_TD @ exact_float64(branch.gate_proj.weight).T if config.gated else None
        value = x_TD @ up.T
        first, second = (value, None) if gate is None else (gate, value)
        limits = {"alpha": config.swiglu_alpha, "limit": config.swiglu_limit}
        shared = reference.activate(config.activation, first, second, **limits) @ down.T
        if moe.shared_expert_gate is not None:
            shared = shared / (1 + np.exp(-(x_TD @ exact_float64(moe.shared_expert_gate.weight).T)))
        y = y + shared
    if moe.output_bias is not None:
        y = y + exact_float64(moe.output_bias)
    return y, logits, weights, experts


def assert_close(actual, expected, rtol=1e-12):
    expected = np.asarray(expected)
    assert np.abs(expected).max(initial=0.0) > 1e-3 or expected.size == 0, "a result of zeros would show nothing"
    np.testing.assert_allclose(exact_float64(actual).reshape(expected.shape), expected, rtol=rtol, atol=rtol)


# Values


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_moe_is_the_oracle_composed(variant, impl):
    moe = make_moe(**VARIANTS[variant], impl=impl)
    x = torch.randn(11, 8, dtype=torch.float64)
    y, logits, weights, experts = oracle_moe(moe, x)
    out = moe(x, return_routing=True)
    assert isinstance(out, MoEOutput)
    assert_close(out.output, y)
    assert_close(out.logits, logits)
    assert_close(out.weights, weights)
    np.testing.assert_array_equal(out.experts, experts)
    np.testing.assert_array_equal(out.tokens_per_expert, np.bincount(experts.reshape(-1), minlength=8))
    assert torch.equal(moe(x), out.output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["dense", "grouped"])
def test_moe_in_lower_precision_is_as_accurate_as_plain_torch(dtype, impl):
    moe = make_moe(dtype=dtype, impl=impl)
    x = torch.randn(40, 8).to(dtype)
    out = moe(x, return_routing=True)
    assert out.output.dtype == dtype and out.logits.dtype == out.weights.dtype == torch.float32
    plain = torch.zeros(40, 8, dtype=dtype)
    for j in range(3):
        up, down = moe.experts.gate_up_proj[out.experts[:, j]], moe.experts.down_proj[out.experts[:, j]]
        gate, value = torch.einsum("tgd,td->tg", up, x).chunk(2, -1)
        plain += torch.einsum("tdf,tf->td", down, nn.functional.silu(gate) * value) * out.weights[:, j, None].to(dtype)
    exact = oracle_experts(moe.experts, exact_float64(x), exact_float64(out.experts), exact_float64(out.weights))
    assert_within_budget(out.output, plain, exact)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 3, 4, 8), (0, 8), (2, 0, 8), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("impl", ["dense", "grouped"])
def test_any_leading_shape(shape, impl):
    moe = make_moe(impl=impl)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = moe(x, return_routing=True)
    assert [tuple(t.shape) for t in out] == [shape, (*shape[:-1], 8), (*shape[:-1], 3), (*shape[:-1], 3), (8,)]
    assert_close(out.output, oracle_moe(moe, x)[0])
    assert int(out.tokens_per_expert.sum()) == 3 * x.numel() // 8
    out.output.sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("impl", ["dense", "grouped"])
def test_strided_input_gives_the_same_bits(impl):
    moe = make_moe(impl=impl)
    x = torch.randn(8, 5, 2, dtype=torch.float64).transpose(0, 2)
    assert torch.equal(moe(x), moe(x.contiguous()))


@pytest.mark.parametrize("variant", ["nemotron_h", "megablocks", "minimax_m3", "privacy_filter", "lfm2"])
def test_variant_compiles_into_one_graph_and_runs_under_autocast(variant):
    moe = make_moe(dtype=torch.float32, **VARIANTS[variant])
    x = torch.randn(11, 8)
    torch._dynamo.reset()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), moe(x))
    expected = torch.autograd.grad(moe(x).square().sum(), list(moe.parameters()))
    actual = torch.autograd.grad(compiled(x).square().sum(), list(moe.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = moe(x)
    assert lower.dtype == torch.bfloat16
    torch.testing.assert_close(lower.float(), moe(x), rtol=0.1, atol=0.1 * float(moe(x).detach().abs().max()))


@pytest.mark.parametrize("impl", ["dense", "grouped"])
@pytest.mark.parametrize("gated", [False, True])
def test_transposed_weights_are_other_storage_of_the_same_block(gated, impl):
    moe = make_moe(impl=impl, gated=gated)
    other = MoE(moe.config.replace(transposed=True), dtype=torch.float64)
    name = "experts.gate_up_proj" if gated else "experts.up_proj"
    state = moe.state_dict()
    other.load_state_dict(state | {k: state[k].mT.contiguous() for k in (name, "experts.down_proj")})
    x = torch.randn(11, 8, dtype=torch.float64)
    torch.testing.assert_close(other(x), moe(x), rtol=1e-12, atol=1e-12)
    for module in (moe, other):
        module(x).square().sum().backward()
    for key in (name, "experts.down_proj"):
        ours, theirs = other.get_parameter(key), moe.get_parameter(key)
        assert ours.is_contiguous() and ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad.mT, rtol=1e-10, atol=1e-10)


def test_transposed_weights_are_never_packed_and_explain_says_what_runs():
    moe = MoE(hidden_size=32, intermediate_size=32, num_experts=4, top_k=2, transposed=True)
    with pytest.raises(ValueError, match="transposed weights cannot be packed"):
        moe.prepack()
    chosen = explain(moe, tokens=5).impl
    assert chosen != "cpu" and chosen == explain(moe.config, tokens=5).impl
    forced = MoE(moe.config.replace(impl=chosen))
    forced.load_state_dict(moe.state_dict())
    x = torch.randn(5, 32)
    assert torch.equal(forced(x), moe(x))
    with pytest.raises(ValueError, match="contiguous"):
        MoE(moe.config.replace(impl="cpu"))(x)


def test_return_routing_fields():
    moe = make_moe(dtype=torch.float32, routed_scaling_factor=2.0)
    out = moe(torch.randn(4, 7, 8), return_routing=True)
    assert [t.dtype for t in out] == [torch.float32, torch.float32, torch.float32, torch.int64, torch.int64]
    torch.testing.assert_close(out.weights.sum(-1), torch.full((4, 7), 2.0))
    assert int(out.tokens_per_expert.sum()) == 4 * 7 * 3
    assert (out.experts.sort(-1).values.diff(dim=-1) > 0).all(), "an expert is picked once per token"
    assert (out.weights.diff(dim=-1) <= 0).all(), "best first"


@pytest.mark.parametrize("module", [make_moe(), FusedOneMoE(8, 6, 4, dtype=torch.float64)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("shape", [(5, 7), (5, 9), (), (8, 1)], ids=str)
def test_wrong_width_is_refused(module, shape):
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 8\], got") as caught:
        module(torch.zeros(shape, dtype=torch.float64))
    assert str(caught.value).endswith(f"got {shape}")


@pytest.mark.parametrize("top_k", [2, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_router_computes_in_float32_or_wider(top_k, dtype):
    torch.manual_seed(0)
    router = TopKRouter(8, 5, top_k, bias=True, dtype=dtype)
    x = torch.randn(3, 7, 8).to(dtype)
    out = router(x)
    assert isinstance(out, RouterOutput)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.logits.dtype == out.weights.dtype == wide and out.experts.dtype == torch.int64
    logits, weights, experts = oracle_router(router, exact_float64(x).reshape(-1, 8))
    rtol = 1e-12 if wide == torch.float64 else 1e-5
    assert_close(out.logits, logits, rtol)
    assert_close(out.weights, weights, rtol)
    np.testing.assert_array_equal(out.experts.reshape(21, -1), experts)


def test_experts_takes_hugging_faces_order_of_arguments():
    torch.manual_seed(0)
    experts = Experts(MoEConfig(**SIZES), dtype=torch.float64)
    x, ids, weights = torch.randn(6, 8, dtype=torch.float64), torch.randint(8, (6, 3)), torch.rand(6, 3, dtype=torch.float64)
    assert_close(experts(x, ids, weights), oracle_experts(experts, *exact_float64(x, ids, weights)))


# FusedOneMoE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_fused_one_moe_mixes_before_the_squared_relu(is_sparse, bias, impl):
    torch.manual_seed(0)
    layer = FusedOneMoE(8, 6, 5, is_sparse=is_sparse, topk=2, bias=bias, impl=impl, dtype=torch.float64)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    x_TD = exact_float64(x).reshape(-1, 8)
    gate, proj, down, up_bias, down_bias = exact_float64(
        layer.gate.weight, layer.proj, layer.down, layer.up_bias, layer.down_bias
    )
    score = 1 / (1 + np.exp(-(x_TD @ gate.T)))
    if is_sparse:  # the two best keep their sigmoid, the others drop out: nothing is normalised
        score[score < np.sort(score, axis=1)[:, [-2]]] = 0
    h = np.einsum("te,td,edf->tf", score, x_TD, proj) + (up_bias if bias else 0)
    assert_close(layer(x), np.maximum(h, 0) ** 2 @ down + (down_bias if bias else 0))


def test_fused_one_moe_without_sparsity_ignores_topk():
    a, b = (FusedOneMoE(8, 6, 5, is_sparse=False, topk=k, dtype=torch.float64) for k in (1, 4))
    b.load_state_dict(a.state_dict())
    x = torch.randn(7, 8, dtype=torch.float64)
    assert a.gate.top_k is None
    assert torch.equal(a(x), b(x))


# The same state dict in transformers


def hugging_face_block(family):
    """A block of transformers and the fields of ours that it stands for."""
    pytest.importorskip("transformers")
    import importlib

    sizes = {"hidden_size": 8, "num_experts_per_tok": 3, "hidden_act": "silu"}
    experts = {"num_experts": 8, "moe_intermediate_size": 6}
    name, given, fields = {
        "qwen3_moe": ("Qwen3Moe", experts | {"norm_topk_prob": True}, {}),
        "qwen2_moe": ("Qwen2Moe", experts | {"shared_expert_intermediate_size": 5, "norm_topk_prob": False}, VARIANTS["qwen2"]),
        "mixtral": ("Mixtral", {"num_local_experts": 8, "intermediate_size": 6}, {}),
        "deepseek_v3": (
            "DeepseekV3",
            {
                "n_routed_experts": 8,
                "moe_intermediate_size": 5,
                "n_shared_experts": 1,
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "norm_topk_prob": True,
            },
            VARIANTS["deepseek_v3"] | {"intermediate_size": 5},
        ),
    }[family]
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(configuration, f"{name}Config")(**sizes, **given)
    block_name = f"{name}MoE" if family == "deepseek_v3" else f"{name}SparseMoeBlock"
    return getattr(modeling, block_name)(config).eval(), fields


@pytest.mark.parametrize("impl", ["dense", "grouped"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3"])
def test_transformers_block_with_the_very_same_state_dict(family, impl):
    theirs, fields = hugging_face_block(family)
    ours = make_moe(**fields, impl=impl, dtype=torch.float32)
    state = ours.state_dict()
    if family == "deepseek_v3":  # the one name that differs
        state = {name.replace("shared_expert.", "shared_experts."): t for name, t in state.items()}
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(2, 20, 8)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, y_theirs = ours(x_ours), theirs(x_theirs)
    exact = oracle_moe(ours, x)[0].reshape(x.shape)
    assert_within_budget(y_ours, y_theirs, exact, slack=4)
    dy = torch.randn_like(x)
    y_ours.backward(dy)
    y_theirs.backward(dy)
    gradients = {name.replace("shared_experts.", "shared_expert."): p.grad for name, p in theirs.named_parameters()}
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, exact_float64(gradients[name]), rtol=1e-5)


# Manners


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(name, duplicate):
    source = MODULES[name]()
    kept = {n: t.clone() for n, t in source.state_dict().items()}
    other = duplicate(source)
    assert repr(other) == repr(source)
    assert other.state_dict().keys() == kept.keys()
    for n, t in other.state_dict().items():
        assert torch.equal(t, kept[n])
        t.add_(1)
    assert all(torch.equal(t, kept[n]) for n, t in source.state_dict().items())
    if name in ("moe", "fused_one_moe"):
        x = torch.randn(4, 8)
        other.load_state_dict(source.state_dict())
        assert torch.equal(other(x), source(x))


@pytest.mark.parametrize("name", ["moe", "fused_one_moe"])
def test_forward_and_backward_leave_the_module_as_it_was(name):
    def attributes(module):
        return {path: (set(vars(part)), id(part)) for path, part in module.named_modules()}

    module = MODULES[name]()
    before, kept = attributes(module), {n: t.clone() for n, t in module.state_dict().items()}
    for training in (True, False):
        module.train(training)
        module(torch.randn(5, 8)).sum().backward()
    assert attributes(module) == before
    assert all(torch.equal(t, kept[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("impl", ["dense", "grouped"])
def test_models_do_not_influence_each_other(impl):
    first, second = make_moe(impl=impl, seed=1), make_moe(impl=impl, seed=2, activation="gelu", scoring="sigmoid")
    x = torch.randn(9, 8, dtype=torch.float64)
    alone = first(x)
    second(x + 1).sum().backward()
    assert torch.equal(first(x), alone)
    assert all(p.grad is None for p in first.parameters())


def test_forward_draws_no_random_numbers():
    moe = make_moe()
    x = torch.randn(5, 8, dtype=torch.float64)
    state = torch.get_rng_state()
    moe(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_repr_shows_the_sizes():
    text = repr(make_moe(shared_intermediate_size=5))
    assert "(gate): TopKRouter(hidden_size=8, num_experts=8, top_k=3, scoring='softmax')" in text
    assert "(experts): Experts(num_experts=8, hidden_size=8, intermediate_size=6, activation='silu', gated=True)" in text
    assert "(shared_expert): SharedExpert(" in text
    assert repr(FusedOneMoE(8, 6, 5)).startswith("FusedOneMoE(\n  hidden_size=8, intermediate_size=6, groups=5, topk=None\n")


def test_a_weight_that_was_taken_away_is_named():
    moe = MoE(hidden_size=8, intermediate_size=4, num_experts=3, top_k=1)
    vars(moe.experts)["_parameters"]["down_proj"] = None
    with pytest.raises(TypeError, match=r"down_proj must be a torch\.Tensor, got NoneType"):
        moe(torch.randn(2, 8))


def test_modules_that_moved_have_their_names_of_before():
    code = (
        "from fusedonemoe.fine_grained import FineGrainedMoE\nfrom fusedonemoe.lora import LoRAExperts, add_lora\n"
        "from fusedonemoe.quantization import quantize_\nimport fusedonemoe.routers, fusedonemoe.quantized, fusedonemoe\n"
        "import fusedonemoe.usage, fusedonemoe.shared_expert, fusedonemoe.ops.quantized\n"
        "assert fusedonemoe.ops.quantized.QuantizedWeight is fusedonemoe.functional.QuantizedWeight\n"
        "assert fusedonemoe.routers.TopKRouter is fusedonemoe.TopKRouter and LoRAExperts is fusedonemoe.LoRAExperts"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
