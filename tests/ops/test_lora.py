"""Experts with low-rank adapters, the function: values, gradients, precision, operators, messages, edges."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fusedonemoe import functional as F
from fusedonemoe.ops import library, mlp
from fusedonemoe.ops.records import LORA_ARGUMENTS, SavedRows
from fusedonemoe.testing import ROUTINGS, MLPInputs, assert_within_budget, make_mlp_inputs

IMPLS = ("dense", "grouped")
every_impl = pytest.mark.parametrize("impl", IMPLS)
FACTORS = ("gate_up_A", "gate_up_B", "down_A", "down_B")
BASE = ("x", "weights", "up_proj", "down_proj", "up_bias", "down_bias")
SCALES = {"gate_up_scale": 0.5, "down_scale": 1.75}
_ops = torch.ops.fusedonemoe


@dataclass(frozen=True)
class Adapted:
    """Arguments of an adapted layer."""

    base: MLPInputs
    factors: dict[str, Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {name: getattr(self.base, name) for name in BASE}
        return {name: tensor for name, tensor in (named | self.factors).items() if tensor is not None}

    def __call__(self, *leaves: Tensor, **options: Any) -> Tensor:
        values = dict(zip(self.leaves, leaves, strict=True)) if leaves else self.leaves
        i = dataclasses.replace(self.base, **{name: values[name] for name in BASE if name in values})
        factors = {name: values[name] for name in self.factors}
        biases = {"gate_up_bias": i.up_bias, "down_bias": i.down_bias}
        return F.experts_mlp_lora(i.x, i.experts, i.weights, i.up_proj, i.down_proj, **factors, **biases, **{**SCALES, **options})


def make(T=5, D=6, F_=3, E=4, K=2, *, ranks=(3, 2), dtype=torch.float64, requires_grad=True, **options) -> Adapted:
    base = make_mlp_inputs(T, D, F_, E, K, **{"dtype": dtype, "bias": True, "requires_grad": requires_grad, **options})
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rank, like in (("gate_up", ranks[0], base.up_proj), ("down", ranks[1], base.down_proj)):
        if rank:
            shapes |= {f"{name}_A": (E, rank, like.shape[2]), f"{name}_B": (E, like.shape[1], rank)}
    factors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * shape[2] ** -0.5
        factors[name] = values.to(dtype).requires_grad_(requires_grad)
    return Adapted(base, factors)


def merged(adapted: Adapted, **options: Any) -> Tensor:
    """The same layer by definition: plain experts with the deltas added to their weights."""
    i, f = adapted.base, adapted.factors
    up = i.up_proj + SCALES["gate_up_scale"] * f["gate_up_B"] @ f["gate_up_A"] if "gate_up_A" in f else i.up_proj
    down = i.down_proj + SCALES["down_scale"] * f["down_B"] @ f["down_A"] if "down_A" in f else i.down_proj
    biases = {"gate_up_bias": i.up_bias, "down_bias": i.down_bias}
    return F.experts_mlp(i.x, i.experts, i.weights, up, down, **biases, **options)


def gradients(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


# Values and gradients


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("ranks", [(3, 2), (1, 1), (5, 0), (0, 7)], ids=str)
@every_impl
def test_equals_the_merged_weights(impl, ranks, routing):
    adapted = make(T=9, ranks=ranks, routing=routing)
    y, expected = adapted(impl=impl), merged(adapted, impl="dense")
    assert_close(y, expected)
    got, wanted = gradients(y, adapted.leaves), gradients(expected, adapted.leaves)
    assert got.keys() == wanted.keys() and {"gate_up_B", "down_B"} & got.keys()
    for name, gradient in wanted.items():
        assert_close(got[name], gradient, msg=name)


FORMS = [
    ("silu", True, "gate_up"),
    ("silu", True, "up_gate"),
    ("gelu_tanh", True, "interleaved"),
    ("swiglu_oai", True, "interleaved"),
    ("gelu", False, "gate_up"),
    ("relu2", False, "gate_up"),
]


@pytest.mark.parametrize(("activation", "gated", "layout"), FORMS)
@pytest.mark.parametrize("bias", [True, False])
@every_impl
def test_gradcheck(impl, bias, activation, gated, layout):
    adapted = make(T=3, gated=gated, bias=bias, routing="out_of_range")
    form = {"activation": activation, "gated": gated, "gate_up_layout": layout, "swiglu_limit": 0.8, "save_percent": 30}
    assert gradcheck(lambda *leaves: adapted(*leaves, **form, impl=impl), tuple(adapted.leaves.values()), fast_mode=True)


@pytest.mark.parametrize("ranks", [(3, 2), (1, 0), (0, 1)], ids=str)
@every_impl
def test_gradcheck_of_every_element(impl, ranks):
    adapted = make(T=2, ranks=ranks, D=3, E=3, routing="out_of_range")
    assert gradcheck(lambda *leaves: adapted(*leaves, impl=impl), tuple(adapted.leaves.values()))


def test_dense_has_second_derivatives_and_grouped_says_that_it_has_none():
    adapted = make(T=2, D=3, E=3)
    leaves = tuple(adapted.leaves.values())
    assert gradgradcheck(lambda *values: adapted(*values, impl="dense"), leaves, fast_mode=True)
    grads = torch.autograd.grad(adapted(impl="grouped").square().sum(), leaves, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="first derivatives only; impl='dense' has derivatives of every order"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("save_percent", [0, 1, 50, 99])
def test_what_is_not_saved_is_computed_again(save_percent):
    adapted = make(T=40, E=3, routing="out_of_range")
    expected, got = (gradients(adapted(impl="grouped", save_percent=p), adapted.leaves) for p in (100, save_percent))
    for name, gradient in expected.items():
        assert_close(got[name], gradient)


@pytest.mark.parametrize("needed", [*BASE, *FACTORS])
def test_each_gradient_alone_is_the_same(needed):
    everything = make(routing="out_of_range")
    expected = gradients(everything(impl="grouped"), everything.leaves)[needed]
    for name, leaf in everything.leaves.items():
        leaf.requires_grad_(name == needed)
    assert_close(gradients(everything(impl="grouped"), {needed: everything.leaves[needed]})[needed], expected, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_transposed_projections_with_the_same_factors(bias):
    adapted = make(bias=bias)
    i = adapted.base
    up, down = (w.detach().transpose(1, 2).contiguous().requires_grad_() for w in (i.up_proj, i.down_proj))
    biases = {"gate_up_bias": i.up_bias, "down_bias": i.down_bias}
    y = F.experts_mlp_lora(i.x, i.experts, i.weights, up, down, **adapted.factors, **biases, **SCALES, transposed=True)
    expected = adapted()
    assert_close(y, expected)
    theirs, ours = gradients(expected, adapted.leaves), gradients(y, adapted.leaves | {"up_proj": up, "down_proj": down})
    for name, gradient in theirs.items():
        assert_close(ours[name].transpose(1, 2) if name in ("up_proj", "down_proj") else ours[name], gradient)


# What a frozen base costs


class Outputs(TorchDispatchMode):
    """Every tensor that an operator makes, by its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.made.append((func.name(), tuple(tensor.shape)))
        return out


