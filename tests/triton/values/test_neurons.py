"""Single-neuron experts and value memory, forward and backward, against float64."""

import numpy as np
import pytest
import torch

from fusedonemoe.ops import reference
from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.neurons import touched_rows
from fusedonemoe.ops.records import ACTIVATIONS, Activation
from fusedonemoe.ops.triton import neurons, segments, token_rows
from fusedonemoe.testing import ROUTINGS, assert_within_budget, make_experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_ARGUMENT = [name for name in ACTIVATIONS if name != "swiglu_oai"]
# T, K, D, E: rows that fill no vector, choices that fill no step, one choice, rows longer than a step and no power of two.
SIZES = ((9, 5, 37, 7), (1, 20, 300, 40), (4, 20, 64, 33), (5, 1, 1, 4), (2, 3, 528, 6))
NAMES = ("dx", "dweights", "ddown", "dup")
ALL = (True, True, True, True)


@pytest.fixture(params=["few", "many"])
def tokens(request, monkeypatch):
    """Cut as for few tokens, which these tests have, or as for many."""
    if request.param == "many":
        monkeypatch.setattr(token_rows, "BYTES_IN_FLIGHT", 0)


@pytest.fixture(params=["whole", "cut"])
def hot(request, monkeypatch):
    """No expert is hot, or many are."""
    if request.param == "cut":
        monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 4)
        monkeypatch.setattr(segments, "SEGMENTS", 10**6)


