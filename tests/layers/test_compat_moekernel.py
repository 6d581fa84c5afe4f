"""MoeKernel's names against plain loops over tokens in float64: values, gradients, capacity, compilation, messages."""

import math
from typing import Any

import pytest
import torch
from torch._dynamo.decorators import mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.compat.moekernel import MOEConfig, moe_expert_computation, moe_gating_forward
from fusedonemoe.testing import assert_within_budget
from tests.exact import EXACT, best, gradients, randn

B, S, D, FF, E, K = 2, 9, 10, 6, 4, 2
CONFIG = MOEConfig(num_experts=E, top_k=K, hidden_dim=D, expert_dim=FF)
P = D * FF + FF * D + FF + D


def make_params(dtype=torch.float64):
    return [(randn(P, seed=10 + e) / D**0.5).to(dtype) for e in range(E)]


def plain_gating(x, gate_DE, top_k=K):
    """Softmax, the K largest with ties to the lower id, divided by their sum; the loss by counting."""
    probabilities = torch.softmax(x.reshape(-1, x.shape[-1]) @ gate_DE, 1)
    num_experts = gate_DE.shape[1]
    ids = [best(row, top_k) for row in probabilities]
    indices = torch.tensor(ids).reshape(-1, top_k)
    picked = probabilities.gather(1, indices)
    counts = [sum(row.count(e) for row in ids) / (len(ids) * top_k) for e in range(num_experts)]
    loss = num_experts * sum(f * probabilities[:, e].mean() for e, f in enumerate(counts))
    return picked / picked.sum(1, keepdim=True), indices, loss.reshape(1)


def plain_experts(x, weights, indices, params, config=CONFIG):
    """Row by row in token order, an expert closing when its capacity is reached."""
    x_TD = x.reshape(-1, D)
    room = [math.ceil(config.capacity_factor * len(x_TD) * K / E)] * E
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for j in range(K):
            e = int(indices[t, j])
            if not 0 <= e < E or room[e] == 0:
                continue
            room[e] -= 1
            W1, W2 = params[e][: D * FF].view(D, FF), params[e][D * FF : 2 * D * FF].view(FF, D)
            b1, b2 = params[e][2 * D * FF : 2 * D * FF + FF], params[e][2 * D * FF + FF :]
            y_D = y_D + (weights[t, j] * (torch.relu(x_D @ W1 + b1) @ W2 + b2)).to(y_D.dtype)
        rows.append(y_D)
    return torch.stack(rows).reshape(x.shape)


# Gating


@pytest.mark.parametrize("shape", [(B, S, D), (5, D), (1, D)], ids=str)
@pytest.mark.parametrize("top_k", [1, K, E])
def test_gating_equals_the_formula(shape, top_k):
    config = MOEConfig(E, top_k, D, FF)
    x, gate = randn(*shape, seed=1).requires_grad_(), randn(D, E, seed=2).requires_grad_()
    weights, indices, loss = moe_gating_forward(x, gate, config)
    exact_weights, exact_indices, exact_loss = plain_gating(x, gate, top_k)
    assert indices.dtype == torch.int32 and torch.equal(indices.long(), exact_indices) and loss.shape == (1,)
    assert_close(weights, exact_weights, **EXACT)
    assert_close(loss, exact_loss, **EXACT)
    for actual, exact in ((weights, exact_weights), (loss, exact_loss)):
        for grad, exact_grad in zip(gradients(actual, (x, gate)), gradients(exact, (x, gate)), strict=True):
            assert_close(grad, exact_grad, **EXACT)


def test_gating_runs_in_float32():
    x, gate = randn(B, S, D, dtype=torch.bfloat16), randn(D, E, seed=2, dtype=torch.bfloat16)
    weights, indices, loss = moe_gating_forward(x, gate, CONFIG)
    exact_weights, exact_indices, exact_loss = plain_gating(x.double(), gate.double())
    assert weights.dtype == loss.dtype == torch.float32 and torch.equal(indices.long(), exact_indices)
    assert_close(weights.double(), exact_weights, rtol=1e-5, atol=1e-6)
    assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-6)


def test_the_loss_is_one_when_even_and_grows_with_imbalance():
    even = moe_gating_forward(torch.eye(E).repeat(3, 1), torch.eye(E) * 50, MOEConfig(E, 1, E, FF))[2]
    assert_close(even, torch.ones(1))
    lopsided = moe_gating_forward(torch.eye(E)[:1].repeat(12, 1), torch.eye(E) * 50, MOEConfig(E, 1, E, FF))[2]
    assert_close(lopsided, torch.full((1,), float(E)))


