"""Expert parallelism against one process: any counts and routings, every kind of block, with and without a capacity."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from fusedonemoe import MoE
from fusedonemoe.integrations.distributed import ExpertParallel, dropped_rows
from fusedonemoe.ops.cpu.native import refusal
from tests.processes import run_in_processes

D, F = 16, 12
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, where sums are taken in another order


def make_moe(E=8, K=2, **options):
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "bias": True, "impl": "grouped", **options}
    return MoE(hidden_size=D, intermediate_size=F, num_experts=E, top_k=K, **options)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch(sizes, dtype=torch.float64):
    """The tokens of all ranks and their cotangents."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(sum(sizes), D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, dy


def gradients(moe, x, dy):
    """Output and gradients of ``sum(y dy)``."""
    x = x.detach().requires_grad_()
    moe.zero_grad()
    y = moe(x)
    (y * dy).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in moe.named_parameters()}


def compare(moe, reference, sizes, rank, *, dtype=torch.float64, close=None, exact_weights=False):
    """A parallel block against the same in one process, on the batch of all ranks."""
    x, dy = batch(sizes, dtype)
    y, dx, dw = gradients(moe, x.split(sizes)[rank], dy.split(sizes)[rank])
    expected_y, expected_dx, expected_dw = gradients(reference, x, dy)
    close = close or (lambda actual, expected, name: torch.testing.assert_close(actual, expected, **EXACT, msg=name))
    close(y, expected_y.split(sizes)[rank], "y")
    close(dx, expected_dx.split(sizes)[rank], "dx")
    for name, expected in expected_dw.items():
        actual = dw[name]
        if isinstance(actual, DTensor):
            actual = whole(actual)
            if exact_weights:
                assert torch.equal(actual, expected), name
        else:
            dist.all_reduce(actual)
        close(actual, expected, name)


# In each process


def equal_to_one_process(rank, world, folder):
    for E, K in [(8, 2), (8, 8), (5, 3), (3, 1), (world - 1, 1)]:  # the last ones: fewer experts than ranks
        for sizes in ([7] * world, [3 * r for r in range(world)], [0] * world, [1] + [0] * (world - 1)):
            reference, moe = make_moe(E, K), make_moe(E, K)
            ExpertParallel(gradients="sum").apply(moe)
            compare(moe, reference, sizes, rank)


def weight_gradients_have_the_same_bits(rank, world, folder):
    if refusal(torch.float32, True):
        return  # other kernels are BLAS's, whose bits hang on where a matrix stands in memory
    for dtype in (torch.float32, torch.bfloat16):
        for factor in (None, math.inf):
            reference, moe = (make_moe(K=3, dtype=dtype, impl="cpu") for _ in range(2))
            ExpertParallel(gradients="sum", capacity_factor=factor).apply(moe)
            x, dy = batch([9] * world, dtype)
            _, _, dw = gradients(moe, x.chunk(world)[rank], dy.chunk(world)[rank])
            _, _, expected = gradients(reference, x, dy)
            for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
                actual = whole(dw[f"experts.{name}"])
                assert actual.abs().max() > 0 and torch.equal(actual, expected[f"experts.{name}"]), (name, dtype, factor)


def every_kind_of_block(rank, world, folder):
    kinds = [
        {"gated": False, "activation": "gelu"},
        {"gate_up_layout": "interleaved", "activation": "swiglu_oai", "scoring": "softmax", "score_first": False},
        {"bias": False, "scoring": "sigmoid", "selection_bias": True, "n_group": 4, "topk_group": 2},
        {"shared_intermediate_size": 6, "shared_gate": True, "save_percent": 30},
        {"impl": "dense"},
        {"impl": "auto"},
    ]
    for kind in kinds:
        reference, moe = make_moe(**kind), make_moe(**kind)
        ExpertParallel(gradients="sum").apply(moe)
        compare(moe, reference, [5 + r for r in range(world)], rank)


def fixed_capacity_that_cannot_overflow_is_exact(rank, world, folder):
    for E, K in [(8, 2), (5, 3), (world - 1, 1)]:
        for T in (7, 1, 0):
            for options in ({"capacity_factor": math.inf}, {"capacity_factor": world}, {"capacity": 21}):
                reference, moe = make_moe(E, K), make_moe(E, K)
                ExpertParallel(gradients="sum", **options).apply(moe)
                compare(moe, reference, [T] * world, rank)
                assert dropped_rows(moe)["experts"] == 0
    # With a number of rows, ranks may have different numbers of tokens.
    reference, moe = make_moe(), make_moe()
    ExpertParallel(gradients="sum", capacity=20).apply(moe)
    compare(moe, reference, [2 * r for r in range(world)], rank)


