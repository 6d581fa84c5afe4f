"""The experts function on its contract: ids of no expert, shapes, dtypes, layouts, gates by their numbers, the unfused path."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUTanh
from transformers.integrations.moe import use_experts_implementation

from fusedonemoe.functional import experts as expert_layers
from fusedonemoe.integrations.transformers.experts import activation_of, experts_forward
from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.records import PLAIN, Activation
from fusedonemoe.testing import assert_within_budget, make_experts
from tests.integrations.transformers_families import build, experts_of

T, D, F, E, K = 13, 24, 16, 6, 3
FUSED, UNFUSED = "qwen3_moe", "deepseek_v4"


def make(family: str) -> Any:
    """The first experts module of a family."""
    experts: Any = next(iter(experts_of(build(family)).values()))
    return experts


def inputs(experts: Any, T: int = T, *, routing: str = "distinct", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    E, D = experts.down_proj.shape[0], experts.down_proj.shape[2 if getattr(experts, "is_transposed", False) else 1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=generator).to(dtype)
    return x, make_experts(T, E, K, routing=routing), torch.rand(T, K, generator=generator) + 0.1


def eager(experts: Any, *arguments: Tensor) -> Tensor:
    return type(experts).forward.__wrapped__(experts, *arguments)


def gradients(experts: Any, function: Any, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    wanted = {"x": x, "weights": weights} | dict(experts.named_parameters())
    y = function(experts, x, ids, weights)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), upstream), strict=True))


FAMILIES = [FUSED, "gpt_oss", "nemotron_h", "openai_privacy_filter", UNFUSED, "muse_spark"]


@pytest.mark.parametrize("outside", [-1, None, 2**31], ids=["minus one", "E", "far"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_no_expert_contribute_nothing(family, outside):
    experts = make(family)
    x, ids, weights = inputs(experts)
    E = experts.down_proj.shape[0]
    skipped = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    skipped[-1] = True
    away = torch.where(skipped, E if outside is None else outside, ids)
    # What the plain code computes with a weight of zero; garbage stands where nobody may read.
    expected = gradients(experts, eager, x, ids, torch.where(skipped, 0, weights))
    ours = gradients(experts, experts_forward, x, away, torch.where(skipped, float("nan"), weights))
    expected["weights"][skipped] = 0
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_and_one_choice(family):
    experts = make(family)
    x, ids, weights = inputs(experts)
    none = gradients(experts, experts_forward, x[:0], ids[:0], weights[:0])
    assert none["y"].shape == x[:0].shape and all(not g.any() for g in none.values())
    # Expert parallelism calls with one choice of weight 1 for each row, on whichever rank it has come to.
    one = ids[:, :1].contiguous(), torch.ones(T, 1)
    torch.testing.assert_close(experts_forward(experts, x, *one), eager(experts, x, *one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [FUSED, UNFUSED])
def test_the_number_of_experts_is_that_of_the_weights(family):
    experts = make(family)
    x, ids, weights = inputs(experts)
    full = gradients(experts, eager, x, ids, torch.where(ids < 4, weights, 0))
    with torch.no_grad():
        for name, p in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(p[:4].clone()))
    local = gradients(experts, experts_forward, x, ids, weights)
    torch.testing.assert_close(local["y"], full["y"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(local["x"], full["x"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(local["down_proj"], full["down_proj"][:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_weights_beside_bfloat16(family):
    experts = make(family).bfloat16()
    x, ids, weights = inputs(experts, dtype=torch.bfloat16)
    assert weights.dtype == torch.float32
    y = experts_forward(experts, x, ids, weights)
    wide = copy.deepcopy(experts).double()
    exact = eager(wide, x.double(), ids, weights.double()).detach()
    plain = eager(experts, x, ids, weights.bfloat16()).detach()
    assert_within_budget(y.detach(), plain, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_takes_float32_hidden_states(family):
    experts = make(family)
    x, ids, weights = inputs(experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gradients(experts, experts_forward, x, ids, weights)
        half = gradients(experts, eager, x, ids, weights)
    assert y["y"].dtype == torch.float32 and all(value.dtype == torch.float32 for value in y.values())
    exact = gradients(copy.deepcopy(experts).double(), eager, x.double(), ids, weights.double())
    assert not torch.equal(y["y"], gradients(experts, experts_forward, x, ids, weights)["y"])
    for name in ("y", "x", "weights"):
        # A little more than the usual: a plain run under autocast leaves the last sum and the weights in float32.
        assert_within_budget(y[name], half[name], exact[name], factor=3, name=name)


def test_weights_of_another_dtype_are_what_is_computed_in():
    experts = make(FUSED)
    x, ids, weights = inputs(experts, dtype=torch.bfloat16)
    y = experts_forward(experts, x, ids, weights)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, experts_forward(experts, x.float(), ids, weights).bfloat16())


def test_non_contiguous_hidden_states_and_small_ids():
    experts = make(FUSED)
    x, ids, weights = inputs(experts)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(experts_forward(experts, strided, ids.int(), weights.double()), eager(experts, x, ids, weights))


@pytest.mark.parametrize("family", ["gpt_oss", "aria"])
def test_transposed_weights_are_not_copied(family, monkeypatch):
    experts = make(family)
    seen: list[Tensor] = []
    real = expert_layers.run_layer

    def run_layer(*args):
        seen.extend(args)
        return real(*args)

    monkeypatch.setattr("fusedonemoe.integrations.transformers.experts.run_layer", run_layer)
    experts_forward(experts, *inputs(experts))
    assert [w.data_ptr() for w in seen[3:5]] == [experts.gate_up_proj.data_ptr(), experts.down_proj.data_ptr()]


def test_gradients_of_transposed_weights_have_their_layout():
    # Otherwise autograd copies each of them once more, as large as all experts.
    experts = make("gpt_oss")
    x, ids, weights = inputs(experts)
    y = experts_forward(experts, x, ids, weights)
    leaves = (experts.gate_up_proj, experts.down_proj)
    assert all(gradient.is_contiguous() for gradient in torch.autograd.grad(y.sum(), leaves))


class Config:
    _experts_implementation = "eager"


class Bare(nn.Module):
    """Experts without any flag, as the first version of the contract had them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * F, D, generator=generator) * D**-0.5)
        self.down_proj = nn.Parameter(torch.randn(E, D, F, generator=generator) * F**-0.5)
        self.limit, self.alpha = 3.0, 1.5
        self.act_fn: Any = nn.SiLU()