def test_no_tokens_route_to_nothing():
    weights, indices, loss = moe_gating_forward(torch.zeros(0, D), torch.zeros(D, E), CONFIG)
    assert weights.shape == indices.shape == (0, K) and torch.equal(loss, torch.zeros(1))
    assert moe_expert_computation(torch.zeros(0, D), weights, indices, make_params(torch.float32), CONFIG).shape == (0, D)


# Experts


def routed(dtype=torch.float64):
    x = randn(B, S, D, seed=1, dtype=dtype)
    weights, indices, _ = moe_gating_forward(x, randn(D, E, seed=2, dtype=dtype), CONFIG)
    return x, weights.detach(), indices


@pytest.mark.parametrize("impl", ["auto", "dense"])
@pytest.mark.parametrize("capacity_factor", [1.0, 1.25, 4.0])
@pytest.mark.parametrize("stacked", [False, True])
def test_experts_equal_the_plain_loop(impl, capacity_factor, stacked):
    config = MOEConfig(E, K, D, FF, capacity_factor)
    x, weights, indices = routed()
    params = [p.requires_grad_() for p in make_params()]
    leaves = (x.requires_grad_(), weights.requires_grad_(), *params)
    y = moe_expert_computation(x, weights, indices, torch.stack(params) if stacked else params, config, impl=impl)
    exact = plain_experts(x, weights, indices, params, config)
    assert_close(y, exact, **EXACT)
    for grad, exact_grad in zip(gradients(y, leaves), gradients(exact, leaves), strict=True):
        assert_close(grad, exact_grad, **EXACT)


def test_capacity_drops_the_last_rows_of_a_full_expert():
    config = MOEConfig(E, K, D, FF, 1.0)  # T = 4: an expert takes 2 rows
    x, weights, indices = randn(4, D), torch.ones(4, K), torch.tensor([[0, 1], [0, 1], [0, 2], [3, 0]])
    y = moe_expert_computation(x, weights.double(), indices, make_params(), config)
    kept = torch.tensor([[0, 1], [0, 1], [-1, 2], [3, -1]])
    unlimited = MOEConfig(E, K, D, FF, 100.0)
    assert_close(y, moe_expert_computation(x, weights.double(), kept, make_params(), unlimited), **EXACT)
    assert not torch.allclose(y, moe_expert_computation(x, weights.double(), indices, make_params(), unlimited))