class Case:
    """Operands, and what the operators should make of them, in float64 by hand and in float32 by autograd."""

    def __init__(self, T, K, D, E, dtype, device, *, activation="gelu", routing="uniform", ids=torch.int64, weights=None, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return torch.randn(shape, generator=generator) * scale

        self.E, self.D, self.activation, self.dtype = E, D, activation, dtype
        experts = make_experts(T, E, K, routing=routing, seed=seed + 1) if T else torch.zeros(0, K, dtype=torch.int64)
        self.experts = experts.to(device, ids)
        self.x, self.dy = normal(T, D).to(device, dtype), normal(T, D).to(device, dtype)
        self.weights = (torch.rand(T, K, generator=generator) + 0.25).to(device, weights or torch.float32)
        self.down, self.up = normal(E, D, scale=D**-0.5).to(device, dtype), normal(E, D, scale=0.5).to(device, dtype)

    def forward(self):
        return neurons.experts_neurons(self.x, self.experts, self.weights, self.down, self.up, self.activation)

    def backward(self, s, needs=ALL):
        return neurons.experts_neurons_backward(
            self.dy, s, self.x, self.experts, self.weights, self.down, self.up, self.activation, needs
        )

    def pairs(self):
        experts = self.experts.cpu().numpy().astype(np.int64)
        t, j = np.nonzero((experts >= 0) & (experts < self.E))
        return t, j, experts[t, j]

    def exact(self):
        x, dy, w, down, up = (v.cpu().double().numpy() for v in (self.x, self.dy, self.weights, self.down, self.up))
        t, j, e = self.pairs()
        s = (x[t] * down[e]).sum(1)
        a = reference.activate(self.activation, s)
        q = (dy[t] * up[e]).sum(1)
        ds, _ = reference.activate_backward(self.activation, q * w[t, j], s)
        y, s_TK, dx, dw, ddown, dup = (np.zeros_like(v) for v in (x, w, x, w, down, up))
        np.add.at(y, t, (a * w[t, j])[:, None] * up[e])
        s_TK[t, j], dw[t, j] = s, q * a
        np.add.at(dx, t, ds[:, None] * down[e])
        np.add.at(ddown, e, ds[:, None] * x[t])
        np.add.at(dup, e, (a * w[t, j])[:, None] * dy[t])
        return y, s_TK, dx, dw, ddown, dup

    def plain(self):
        operands = (self.x, self.weights, self.down, self.up)
        x, w, down, up = leaves = [v.detach().cpu().float().requires_grad_() for v in operands]
        t, j, e = (torch.from_numpy(v) for v in self.pairs())
        s = (x[t] * down[e]).sum(1)
        c = activate(s, Activation(self.activation, "plain", 0.0, 0.0)) * w[t, j]
        y = torch.zeros_like(x).index_add(0, t, c[:, None] * up[e])
        gradients = torch.autograd.grad(y, leaves, self.dy.cpu().float())
        s_TK = torch.zeros_like(w).index_put((t, j), s)
        rounded = [g.to(v.dtype) for g, v in zip(gradients, operands, strict=True)]
        return y.detach().to(self.dtype), s_TK.detach(), *rounded


def check_neurons(case):
    y, s = case.forward()
    results = (y, s, *case.backward(s))
    again = (*case.forward(), *case.backward(s))
    plain, exact = case.plain(), case.exact()
    for name, got, repeated, yardstick, right in zip(("y", "s", *NAMES), results, again, plain, exact, strict=True):
        assert got.is_contiguous() and torch.equal(got, repeated), name
        assert_within_budget(got.cpu(), yardstick, right, name=name)
    empty = torch.ones(case.E, dtype=torch.bool)
    empty[torch.from_numpy(case.pairs()[2])] = False
    for table in results[4:]:
        assert (table.cpu()[empty] == 0).all()
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_neurons_equal_float64(size, dtype, tokens, device):
    check_neurons(Case(*size, dtype, device))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_neurons_with_hot_experts(routing, hot, device):
    check_neurons(Case(10, 3, 40, 9, torch.bfloat16, device, routing=routing))


@pytest.mark.parametrize("activation", ONE_ARGUMENT)
def test_neurons_with_every_activation(activation, device):
    check_neurons(Case(11, 3, 32, 5, torch.float32, device, activation=activation))


@pytest.mark.parametrize("routing", ["uniform", "out_of_range", "one_expert"])
@pytest.mark.parametrize("E", [9, 40])  # an expert of many pairs, or of about one: other programs
def test_slots_have_the_rows_of_the_tables_to_the_bit(routing, E, hot, device):
    K = 1 if routing == "one_expert" else 3
    case = Case(10, K, 40, E, torch.bfloat16, device, routing=routing)
    whole = case.backward(case.forward()[1])
    touched, slots = touched_rows(case.experts, E)
    operands = (case.x, case.experts, case.weights, case.down, case.up, case.activation)
    rows = neurons.experts_neurons_backward(case.dy, case.forward()[1], *operands, ALL, slots, len(touched))
    of_values = (case.dy, case.experts, case.weights, case.up, (True, True))
    for full, some in zip(
        (*whole, *neurons.experts_values_backward(*of_values)),
        (*rows, *neurons.experts_values_backward(*of_values, slots, len(touched))),
        strict=True,
    ):
        assert torch.equal(some, full[touched] if full.shape == case.up.shape else full)
    nowhere = torch.full_like(slots, -1)
    none = neurons.experts_values_backward(case.dy, nowhere, case.weights, case.up, (True, True), nowhere, 0)
    assert none[1].shape == (0, 40) and not none[0].any()


def check_table(experts, E, D, device, dtype=torch.float32):
    """The gradient of a table alone."""
    T, K = experts.shape
    generator = torch.Generator().manual_seed(0)
    rows, factors = torch.randn(T, D, generator=generator).to(dtype), torch.randn(T, K, generator=generator)
    operands = [v.to(device) for v in (rows, experts, factors)]

    def run():
        return segments.table_gradient(*operands, segments.rows_plan(operands[1], E), dtype, E)

    t, j = torch.nonzero((experts >= 0) & (experts < E), as_tuple=True)
    e = experts[t, j]

    def expected(dtype):
        return torch.zeros(E, D, dtype=dtype).index_add(0, e, factors[t, j].to(dtype)[:, None] * rows[t].to(dtype))

    out = run()
    assert_within_budget(out.cpu(), expected(torch.float32).to(dtype), expected(torch.float64), name="table")
    assert torch.equal(out, run())
    empty = torch.bincount(e, minlength=E) == 0
    assert (out.cpu()[empty] == 0).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("D", [16, 8, 200])
def test_hot_experts_begin_and_end_anywhere(D, seed, monkeypatch, device):
    """Experts of 0 to 20 pairs in segments of 4, and pairs of no expert behind them."""
    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 4)
    monkeypatch.setattr(segments, "SEGMENTS", 10**6)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 21, (9,), generator=generator) * (torch.rand(9, generator=generator) < 0.7)
    ids = torch.repeat_interleave(torch.arange(9), counts)
    ids = torch.cat((ids, ids.new_full((60,), -3)))[:60]
    check_table(ids[torch.randperm(60, generator=generator)].view(20, 3), 9, D, device)