def frozen(adapted: Adapted) -> Adapted:
    for name in ("up_proj", "down_proj", "up_bias", "down_bias"):
        if name in adapted.leaves:
            adapted.leaves[name].requires_grad_(False)
    return adapted


@pytest.mark.parametrize("save_percent", [0, 100])
def test_a_frozen_base_costs_no_tensor_of_its_size(save_percent):
    # The operators' kernels themselves, so that what they make is seen.
    adapted = frozen(make(T=13, D=16, F_=12, E=8, ranks=(3, 3), dtype=torch.float32, bias=False))
    sizes = {adapted.base.up_proj.numel(), adapted.base.down_proj.numel()}
    i, f = adapted.base, adapted.factors
    tensors: Any = (i.x, i.experts, i.weights, i.up_proj, i.down_proj, None, None, *f.values())
    numbers: Any = (0.5, 1.0, "silu", "gate_up", 1.7, 7.0)
    call = LORA_ARGUMENTS.call((*tensors, *numbers))
    with torch.no_grad(), Outputs() as forward:
        y, *saved = mlp.experts_mlp(call, save_percent)
    needs = [True, True, False, False, False, False, True, True, True, True]
    with torch.no_grad(), Outputs() as backward:
        rows, wanted = SavedRows(*saved), LORA_ARGUMENTS.needs(needs)
        gradients = mlp.experts_mlp_backward(torch.ones_like(y), rows, call, save_percent, wanted)
    grads = LORA_ARGUMENTS.results(gradients, call.x)
    made = forward.made + backward.made
    assert len(made) > 30
    assert not [(name, shape) for name, shape in made if torch.Size(shape).numel() in sizes]
    assert not [name for name, shape in made if shape[:1] == (8,) and torch.Size(shape).numel() > 8 * 3 * 24]
    assert [g.numel() > 0 for g in grads] == needs