def what_exceeds_the_capacity_is_dropped_and_counted(rank, world, folder):
    moe = make_moe(8, 2)
    experts = moe.experts
    ExpertParallel(capacity=3, gradients="sum").apply(moe)
    T = 10
    x, _ = batch([T] * world)
    x = x.split(T)[rank].requires_grad_()
    block = 8 // world
    there = (rank + 1) % world
    # Choice 0 stays here, choice 1 goes to the next rank: three of those fit.
    ids = torch.tensor([[rank * block, there * block]] * T, dtype=torch.int16)
    weights = torch.rand(T, 2, dtype=torch.float64, requires_grad=True)
    y = experts(x, ids, weights)
    full = make_moe(8, 2).experts
    kept = ids.to(torch.int64).clone()
    kept[3:, 1] = -1
    torch.testing.assert_close(y, full(x, kept, weights), **EXACT)
    (dweights,) = torch.autograd.grad(y.square().sum(), weights)
    assert (dweights[3:, 1] == 0).all() and (dweights[:3] != 0).all() and (dweights[:, 0] != 0).all()
    assert dropped_rows(moe) == {"experts": torch.tensor(T - 3)}
    # What checkpointing repeats is no second drop.
    checkpoint(experts, x, ids, weights, use_reentrant=False).sum().backward()
    assert dropped_rows(moe, reset=True)["experts"] == 2 * (T - 3)
    assert dropped_rows(moe)["experts"] == 0


def hard_routings(rank, world, folder):
    """Ids out of range, one expert for all, the same expert twice, unsigned ids, x in pieces of another tensor."""
    reference = make_moe(6, 2).experts
    for options in ({}, {"capacity_factor": math.inf}):
        experts = make_moe(6, 2).experts
        ExpertParallel(gradients="sum", **options).apply(experts)
        T = 8
        routings = [
            torch.tensor([[-1, 6], [0, -5], [5, 5], [7, 2], [1, 0], [-1, -1], [3, 127], [4, 4]], dtype=torch.int8),
            torch.full((T, 2), 5, dtype=torch.uint8),
            torch.full((T, 2), -1),
        ]
        for ids in routings:
            wide = torch.randn(T, 2 * D, dtype=torch.float64)
            x, weights = wide[:, ::2].requires_grad_(), torch.randn(T, 2).requires_grad_()
            assert not x.is_contiguous()
            found = [experts(x, ids, weights), reference(x, ids, weights)]
            grads = [torch.autograd.grad(y.square().sum(), (x, weights)) for y in found]
            torch.testing.assert_close(*found, **EXACT)
            torch.testing.assert_close(*grads, **EXACT)
    x = torch.randn(2, 4, D, dtype=torch.float64)  # more leading dimensions
    ids, weights = torch.zeros(2, 4, 2, dtype=torch.int64), torch.ones(2, 4, 2)
    torch.testing.assert_close(experts(x, ids, weights), reference(x, ids, weights), **EXACT)


def the_mean_is_that_of_data_parallelism(rank, world, folder):
    moe, reference = make_moe(), make_moe()
    ExpertParallel().apply(moe)
    x, _ = batch([5] * world)
    moe(x.chunk(world)[rank]).square().mean().backward()
    reference(x).square().mean().backward()
    for name in ("gate_up_proj", "down_proj", "down_proj_bias"):
        actual, expected = (getattr(m.experts, name).grad for m in (moe, reference))
        torch.testing.assert_close(whole(actual), expected, **EXACT)


def ways_to_name_the_processes(rank, world, folder):
    reference = make_moe()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("experts",))
    groups = dist.new_group(list(range(world)))
    x, _ = batch([5] * world)
    x = x.chunk(world)[rank]
    made = [
        ExpertParallel().apply(make_moe()),
        ExpertParallel(mesh).apply(make_moe()),
        ExpertParallel(mesh["experts"]).apply(make_moe()),
        ExpertParallel(groups).apply(make_moe()),
        parallelize_module(make_moe(), mesh, {"experts": ExpertParallel()}),
        ExpertParallel(mesh).apply(nn.Sequential(make_moe()))[0],
    ]
    for moe in made:
        assert moe.state_dict().keys() == reference.state_dict().keys()
        assert all(p.requires_grad for p in moe.parameters())
        torch.testing.assert_close(moe(x), reference(x), **EXACT)
    # Half of the ranks each: two copies of the experts, and no word between them.
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "experts"))
        moe = ExpertParallel(grid["experts"], gradients="sum").apply(make_moe())
        assert moe.experts.down_proj.to_local().shape[0] == 4
        torch.testing.assert_close(moe(x), reference(x), **EXACT)
        with pytest.raises(ValueError, match=r"mesh must have one dimension, got 2: \('copies', 'experts'\)"):
            ExpertParallel(grid).apply(make_moe())