def test_one_expert_with_all_pairs(device):
    """In segments as they are shipped, one of which is not full."""
    assert segments.segment_length(950) == 64 and segments.segment_length(1 << 23) == 4096
    check_table(make_experts(50, 5, 19, routing="one_expert"), 5, 24, device)


@pytest.mark.parametrize("T", [10, 100])
def test_more_experts_than_the_plan_holds(T, device, monkeypatch):
    monkeypatch.setattr(segments, "MAX_EXPERTS", 200)
    check_table(make_experts(T, 207, 5, routing="skewed"), 207, 17, device, torch.bfloat16)


@pytest.mark.parametrize("ids", [torch.int32, torch.uint8, torch.int16])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_dtypes_of_ids_and_weights(ids, weights, device):
    case = Case(13, 6, 24, 11, torch.bfloat16, device, ids=ids, weights=weights, routing="out_of_range")
    assert check_neurons(case)[3].dtype == weights


def test_ids_out_of_range_read_nothing(device):
    case = Case(12, 4, 20, 6, torch.float32, device, routing="out_of_range")
    t, j, _ = case.pairs()
    outside = torch.ones(12, 4, dtype=torch.bool)
    outside[t, j] = False
    assert outside[-1].all()
    expected = check_neurons(case)
    case.weights[outside.to(device)] = torch.nan
    case.x[-1] = case.dy[-1] = torch.inf
    y, s = case.forward()
    results = (y, s, *case.backward(s))
    for got, right in zip(results, expected, strict=True):
        assert torch.equal(got, right)
    assert (s.cpu()[outside] == 0).all() and (results[3].cpu()[outside] == 0).all() and (y[-1] == 0).all()


def test_no_tokens(device):
    case = Case(0, 3, 20, 6, torch.bfloat16, device)
    y, s = case.forward()
    dx, dweights, ddown, dup = case.backward(s)
    assert y.shape == dx.shape == (0, 20) and s.shape == dweights.shape == (0, 3)
    assert ddown.shape == dup.shape == (6, 20) and not ddown.any() and not dup.any()


