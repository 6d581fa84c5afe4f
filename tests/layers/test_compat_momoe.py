"""MoMoE's names against plain loops over experts in float64: values, gradients, biases, compilation, messages."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch._dynamo.decorators import mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fusedonemoe import functional as F
from fusedonemoe.compat.momoe import MoE, MoMoE, TopKRouter
from fusedonemoe.testing import assert_within_budget
from tests.exact import EXACT, best, gradients, randn

B, S, D, H, N, K, KS = 2, 7, 12, 6, 6, 3, 1


def make_mask(M, *, seed=0):
    """K experts for each token, at random."""
    scores = torch.rand(N, M, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(N, M, dtype=torch.int32).scatter(0, scores.topk(K, dim=0).indices, 1)


def make_momoe(dtype=torch.float64, **options):
    Wl1, Wl2 = randn(N, D, 2 * H, seed=1, dtype=dtype) / D**0.5, randn(N, H, D, seed=2, dtype=dtype) / H**0.5
    return MoMoE(D, H, N, K, Wl1_ND2H=Wl1, Wl2_NHD=Wl2, **options)


def plain_momoe(x_BSD, mask_NM, s_NM, Wl1_ND2H, Wl2_NHD):
    """y_m = sum over the mask of s_nm ((a * silu(b)) Wl2_n), [a | b] = x_m Wl1_n; one expert after the other."""
    x_MD = x_BSD.reshape(-1, x_BSD.shape[-1])
    y_MD = torch.zeros_like(x_MD)
    for n in range(N):
        tokens = mask_NM[n].bool().nonzero()[:, 0]
        a, b = (x_MD[tokens] @ Wl1_ND2H[n]).chunk(2, dim=1)
        out = (a * b * torch.sigmoid(b)) @ Wl2_NHD[n]
        y_MD = y_MD.index_add(0, tokens, (s_NM[n, tokens, None] * out).to(y_MD.dtype))
    return y_MD.reshape(x_BSD.shape)


def plain_router(x_BSD, Wg_DN, biases_N, Ks=KS):
    """The documented mathematics, token by token: the mask and the weights."""
    rows_s, rows_mask = [], []
    for x_D in x_BSD.reshape(-1, x_BSD.shape[-1]):
        logits = x_D @ Wg_DN
        p = torch.softmax(logits[: N - Ks], 0)
        picked = best(p + biases_N[: N - Ks], K - Ks)
        kept = torch.zeros_like(p)
        kept[picked] = 1
        rows_s.append(torch.cat((p * kept / (p * kept).sum() if Ks < K else p * kept, torch.softmax(logits[N - Ks :], 0))))
        rows_mask.append(torch.cat((kept, torch.ones(Ks))).int())
    return torch.stack(rows_mask, 1), torch.stack(rows_s, 1)


# MoMoE


@pytest.mark.parametrize("impl", ["auto", "dense"])
@pytest.mark.parametrize("save_percent", [0, 37, 100])
@pytest.mark.parametrize("mask_dtype", [torch.int32, torch.bool, torch.uint8])
def test_momoe_equals_the_plain_loop(impl, save_percent, mask_dtype):
    momoe = make_momoe(save_percent=save_percent, impl=impl)
    x, s, mask = randn(B, S, D, seed=3).requires_grad_(), randn(N, B * S, seed=4).requires_grad_(), make_mask(B * S)
    leaves = (x, s, momoe.Wl1_ND2H, momoe.Wl2_NHD)
    y, sizes = momoe(x, mask.to(mask_dtype), s)
    exact = plain_momoe(x, mask, s, momoe.Wl1_ND2H, momoe.Wl2_NHD)
    assert_close(y, exact, **EXACT)
    assert torch.equal(sizes, mask.sum(1)) and sizes.shape == (N,)
    for grad, exact_grad in zip(gradients(y, leaves), gradients(exact, leaves), strict=True):
        assert_close(grad, exact_grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_momoe_in_low_precision_is_as_good_as_plain_pytorch(dtype):
    momoe = make_momoe(dtype)
    x, s, mask = randn(B, S, D, seed=3, dtype=dtype), torch.rand(N, B * S), make_mask(B * S)
    y, _ = momoe(x, mask, s)
    weights = momoe.Wl1_ND2H.detach(), momoe.Wl2_NHD.detach()
    exact = plain_momoe(x.double(), mask, s.double(), *(w.double() for w in weights))
    assert_within_budget(y.detach(), plain_momoe(x, mask, s, *weights), exact)


def test_a_token_takes_what_its_column_names_and_k_at_most():
    momoe, x, s = make_momoe(), randn(1, 4, D, seed=3), randn(N, 4, seed=4)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]])
    first_three = mask.clone()
    first_three[3:, 2] = 0
    y, sizes = momoe(x, mask, s)
    assert_close(y, plain_momoe(x, first_three, s, momoe.Wl1_ND2H, momoe.Wl2_NHD), **EXACT)
    assert (y[0, 0] == 0).all() and (y[0, 1:] != 0).any(1).all()
    assert torch.equal(sizes, mask.sum(1))


def test_what_stands_outside_the_mask_is_never_read():
    momoe, x, mask = make_momoe(), randn(B, S, D), make_mask(B * S)
    s = randn(N, B * S, seed=4)
    spoiled = torch.where(mask != 0, s, torch.nan).requires_grad_()
    y, _ = momoe(x, mask, spoiled)
    assert_close(y, momoe(x, mask, s)[0], rtol=0, atol=0)
    (grad,) = gradients(y, (spoiled,))
    assert (grad[mask == 0] == 0).all() and (grad[mask != 0] != 0).all()


@pytest.mark.parametrize("shape", [(0, 5, D), (1, 1, D), (5, D)])
def test_momoe_takes_any_leading_dimensions(shape):
    momoe, x = make_momoe(), randn(*shape)
    M = x[..., 0].numel()
    mask, s = make_mask(M), randn(N, M)
    assert_close(momoe(x, mask, s)[0], plain_momoe(x, mask, s, momoe.Wl1_ND2H, momoe.Wl2_NHD), **EXACT)


def test_momoe_reads_its_parameters_in_place(monkeypatch):
    momoe, experts_mlp = make_momoe(), F.experts_mlp
    read: list[int] = []

    def watched(*args, **kwargs):
        read.extend(weight.data_ptr() for weight in args[3:5])
        return experts_mlp(*args, **kwargs)

    monkeypatch.setattr(F, "experts_mlp", watched)
    momoe(randn(B, S, D), make_mask(B * S), randn(N, B * S))
    assert read == [momoe.Wl1_ND2H.data_ptr(), momoe.Wl2_NHD.data_ptr()]


def test_momoe_copies_given_weights_and_defaults_to_bfloat16():
    Wl1, Wl2 = torch.randn(N, D, 2 * H), torch.randn(N, H, D)
    momoe = MoMoE(D, H, N, K, Wl1_ND2H=Wl1, Wl2_NHD=Wl2.bfloat16())
    assert momoe.Wl1_ND2H.dtype == momoe.Wl2_NHD.dtype == torch.float32 and momoe.Wl1_ND2H.requires_grad
    assert torch.equal(momoe.Wl1_ND2H, Wl1) and momoe.Wl1_ND2H.data_ptr() != Wl1.data_ptr()
    drawn = MoMoE(D, H, N, K)
    assert drawn.Wl1_ND2H.dtype == torch.bfloat16 and 0 < drawn.Wl1_ND2H.abs().max() <= D**-0.5
    assert set(drawn.state_dict()) == {"Wl1_ND2H", "Wl2_NHD"}


# Router


@pytest.mark.parametrize(("Ks", "dtype"), list(itertools.product([0, 1, 2, K], [torch.float64, torch.float32])))
def test_router_equals_the_formula(Ks, dtype):
    router = TopKRouter(D, N, K, Ks, Wg_DN=randn(D, N, seed=1, dtype=dtype))
    x, biases = randn(B, S, D, seed=3, dtype=dtype).requires_grad_(), randn(N, seed=4) / 4
    same_x, mask, s = router(x, biases)
    exact_x, exact_Wg = x.detach().double().requires_grad_(), router.Wg_DN.detach().double().requires_grad_()
    exact_mask, exact_s = plain_router(exact_x, exact_Wg, biases.to(dtype).double(), Ks)
    assert same_x is x and mask.dtype == torch.int32 and s.dtype == dtype
    assert torch.equal(mask, exact_mask) and (mask.sum(0) == K).all()
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert_close(s.double(), exact_s, **tolerance)
    if K > Ks > 1 or Ks == 0:  # otherwise a weight of 1 has no gradient to speak of
        exact_grads = gradients(exact_s, (exact_x, exact_Wg))
        assert all(grad.abs().max() > 1e-3 for grad in exact_grads)
        for grad, exact_grad in zip(gradients(s, (x, router.Wg_DN)), exact_grads, strict=True):
            assert_close(grad.double(), exact_grad, **({"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else EXACT))


def test_a_bias_decides_who_is_picked_and_never_enters_a_weight():
    router, x = TopKRouter(D, N, K, KS, Wg_DN=randn(D, N, seed=1)), randn(B, S, D)
    biases = torch.zeros(N)
    biases[4] = 10
    _, mask, s = router(x, biases)
    assert (mask[4] == 1).all() and not torch.equal(mask, router(x, torch.zeros(N))[1])
    assert_close(s[: N - KS].sum(0), torch.ones(B * S, dtype=s.dtype))
    assert (router(x, torch.cat((torch.zeros(N - KS), torch.full((KS,), torch.nan))))[2].isfinite()).all()


def test_router_decides_in_float32_under_autocast():
    router, x = TopKRouter(D, N, K, KS, Wg_DN=randn(D, N, seed=1, dtype=torch.float32)), randn(B, S, D, dtype=torch.float32)
    _, mask, s = router(x, torch.zeros(N))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, autocast_mask, autocast_s = router(x, torch.zeros(N))
    assert torch.equal(mask, autocast_mask) and torch.equal(s, autocast_s)


# The block


def make_moe(**options):
    torch.manual_seed(0)
    return MoE(D, H, N, K, KS, **{"dtype": torch.float64, "bias_update_rate": 0.05, **options})


def test_block_equals_router_and_experts():
    moe, x = make_moe(), randn(B, S, D, seed=3).requires_grad_()
    y = moe(x)
    mask, s = plain_router(x, moe.router.Wg_DN, torch.zeros(N))
    exact = plain_momoe(x, mask, s, moe.momoe.Wl1_ND2H, moe.momoe.Wl2_NHD)
    leaves = (x, *moe.parameters())
    assert len(leaves) == 4
    assert_close(y, exact, **EXACT)
    for grad, exact_grad in zip(gradients(y, leaves), gradients(exact, leaves), strict=True):
        assert_close(grad, exact_grad, **EXACT)


def train_step(moe, optimizer, *inputs, run=None):
    """Forward and backward of every input, one step of the optimizer; the gradients."""
    optimizer.zero_grad()
    for x in inputs:
        (run or moe)(x).square().sum().backward()
    grads = [p.grad.clone() for p in moe.parameters()]
    optimizer.step()
    return grads


def test_biases_follow_the_published_rule_and_rest_in_evaluation():
    moe = make_moe()
    optimizer, biases = torch.optim.SGD(moe.parameters(), lr=0.01), torch.zeros(N)
    for step in range(4):
        inputs = [randn(B, S, D, seed=2 * step + i) for i in range(2)]
        counts = sum(plain_router(x, moe.router.Wg_DN, biases)[0].sum(1) for x in inputs)
        for x in inputs:
            moe.eval()(x)
        train_step(moe.train(), optimizer, *inputs)
        biases = biases + 0.05 * torch.sign(2 * B * S * (K - KS) / (N - KS) - counts)
        assert_close(moe.biases_N[: N - KS], biases[: N - KS])
        assert (moe.counts_N == 0).all()
    assert biases[: N - KS].abs().max() >= 0.05 and (moe.biases_N[N - KS :] == -torch.inf).all()


def test_only_the_optimizer_of_a_block_moves_its_biases():
    moe, other, copied = make_moe(), torch.nn.Linear(2, 2), copy.deepcopy(make_moe())
    for block in (moe, copied):
        block(randn(B, S, D)).sum().backward()
        counted = block.counts_N.clone()
        assert counted.sum() == B * S * K
        other(torch.zeros(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters()).step()
        assert torch.equal(block.counts_N, counted) and (block.biases_N[: N - KS] == 0).all()
        torch.optim.SGD(block.parameters()).step()
        assert (block.counts_N == 0).all() and (block.biases_N[: N - KS] != 0).any()


@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant", "compiled"])
def test_checkpointing_counts_a_step_once_and_routes_as_the_forward_did(kind):
    plain, checkpointed = make_moe(bias_update_rate=0.5), make_moe(bias_update_rate=0.5)
    optimizers = [torch.optim.SGD(moe.parameters(), lr=0.01) for moe in (plain, checkpointed)]

    def run(x):
        return checkpoint(checkpointed, x, use_reentrant=kind == "reentrant")

    if kind == "compiled":
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    moved = False
    for step in range(3):
        x = randn(B, S, D, seed=step).requires_grad_()
        expected, grads = train_step(plain, optimizers[0], x), train_step(checkpointed, optimizers[1], x, run=run)
        assert_close(grads, expected, **EXACT)
        assert torch.equal(plain.biases_N, checkpointed.biases_N)
        moved |= bool((plain.biases_N[: N - KS] != 0).any())
    assert moved


def test_two_forwards_before_a_backward():
    moe = make_moe()
    (moe(randn(B, S, D, seed=1)).sum() + moe(randn(B, S, D, seed=2)).sum()).backward()
    assert all(p.grad.isfinite().all() for p in moe.parameters())


def test_every_save_percent_trains_the_same():
    losses = []
    for save_percent in (0, 50, 100):
        moe, x = make_moe(save_percent=save_percent), randn(B, S, D)
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.05)
        curve = []
        for _ in range(20):
            loss = (moe(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)


# Compilation


def test_compiled_block_with_an_open_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")
    eager, fast = make_moe(), make_moe()
    run = torch.compile(fast, fullgraph=True, backend=counter)
    for step, T in enumerate((6, 11, 17)):
        x = randn(2, T, D, seed=step)
        mark_dynamic(x, 1)
        outputs = [model(x) for model in (eager, run)]
        assert_close(*outputs, **EXACT)
        grads = [gradients(y, tuple(model.parameters()), False) for y, model in zip(outputs, (eager, fast), strict=True)]
        for expected, grad in zip(*grads, strict=True):
            assert_close(grad, expected, **EXACT)
        assert torch.equal(eager.biases_N, fast.biases_N) and torch.equal(eager.counts_N, fast.counts_N)
    assert counter.frame_count == 1


def test_operators_get_no_host_synchronisation_on_meta():
    # A meta tensor has no values: whatever reads one raises.
    moe = MoE(D, H, N, K, KS, device="meta", dtype=torch.float32)
    assert moe(torch.empty(B, S, D, device="meta")).shape == (B, S, D)


# Messages

SIZES: dict[str, Any] = {"embedding_dim": D, "intermediate_dim": H, "num_experts": N, "num_chosen_experts": K}
ROUTER: dict[str, Any] = {"embedding_dim": D, "num_experts": N, "num_chosen_experts": K, "num_shared_experts": KS}


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        (MoMoE, {"embedding_dim": 0}, ValueError, "^embedding_dim must be at least 1, got 0$"),
        (MoMoE, {"intermediate_dim": 2.0}, TypeError, "^intermediate_dim must be an integer, got 2.0$"),
        (MoMoE, {"num_experts": True}, TypeError, "^num_experts must be an integer, got True$"),
        (MoMoE, {"num_chosen_experts": 7}, ValueError, r"^num_chosen_experts must be from 1 to num_experts \(6\), got 7$"),
        (MoMoE, {"save_percent": 101}, ValueError, "^save_percent must be an integer from 0 to 100, got 101$"),
        (MoMoE, {"Wl1_ND2H": torch.zeros(N, D, H)}, ValueError, r"^Wl1_ND2H must have shape \(6, 12, 12\), got \(6, 12, 6\)$"),
        (MoMoE, {"Wl2_NHD": [1.0]}, TypeError, "^Wl2_NHD must be a torch.Tensor, got list$"),
        (
            TopKRouter,
            {"num_shared_experts": 4},
            ValueError,
            r"^num_shared_experts must be from 0 to num_chosen_experts \(3\), got 4$",
        ),
        (TopKRouter, {"Wg_DN": torch.zeros(N, D)}, ValueError, r"^Wg_DN must have shape \(12, 6\), got \(6, 12\)$"),
        (MoE, {"num_shared_experts": 0, "bias_update_rate": -1.0}, ValueError, "^bias_update_rate must be at least 0, got -1.0$"),
        (MoE, {"num_shared_experts": 0, "bias_update_rate": "a"}, TypeError, "^bias_update_rate must be a number, got 'a'$"),
    ],
)
def test_constructors_say_what_is_wrong(kind, changes, error, message):
    sizes = ROUTER if kind is TopKRouter else SIZES
    with pytest.raises(error, match=message):
        kind(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_BSD": torch.zeros(B, S, 5)}, ValueError, r"^x_BSD must have shape \[..., 12\], got \(2, 7, 5\)$"),
        ({"x_BSD": torch.zeros(B, S, D, dtype=torch.int64)}, TypeError, "^x_BSD must be float64, .* got torch.int64$"),
        ({"mask_NM": None}, TypeError, "^mask_NM must be a torch.Tensor, got NoneType$"),
        ({"mask_NM": torch.zeros(N, B * S)}, TypeError, "^mask_NM must be boolean or of an integer dtype, got torch.float32$"),
        ({"mask_NM": make_mask(B * S).t()}, ValueError, r"^mask_NM must have shape \(6, 14\), got \(14, 6\)$"),
        ({"s_NM": torch.zeros(N, 3)}, ValueError, r"^s_NM must have shape \(6, 14\), got \(6, 3\)$"),
        ({"s_NM": make_mask(B * S)}, TypeError, "^s_NM must be float64, .* got torch.int32$"),
        (
            {"s_NM": torch.zeros(N, B * S, device="meta")},
            ValueError,
            r"^s_NM must be on the device of the parameters \(cpu\), got meta$",
        ),
    ],
)
def test_momoe_says_what_is_wrong(changes, error, message):
    given = {"x_BSD": torch.zeros(B, S, D), "mask_NM": make_mask(B * S), "s_NM": torch.zeros(N, B * S)}
    with pytest.raises(error, match=message):
        make_momoe()(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_BSD": torch.zeros(B, S, 5)}, ValueError, r"^x_BSD must have shape \[..., 12\], got \(2, 7, 5\)$"),
        ({"x_BSD": torch.zeros(B, S, D, device="meta")}, ValueError, "^x_BSD must be on the device of the parameters"),
        ({"biases_N": torch.zeros(3)}, ValueError, r"^biases_N must have shape \(6,\), got \(3,\)$"),
        ({"biases_N": torch.zeros(N, dtype=torch.int64)}, TypeError, "^biases_N must be float64, .* got torch.int64$"),
        ({"biases_N": torch.zeros(N, device="meta")}, ValueError, r"^biases_N must be on the device of x_BSD \(cpu\), got meta$"),
    ],
)
def test_router_says_what_is_wrong(changes, error, message):
    router = TopKRouter(D, N, K, KS, dtype=torch.float32, device="cpu")
    with pytest.raises(error, match=message):
        router(**{"x_BSD": torch.zeros(B, S, D), "biases_N": torch.zeros(N), **changes})
