"""What kernels read by address: any strides that autograd's hooks return, and nothing past the memory of what came."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fusedonemoe import MoE, MoEConfig
from fusedonemoe import functional as F
from fusedonemoe.ops import library
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import make_logits, make_merged_inputs, make_mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
IMPLS = [pytest.param("cpu", marks=needs_kernels), "grouped"]
T, D, INNER, E, K = 12, 32, 32, 5, 2
ACT = ("silu", "gate_up", 1.702, 7.0)
_ops = torch.ops.fusedonemoe


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def spread(t: Tensor) -> Tensor:
    """Every other element of a buffer that holds NaN, or a large number, in between."""
    filler = float("nan") if t.is_floating_point() else 100
    wide = torch.full((*t.shape, 2), filler, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


def reversed_rows(t: Tensor) -> Tensor:
    """Rows that lie in another order than that of their indices."""
    return t.flip(0).as_strided(t.shape, t.stride()) if t.dim() == 0 else torch.stack(t.unbind(0), -1).movedim(-1, 0)


def padded(t: Tensor) -> Tensor:
    """A slice of longer rows."""
    wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


LAYOUTS = {f.__name__: f for f in (transposed, spread, reversed_rows, padded)}


def routing(dtype=torch.int64) -> tuple[Tensor, Tensor]:
    inputs = make_mlp_inputs(T, D, INNER, E, K, routing="out_of_range", experts_dtype=dtype)
    return inputs.experts, inputs.weights


def mlp(impl, **options):
    inputs = make_mlp_inputs(T, D, INNER, E, K, bias=True, routing="out_of_range", requires_grad=True, **options)
    x, experts, weights, up, down, up_bias, down_bias = vars(inputs).values()
    leaves = [x, weights, up, down, up_bias, down_bias]
    return leaves, lambda: F.experts_mlp(
        x, experts, weights, up, down, gate_up_bias=up_bias, down_bias=down_bias, save_percent=50, impl=impl
    )


def mlp_of_bfloat16(impl):
    return mlp(impl, dtype=torch.bfloat16)


def merged(impl):
    inputs = make_merged_inputs(T, D, INNER, E, K, routing="out_of_range", requires_grad=True)
    leaves = [inputs.x, inputs.weights, inputs.proj]
    return leaves, lambda: F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl=impl)


def quantised(impl, dtype):
    leaves, _ = mlp(impl)
    x, weights, up, down, up_bias, down_bias = leaves
    experts, _ = routing(torch.int32)
    group = {"group_size": 32, "symmetric": False} if dtype == "int4" else {}
    made = [F.quantize_weight(weight.detach(), dtype, **group) for weight in (up, down)]
    biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
    call = partial(F.experts_mlp_quantized, x, experts, weights, *made, **biases, save_percent=50, impl=impl)
    return [x, weights, up_bias, down_bias], call


def table(seed: int) -> Tensor:
    return torch.randn(E, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def neurons(impl, sparse=False):
    (x, weights, *_), _ = mlp(impl)
    experts, _ = routing()
    down, up = table(0), table(1)
    return [x, weights, down, up], lambda: F.experts_neurons(x, experts, weights, down, up, sparse=sparse, impl=impl)


def values(impl, sparse=False):
    (_, weights, *_), _ = mlp(impl)
    experts, _ = routing()
    rows = table(2)
    return [weights, rows], lambda: F.experts_values(experts, weights, rows, sparse=sparse, impl=impl)


def lora(impl):
    (x, weights, up, down, *_), _ = mlp(impl)
    A, B = (torch.randn(E, *s, generator=torch.Generator().manual_seed(3)).requires_grad_() for s in ((2, D), (2 * INNER, 2)))
    experts, _ = routing()
    call = partial(F.experts_mlp_lora, x, experts, weights, up, down, gate_up_A=A, gate_up_B=B, save_percent=50)
    return [x, weights, up, down, A, B], call


def routed(impl, **rule):
    logits = make_logits(T, 8).requires_grad_()
    return [logits], lambda: F.route(logits, 3, **rule)[0]


def product_keys(impl):
    logits = make_logits(2 * T, 8).reshape(T, 2, 8).requires_grad_()
    return [logits], lambda: F.route_product_key(logits, 3)[0]


CALLS: dict[str, Any] = {
    "mlp": mlp,
    "mlp of bfloat16": mlp_of_bfloat16,
    "merged": merged,
    "int8": partial(quantised, dtype="int8"),
    "int4": partial(quantised, dtype="int4"),
    "neurons": neurons,
    "sparse neurons": partial(neurons, sparse=True),
    "values": values,
    "sparse values": partial(values, sparse=True),
    "lora": lora,
    "route": routed,
    "route of sigmoids": partial(routed, scoring="sigmoid", n_group=4, topk_group=2),
    "product keys": product_keys,
}


def gradients(leaves, y):
    draw = torch.Generator().manual_seed(5)
    dy = torch.randn(y.shape, generator=draw, dtype=torch.float32, device="cpu").to(y.dtype)
    return [g.to_dense() for g in torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_do_not_depend_on_the_strides_of_what_autograd_kept(name, impl, layout):
    leaves, call = CALLS[name](impl)
    expected = gradients(leaves, call())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, LAYOUTS[layout]):
        y = call()
    for actual, exact in zip(gradients(leaves, y), expected, strict=True):
        if impl == "cpu" and name != "lora":
            assert torch.equal(actual, exact)
        else:  # torch's own products round by strides
            assert_close(actual, exact, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_an_expanded_tensor_is_read_within_its_memory():
    # Equal rows, which a hook keeps once.
    inputs = make_mlp_inputs(T, D, INNER, E, K)
    x = torch.ones(T, D).requires_grad_()
    weights = torch.full((T, K), 0.5).requires_grad_()

    def kept_once(t: Tensor) -> Tensor:
        return t[:1].clone().expand(t.shape) if t.dim() == 2 and bool((t == t[:1]).all()) else t

    def run():
        return F.experts_mlp(x, inputs.experts, weights, inputs.up_proj, inputs.down_proj, impl="cpu")

    expected = gradients([x, weights], run())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, kept_once):
        y = run()
    for actual, exact in zip(gradients([x, weights], y), expected, strict=True):
        assert torch.equal(actual, exact)


CHANGES = {
    "too short": lambda t: t[:-1],
    "too wide": lambda t: torch.cat((t, t), -1),
    "of another dtype": lambda t: t.to(torch.float64 if t.is_floating_point() else torch.float32),
    "of another rank": lambda t: t[None],
}


def changing(at: int, change):
    """Hooks that change one of the tensors that are kept."""
    count = itertools.count()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: (t, next(count)), lambda p: change(p[0]) if p[1] == at else p[0])


@needs_kernels
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["mlp", "merged", "int8", "int4", "neurons", "values"])
def test_a_hook_that_returns_another_tensor_is_refused(name, change):
    leaves, call = CALLS[name]("cpu")
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    for i, tensor in enumerate(kept):
        if change == "of another dtype" and tensor.shape == (T, K) and tensor.is_floating_point() and i > 0:
            continue  # routing weights may be of any floating dtype
        if change == "too short" and tensor.shape == (T * K // 2, 2 * INNER):
            continue  # z, whose missing rows are computed again
        with changing(i, CHANGES[change]):
            y = call()
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"must have|invalid gradient"):
            gradients(leaves, y)


def saved_of_mlp():
    inputs = make_mlp_inputs(T, D, INNER, E, K, bias=True, routing="out_of_range")
    operands = list(vars(inputs).values())
    y, z, order, offsets = _ops.experts_mlp_cpu(*operands, *ACT, 100)
    return [torch.ones_like(y), z, order, offsets, *operands]


@needs_kernels
def test_an_operator_that_is_called_by_name_reads_any_strides():
    inputs = make_mlp_inputs(T, D, INNER, E, K, bias=True, routing="out_of_range")
    operands = list(vars(inputs).values())
    expected = _ops.experts_mlp_cpu(*operands, *ACT, 100)
    arguments = saved_of_mlp()
    needs = [True] * 6
    gradients_expected = _ops.experts_mlp_cpu_backward(*arguments, *ACT, needs)
    for layout in LAYOUTS.values():
        for actual, exact in zip(_ops.experts_mlp_cpu(*map(layout, operands), *ACT, 100), expected, strict=True):
            assert actual.is_contiguous() and torch.equal(actual[:8], exact[:8])
        for actual, exact in zip(
            _ops.experts_mlp_cpu_backward(*map(layout, arguments), *ACT, needs), gradients_expected, strict=True
        ):
            assert actual.is_contiguous() and torch.equal(actual, exact)


@needs_kernels
@pytest.mark.parametrize("change", ["too short", "too wide", "of another dtype", "of another rank"])
def test_an_operator_that_is_called_by_name_refuses_other_shapes_and_dtypes(change):
    arguments = saved_of_mlp()
    for i, argument in enumerate(arguments):
        changed = [*arguments[:i], CHANGES[change](argument), *arguments[i + 1 :]]
        if i == 6 and change == "of another dtype":
            continue
        if i == 1 and change == "too short":
            _ops.experts_mlp_cpu_backward(*changed, *ACT, [True] * 6)  # some rows of z, of which the rest is computed again
            continue
        with pytest.raises((TypeError, ValueError), match="must have"):
            _ops.experts_mlp_cpu_backward(*changed, *ACT, [True] * 6)
        if i >= 4:
            with pytest.raises((TypeError, ValueError), match="must have"):
                _ops.experts_mlp_cpu(*changed[4:], *ACT, 100)


def plans(order: Tensor, offsets: Tensor):
    """Plans that are none of these ids."""
    huge, negative, twice = order.clone(), order.clone(), order.clone()
    huge[3], negative[0], twice[1] = 2**30, -1, int(order[0])
    yield huge, offsets
    yield negative, offsets
    yield twice, offsets
    yield order.flip(0), offsets
    for at, value in ((0, 1), (2, 2**30), (2, -5), (-1, 2**30), (-1, 0)):
        other = offsets.clone()
        other[at] = value
        yield order, other


@needs_kernels
@pytest.mark.parametrize("name", ["mlp", "some rows of z", "merged", "int8"])
def test_a_plan_of_another_routing_is_refused(name):
    experts, weights = routing()
    inputs = make_mlp_inputs(T, D, INNER, E, K, routing="out_of_range")
    up, down = inputs.up_proj, inputs.down_proj
    dy = torch.ones(T, D)
    arguments: tuple[Any, ...]
    if name == "merged":
        arguments = (inputs.x, experts, weights, down)
        _, order, offsets = _ops.experts_merged_cpu(*arguments)
        run, needs = partial(_ops.experts_merged_cpu_backward, torch.ones(T, INNER)), [True] * 3
    elif name == "int8":
        arguments = (inputs.x, experts, weights, *F.quantize_weight(up), *F.quantize_weight(down), None, None, *ACT)
        _, z, order, offsets = _ops.experts_mlp_quantized_cpu(*arguments, 50)
        run, needs = partial(_ops.experts_mlp_quantized_cpu_backward, dy, z), [True, True, False, False]
    else:
        arguments = (inputs.x, experts, weights, up, down, None, None, *ACT)
        _, z, order, offsets = _ops.experts_mlp_cpu(*arguments, 100 if name == "mlp" else 50)
        run, needs = partial(_ops.experts_mlp_cpu_backward, dy, z), [True] * 4 + [False] * 2

    def backward(*plan):
        return run(*plan, *arguments, needs)

    backward(order, offsets)
    for plan in plans(order, offsets):
        with pytest.raises(ValueError, match="must be the plan of experts"):
            backward(*plan)


@needs_kernels
def test_slots_that_are_out_of_range_are_written_nowhere():
    experts, weights = routing()
    x, down, up = torch.ones(T, D), table(0).detach(), table(1).detach()
    slots = torch.full((T, K), 2**40)
    s = torch.zeros(T, K)
    _, _, ddown, dup = _ops.experts_neurons_cpu_backward(x, s, x, experts, weights, down, up, "silu", [True] * 4, slots, 3)
    assert ddown.shape == dup.shape == (3, D) and not ddown.any() and not dup.any()


@pytest.mark.parametrize("offsets", [[0, 2, 1, 4], [1, 2, 3, 4], [0, 2, 3, 9], [0, 2, 4]])
def test_grouped_products_refuse_offsets_that_are_none(offsets):
    rows, weights = torch.ones(4, D), torch.ones(3, D, INNER)
    with pytest.raises(ValueError, match="offsets must be"):
        _ops.grouped_mm(rows, weights, torch.tensor(offsets, dtype=torch.int32))


@needs_kernels
def test_routing_operators_refuse_what_a_row_does_not_have():
    rule = (2, "softmax", True, True, 1.0, 1, 1, "max", 1e-20)
    logits = torch.randn(T, 8)
    for bad in ((9, *rule[1:]), (-1, *rule[1:]), (*rule[:5], 3, *rule[6:]), (*rule[:6], 2, *rule[7:])):
        with pytest.raises(ValueError, match=r"top_k|n_group"):
            _ops.route_cpu(logits, None, *bad)
    with pytest.raises(ValueError, match="selection_bias must have shape"):
        _ops.route_cpu(logits, torch.zeros(7), *rule)
    _, experts = _ops.route_cpu(logits, None, *rule)
    for dweights in (torch.ones(T, 3), torch.ones(T - 1, 2)):
        with pytest.raises(ValueError, match="dweights must have shape"):
            _ops.route_cpu_backward(dweights, logits, experts, *rule)
    with pytest.raises(ValueError, match="keys must have shape"):
        _ops.select_experts(logits, 9)


@needs_kernels
@pytest.mark.parametrize("name", ["mlp", "merged", "neurons", "values", "int4"])
def test_strides_are_those_that_the_fake_kernels_promise(name):
    inputs = make_mlp_inputs(T, D, INNER, E, K, routing="out_of_range")
    x, experts, weights = (transposed(t) for t in (inputs.x, inputs.experts, inputs.weights))
    up, down = transposed(inputs.up_proj), spread(inputs.down_proj)
    first, second = spread(table(0).detach()), transposed(table(1).detach())
    quantised_weights = [F.quantize_weight(w, "int4", group_size=32) for w in (inputs.up_proj, inputs.down_proj)]
    operator, arguments = {
        "mlp": (_ops.experts_mlp_cpu, (x, experts, weights, up, down, None, None, *ACT, 50)),
        "merged": (_ops.experts_merged_cpu, (x, experts, weights, down)),
        "neurons": (_ops.experts_neurons_cpu, (x, experts, weights, first, second, "silu")),
        "values": (_ops.experts_values_cpu, (experts, weights, first)),
        "int4": (
            _ops.experts_mlp_quantized_cpu,
            (x, experts, weights, *quantised_weights[0], *quantised_weights[1], None, None, *ACT, 50),
        ),
    }[name]
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def too_many(dtype=torch.float32):
    """2**31 rows in the memory of one."""
    tokens = 2**30
    x, weights = torch.ones(1, 1, dtype=dtype).expand(tokens, 1), torch.ones(1, 1).expand(tokens, 2)
    return x, torch.zeros(1, 1, dtype=torch.int64).expand(tokens, 2), weights


def calls_with_too_many():
    x, experts, weights = too_many()
    up, down, rows = torch.ones(1, 2, 1), torch.ones(1, 1, 1), torch.ones(1, 1)
    quantised_weights = [F.quantize_weight(w) for w in (up, down)]
    layer = MoE(MoEConfig(hidden_size=1, intermediate_size=1, num_experts=1, top_k=1)).experts
    build = library.BUILD
    return {
        "experts_mlp": lambda: F.experts_mlp(x, experts, weights, up, down),
        "grouped": lambda: F.experts_mlp(x, experts, weights, up, down, impl="grouped"),
        "dense": lambda: F.experts_mlp(x, experts, weights, up, down, impl="dense"),
        "in three dimensions": lambda: F.experts_mlp(x[None], experts[None], weights[None], up, down),
        "experts_merged": lambda: F.experts_merged(x, experts, weights, down),
        "experts_neurons": lambda: F.experts_neurons(x, experts, weights, rows, rows),
        "experts_values": lambda: F.experts_values(experts, weights, rows),
        "experts_mlp_lora": lambda: F.experts_mlp_lora(x, experts, weights, up, down),
        "experts_mlp_quantized": lambda: F.experts_mlp_quantized(x, experts, weights, *quantised_weights),
        "layer": lambda: layer(x, experts, weights),
        "plan": lambda: F.plan(experts, 1),
        "apply_capacity": lambda: F.apply_capacity(experts, weights, 1, 1.0),
        "operator": lambda: _ops.experts_mlp(x, experts, weights, up, down, None, None, *ACT, 0, build, "grouped"),
        "operator merged": lambda: _ops.experts_merged(x, experts, weights, down, build, "grouped"),
        "operator of values": lambda: _ops.experts_values(experts, weights, rows, build, "grouped"),
    }


@pytest.mark.parametrize("name", calls_with_too_many())
def test_rows_that_32_bits_cannot_count_are_refused(name):
    with pytest.raises(ValueError, match=r"experts must have fewer than 2\*\*31 entries, T \* K, got 2147483648"):
        calls_with_too_many()[name]()


def routings_with_too_many():
    logits = torch.zeros(1, 4).expand(2**30, 4)
    pairs = torch.zeros(1, 2, 2).expand(2**30, 2, 2)
    return {
        **{impl: partial(F.route, logits, 2, impl=impl) for impl in ("auto", "dense", "portable")},
        "all experts": lambda: F.route(logits[: 2**29], None),
        "in three dimensions": lambda: F.route(logits[None], 2),
        "topk_softmax": lambda: F.topk_softmax(logits, 2),
        "route_with_shared": lambda: F.route_with_shared(logits, 2, num_shared_experts=1),
        **{f"product keys {impl}": partial(F.route_product_key, pairs, 2, impl=impl) for impl in ("auto", "dense", "portable")},
    }


@pytest.mark.parametrize("name", routings_with_too_many())
def test_routings_that_32_bits_cannot_count_are_refused(name):
    with pytest.raises(ValueError, match=r"logits must be of fewer than 2\*\*31 choices, T \* K, got 2147483648"):
        routings_with_too_many()[name]()


@needs_kernels
def test_the_kernels_refuse_too_many_rows_themselves():
    x, experts, weights = too_many()
    up, down = torch.ones(1, 2, 1), torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 entries"):
        _ops.experts_mlp_cpu(x, experts, weights, up, down, None, None, *ACT, 0)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 entries"):
        torch.compile(partial(F.experts_mlp, impl="cpu"), backend="aot_eager", dynamic=True)(x, experts, weights, up, down)


def test_symbolic_rows_make_no_guard():
    layer = MoE(MoEConfig(hidden_size=D, intermediate_size=INNER, num_experts=E, top_k=K))
    tokens = torch.export.Dim("tokens", min=2)
    torch.export.export(layer, (torch.randn(T, D),), dynamic_shapes={"x": {0: tokens}})
