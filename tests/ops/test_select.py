"""The selection's operator: the kernel's ids against torch's arithmetic and the order spelled out, in eager and in graphs.

tests/ops/test_cpu_build.py runs this file again, for other instruction sets and under sanitizers.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.decorators import mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend

from fusedonemoe import functional as F
from fusedonemoe.ops import reference, route
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import exact_float64

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
select_experts = torch.ops.fusedonemoe.select_experts.default

# Bits of zeros, infinities, the smallest and largest of each kind of number, and NaNs of both signs.
SPECIAL = [0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
SPECIAL += [bits | 0x80000000 for bits in SPECIAL]
# Vectors have 4, 8 or 16 lanes; a bound from groups is taken up to K = 16, 32 or 64.
SIZES = [(1, 1), (2, 1), (2, 2), (7, 3), (8, 2), (16, 8), (17, 1), (17, 17), (64, 6), (128, 8), (257, 33), (1000, 8), (1000, 64)]
SIZES += [(1000, 65), (1000, 1000), (1024, 8), (3000, 70)]
every_size = pytest.mark.parametrize(("E", "K"), SIZES)


def random_keys(T, E, seed=0):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed))


def keys_of(bits):
    """Float32 keys of the given bits, which need be no numbers."""
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32).view(np.int32)).view(torch.float32)


def expected_ids(keys, K):
    """The order spelled out: bits as integers, turned around below zero, zeros alike; then the lower id."""
    bits = keys.contiguous().view(torch.int32).numpy().astype(np.int64)
    order = np.where(bits < 0, (bits ^ 0x7FFFFFFF), bits)
    order[keys.numpy() == 0] = 0
    return np.argsort(-order, axis=1, kind="stable")[:, :K]


def check(keys, K):
    ids = select_experts(keys, K)
    assert ids.dtype == torch.int64 and ids.is_contiguous()
    np.testing.assert_array_equal(ids, expected_ids(keys, K))
    assert torch.equal(ids, route.select(keys, K))


# Values


@every_size
@pytest.mark.parametrize("T", [0, 1, 2, 19])
def test_random_keys(T, E, K):
    check(random_keys(T, E), K)


@every_size
def test_ties(E, K):
    for values in (1, 2, 5):
        check(random_keys(9, E).mul(values).round().clamp(0, values - 1), K)


@every_size
def test_sorted_keys_either_way(E, K):
    # Ascending keys fill a buffer of candidates again and again.
    keys = random_keys(3, E).sort().values
    check(keys, K)
    check(keys.flip(1), K)


@every_size
def test_all_equal_whatever_they_are(E, K):
    check(keys_of(SPECIAL)[:, None].expand(-1, E).contiguous(), K)


@every_size
def test_every_kind_of_number_and_of_none(E, K):
    bits = np.random.default_rng(E).choice(np.array(SPECIAL, dtype=np.uint32), size=(40, E))
    check(keys_of(bits), K)
    some = keys_of(bits)
    check(torch.where(torch.rand(some.shape, generator=torch.Generator().manual_seed(1)) < 0.9, random_keys(40, E), some), K)


@st.composite
def selections(draw):
    E = draw(st.integers(1, 70), label="E")
    key = st.sampled_from(SPECIAL) | st.integers(0, 2**32 - 1) | st.sampled_from([0x3F800000, 0x40000000])
    rows = draw(st.lists(st.lists(key, min_size=E, max_size=E), min_size=1, max_size=3), label="bits")
    return keys_of(rows), draw(st.integers(1, E), label="K")


@given(selections())
def test_any_keys(keys_and_k):
    check(*keys_and_k)


def test_the_oracle_selects_the_same():
    logits = random_keys(50, 128)
    _, experts = reference.route(exact_float64(logits), 8)
    np.testing.assert_array_equal(select_experts(logits, 8), experts)


def test_keys_need_not_be_contiguous():
    base = random_keys(40, 40)
    for keys in (base.t(), base[::2, 1:18], base[:, :1].expand(40, 5), base[3:5].flip(0), base[:, 7:8].t()):
        check(keys, 3)


def test_float64_keys_are_compared_as_such():
    keys = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.0 + 1e-12]], dtype=torch.float64)
    np.testing.assert_array_equal(select_experts(keys, 4), [[1, 3, 0, 2]])


@pytest.fixture
def set_threads(small_thresholds):
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("K", [1, 8, 100])
def test_any_number_of_threads_selects_the_same(K, set_threads):
    keys = random_keys(67, 500).mul(20).round()
    for threads in (1, 2, 5, 70):
        set_threads(threads)
        check(keys, K)


def test_without_kernels_torch_selects(monkeypatch):
    monkeypatch.setattr(native, "refusal", lambda *_: "no kernels here")
    check(random_keys(5, 30), 4)


@needs_kernels
def test_the_kernel_and_nothing_else_runs_on_float32(monkeypatch):
    monkeypatch.setattr(route, "select", None)
    np.testing.assert_array_equal(F.route(torch.tensor([[0.0, 3.0, 1.0]]), 2)[1], [[1, 2]])


# Graphs


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, requires_grad):
    keys = random_keys(5, 9).to(dtype).requires_grad_(requires_grad)
    torch.library.opcheck(select_experts, (keys, 3))
    assert not select_experts(keys, 3).requires_grad


class Router(nn.Module):
    def __init__(self, impl="auto", **options):
        super().__init__()
        self.options = {"top_k": 2, "impl": impl, **options}

    def forward(self, logits):
        return F.route(logits, **self.options)


GROUPS = {"scoring": "sigmoid", "n_group": 4, "topk_group": 2}


@needs_kernels
@pytest.mark.parametrize(("options", "count"), [({}, 1), (GROUPS, 1), ({"impl": "dense"}, 0)], ids=["plain", "groups", "dense"])
def test_one_compiled_graph_serves_every_number_of_tokens(options, count):
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes].count("fusedonemoe.route_cpu.default"))
        return graph

    router = Router(**options)
    counter = CompileCounterWithBackend(aot_autograd(fw_compiler=backend))
    compiled = torch.compile(router, fullgraph=True, backend=counter)
    for T in (5, 2, 33, 16):
        logits = random_keys(T, 12)
        mark_dynamic(logits, 0)
        for actual, expected in zip(compiled(logits), router(logits), strict=True):
            assert torch.equal(actual, expected)
    assert counter.frame_count == 1 and seen == [count]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("options", [{}, GROUPS], ids=["plain", "groups"])
def test_an_exported_graph_needs_no_operator_of_this_machine(options, strict):
    router = Router(**options)
    program = torch.export.export(router, (random_keys(6, 12),), dynamic_shapes=({0: torch.export.Dim("T")},), strict=strict)
    targets = {str(node.target) for node in program.run_decompositions().graph.nodes if node.op == "call_function"}
    assert {target for target in targets if "fusedonemoe" in target} == {"fusedonemoe.route.default"}
    logits = random_keys(11, 12)
    for actual, expected in zip(program.module()(logits), router(logits), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.slow
def test_a_packaged_router_holds_torch_operators_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    program = torch.export.export(Router(), (random_keys(6, 12),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "router.pt2"))
    packaged = (tmp_path / "router.pt2").read_bytes()
    assert b"select_experts" not in packaged and b"route_cpu" not in packaged
    logits = random_keys(6, 12, seed=1)
    _, experts = torch._inductor.aoti_load_package(package)(logits)
    assert torch.equal(experts, Router()(logits)[1])