def decorated(gate: Any = None, **flags: Any) -> Any:
    namespace = {} if gate is None else {"_apply_gate": gate}
    cls = type("SomeExperts", (Bare,), namespace)
    return use_experts_implementation(cls, **flags)(Config()) if flags else use_experts_implementation(cls)(Config())


def test_a_module_without_flags_has_the_defaults():
    experts = decorated()
    x, ids, weights = inputs(experts)
    expected = experts_forward(experts, x, ids, weights)
    for flag in ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel"):
        delattr(experts, flag)
    assert torch.equal(experts_forward(experts, x, ids, weights), expected)


def clamped(self, z):
    gate, up = z.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def oai(self, z):
    gate, up = z[..., 0::2].clamp(max=self.limit), z[..., 1::2].clamp(-self.limit, self.limit)
    return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def oai_with_another_one(self, z):
    gate, up = z[..., 0::2].clamp(max=self.limit), z[..., 1::2].clamp(-self.limit, self.limit)
    return (up + 1.001) * gate * torch.sigmoid(gate * self.alpha)


def in_float32(self, z):
    gate, up = z.float().chunk(2, dim=-1)
    return (self.act_fn(gate) * up).to(z.dtype)


def up_first(self, z):
    up, gate = z.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def hidden_clamp(self, z):
    gate, up = z.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=500.0)) * up


def learned(self, z):
    gate, up = z.chunk(2, dim=-1)
    return self.act_fn(gate) * up * self.down_proj.mean()


GATES = {
    "default": (None, ("silu", "gate_up")),
    "oai": (oai, ("swiglu_oai", "interleaved")),
    "oai with another one": (oai_with_another_one, None),
    "clamped": (clamped, None),
    "in float32": (in_float32, ("silu", "gate_up")),
    "up first": (up_first, ("silu", "up_gate")),
    "hidden clamp": (hidden_clamp, None),
    "learned": (learned, None),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_are_known_by_what_they_compute(name):
    gate, expected = GATES[name]
    experts = decorated(gate)
    found: Any = activation_of(experts)
    assert (None if found is None else found[:2]) == expected
    if name == "oai":
        assert found[2:] == (1.5, 3.0)
    x, ids, weights = inputs(experts)
    z = torch.einsum("td,tkgd->tkg", 4 * x, experts.gate_up_proj[ids])
    h = experts._apply_gate(z)
    y = torch.einsum("tkf,tkdf,tk->td", h, experts.down_proj[ids], weights)
    torch.testing.assert_close(experts_forward(experts, 4 * x, ids, weights), y, rtol=1e-4, atol=1e-4)


def test_a_gate_replaced_on_the_instance_is_not_guessed():
    experts = decorated()
    experts._apply_gate = lambda z: z[..., :F].sin()
    assert activation_of(experts) is None
    x, ids, weights = inputs(experts)
    z = torch.einsum("td,tkgd->tkg", x, experts.gate_up_proj[ids])
    y = torch.einsum("tkf,tkdf,tk->td", z[..., :F].sin(), experts.down_proj[ids], weights)
    torch.testing.assert_close(experts_forward(experts, x, ids, weights), y, rtol=1e-4, atol=1e-5)


def test_a_gate_replaced_after_compiling_runs():
    experts = make("qwen3_moe")
    arguments = inputs(experts)
    torch._dynamo.reset()
    fast = torch.compile(lambda *given: experts_forward(experts, *given), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(*arguments), experts_forward(experts, *arguments), rtol=0, atol=0)
    own = experts._apply_gate
    experts._apply_gate = lambda z: 2 * own(z)
    torch.testing.assert_close(fast(*arguments), experts_forward(experts, *arguments), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(ACT2FN.keys()))
def test_every_activation_is_what_its_name_says_or_unknown(name):
    experts = decorated()
    experts.act_fn = ACT2FN[name]
    found = activation_of(experts)
    if found is not None:
        v = torch.linspace(-9, 9, 200, dtype=torch.float64)
        expected = activate(v, Activation(found.name, PLAIN, 0.0, 0.0))
        torch.testing.assert_close(experts.act_fn(v), expected, rtol=1e-6, atol=1e-6)
    assert (found is not None) or name not in ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")


def test_a_gelu_tells_its_form():
    experts = decorated()
    for act_fn, name in ((nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (GELUTanh(), "gelu_tanh")):
        experts.act_fn = act_fn
        found: Any = activation_of(experts)
        assert found.name == name
    del experts.act_fn
    experts.act_fn = torch.tanh
    assert activation_of(experts) is None


def test_a_subclass_by_any_name_is_read_the_same():
    # PEFT renames the class of a module that it parametrises.
    experts = make("gpt_oss")
    before = activation_of(experts)
    experts.__class__ = type("ParametrizedGptOssExperts", (type(experts),), {})
    assert before is not None and activation_of(experts) == before
