"""Peers of the suite for GPUs: a check in float64 tells right from wrong, and wrappers hand libraries what they take."""

import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fusedonemoe.bench import libraries, peers
from fusedonemoe.bench.exact import OUTPUT, exact_answer
from fusedonemoe.bench.inputs import GPU_DRAWS, Inputs, sampled_tokens
from fusedonemoe.bench.inputs import make_inputs as make
from fusedonemoe.bench.libraries import FOR_GPUS, line_up
from fusedonemoe.bench.peers import GROUPED, OURS, PEERS, PLAIN, Peer
from fusedonemoe.bench.workloads import MODES, Cell, shrunk
from tests.bench.gpu_suite import (
    CPU,
    GPT_OSS,
    MERGED,
    NAMED,
    OUR_EXPERTS,
    QWEN,
    ROUTER,
    TRAINING,
    measure,
    row_of,
    runner,
    timing,
)


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    return make(cell, device, GPU_DRAWS)


def test_skewed_routing_is_skewed_and_the_same_for_every_dtype():
    shares = {}
    for routing in ("uniform", "skewed"):
        cell = replace(QWEN, T=512, E=32, K=4, routing=routing)
        inputs = make_inputs(cell, CPU)
        counts = inputs.experts[0].flatten().bincount(minlength=32)
        shares[routing] = float(counts.max() / counts.float().mean())
        assert inputs.experts[0].sort(1).values.diff(dim=1).min() > 0
        logits = inputs.draws[0][1]
        for wide in (logits, logits.double(), logits.softmax(1)):
            assert torch.equal(wide.topk(4, dim=1).indices, inputs.experts[0])
        assert not torch.equal(logits, inputs.draws[1][1])
    assert shares["skewed"] > 4 > 1.5 > shares["uniform"]


def test_the_sample_has_the_borders_of_every_expert():
    cell = replace(NAMED["qwen3-30b-T32768-bfloat16-forward"], E=16)
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(16, (cell.T, cell.K), generator=generator)
    sample = set(sampled_tokens(cell, experts).tolist())
    assert len(sample) < cell.T / 2
    for e in range(16):
        tokens = (experts == e).any(1).nonzero()
        assert {int(tokens.min()), int(tokens.max())} <= sample
    assert sampled_tokens(QWEN, experts[: QWEN.T] % QWEN.E).tolist() == list(range(QWEN.T))


@pytest.fixture
def few_sampled(monkeypatch):
    """Only a part of the tokens is checked in float64, as it is in large cells."""
    monkeypatch.setattr("fusedonemoe.bench.inputs.CHECKED_FLOPS", 1.0)


@pytest.mark.parametrize("cell", [QWEN, TRAINING, GPT_OSS, MERGED], ids=lambda cell: cell.name)
def test_right_peers_pass_where_only_a_sample_is_checked(few_sampled, cell):
    cell = replace(cell, T=200)
    assert make_inputs(cell, CPU).sample.numel() < 200
    result = measure(cell, [peer for peer in line_up("gpu", cell) if peer.name in (OURS, GROUPED, PLAIN, "original einsum")])
    assert [(row.peer, row.note) for row in result.rows if row.seconds is None] == []
    assert all(row.peak_bytes for row in result.rows) and result.floor.seconds > 0


def altered(cell, change):
    """A peer that does what ours does, and then changes the result."""
    build = PEERS[cell.operator][0].build

    def wrong(cell, weights):
        forward: Any = build(cell, weights)
        return lambda *draw: change(forward(*draw))

    return Peer("altered", wrong, MODES)


def second_halved(y):
    return torch.cat((y[:1], y[1:2] / 2, y[2:]))


