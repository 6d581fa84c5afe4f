"""Balance: the losses and one update of the bias against the oracle."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from fusedonemoe import balance
from fusedonemoe import functional as F
from fusedonemoe.balance import load_balancing_loss, router_z_loss, update_selection_bias
from fusedonemoe.balance.losses import SCORINGS
from fusedonemoe.ops.reference import balance as reference_balance
from fusedonemoe.testing import assert_within_budget, exact_float64, make_experts, make_logits

D, E, K = 16, 8, 2
MASK = [1, 0, 1, 1, 0, 1, 1, 1, 0]
every_scoring = pytest.mark.parametrize("scoring", SCORINGS)
every_mask = pytest.mark.parametrize("mask", [None, MASK, [0] * 9], ids=["no_mask", "mask", "all_padding"])


def make_rows(T, scoring="softmax", dtype=torch.float64, **options):
    """Logits, or probabilities that sum to 1 where those are given."""
    logits = make_logits(T, E, **options)
    return (logits.softmax(-1) if scoring == "given" else logits).to(dtype).requires_grad_()


def as_mask(mask):
    return None if mask is None else torch.tensor(mask)


# Losses


@every_scoring
@every_mask
@pytest.mark.parametrize("routing", ["uniform", "skewed", "out_of_range"])
def test_the_loss_equals_the_oracle_in_value_and_gradient(scoring, mask, routing):
    rows, experts = make_rows(9, scoring), make_experts(9, E, 3, routing=routing)
    loss = load_balancing_loss(rows, experts, E, scoring=scoring, attention_mask=as_mask(mask))
    exact, exact_grad = reference_balance.load_balancing_loss(*exact_float64(rows, experts), scoring=scoring, attention_mask=mask)
    assert loss.shape == () and loss.dtype == torch.float64
    assert_close(float(loss.detach()), exact, rtol=1e-12, atol=0)
    assert (exact > 0.5) == (mask is None or any(mask))
    (grad,) = torch.autograd.grad(loss, rows)
    assert_close(grad, torch.from_numpy(exact_grad), rtol=1e-10, atol=1e-14)


@every_mask
def test_the_z_loss_equals_the_oracle_in_value_and_gradient(mask):
    logits = make_rows(9)
    loss = router_z_loss(logits, attention_mask=as_mask(mask))
    exact, exact_grad = reference_balance.router_z_loss(exact_float64(logits), attention_mask=mask)
    assert loss.shape == () and loss.dtype == torch.float64
    assert_close(float(loss.detach()), exact, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert_close(grad, torch.from_numpy(exact_grad), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_in_low_precision_are_as_good_as_plain_pytorch(dtype):
    logits, experts = make_rows(40, dtype=dtype), make_experts(40, E, K, routing="skewed")
    wide = logits.float()
    share = torch.nn.functional.one_hot(experts, E).sum((0, 1)).float() / (40 * K)
    cases = {
        "balance": (
            load_balancing_loss(logits, experts, E),
            E * (share * wide.softmax(-1).mean(0)).sum(),
            reference_balance.load_balancing_loss(*exact_float64(logits, experts)),
        ),
        "z": (
            router_z_loss(logits),
            wide.logsumexp(-1).square().mean(),
            reference_balance.router_z_loss(exact_float64(logits)),
        ),
    }
    for name, (loss, plain, (exact, exact_grad)) in cases.items():
        assert loss.dtype == torch.float32
        assert_within_budget(loss, plain, np.array(exact), slack=4.0, name=name)
        (grad,), (plain_grad,) = torch.autograd.grad(loss, logits), torch.autograd.grad(plain, logits)
        assert grad.dtype == dtype
        assert_within_budget(grad, plain_grad, exact_grad, slack=4.0, name=f"{name} gradient")


@every_scoring
def test_perfect_balance_is_one_and_one_expert_for_all_is_the_number_of_experts(scoring):
    even = torch.full((16, E), 1 / E) if scoring == "given" else torch.zeros(16, E)
    experts = torch.arange(32).reshape(16, 2) % E
    assert load_balancing_loss(even, experts, E, scoring=scoring) == 1.0
    peaked = torch.eye(E)[:1].expand(16, E) if scoring == "given" else torch.tensor([[80.0, *[-80.0] * (E - 1)]]).expand(16, E)
    assert_close(load_balancing_loss(peaked, torch.zeros(16, 2, dtype=torch.int32), E, scoring=scoring), torch.tensor(float(E)))


@pytest.mark.parametrize("with_mask", [False, True])
def test_transformers_loss_is_k_times_ours(with_mask):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers, B, S = 3, 2, 5
    logits = torch.stack([make_logits(B * S, E, seed=seed) for seed in range(layers)])
    _, experts = F.route(logits, K)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]) if with_mask else None
    theirs = mixtral.load_balancing_loss_func(tuple(logits), E, K, mask)
    ours = load_balancing_loss(logits.reshape(layers, B, S, E), experts.reshape(layers, B, S, K), E, attention_mask=mask)
    assert abs(ours - 1) > 0.01
    assert_close(K * ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype_and_of_either_shape(dtype):
    logits, experts = make_rows(12), make_experts(12, E, K)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]]).to(dtype)
    kept = mask.reshape(-1).bool()
    expected = load_balancing_loss(logits[kept], experts[kept], E), router_z_loss(logits[kept])
    # [batch, sequence] for flat tokens, for [batch, sequence], and for two equal layers of those
    shaped = [(logits, experts), (logits.reshape(4, 3, E), experts.reshape(4, 3, K))]
    shaped.append((shaped[1][0].expand(2, 4, 3, E), shaped[1][1].expand(2, 4, 3, K)))
    for rows, ids in shaped:
        assert_close(load_balancing_loss(rows, ids, E, attention_mask=mask), expected[0])
        assert_close(router_z_loss(rows, attention_mask=mask), expected[1])


def test_what_stands_in_padding_changes_nothing():
    logits, experts, mask = make_rows(9), make_experts(9, E, K), as_mask(MASK)
    spoilt = torch.where(mask[:, None] == 0, torch.nan, logits.detach()).requires_grad_()
    for loss in (
        lambda v: load_balancing_loss(v, experts, E, attention_mask=mask),
        lambda v: router_z_loss(v, attention_mask=mask),
    ):
        clean, dirty = loss(logits), loss(spoilt)
        assert torch.equal(clean, dirty)
        (expected,), (found,) = torch.autograd.grad(clean, logits), torch.autograd.grad(dirty, spoilt)
        assert torch.equal(found, expected) and expected[mask == 0].abs().max() == 0 and expected.abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, 0), ()])
def test_losses_of_any_leading_dimensions(shape):
    logits = torch.randn(*shape, E, requires_grad=True)
    experts = torch.randint(0, E, (*shape, K), dtype=torch.int16)
    for loss in (load_balancing_loss(logits, experts, E), router_z_loss(logits)):
        assert loss.shape == () and torch.isfinite(loss) and (loss > 0) == (logits.numel() > 0)
        loss.backward()
        assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_sigmoid_probabilities_survive_underflow():
    logits = torch.full((3, E), -300.0, requires_grad=True)
    loss = load_balancing_loss(logits, make_experts(3, E, K), E, scoring="sigmoid")
    assert_close(loss, torch.tensor(1.0))
    loss.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_gradcheck():
    experts, mask = make_experts(9, E, K, routing="skewed"), as_mask(MASK)
    for scoring in ("softmax", "sigmoid"):
        assert gradcheck(
            lambda v, scoring=scoring: load_balancing_loss(v, experts, E, scoring=scoring, attention_mask=mask), make_rows(9)
        )
    assert gradcheck(lambda v: router_z_loss(v, attention_mask=mask), make_rows(9))


def test_the_loss_pulls_towards_balance():
    logits = (make_logits(64, E) + torch.tensor([3.0] + [0.0] * (E - 1))).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=100.0)
    before = balance.usage(F.route(logits, 1)[1], E).entropy
    for _ in range(30):
        optimizer.zero_grad()
        load_balancing_loss(logits, F.route(logits, 1)[1], E).backward()
        optimizer.step()
    assert before < 0.8 and balance.usage(F.route(logits, 1)[1], E).entropy > 0.95


def test_losses_compile_with_a_dynamic_number_of_tokens():
    torch._dynamo.reset()

    def both(logits, experts, mask):
        return load_balancing_loss(logits, experts, E, attention_mask=mask) + router_z_loss(logits, attention_mask=mask)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for T in (9, 21, 4):
        logits, experts, mask = make_rows(T, dtype=torch.float32), make_experts(T, E, K), torch.arange(T) % 3
        found, expected = compiled(logits, experts, mask), both(logits, experts, mask)
        assert_close(found, expected)
        assert_close(torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, logits)[0])


# The bias


@pytest.mark.parametrize("counts", [[5, 1, 0, 9], [4, 4, 4, 4], [0, 0, 0, 0], [3, 3, 3, 2], [2, 1, 3, 2]])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_bias_update_equals_the_oracle(counts, shared):
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0], dtype=torch.float64)
    exact = reference_balance.update_selection_bias(bias, counts, 0.125, num_shared_experts=shared)
    moved = update_selection_bias(bias, torch.tensor(counts), 0.125, num_shared_experts=shared)
    assert moved is bias
    np.testing.assert_array_equal(bias, exact)


def test_the_comparison_with_the_mean_is_exact():
    # The mean is 2^60 + 1/3, which no float tells from 2^60.
    counts = torch.tensor([2**60, 2**60, 2**60 + 1])
    assert update_selection_bias(torch.zeros(3), counts, 1.0).tolist() == [1.0, 1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts_dtype", [torch.int64, torch.int32, torch.uint8])
def test_bias_and_counts_of_any_dtype(dtype, counts_dtype):
    bias = nn.Parameter(torch.zeros(3, dtype=dtype))
    update_selection_bias(bias, torch.tensor([5, 3, 1], dtype=counts_dtype), 0.5)
    assert bias.tolist() == [-0.5, 0.0, 0.5] and bias.dtype == dtype


# Refusals


LOGITS, EXPERTS = torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, r"^logits must be a torch.Tensor, got list$"),
        ({"logits": LOGITS.long()}, TypeError, r"^logits must be float64, .* got torch.int64$"),
        ({"logits": torch.tensor(0.0)}, ValueError, r"^logits must have shape \[..., E\] with E >= 1, got \(\)$"),
        ({"num_experts": 4}, ValueError, r"^logits must have num_experts \(4\) columns, got shape \(4, 3\)$"),
        ({"num_experts": None}, TypeError, r"^num_experts must be an integer, got None$"),
        ({"experts": LOGITS}, TypeError, r"^experts must have an integer dtype, got torch.float32$"),
        ({"experts": EXPERTS[:3]}, ValueError, r"^experts must have shape \(4, 2\), got \(3, 2\)$"),
        ({"experts": EXPERTS[:, :0]}, ValueError, r"^experts must have shape \[..., K\] with K >= 1, got \(4, 0\)$"),
        ({"experts": EXPERTS.to("meta")}, ValueError, r"^experts must be on the device of logits \(cpu\), got meta$"),
        ({"scoring": "tanh"}, ValueError, r"^scoring must be one of \('softmax', 'sigmoid', 'given'\), got 'tanh'$"),
        ({"attention_mask": [1]}, TypeError, r"^attention_mask must be a torch.Tensor, got list$"),
        (
            {"attention_mask": torch.ones(3)},
            ValueError,
            r"^attention_mask must have one entry for each token, or the last dimensions of the tokens \(4,\), got shape \(3,\)$",
        ),
        ({"attention_mask": torch.ones(2, 1, 4)}, ValueError, r"^attention_mask must have one entry .* got shape \(2, 1, 4\)$"),
        (
            {"attention_mask": torch.ones(4, device="meta")},
            ValueError,
            r"^attention_mask must be on the device of logits \(cpu\), got meta$",
        ),
    ],
)
def test_bad_arguments_of_the_losses_are_named(changes, error, message):
    arguments: dict[str, Any] = {"logits": LOGITS, "experts": EXPERTS, "num_experts": 3, **changes}
    with pytest.raises(error, match=message):
        load_balancing_loss(**arguments)
    if changes.keys() & {"logits", "attention_mask"}:
        with pytest.raises(error, match=message):
            router_z_loss(**{name: arguments[name] for name in arguments if name in ("logits", "attention_mask")})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bias": torch.zeros(3).int()}, TypeError, r"^bias must be float64, .* got torch.int32$"),
        ({"counts": torch.zeros(3)}, TypeError, r"^counts must have an integer dtype, got torch.float32$"),
        ({"counts": [1, 2, 3]}, TypeError, r"^counts must be a torch.Tensor, got list$"),
        ({"counts": torch.zeros(2).long()}, ValueError, r"^counts must have shape \(3,\), got \(2,\)$"),
        ({"counts": torch.zeros(3, 1).long()}, ValueError, r"^counts must have shape \[E\] with E >= 1, got \(3, 1\)$"),
        (
            {"counts": torch.zeros(3, device="meta").long()},
            ValueError,
            r"^counts must be on the device of bias \(cpu\), got meta$",
        ),
        ({"rate": -1.0}, ValueError, r"^rate must be at least 0 and finite, got -1.0$"),
        ({"rate": "1"}, TypeError, r"^rate must be a number, got '1'$"),
        ({"num_shared_experts": 3}, ValueError, r"^num_shared_experts must be an integer from 0 to 2, got 3$"),
        ({"num_shared_experts": 1.0}, ValueError, r"^num_shared_experts must be an integer from 0 to 2, got 1.0$"),
    ],
)
def test_bad_arguments_of_the_update_are_named(changes, error, message):
    arguments: dict[str, Any] = {"bias": torch.zeros(3), "counts": torch.zeros(3).long(), "rate": 0.1, **changes}
    with pytest.raises(error, match=message):
        update_selection_bias(**arguments)