def test_a_frozen_base_gets_no_gradient():
    adapted = frozen(make())
    adapted(impl="grouped").sum().backward()
    assert {name for name, leaf in adapted.leaves.items() if leaf.grad is not None} == {"x", "weights", *FACTORS}


# Precision


def plain(adapted: Adapted) -> Tensor:
    """As one writes it: one expert after the other, every step rounded to the dtype of x."""
    i, f = adapted.base, adapted.factors
    linear = torch.nn.functional.linear
    y = torch.zeros_like(i.x)
    for e in range(len(i.up_proj)):
        token, choice = (i.experts == e).nonzero(as_tuple=True)
        x = i.x[token]
        z = linear(x, i.up_proj[e], None if i.up_bias is None else i.up_bias[e])
        z = z + linear(linear(x, f["gate_up_A"][e]), f["gate_up_B"][e]) * SCALES["gate_up_scale"]
        gate, up = z.chunk(2, dim=1)
        h = torch.nn.functional.silu(gate) * up
        out = linear(h, i.down_proj[e], None if i.down_bias is None else i.down_bias[e])
        out = out + linear(linear(h, f["down_A"][e]), f["down_B"][e]) * SCALES["down_scale"]
        y = y.index_add(0, token, (out * i.weights[token, choice, None]).to(y.dtype))
    return y


def exactly(adapted: Adapted) -> Adapted:
    """The same numbers in float64."""
    base = {
        name: value.detach().double().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in vars(adapted.base).items()
    }
    factors = {name: value.detach().double().requires_grad_() for name, value in adapted.factors.items()}
    return Adapted(MLPInputs(**base), factors)