@pytest.mark.parametrize("id_dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_ids_of_any_dtype_and_outside_the_range(id_dtype):
    x, weights, indices = routed()
    indices = indices.to(id_dtype)
    indices[0, 0] = 100
    params = make_params()
    assert_close(moe_expert_computation(x, weights, indices, params, CONFIG), plain_experts(x, weights, indices, params), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_plain_pytorch(dtype):
    x, weights, indices = routed(dtype)
    params = make_params(dtype)
    exact = plain_experts(x.double(), weights.double(), indices, [p.double() for p in params])
    y = moe_expert_computation(x, weights, indices, params, CONFIG)
    assert_within_budget(y, plain_experts(x, weights, indices, params), exact)


def test_stacked_parameters_are_read_in_place(monkeypatch):
    params, seen = torch.stack(make_params()), []
    experts_mlp = F.experts_mlp

    def watched(*args, **kwargs):
        seen.extend([*args[3:5], kwargs["gate_up_bias"], kwargs["down_bias"]])
        return experts_mlp(*args, **kwargs)

    monkeypatch.setattr(F, "experts_mlp", watched)
    x, weights, indices = routed()
    moe_expert_computation(x, weights, indices, params, CONFIG)
    assert len(seen) == 4
    assert {tensor.untyped_storage().data_ptr() for tensor in seen} == {params.untyped_storage().data_ptr()}


# Compilation


def test_compiled_with_an_open_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")
    gate, params = randn(D, E, seed=2).requires_grad_(), [p.requires_grad_() for p in make_params()]

    def block(x):
        weights, indices, loss = moe_gating_forward(x, gate, CONFIG)
        return moe_expert_computation(x, weights, indices, params, CONFIG) + loss

    fast = torch.compile(block, fullgraph=True, backend=counter)
    for T in (6, 11, 17):
        x = randn(2, T, D, seed=T)
        mark_dynamic(x, 1)
        y, expected = fast(x), block(x)
        assert_close(y, expected, **EXACT)
        for grad, exact in zip(gradients(y, (gate, *params), False), gradients(expected, (gate, *params)), strict=True):
            assert_close(grad, exact, **EXACT)
    assert counter.frame_count == 1


def test_no_host_synchronisation_on_meta():
    # A meta tensor has no values: whatever reads one raises.
    x = torch.empty(B, S, D, device="meta")
    weights, indices, loss = moe_gating_forward(x, torch.empty(D, E, device="meta"), CONFIG)
    y = moe_expert_computation(x, weights, indices, torch.empty(E, P, device="meta"), CONFIG, impl="dense")
    assert y.shape == x.shape and loss.shape == (1,)


# Messages


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "^num_experts must be at least 1, got 0$"),
        ({"num_experts": 2.0}, TypeError, "^num_experts must be an integer, got 2.0$"),
        ({"top_k": 9}, ValueError, r"^top_k must be from 1 to num_experts \(8\), got 9$"),
        ({"hidden_dim": -1}, ValueError, "^hidden_dim must be at least 1, got -1$"),
        ({"expert_dim": None}, TypeError, "^expert_dim must be an integer, got None$"),
        ({"capacity_factor": 0.9}, ValueError, "^capacity_factor must be at least 1, got 0.9$"),
        ({"capacity_factor": math.inf}, ValueError, "^capacity_factor must be at least 1, got inf$"),
        ({"capacity_factor": "1"}, TypeError, "^capacity_factor must be a number, got '1'$"),
    ],
)
def test_config_says_what_is_wrong(changes, error, message):
    sizes: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_dim": 512, "expert_dim": 2048}
    with pytest.raises(error, match=message):
        MOEConfig(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": {}}, TypeError, "^config must be a MOEConfig, got dict$"),
        ({"input": torch.zeros(3, 7)}, ValueError, r"^input must have shape \[..., 10\], got \(3, 7\)$"),
        ({"input": None}, TypeError, "^input must be a torch.Tensor, got NoneType$"),
        ({"gate_weights": torch.zeros(E, D)}, ValueError, r"^gate_weights must have shape \(10, 4\), got \(4, 10\)$"),
        ({"gate_weights": torch.zeros(D, E, dtype=torch.int64)}, TypeError, "^gate_weights must be float64, .* got torch.int64$"),
        ({"gate_weights": torch.zeros(D, E, device="meta")}, ValueError, r"^gate_weights must be on the device of input \(cpu\)"),
    ],
)
def test_gating_says_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        moe_gating_forward(**{"input": torch.zeros(B, S, D), "gate_weights": torch.zeros(D, E), "config": CONFIG, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": None}, TypeError, "^config must be a MOEConfig, got NoneType$"),
        ({"input": torch.zeros(D, 3)}, ValueError, r"^input must have shape \[..., 10\], got \(10, 3\)$"),
        ({"expert_weights": torch.zeros(3, K)}, ValueError, r"^expert_weights must have shape \(18, 2\), got \(3, 2\)$"),
        ({"expert_weights": [0.0]}, TypeError, "^expert_weights must be a torch.Tensor, got list$"),
        ({"expert_indices": torch.zeros(B * S, K)}, TypeError, "^expert_indices must have an integer dtype, got torch.float32$"),
        ({"expert_indices": torch.zeros(B * S, 1, dtype=torch.int64)}, ValueError, r"^expert_indices must have shape \(18, 2\)"),
        ({"expert_params": 3}, TypeError, r"^expert_params must be a list of tensors or one tensor \[E, P\], got int$"),
        ({"expert_params": torch.zeros(E, 5)}, ValueError, r"^expert_params must have shape \(4, 136\), got \(4, 5\)$"),
        ({"expert_params": [torch.zeros(P)]}, ValueError, "^expert_params must hold 4 tensors, one for each expert, got 1$"),
        ({"expert_params": [torch.zeros(P)] * 3 + [torch.zeros(2)]}, ValueError, r"^expert_params\[3\] must have shape \(136,\)"),
        (
            {"expert_params": [torch.zeros(P)] * 3 + [torch.zeros(P).double()]},
            TypeError,
            r"^expert_params\[3\] must have the dtype of input \(torch.float32\), got torch.float64$",
        ),
        (
            {"expert_params": torch.zeros(E, P).double()},
            TypeError,
            r"^expert_params must have the dtype of input \(torch.float32\)",
        ),
        ({"impl": "fast"}, ValueError, "^impl must be one of"),
    ],
)
def test_expert_computation_says_what_is_wrong(changes, error, message):
    given = {
        "input": torch.zeros(B, S, D),
        "expert_weights": torch.zeros(B * S, K),
        "expert_indices": torch.zeros(B * S, K, dtype=torch.int32),
        "expert_params": [torch.zeros(P)] * E,
        "config": CONFIG,
    }
    with pytest.raises(error, match=message):
        moe_expert_computation(**{**given, **changes})