def test_tables_and_tokens_that_are_views(device):
    case = Case(9, 3, 32, 6, torch.float32, device)
    expected = check_neurons(case)
    case.x, case.dy, case.weights, case.experts = (v.t().contiguous().t() for v in (case.x, case.dy, case.weights, case.experts))
    case.down = torch.cat((case.down, case.up), 1)[:, :32]  # rows lie apart
    case.up = case.up.t().contiguous().t()  # columns do
    assert case.down.stride() == (64, 1) and case.up.stride() == (1, 6)
    for got, right in zip(check_neurons(case), expected, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("wanted", range(4), ids=NAMES)
def test_only_what_is_wanted_is_computed(wanted, device):
    case = Case(9, 3, 20, 6, torch.bfloat16, device, weights=torch.float32)
    _, s = case.forward()
    expected = case.backward(s)
    results = case.backward(s, [i == wanted for i in range(4)])
    for i, (got, right) in enumerate(zip(results, expected, strict=True)):
        assert got.dtype == right.dtype
        assert torch.equal(got, right) if i == wanted else got.numel() == 0


def test_a_token_alone_has_the_bits_that_it_has_among_others(device):
    case = Case(9, 20, 40, 30, torch.bfloat16, device)
    y, s = case.forward()
    case.x, case.experts, case.weights = case.x[4:5], case.experts[4:5], case.weights[4:5]
    alone, s_alone = case.forward()
    assert torch.equal(y[4:5], alone) and torch.equal(s[4:5], s_alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["out_of_range", "some_empty"])
def test_values_equal_float64(dtype, routing, hot, device):
    T, K, D, E = 9, 6, 41, 8
    case = Case(T, K, D, E, dtype, device, routing=routing)
    y = neurons.experts_values(case.experts, case.weights, case.up)
    backward = neurons.experts_values_backward(case.dy, case.experts, case.weights, case.up, (True, True))
    assert torch.equal(y, neurons.experts_values(case.experts, case.weights, case.up))

    t, j, e = case.pairs()
    dy, w, table = (v.cpu().double().numpy() for v in (case.dy, case.weights, case.up))
    exact = [np.zeros_like(v) for v in (dy, w, table)]
    np.add.at(exact[0], t, w[t, j][:, None] * table[e])
    exact[1][t, j] = (dy[t] * table[e]).sum(1)
    np.add.at(exact[2], e, w[t, j][:, None] * dy[t])

    leaves = w, table = [v.detach().cpu().float().requires_grad_() for v in (case.weights, case.up)]
    plain_y = torch.zeros(T, D).index_add(0, torch.from_numpy(t), w[t, j][:, None] * table[e])
    dw, dtable = torch.autograd.grad(plain_y, leaves, case.dy.cpu().float())
    plain = plain_y.detach().to(dtype), dw, dtable.to(dtype)
    for name, got, yardstick, right in zip(("y", "dweights", "dtable"), (y, *backward), plain, exact, strict=True):
        assert_within_budget(got.cpu(), yardstick, right, name=name)
    empty = torch.ones(E, dtype=torch.bool)
    empty[torch.from_numpy(e)] = False
    assert (backward[1].cpu()[empty] == 0).all()
    assert empty.any() or routing != "some_empty"


def test_values_compute_only_what_is_wanted(device):
    case = Case(7, 3, 20, 6, torch.bfloat16, device)
    arguments = case.dy, case.experts, case.weights, case.up
    dweights, dtable = neurons.experts_values_backward(*arguments, (True, True))
    alone, none = neurons.experts_values_backward(*arguments, (True, False))
    assert torch.equal(alone, dweights) and none.numel() == 0
    none, alone = neurons.experts_values_backward(*arguments, (False, True))
    assert torch.equal(alone, dtable) and none.numel() == 0


def test_cuts_keep_memory_busy():
    """Each thread has 8 vectors under way, 4 of rows that are not aligned, or the token has no more."""
    for itemsize in (2, 4):
        for tokens in (1, 7, 300, 5000):
            for K in (1, 16, 512):
                for D in (16, 64, 256, 1000, 4096):
                    vectors = (4 if D % 16 else 8) * 32 * 16 // itemsize
                    dots, sums = token_rows.cut_dots(tokens * K, K, D, itemsize), token_rows.cut_sums(tokens, K, D, itemsize)
                    assert dots.choices * dots.columns == vectors or dots.choices >= K or dots.columns >= D
                    assert dots.choices * dots.columns <= vectors
                    assert sums.choices * sums.columns == vectors * sums.warps or sums.choices >= K
    assert token_rows.cut_dots(64, 64, 1024, 2) == token_rows.Cut(2, 1024, 1)
    assert token_rows.cut_dots(4096 * 64, 64, 1024, 2) == token_rows.Cut(8, 256, 1)
    assert token_rows.cut_sums(1, 64, 1024, 2) == token_rows.Cut(64, 32, 1)
    assert token_rows.cut_sums(1, 512, 1024, 2) == token_rows.Cut(256, 32, 4)
    assert token_rows.cut_sums(4096, 64, 1024, 2) == token_rows.Cut(8, 256, 1)
