"""A block under torch.compile: what Dynamo guards, and that nothing else differs from a block that it looks into."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fusedonemoe import Experts, MoE, MoEConfig, functional

D = 16
FORMS = [
    {},
    {"bias": True, "router_bias": True, "selection_bias": True, "scoring": "sigmoid"},
    {"gated": False, "activation": "relu2", "norm_topk_prob": False, "save_percent": 0},
    {"transposed": True, "activation": "swiglu_oai", "gate_up_layout": "interleaved", "score_first": False},
]


def make(**fields):
    torch.manual_seed(0)
    return MoE(hidden_size=D, intermediate_size=8, num_experts=4, top_k=2, **fields)


def compiled(module, **options):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, **{"backend": "aot_eager", **options})


def targets(graph):
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


def seen_by_dynamo(module, *arguments, **keywords):
    """The guards of a compiled call, by name and type, and the operators of this library that Dynamo saw."""
    guards: list[tuple[str, str]] = []
    graphs = []

    def keep(entries):
        guards.extend((entry.name, entry.guard_type) for entry in entries)
        return [True] * len(entries)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled(module, backend=backend, options={"guard_filter_fn": keep})(*arguments, **keywords)
    (graph,) = graphs
    return guards, {name.split(".")[1] for name in targets(graph) if name.startswith("fusedonemoe.")}


@pytest.mark.parametrize("fields", FORMS)
def test_dynamo_sees_few_operators_and_guards_little(fields):
    guards, operators = seen_by_dynamo(make(**fields), torch.randn(5, D))
    assert operators == {"block_form"}
    inside = [name for name, _ in guards if "functional" in name and "torch" not in name]
    assert not inside, "Dynamo looked into the functions behind the operators"
    assert len(guards) <= 80, "180 if it looks into them"


def test_a_second_block_has_few_guards_of_its_own():
    one, _ = seen_by_dynamo(nn.Sequential(make()), torch.randn(5, D))
    two, _ = seen_by_dynamo(nn.Sequential(make(), make()), torch.randn(5, D))
    assert len(two) - len(one) <= 60  # 24 of them are of hooks, of three modules


@pytest.mark.parametrize("fields", FORMS)
def test_values_and_gradients_are_eagers(fields):
    moe, x = make(**fields), torch.randn(7, D, requires_grad=True)
    results = []
    for run in (moe, compiled(moe)):
        y = run(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])
        results.append([y.detach(), *gradients])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=0, atol=0)


def test_a_changed_rule_reaches_a_compiled_block():
    moe, x = make(), torch.randn(7, D)
    fast = compiled(moe)
    for name, value in (("top_k", 3), ("scoring", "sigmoid"), ("norm_topk_prob", False), ("routed_scaling_factor", 2.5)):
        before = fast(x)
        setattr(moe.gate, name, value)
        assert not torch.equal(fast(x), before)
        torch.testing.assert_close(fast(x), moe(x), rtol=0, atol=0)
        torch.testing.assert_close(fast(x), moe(x), rtol=0, atol=0)  # eager has checked the new rule


def test_a_changed_configuration_reaches_compiled_experts():
    moe, x = make(), torch.randn(7, D)
    fast, before = compiled(moe), moe(x)
    moe.experts.config = moe.config.replace(activation="relu2")
    assert not torch.equal(fast(x), before)
    torch.testing.assert_close(fast(x), moe(x), rtol=0, atol=0)


def test_another_number_of_experts_is_checked_again():
    moe, x = make(selection_bias=True), torch.randn(7, D)
    moe.gate.weight, moe.gate.e_score_correction_bias = nn.Parameter(torch.randn(3, D)), torch.zeros(3)
    torch.testing.assert_close(compiled(moe)(x), moe(x), rtol=0, atol=0)
    moe.gate.weight, moe.gate.e_score_correction_bias = nn.Parameter(torch.randn(1, D)), torch.zeros(1)
    for run in (moe, compiled(moe)):
        with pytest.raises(Exception, match="top_k must be from 1 to 1"):
            run(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, D - 1),), rf"x must have shape \[\.\.\., {D}\], got \(3, 15\)"),
        ((torch.ones(3, D, dtype=torch.float64),), r"gate_up_proj must have the dtype of x \(torch.float64\), got torch.float32"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    moe = make()
    for run in (moe, compiled(moe)):
        with pytest.raises(Exception, match=message):
            run(*arguments)


def test_a_missing_weight_is_named():
    moe, x = make(), torch.randn(3, D)
    moe.experts.down_proj = None
    for run in (moe, torch.compile(moe, backend="aot_eager")):
        with pytest.raises(TypeError, match=r"down_proj must be a torch\.Tensor, got NoneType"):
            run(x)


def test_export_has_no_operator_of_dynamos():
    for strict in (False, True):
        program = torch.export.export(make().eval(), (torch.randn(5, D),), strict=strict)
        assert not targets(program.graph_module) & {
            f"fusedonemoe.{name}.default" for name in ("route_linear", "experts_form", "block_form")
        }


def test_experts_alone_are_one_operator():
    layer = Experts(MoEConfig(hidden_size=D, intermediate_size=8, num_experts=4, top_k=2, activation="gelu", save_percent=50))
    given = torch.randn(5, D), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    guards, operators = seen_by_dynamo(layer, *given)
    assert operators == {"experts_form"}
    assert not [name for name, _ in guards if "check_routing" in name or "choose" in name], "Dynamo looked into run_experts"
    results = [run(*given) for run in (layer, compiled(layer))]
    gradients = [torch.autograd.grad(y.sum(), list(layer.parameters())) for y in results]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_errors_of_the_function_can_be_caught_in_a_graph():
    ids, shares, up, down = torch.randint(0, 4, (5, 2)), torch.rand(5, 2), torch.randn(4, 16, D), torch.randn(4, D, 8)

    class Fallback(nn.Module):
        def forward(self, x):
            try:
                return functional.experts_mlp(x, ids, shares, up, down, impl="triton")
            except ValueError:
                return functional.experts_mlp(x, ids, shares, up, down)

    x = torch.randn(5, D)
    torch.testing.assert_close(compiled(Fallback())(x), Fallback()(x), rtol=0, atol=0)


def test_experts_alone_and_under_autocast():
    layer = Experts(MoEConfig(hidden_size=D, intermediate_size=8, num_experts=4, top_k=2))
    given = torch.randn(5, D), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            eager, fast = layer(*given), compiled(layer)(*given)
        assert eager.dtype == fast.dtype
        torch.testing.assert_close(fast, eager, rtol=0, atol=0)


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


def half(part, name):
    prune.custom_from_mask(part, name, torch.arange(getattr(part, name).numel()).reshape(getattr(part, name).shape) % 2)


@pytest.mark.parametrize("change", [half, lambda part, name: parametrize.register_parametrization(part, name, Twice())])
@pytest.mark.parametrize(("part", "name"), [("gate", "weight"), ("experts", "gate_up_proj"), ("experts", "down_proj")])
def test_a_weight_that_is_computed_from_now_on(part, name, change):
    moe, x = make(), torch.randn(5, D)
    fast = compiled(moe, backend="aot_eager")
    before = moe(x)
    torch.testing.assert_close(fast(x), before, rtol=0, atol=0)
    change(getattr(moe, part), name)
    after = moe(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(fast(x), after, rtol=0, atol=0)
