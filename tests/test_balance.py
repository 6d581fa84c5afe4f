"""Balance: the losses and the bias update against the oracle, and what is counted when, on one process and on two."""

import copy
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedonemoe import MoE, TopKRouter, balance
from fusedonemoe import functional as F
from fusedonemoe.balance import LossFreeBalance, load_balancing_loss, router_z_loss, update_selection_bias
from fusedonemoe.ops import reference_balance
from fusedonemoe.testing import assert_within_budget, exact_float64, make_experts, make_logits

D, E, K = 16, 8, 2
MASK = [1, 0, 1, 1, 0, 1, 1, 1, 0]
every_scoring = pytest.mark.parametrize("scoring", balance.SCORINGS)
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


# Counting


def test_opcheck_counting():
    counts = torch.zeros(4, dtype=torch.int64)
    torch.library.opcheck(torch.ops.fusedonemoe.count_tokens_.default, (counts, torch.tensor([[0, 3], [1, 9]])))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_counting_adds_and_skips_ids_out_of_range(dtype):
    counts = torch.tensor([10, 0, 0])
    torch.ops.fusedonemoe.count_tokens_(counts, torch.tensor([[0, 2], [2, 100]], dtype=dtype))
    assert counts.tolist() == [11, 0, 2]


def make_model(depth=2, **options):
    torch.manual_seed(0)
    fields = {"hidden_size": D, "intermediate_size": 8, "num_experts": E, "top_k": K, "selection_bias": True, **options}
    return nn.Sequential(*(MoE(**fields) for _ in range(depth)))


def biases(model):
    return [block.gate.e_score_correction_bias.clone() for block in model]


def expected_biases(model, batches, rate):
    """By a copy without hooks: the routing of every batch, counted and handed to the oracle."""
    model = copy.deepcopy(model)
    for block in model:
        block.gate._forward_hooks.clear()
    totals = [torch.zeros(E, dtype=torch.int64) for _ in model]
    with torch.no_grad():
        for x in batches:
            for total, block in zip(totals, model, strict=True):
                out = block(x, return_routing=True)
                total += out.tokens_per_expert
                x = out.output
    before = biases(model)
    return [
        torch.from_numpy(reference_balance.update_selection_bias(b, c, rate)).float() for b, c in zip(before, totals, strict=True)
    ]


def assert_biases(model, expected):
    for found, exact in zip(biases(model), expected, strict=True):
        assert exact.abs().max() > 0
        assert_close(found, exact)


def checkpointed(model, use_reentrant):
    def run(x):
        for block in model:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    return run


def compile_blocks(model, **options):
    blocks: list[Any] = [torch.compile(block, fullgraph=True, **options) for block in model]
    return nn.Sequential(*blocks)


RUNS = {
    "eager": lambda model: model,
    "checkpoint": lambda model: checkpointed(model, False),
    "checkpoint_reentrant": lambda model: checkpointed(model, True),
    "compile": lambda model: torch.compile(model, fullgraph=True),
    "compile_dynamic": lambda model: torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"),
    "compiled_checkpoint": lambda model: torch.compile(checkpointed(model, False), fullgraph=True),
    "compiled_checkpoint_reentrant": lambda model: torch.compile(checkpointed(model, True), fullgraph=True, backend="aot_eager"),
    "checkpoint_of_compiled": lambda model: checkpointed(compile_blocks(model), False),
    "checkpoint_of_compiled_reentrant": lambda model: checkpointed(compile_blocks(model, backend="aot_eager"), True),
}