CHANGES = {
    "zeros": lambda y: y * 0,
    "five percent off": lambda y: y * 1.05,
    "a token missing": lambda y: torch.cat((y[:-1], torch.zeros_like(y[-1:]))),
    "not finite": lambda y: y * float("nan"),
    "another shape": lambda y: y[:, :1],
    "half a token": second_halved,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", [QWEN, MERGED], ids=["experts", "merged"])
def test_a_wrong_output_gets_no_time(cell, mode, change):
    cell = replace(cell, mode=mode)
    result = measure(cell, [PEERS[cell.operator][0], altered(cell, change)])
    wrong = row_of(result, "altered")
    assert wrong.failed and (wrong.note.endswith("disagree") or "shape" in wrong.note)
    assert wrong.seconds is None and wrong.peak_bytes is None and wrong.calls == 0
    assert row_of(result, OURS).seconds > 0 and result.best_peer is None


def test_an_output_that_is_wrong_outside_the_sample_gets_no_time(few_sampled):
    cell = replace(QWEN, T=200, dtype=torch.float32)
    outside = next(t for t in range(200) if t not in make_inputs(cell, CPU).sample.tolist())

    def change(y):
        y = y.clone()
        y[outside] *= 2
        return y

    wrong = row_of(measure(cell, [OUR_EXPERTS, altered(cell, change)]), "altered")
    assert wrong.failed and "over all rows" in wrong.note


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * 0.5


@pytest.mark.parametrize("cell", [TRAINING, GPT_OSS, MERGED], ids=lambda cell: cell.name)
def test_a_wrong_gradient_gets_no_time(cell):
    def halving(which):
        def build(cell, weights):
            build_ours = PEERS[cell.operator][0].build
            forward: Any = build_ours(cell, {n: Halved.apply(w) if n == which else w for n, w in weights.items()})
            return lambda *draw: forward(*(Halved.apply(t) if which == i else t for i, t in enumerate(draw)))

        return Peer(f"halves {which}", build, MODES)

    inputs = make_inputs(cell, CPU)
    routing = 2 if cell.operator == "merged" else 1
    peers = [halving(which) for which in (0, routing, *inputs.weights)]
    result = measure(cell, [PEERS[cell.operator][0], *peers])
    assert row_of(result, OURS).seconds > 0
    for row in result.rows[1:]:
        assert row.failed and row.note.startswith("gradients of ") and row.seconds is None, row


def test_wrong_ids_of_a_router_get_no_time():
    router = PEERS["router"][0]
    result = measure(ROUTER, [router, altered(ROUTER, lambda pair: (pair[0], pair[1].flip(1)))])
    assert row_of(result, OURS).seconds and row_of(result, "altered").note == "ids disagree"


def test_the_oracle_is_what_autograd_finds():
    cell = replace(TRAINING, dtype=torch.float64)
    inputs = make_inputs(cell, CPU)
    exact = exact_answer(cell, inputs)
    x, logits = (t.double().requires_grad_() for t in inputs.draws[0])
    weights = {name: w.double().requires_grad_() for name, w in inputs.weights.items()}
    scores, experts = logits.softmax(1).topk(cell.K, dim=1)
    y = torch.zeros(cell.T, cell.D, dtype=torch.float64)
    for t in range(cell.T):
        for j in range(cell.K):
            gate, up = (weights["gate_up_proj"][experts[t, j]] @ x[t]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            y[t] += scores[t, j] / scores[t].sum() * (weights["down_proj"][experts[t, j]] @ hidden)
    torch.testing.assert_close(y.detach(), exact[OUTPUT])
    dx, dlogits = torch.autograd.grad(y, (x, logits), inputs.dys[0])
    torch.testing.assert_close(dx, exact["gradients of x"])
    torch.testing.assert_close(dlogits, exact["gradients of logits"])


def raising(error, when):
    """A peer that runs out of memory, or fails, at a stage."""

    def build(cell, weights):
        forward: Any = OUR_EXPERTS.build(cell, weights)
        calls: list[None] = []
        if when == "build":
            raise error

        def call(*draw):
            calls.append(None)
            if when == "check" or (when == "timing" and len(calls) > 3):
                raise error
            return forward(*draw)

        return call

    return Peer("raising", build, MODES)


@pytest.mark.parametrize("when", ["build", "check", "timing"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_out_of_memory_in_a_peer_is_a_note_and_the_others_are_timed(when, mode):
    cell = replace(TRAINING, mode=mode)
    peers = [OUR_EXPERTS, raising(torch.OutOfMemoryError("2 GiB"), when), PEERS["experts"][1]]
    result = measure(cell, peers)
    row = row_of(result, "raising")
    assert row.note == "skipped: out of memory" and not row.failed and row.seconds is None
    assert row_of(result, OURS).seconds and row_of(result, GROUPED).seconds
    failed = row_of(measure(cell, [OUR_EXPERTS, raising(RuntimeError("no such kernel"), when)]), "raising")
    assert failed.failed and failed.note == "failed: RuntimeError: no such kernel"


def test_out_of_memory_is_a_failure_of_ours():
    ours = replace(raising(torch.OutOfMemoryError("2 GiB"), "check"), name=OURS)
    row = row_of(measure(QWEN, [ours]), OURS)
    assert row.failed and row.note == "failed: out of memory"


def test_what_cannot_be_captured_is_a_note_of_others_and_a_failure_of_ours(monkeypatch):
    def no_graph(self, forward):
        raise RuntimeError("operation not permitted when stream is capturing\nlong story")

    monkeypatch.setattr(timing.Timer, "graphed", no_graph)
    cell = replace(QWEN, mode="decode")
    inputs = make_inputs(cell, CPU)
    check = runner._Checks(cell, inputs, exact_answer(cell, inputs), timing.gpu_timer(CPU))
    ours, _ = check(OUR_EXPERTS)
    other, _ = check(replace(OUR_EXPERTS, name="other"))
    assert ours.failed and ours.note.startswith("failed: CaptureError")
    assert not other.failed and other.note == (
        "skipped: cannot be captured in a CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    )


def test_a_graph_computes_what_stands_in_its_inputs_when_it_is_replayed():
    cell = replace(QWEN, mode="decode")
    inputs = make_inputs(cell, CPU)
    seen = []

    def forward(x, logits):
        seen.append(x.clone())
        return x * 1

    answer = runner.prepare(cell, inputs, forward, {}, timing.gpu_timer(CPU)).answer()
    assert torch.equal(seen[0], inputs.draws[1][0]) and torch.equal(answer[OUTPUT], inputs.draws[0][0])


def test_calls_take_turns_and_long_ones_are_timed_once(monkeypatch):
    log = []
    calls = {name: lambda i, name=name: log.append(name) for name in "ab"}
    timer = timing.gpu_timer(CPU)
    times = timing.time_interleaved(timer, calls, rounds=3, seconds=0.0)
    assert "".join(log) == "aabb" + "bbaa" + "aabb" and {len(t) for t in times.values()} == {3}
    monkeypatch.setattr(timer, "long_seconds", -1.0)
    log.clear()
    timing.time_interleaved(timer, calls, rounds=2, seconds=9.0)
    assert "".join(log) == "ab" + "ba"


def test_absent_libraries_and_what_they_cannot_take_are_notes(monkeypatch):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    result = measure(QWEN, [OUR_EXPERTS, *FOR_GPUS])
    for row in result.rows[1:]:
        assert row.is_absent and re.match(r"skipped: \S+ is not installed: pip install ", row.note)
    assert peers.our_impl(torch.device("cuda")) == "triton"


def grouped_by_loop(x, weights_EAB, counts):
    rows = x.split(counts.tolist())
    return torch.cat([r @ w for r, w in zip(rows, weights_EAB, strict=True)])


def stand_ins():
    """Modules with the interface of the libraries, written in torch."""

    class Function:
        @staticmethod
        def apply(x, gate_up, down, ids, scores):
            assert ids.dtype == torch.int32
            y = torch.zeros_like(x)
            for t in range(len(x)):
                for j, e in enumerate(ids[t].tolist()):
                    gate, up = (gate_up[e] @ x[t]).chunk(2)
                    y[t] += scores[t, j].to(x.dtype) * (down[e] @ (torch.nn.functional.silu(gate) * up))
            return y

    def flatten_sort_count(ids, num_experts):
        sorted_ids, order = ids.flatten().sort(stable=True)
        return sorted_ids, order, ids.flatten().bincount(minlength=num_experts).cumsum(0)

    def parallel_linear(x, w, k, ids, order, offsets, expert_biases=None, gates=None, grouped_in=False, grouped_out=False):
        rows = x if grouped_in else x[order // k]
        out = torch.stack([r @ w[e] + (0 if expert_biases is None else expert_biases[e]) for r, e in zip(rows, ids, strict=True)])
        if grouped_out:
            return out
        out = torch.empty_like(out).index_copy(0, order, out).view(*gates.shape, -1)
        return (gates.unsqueeze(1) @ out).squeeze(1)

    def matmul(x, w, bias, *, a_ragged_metadata):
        counts = a_ragged_metadata
        out = grouped_by_loop(x, w, counts)
        return out if bias is None else (out + bias.repeat_interleave(counts, dim=0)).to(x.dtype)

    def general(x, scores, token, ids, w1, b1, w2, b2, *, E, stream_id, activation_type, concat_layout, **options):
        y = torch.zeros_like(x)
        for score, t, e in zip(scores, token, ids, strict=True):
            z = w1[:, :, e] @ x[t]
            gate, up = z.chunk(2) if concat_layout else (z[0::2], z[1::2])
            y[t] += score * (w2[:, :, e] @ (torch.nn.functional.silu(gate) * up))
        return y, None

    modules: dict[str, dict[str, Any]] = {
        "liger_kernel.ops.fused_moe": {"LigerFusedMoEFunction": Function},
        "scattermoe.parallel_experts": {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear},
        "triton_kernels.matmul": {"matmul": matmul},
        "triton_kernels.tensor": {"make_ragged_tensor_metadata": lambda sizes, rows: sizes},
        "sonicmoe": {"enums": SimpleNamespace(ActivationType=SimpleNamespace(SWIGLU="swiglu"))},
        "sonicmoe.functional": {"moe_general_routing_inputs": general},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        yield name, module


PLAIN_NOMIC = shrunk(NAMED["nomic-T512-bfloat16-forward"])


@pytest.mark.parametrize("peer", FOR_GPUS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("cell", [QWEN, replace(GPT_OSS, mode="forward"), PLAIN_NOMIC], ids=lambda cell: cell.label)
def test_wrappers_hand_libraries_what_they_take(peer, cell, monkeypatch):
    for name, module in stand_ins():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(libraries, "find_spec", lambda name: name)
    monkeypatch.setattr(libraries, "_needs_gpu", lambda weights: None)
    row = row_of(measure(cell, [OUR_EXPERTS, peer]), peer.name)
    takes = cell is QWEN or peer.name in ("ScatterMoE", "triton_kernels")
    assert (row.seconds is not None, row.note.startswith("skipped: takes")) == (takes, not takes), row