def the_first_rank_says_what_the_weights_are(rank, world, folder):
    torch.manual_seed(rank)
    moe = MoE(hidden_size=D, intermediate_size=F, num_experts=6, top_k=2)
    first = [p.detach().clone() for p in moe.experts.parameters()]
    for value in first:
        dist.broadcast(value, 0)
    ExpertParallel().apply(moe)
    for placed, expected in zip(moe.experts.parameters(), first, strict=True):
        assert torch.equal(whole(placed), expected)
    # On the meta device there is nothing to send.
    with torch.device("meta"):
        moe = MoE(hidden_size=D, intermediate_size=F, num_experts=6, top_k=2)
    ExpertParallel().apply(moe).to_empty(device="cpu")
    moe.reset_parameters()
    assert moe(torch.randn(3, D)).isfinite().all()


def packed_experts_become_parallel_and_parallel_ones_stay_unpacked(rank, world, folder):
    if refusal(torch.float32, True):
        return
    moe = make_moe(dtype=torch.float32, impl="cpu", bias=False)
    x, _ = batch([5] * world, torch.float32)
    with torch.no_grad():
        expected = moe(x)
        moe.prepack()
        before = [w.data_ptr() for w in (moe.experts.gate_up_proj, moe.experts.down_proj)]
        for parameter in (moe.experts.gate_up_proj, moe.experts.down_proj):
            dist.broadcast(parameter.mul_(2), 0)  # a write that torch does not count, into the panels
        assert before == [w.data_ptr() for w in (moe.experts.gate_up_proj, moe.experts.down_proj)]
        doubled = moe(x)
        assert not torch.equal(doubled, expected)
        ExpertParallel().apply(moe)
        torch.testing.assert_close(moe(x.chunk(world)[rank]), doubled.chunk(world)[rank])
        with pytest.raises(RuntimeError, match="parallel experts cannot be packed: they have an exchange"):
            moe.prepack()
        moe.experts.down_proj.to_local().mul_(2)
        torch.testing.assert_close(moe(x.chunk(world)[rank]), 2 * doubled.chunk(world)[rank])


def frozen_parts(rank, world, folder):
    moe, reference = make_moe(), make_moe()
    ExpertParallel(gradients="sum").apply(moe)
    for block in (moe, reference):
        block.experts.requires_grad_(False)
    assert not any(p.requires_grad for p in moe.experts.parameters())
    x, dy = batch([5] * world)
    _, dx, dw = gradients(moe, x.chunk(world)[rank], dy.chunk(world)[rank])
    _, expected_dx, _ = gradients(reference, x, dy)
    torch.testing.assert_close(dx, expected_dx.chunk(world)[rank], **EXACT)
    assert dw["experts.down_proj"] is None


AT_TWO = [
    "equal_to_one_process",
    "the_first_rank_says_what_the_weights_are",
    "packed_experts_become_parallel_and_parallel_ones_stay_unpacked",
]
AT_FOUR = [
    "equal_to_one_process",
    "weight_gradients_have_the_same_bits",
    "every_kind_of_block",
    "fixed_capacity_that_cannot_overflow_is_exact",
    "what_exceeds_the_capacity_is_dropped_and_counted",
    "hard_routings",
    "the_mean_is_that_of_data_parallelism",
    "ways_to_name_the_processes",
    "frozen_parts",
]


def finder(module, names, tmp_path_factory):
    """What failed in the processes, by their number and the function; each number's run at its first test."""
    runs: dict[int, dict[str, str]] = {}

    def find(world: int, name: str) -> str:
        if world not in runs:
            runs[world] = run_in_processes(module, names[world], world, tmp_path_factory.mktemp(f"world{world}"))
        return runs[world][name]

    return find


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return finder("tests.integrations.test_distributed", {2: AT_TWO, 4: AT_FOUR}, tmp_path_factory)


@pytest.mark.parametrize(("world", "name"), [(2, name) for name in AT_TWO] + [(4, name) for name in AT_FOUR])
def test_in_processes(failures, world, name):
    assert not failures(world, name), failures(world, name)