@pytest.mark.parametrize("routing", ["distinct", "skewed", "out_of_range"])
@pytest.mark.parametrize("save_percent", [100, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_impl
def test_as_exact_as_plain_pytorch(impl, dtype, save_percent, routing):
    adapted = make(40, 24, 16, 6, 3, ranks=(8, 4), dtype=dtype, routing=routing)
    y, by_hand, truth = adapted(impl=impl, save_percent=save_percent), plain(adapted), exactly(adapted)
    exact = merged(truth, impl="dense")
    assert_within_budget(y, by_hand, exact.detach(), factor=4.0, name="y")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype)

    def grads(out, owner):
        return torch.autograd.grad(out, list(owner.leaves.values()), dy.to(out.dtype))

    for name, got, theirs, right in zip(
        adapted.leaves, grads(y, adapted), grads(by_hand, adapted), grads(exact, truth), strict=True
    ):
        assert_within_budget(got, theirs, right, factor=4.0, name=f"d{name}")


def test_float32_adapters_beside_half_precision_are_computed_in_half_and_keep_their_dtype():
    adapted = make(12, 8, 8, 4, 2, dtype=torch.bfloat16)
    masters = {name: factor.detach().float().requires_grad_() for name, factor in adapted.factors.items()}
    y = Adapted(adapted.base, masters)()
    assert torch.equal(y, adapted())
    y.sum().backward()
    assert all(factor.grad is not None and factor.grad.dtype == torch.float32 for factor in masters.values())


def test_equal_inputs_give_equal_bits():
    runs = []
    for _ in range(2):
        adapted = make(64, 32, 16, 6, 3, ranks=(8, 8), dtype=torch.float32)
        y = adapted(impl="grouped")
        runs.append([y, *gradients(y, adapted.leaves).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("save_percent", [0, 100])
def test_autocast_equals_casting_by_hand(save_percent):
    adapted = make(12, 8, 8, 4, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted(save_percent=save_percent)
    i = adapted.base
    cast = {name: getattr(i, name).bfloat16() for name in ("x", "up_proj", "down_proj", "up_bias", "down_bias")}
    by_hand = Adapted(dataclasses.replace(i, **cast), {name: factor.bfloat16() for name, factor in adapted.factors.items()})(
        save_percent=save_percent
    )
    assert y.dtype == torch.bfloat16 and torch.equal(y, by_hand)
    for got, wanted in zip(gradients(y, adapted.leaves).items(), gradients(by_hand, adapted.leaves).items(), strict=True):
        assert got[1].dtype == torch.float32 and torch.equal(got[1], wanted[1]), got[0]


# Operators


def arguments(adapted: Adapted) -> tuple[Any, ...]:
    i = adapted.base
    tensors = (i.x, i.experts, i.weights, i.up_proj, i.down_proj, i.up_bias, i.down_bias, *adapted.factors.values())
    return (*tensors, 0.5, 1.75, "silu", "gate_up", 1.7, 7.0)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    adapted = make(requires_grad=requires_grad, routing="out_of_range")
    torch.library.opcheck(_ops.experts_mlp_lora.default, (*arguments(adapted), 50, library.BUILD))
    torch.library.opcheck(_ops.experts_mlp_lora_dense.default, (*arguments(adapted), library.BUILD))


@pytest.mark.parametrize("needs", [[True] * 10, [True, True, *[False] * 4, *[True] * 4], [False] * 10])
def test_opcheck_of_the_backward(needs):
    adapted = make(requires_grad=False, routing="out_of_range")
    y, *saved = _ops.experts_mlp_lora(*arguments(adapted), 50, library.BUILD)
    args = (torch.randn_like(y), *saved, *arguments(adapted), 50, needs, library.BUILD)
    torch.library.opcheck(_ops.experts_mlp_lora_backward.default, args)


# Edges


@pytest.mark.parametrize("T", [0, 1])
@every_impl
def test_no_token_and_one(T, impl):
    adapted = make(T=T, dtype=torch.float32)
    y = adapted(impl=impl)
    assert y.shape == (T, 6)
    y.sum().backward()
    for name, leaf in adapted.leaves.items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, name


@every_impl
def test_ids_out_of_range_take_no_part_whatever_their_weight(impl):
    adapted = make(T=6, dtype=torch.float32)
    ids = adapted.base.experts.clone()
    ids[0], ids[1, 0], ids[2, 1] = -1, 4, 255
    weights = adapted.base.weights.detach().clone()
    weights[0] = float("nan")
    skipped = Adapted(dataclasses.replace(adapted.base, experts=ids, weights=weights.requires_grad_()), adapted.factors)
    y = skipped(impl=impl)
    assert torch.equal(y[0], torch.zeros(6)) and y.isfinite().all()
    found = gradients(y, skipped.leaves)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert not found["weights"][0].any() and found["weights"][1, 0] == 0 and found["weights"][2, 1] == 0


def test_an_expert_without_rows_gets_zeros():
    adapted = make(T=9, E=5, routing="one_expert")
    found = gradients(adapted(impl="grouped"), adapted.leaves)
    for name in FACTORS:
        others = [e for e in range(5) if e != 2]
        assert not found[name][others].any() and found[name][2].any(), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_any_integer_dtype_of_ids_and_any_leading_dimensions(dtype):
    adapted = make(T=6)
    i = adapted.base
    narrow = dataclasses.replace(
        i, x=i.x.view(2, 3, -1), experts=i.experts.to(dtype).view(2, 3, -1), weights=i.weights.view(2, 3, -1)
    )
    assert_close(Adapted(narrow, adapted.factors)().view(6, -1), adapted())


def test_strided_inputs():
    adapted = make(T=6)

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack((tensor.detach(), torch.full_like(tensor, float("nan"))), -1)[..., 0]

    i = adapted.base
    values = {name: strided(getattr(i, name)) for name in BASE}
    y = Adapted(dataclasses.replace(i, **values), {n: strided(f) for n, f in adapted.factors.items()})()
    assert_close(y, adapted().detach())


@pytest.mark.parametrize(("backend", "save_percent"), list(itertools.product(["aot_eager", "inductor"], [100, 0])))
def test_compiles_whole(backend, save_percent):
    torch._dynamo.reset()
    adapted = frozen(make(12, 8, 8, 4, 2, dtype=torch.float32))
    wanted = {name: leaf for name, leaf in adapted.leaves.items() if leaf.requires_grad}

    @torch.compile(fullgraph=True, backend=backend)
    def layer(*leaves):
        return adapted(*leaves, save_percent=save_percent)

    y, expected = layer(*adapted.leaves.values()), adapted()
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    got, right = gradients(y, wanted), gradients(expected, wanted)
    for name in wanted:
        assert_close(got[name], right[name], rtol=1e-5, atol=1e-5)


# Messages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate_up_B": None}, ValueError, "gate_up_B must be given with gate_up_A, got None"),
        ({"down_A": None}, ValueError, "down_A must be given with down_B, got None"),
        ({"gate_up_A": torch.zeros(4, 3)}, ValueError, r"gate_up_A must have 3 dimensions \[E, r, in\], got shape \(4, 3\)"),
        ({"gate_up_A": torch.zeros(4, 3, 5)}, ValueError, r"gate_up_A must have shape \(4, 3, 6\), got \(4, 3, 5\)"),
        ({"down_B": torch.zeros(4, 6, 3)}, ValueError, r"down_B must have shape \(4, 6, 2\), got \(4, 6, 3\)"),
        ({"down_A": torch.zeros(4, 0, 3), "down_B": torch.zeros(4, 6, 0)}, ValueError, "down_A must have a rank of at least 1"),
        ({"down_A": torch.zeros(4, 2, 3).int()}, TypeError, "down_A must be float64, float32, bfloat16 or float16"),
        ({"down_A": torch.zeros(4, 2, 3, device="meta")}, ValueError, r"down_A must be on the device of x \(cpu\), got meta"),
        ({"down_scale": float("nan")}, ValueError, "down_scale must be a finite number, got nan"),
        ({"gate_up_scale": True}, ValueError, "gate_up_scale must be a finite number, got True"),
        ({"impl": "cpu"}, ValueError, "impl='cpu' cannot run here: the compiled CPU kernels have no adapters"),
        ({"impl": "triton"}, ValueError, "impl='triton' cannot run here"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"save_percent": 101}, ValueError, "save_percent must be an integer from 0 to 100"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"gated": False, "activation": "swiglu_oai"}, ValueError, "is gated by definition"),
        ({"gate_up_bias": torch.zeros(4, 5)}, ValueError, r"gate_up_bias must have shape \(4, 6\)"),
    ],
)
def test_bad_arguments(change, error, message):
    adapted = make(dtype=torch.float32)
    i = adapted.base
    with pytest.raises(error, match=message):
        F.experts_mlp_lora(i.x, i.experts, i.weights, i.up_proj, i.down_proj, **{**adapted.factors, **change})
