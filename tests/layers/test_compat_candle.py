"""candle-moe's names against plain loops over tokens in float64: values, gradients, both weight conventions, messages."""

from typing import Any

import pytest
import torch
from torch._dynamo.decorators import mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.compat.candle import NOMIC, QWEN3, Activation, FusedMoE, apply_topk_softmax_inplace
from fusedonemoe.testing import assert_within_budget, make_logits
from tests.exact import EXACT, best, gradients, randn

T, D, FF, E, K = 9, 10, 6, 5, 2
PLAIN_ACTIVATIONS = {
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "relu": lambda z: z.clamp(min=0),
}


# The router


def plain_topk_softmax(logits, top_k):
    """Softmax, the K largest with ties to the lower id, not normalised; source rows counted choice by choice."""
    weights, ids, rows = [], [], []
    for t, row in enumerate(logits):
        p = torch.exp(row - row.max()) / torch.exp(row - row.max()).sum()
        ids.append(best(p, top_k))
        weights.append(p[ids[-1]])
        rows.append([j * len(logits) + t for j in range(top_k)])
    return torch.stack(weights), torch.tensor(ids), torch.tensor(rows)


def apply(logits, top_k, *, weight_dtype=None, id_dtype=torch.int64):
    weight = torch.full((len(logits), top_k), torch.nan, dtype=weight_dtype or logits.dtype)
    indices, rows = (torch.full((len(logits), top_k), 77).to(id_dtype) for _ in range(2))
    apply_topk_softmax_inplace(logits, weight, indices, rows)
    return weight, indices, rows


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 1), (5, 3), (5, 5), (8, 2), (300, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_topk_softmax_equals_the_formula(num_experts, top_k, ties):
    logits = make_logits(T, num_experts, dtype=torch.float64, ties=ties)
    weight, indices, rows = apply(logits, top_k)
    exact = plain_topk_softmax(logits, top_k)
    assert_close(weight, exact[0], **EXACT)
    assert torch.equal(indices, exact[1]) and torch.equal(rows, exact[2])


@pytest.mark.parametrize("id_dtype", [torch.uint32, torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_topk_softmax_writes_the_dtypes_it_is_given(id_dtype, dtype):
    logits = make_logits(T, 8, dtype=dtype)
    weight, indices, rows = apply(logits, K, id_dtype=id_dtype)
    exact = plain_topk_softmax(logits.double(), K)
    assert weight.dtype == dtype and indices.dtype == rows.dtype == id_dtype
    assert_close(weight.double(), exact[0], rtol=torch.finfo(dtype).eps * 4, atol=0)
    assert indices.tolist() == exact[1].tolist() and rows.tolist() == exact[2].tolist()


def test_topk_softmax_writes_into_views_and_passes_gradients():
    logits, base = randn(T, E, seed=1).requires_grad_(), torch.zeros(T, 2 * K, dtype=torch.float64)
    weight = base[:, ::2]
    apply_topk_softmax_inplace(logits, weight, torch.zeros(T, K, dtype=torch.int32), torch.zeros(T, K, dtype=torch.int32))
    exact = plain_topk_softmax(logits, K)[0]
    assert_close(base[:, ::2], exact, **EXACT)
    assert (base[:, 1::2] == 0).all()
    assert_close(gradients(weight, (logits,)), gradients(exact, (logits,)), **EXACT)


def test_topk_softmax_of_no_tokens():
    weight, indices, rows = apply(torch.zeros(0, E), K)
    assert weight.shape == indices.shape == rows.shape == (0, K)


# The experts


def make_inputs(moe_type, dtype=torch.float64):
    inputs: dict[str, Any] = {
        "input": randn(T, D, seed=1, dtype=dtype),
        "gate_weights": randn(E, D, FF, seed=2, dtype=dtype) / D**0.5,
        "up_weights": randn(E, D, FF, seed=3, dtype=dtype) / D**0.5,
        "down_weights": randn(E, FF, D, seed=4, dtype=dtype) / FF**0.5 if moe_type == QWEN3 else None,
        "routing_weights": torch.rand(T, K, generator=torch.Generator().manual_seed(5)).to(dtype) + 0.25,
        "expert_indices": torch.randint(E, (T, K), generator=torch.Generator().manual_seed(6)),
    }
    return inputs | {"moe_type": moe_type}


def plain_experts(activation, x_TD, gate_weights, up_weights, down_weights, routing_weights, expert_indices, moe_type):
    act = PLAIN_ACTIVATIONS[activation]
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for j in range(expert_indices.shape[1]):
            e = int(expert_indices[t, j])
            if not 0 <= e < len(gate_weights):
                continue
            h_F = act(x_D @ gate_weights[e])
            out_D = (h_F * (x_D @ up_weights[e])) @ down_weights[e] if moe_type == QWEN3 else h_F @ up_weights[e].t()
            y_D = y_D + (routing_weights[t, j] * out_D).to(y_D.dtype)
        rows.append(y_D)
    return torch.stack(rows)


both_types = pytest.mark.parametrize("moe_type", [QWEN3, NOMIC], ids=["qwen3", "nomic"])


@both_types
@pytest.mark.parametrize("activation", PLAIN_ACTIVATIONS)
@pytest.mark.parametrize("impl", ["auto", "dense"])
def test_experts_equal_the_plain_loop(moe_type, activation, impl):
    inputs = make_inputs(moe_type)
    leaves = [t.requires_grad_() for t in inputs.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert len(leaves) == (5 if moe_type == QWEN3 else 4)
    y = FusedMoE(E, K, activation, impl=impl).forward(*inputs.values())
    exact = plain_experts(activation, *inputs.values())
    assert_close(y, exact, **EXACT)
    for grad, exact_grad in zip(gradients(y, leaves), gradients(exact, leaves), strict=True):
        assert_close(grad, exact_grad, **EXACT)


@both_types
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_plain_pytorch(moe_type, dtype):
    inputs = make_inputs(moe_type, dtype) | {"routing_weights": torch.rand(T, K)}
    exact_inputs = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs.values()]
    y = FusedMoE(E, K, Activation.Silu).forward(*inputs.values())
    assert_within_budget(y, plain_experts("silu", *inputs.values()), plain_experts("silu", *exact_inputs))


@both_types
@pytest.mark.parametrize("id_dtype", [torch.uint32, torch.int32, torch.uint8], ids=str)
def test_ids_of_any_dtype_and_outside_the_range(moe_type, id_dtype):
    inputs = make_inputs(moe_type)
    inputs["expert_indices"][0, 0] = 200
    exact = plain_experts("relu", *inputs.values())
    inputs["expert_indices"] = inputs["expert_indices"].to(id_dtype)
    assert_close(FusedMoE(E, K, Activation.Relu).forward(*inputs.values()), exact, **EXACT)


@both_types
def test_no_tokens(moe_type):
    inputs = make_inputs(moe_type)
    for name in ("input", "routing_weights", "expert_indices"):
        inputs[name] = inputs[name][:0]
    assert FusedMoE(E, K, "silu").forward(*inputs.values()).shape == (0, D)


def weights_read(monkeypatch):
    """The weights that each call of the functional layer got."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts_mlp = F.experts_mlp

    def watched(*args, **kwargs):
        seen.append((args[3], args[4]))
        return experts_mlp(*args, **kwargs)

    monkeypatch.setattr(F, "experts_mlp", watched)
    return seen


def test_nomic_reads_its_weights_in_place(monkeypatch):
    inputs, seen = make_inputs(NOMIC), weights_read(monkeypatch)
    FusedMoE(E, K, "silu").forward(*inputs.values())
    ((up, down),) = seen
    assert (up.data_ptr(), down.data_ptr()) == (inputs["gate_weights"].data_ptr(), inputs["up_weights"].data_ptr())


def write(weight, value, how):
    """Write into a weight as those do whose writes torch does not count."""
    if how == "data":
        weight.data.copy_(value)
    elif how == "numpy":
        weight.detach().numpy()[...] = value.numpy()
    else:
        parameter = torch.nn.Parameter(weight)
        parameter.grad = (weight - value).sign()
        torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


@pytest.mark.parametrize("how", ["data", "numpy", "fused optimizer"])
@pytest.mark.parametrize("name", ["gate_weights", "up_weights", "down_weights"])
def test_weights_that_were_written_unseen_are_read_anew(how, name):
    inputs, layer = make_inputs(QWEN3), FusedMoE(E, K, "silu")
    with torch.no_grad():
        before = layer.forward(*inputs.values())
        write(inputs[name], inputs[name] + 1, how)
        after = layer.forward(*inputs.values())
        assert_close(after, plain_experts("silu", *inputs.values()), **EXACT)
    assert not torch.allclose(before, after)


def test_weights_made_in_inference_mode_are_read_anew():
    layer = FusedMoE(E, K, "silu")
    with torch.inference_mode():
        inputs = make_inputs(QWEN3)
        layer.forward(*inputs.values())
        inputs["up_weights"].mul_(2)
        assert_close(layer.forward(*inputs.values()), plain_experts("silu", *inputs.values()), **EXACT)


# Compilation


@both_types
def test_compiled_router_and_experts_with_an_open_number_of_tokens(moe_type):
    counter = CompileCounterWithBackend("aot_eager")
    inputs, layer = make_inputs(moe_type), FusedMoE(E, K, Activation.Gelu)
    weights = [t.requires_grad_() for name, t in inputs.items() if name.endswith("_weights") and name[0] != "r" and t is not None]
    w = (inputs["gate_weights"], inputs["up_weights"], inputs["down_weights"])

    def block(x, logits):
        weight, indices, rows = x.new_zeros(len(x), K), logits.new_zeros(len(x), K).int(), logits.new_zeros(len(x), K).int()
        apply_topk_softmax_inplace(logits, weight, indices, rows)
        return layer.forward(x, *w, weight, indices, moe_type) + rows.sum()

    fast = torch.compile(block, fullgraph=True, backend=counter)
    for tokens in (7, 12, 23):
        x, logits = randn(tokens, D, seed=tokens), randn(tokens, E, seed=1)
        mark_dynamic(x, 0)
        mark_dynamic(logits, 0)
        y, expected = fast(x, logits), block(x, logits)
        assert_close(y, expected, **EXACT)
        for grad, exact in zip(gradients(y, weights, False), gradients(expected, weights), strict=True):
            assert_close(grad, exact, **EXACT)
    assert counter.frame_count == 1


# Messages


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gating_output": None}, TypeError, "^gating_output must be a torch.Tensor, got NoneType$"),
        ({"gating_output": torch.zeros(2, T, E)}, ValueError, r"^gating_output must have 2 dimensions \[T, E\]"),
        ({"topk_weight": torch.zeros(T, K, dtype=torch.int64)}, TypeError, "^topk_weight must be float64, .* got torch.int64$"),
        ({"topk_weight": torch.zeros(T, 6)}, ValueError, r"^topk_weight must have shape .* experts \(5\), got K = 6$"),
        ({"topk_weight": torch.zeros(3, K)}, ValueError, r"^topk_weight must have shape \(9, 2\), got \(3, 2\)$"),
        ({"topk_weight": torch.zeros(T, K, device="meta")}, ValueError, r"^topk_weight must be on the device of gating_output"),
        ({"topk_indices": torch.zeros(T, K)}, TypeError, "^topk_indices must have an integer dtype, got torch.float32$"),
        ({"topk_indices": torch.zeros(T, 1).int()}, ValueError, r"^topk_indices must have shape \(9, 2\), got \(9, 1\)$"),
        ({"token_expert_indices": [1]}, TypeError, "^token_expert_indices must be a torch.Tensor, got list$"),
        ({"token_expert_indices": torch.zeros(1, K).int()}, ValueError, r"^token_expert_indices must have shape \(9, 2\)"),
    ],
)
def test_router_says_what_is_wrong(changes, error, message):
    given = {
        "gating_output": torch.zeros(T, E),
        "topk_weight": torch.zeros(T, K),
        "topk_indices": torch.zeros(T, K, dtype=torch.int32),
        "token_expert_indices": torch.zeros(T, K, dtype=torch.int32),
    }
    with pytest.raises(error, match=message):
        apply_topk_softmax_inplace(**{**given, **changes})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1, "silu"), ValueError, "^num_experts must be at least 1, got 0$"),
        ((4, 5, "silu"), ValueError, r"^num_selected_experts must be from 1 to num_experts \(4\), got 5$"),
        ((4, 2, "tanh"), ValueError, r"^activation must be an Activation or one of \('silu', 'gelu', 'relu'\), got 'tanh'$"),
        ((4, 2, 1), ValueError, "^activation must be an Activation or one of .*, got 1$"),
    ],
)
def test_constructor_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        FusedMoE(*arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"moe_type": 2}, ValueError, r"^moe_type must be 0 \(Qwen3\) or 1 \(Nomic\), got 2$"),
        ({"moe_type": True}, ValueError, r"^moe_type must be 0 \(Qwen3\) or 1 \(Nomic\), got True$"),
        ({"down_weights": None}, ValueError, r"^down_weights must be a tensor \[E, F, D\] with moe_type 0, got None$"),
        ({"input": torch.zeros(2, T, D)}, ValueError, r"^input must have 2 dimensions \[T, D\]"),
        ({"input": None}, TypeError, "^input must be a torch.Tensor, got NoneType$"),
        ({"gate_weights": torch.zeros(E, D)}, ValueError, r"^gate_weights must have 3 dimensions \[E, D, F\]"),
        (
            {"gate_weights": torch.zeros(E + 1, D, FF)},
            ValueError,
            r"^gate_weights must have shape \(5, 10, 6\), got \(6, 10, 6\)$",
        ),
        ({"up_weights": torch.zeros(E, FF, D)}, ValueError, r"^up_weights must have shape \(5, 10, 6\), got \(5, 6, 10\)$"),
        (
            {"up_weights": torch.zeros(E, D, FF).double()},
            TypeError,
            r"^up_weights must have the dtype of input \(torch.float32\), got torch.float64$",
        ),
        ({"down_weights": torch.zeros(E, D, FF)}, ValueError, r"^down_weights must have shape \(5, 6, 10\), got \(5, 10, 6\)$"),
        (
            {"down_weights": torch.zeros(E, FF, D, device="meta")},
            ValueError,
            r"^down_weights must be on the device of input \(cpu\)",
        ),
        ({"routing_weights": torch.zeros(T, 3)}, ValueError, r"^routing_weights must have shape \(9, 2\), got \(9, 3\)$"),
        ({"routing_weights": torch.zeros(T, K).int()}, TypeError, "^routing_weights must be float64, .* got torch.int32$"),
        ({"expert_indices": torch.zeros(T, K)}, TypeError, "^expert_indices must have an integer dtype, got torch.float32$"),
        ({"expert_indices": torch.zeros(1, K).int()}, ValueError, r"^expert_indices must have shape \(9, 2\), got \(1, 2\)$"),
    ],
)
def test_experts_say_what_is_wrong(changes, error, message):
    given = make_inputs(QWEN3, torch.float32)
    with pytest.raises(error, match=message):
        FusedMoE(E, K, "silu").forward(**{**given, **changes})