@pytest.mark.parametrize("kind", RUNS)
def test_every_forward_counts_once_and_every_step_updates_once(kind):
    torch._dynamo.reset()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    balancer = LossFreeBalance(model, optimizer)
    run = RUNS[kind](model)
    for step, rate in enumerate((0.125, 0.25)):  # unequal, so that no bias comes back to zero
        balancer.rate = rate
        batches = [torch.randn(10, D, requires_grad=True) for _ in range(3)]
        expected = expected_biases(model, batches, rate)
        for x in batches:
            run(x).square().sum().backward()
        counted = balancer.tokens_per_expert()
        assert list(counted) == ["0.gate", "1.gate"]
        assert [int(c.sum()) for c in counted.values()] == [3 * 10 * K] * 2, step
        optimizer.step()
        optimizer.zero_grad()
        assert_biases(model, expected)
        assert all(int(c.sum()) == 0 for c in balancer.tokens_per_expert().values())
    optimizer.step()  # nothing was counted since: nothing moves
    assert_biases(model, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_counted_in_eval(compiled):
    torch._dynamo.reset()
    model = make_model()
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.randn(10, D)
    for mode, counted in (("eval", 0), ("train", 20), ("eval", 20), ("train", 40)):
        getattr(model, mode)()
        run(x)
        assert [int(c.sum()) for c in balancer.tokens_per_expert().values()] == [counted] * 2


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_training_mode_counts_without_recording_too(grad_mode):
    model = make_model(1)
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with grad_mode():
        model(torch.randn(10, D))
    assert int(balancer.tokens_per_expert()["0.gate"].sum()) == 20


def test_a_step_that_the_gradient_scaler_skips_leaves_its_counts_to_the_next():
    model, x = make_model(1), torch.randn(10, D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    balancer = LossFreeBalance(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    (scaler.scale(model(x).square().sum()) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert int(balancer.tokens_per_expert()["0.gate"].sum()) == 20
    assert biases(model)[0].abs().max() == 0
    optimizer.zero_grad()
    scaler.scale(model(x).square().sum()).backward()
    assert int(balancer.tokens_per_expert()["0.gate"].sum()) == 40
    scaler.step(optimizer)
    assert biases(model)[0].abs().max() > 0


def test_only_routers_with_a_selection_bias_are_hooked():
    model = nn.ModuleDict({"with": TopKRouter(D, E, K, selection_bias=True), "without": TopKRouter(D, E, K)})
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert list(balancer.tokens_per_expert()) == ["with"]
    assert not model["without"]._forward_hooks


def test_routers_of_different_sizes_are_told_apart():
    routers = [TopKRouter(D, n, 1, selection_bias=True) for n in (3, 5)]
    model = nn.ModuleList(routers)
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01), rate=1.0)
    for router in routers:
        with torch.no_grad():
            router.weight.zero_()  # all logits tie: every token goes to expert 0
        router(torch.randn(4, D))
    balancer.update()
    found = [b.tolist() for b in model.buffers()]
    assert found == [[-1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0, 1.0]]


def test_the_rate_can_be_scheduled():
    model, optimizer = make_model(1), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    balancer = LossFreeBalance(model, optimizer)
    for rate in (0.25, 0.0):
        balancer.rate = rate
        before = biases(model)[0]
        model(torch.randn(10, D))
        optimizer.step()
        assert (biases(model)[0] - before).abs().max() == rate


def test_remove_takes_off_every_hook():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    balancer = LossFreeBalance(model, optimizer)
    balancer.remove()
    model(torch.randn(10, D)).sum().backward()
    assert all(int(c.sum()) == 0 for c in balancer.tokens_per_expert().values())
    optimizer.step()
    assert all(b.abs().max() == 0 for b in biases(model))
    assert not any(module._forward_hooks for module in model.modules()) and not optimizer._optimizer_step_post_hooks


def test_a_copy_of_the_model_counts_for_itself():
    model = make_model(1)
    balancer = LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    copy.deepcopy(model)(torch.randn(10, D))
    assert int(balancer.tokens_per_expert()["0.gate"].sum()) == 0


def test_the_counts_are_not_in_the_state_dict():
    model = make_model(1)
    names = list(model.state_dict())
    LossFreeBalance(model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert list(model.state_dict()) == names and len(list(model.buffers())) == 1


def test_hooks_that_come_after_compilation_are_reported():
    torch._dynamo.reset()
    model, x = make_model(1), torch.randn(10, D)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    balancer = LossFreeBalance(model, optimizer)
    run(x).sum().backward()
    if int(balancer.tokens_per_expert()["0.gate"].sum()) > 0:
        pytest.skip("this torch.compile looks for hooks that come later")
    with pytest.warns(UserWarning, match="counted nothing before the first step"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # said once


class ReadsOfTheDevice(TorchDispatchMode):
    """Notes what makes the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        ):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_only_the_first_update_reads_a_value():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    LossFreeBalance(model, optimizer)
    reads = []
    for _ in range(3):
        with ReadsOfTheDevice() as log:
            model(torch.randn(10, D)).sum().backward()
            optimizer.step()
        reads.append(len(log.found))
    assert reads == [1, 0, 0]


def test_the_bias_balances_a_skewed_router():
    model, x = make_model(1, top_k=1), torch.randn(256, D) + 1.0  # a common part, which favours some experts
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    LossFreeBalance(model, optimizer, rate=0.01)

    def entropy():
        return balance.Usage(model[0](x, return_routing=True).tokens_per_expert).entropy

    model.eval()
    before = entropy()
    model.train()
    for _ in range(100):
        model(x).sum().backward()
        optimizer.step()
    model.eval()
    assert before < 0.9 and entropy() > 0.97


# Two processes


TRAIN_ON_A_RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fusedonemoe.balance import LossFreeBalance
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
model, batches = torch.load(f"{folder}/task.pt", weights_only=False)
parallel = DistributedDataParallel(model)  # broadcasts buffers before each forward
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
balancer = LossFreeBalance(parallel, optimizer, rate=0.125)
for x in batches:
    parallel(x.chunk(2)[rank]).square().mean().backward()
counted = balancer.tokens_per_expert()
optimizer.step()
found = [block.gate.e_score_correction_bias for block in model]
torch.save((counted, found), f"{folder}/found{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_update_as_one_would(tmp_path):
    model, batches = make_model(), [torch.randn(20, D) for _ in range(2)]
    torch.save((model, batches), tmp_path / "task.pt")
    commands = [[sys.executable, "-c", TRAIN_ON_A_RANK, str(tmp_path), str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    expected = expected_biases(model, batches, 0.125)
    ranks = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    for counted, found in ranks:
        assert [int(c.sum()) for c in counted.values()] == [2 * 10 * K] * 2
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    # Neither rank alone would have moved every bias that way.
    for counted, _ in ranks:
        alone = [torch.from_numpy(reference_balance.update_selection_bias(torch.zeros(E), c, 0.125)) for c in counted.values()]
        assert any(not torch.equal(a.float(), b) for a, b in zip(alone, expected, strict=True))


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


def test_bad_arguments_of_the_balancer_are_named():
    model = make_model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got list$"):
        LossFreeBalance([], optimizer)
    with pytest.raises(TypeError, match=r"^optimizer must be a torch.optim.Optimizer, got Sequential$"):
        LossFreeBalance(model, model)
    with pytest.raises(ValueError, match=r"^rate must be at least 0 and finite, got -0.1$"):
        LossFreeBalance(model, optimizer, rate=-0.1)
    with pytest.raises(ValueError, match=r"^model has no TopKRouter with selection_bias=True$"):
        LossFreeBalance(make_model(1, selection_bias=False), optimizer)
