"""The order of product keys against a full sort in exact arithmetic: a million rows, ties, rounded sums, ids, infinities."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fusedonemoe import functional as F
from fusedonemoe.ops import product_keys
from fusedonemoe.ops.reference import product_keys as reference
from fusedonemoe.testing import exact_float64
from tests.ops.test_product_keys import FLOATS, IMPLS, every_impl, halves


def is_the_full_sort(logits, experts):
    """Whether each row of ``experts`` is the beginning of a full sort of all pairs by (exact sum, lower id).

    Equivalent, without the sort: the picks are in strictly descending order, and no more pairs than K stand at or before the
    last one. A float64 sum of two float32 is monotone in the real sum; where two are equal, the errors of the additions
    decide, and then the ids.
    """
    G = logits.shape[-1]
    K = experts.shape[1]
    a, b = logits.double().unbind(1)

    def key(x, y):
        total = x + y
        from_y = total - x
        return total, (x - (total - from_y)) + (y - from_y)

    def before(first, second):
        (s, e, i), (t, f, j) = first, second
        return (s > t) | ((s == t) & ((e > f) | ((e == f) & (i <= j))))

    picked = (*key(a.gather(1, experts // G), b.gather(1, experts % G)), experts)
    descending = before([v[:, :-1] for v in picked], [v[:, 1:] for v in picked]).all(1)
    descending &= (experts[:, 1:] != experts[:, :-1]).all(1)
    last = [v[:, -1] for v in picked]
    sums = (a[:, :, None] + b[:, None, :]).flatten(1)
    at_or_before = (sums > last[0][:, None]).sum(1)
    row, expert = (sums == last[0][:, None]).nonzero().unbind(1)
    tied = (*key(a[row, expert // G], b[row, expert % G]), expert)
    at_or_before.index_add_(0, row, before(tied, [v[row] for v in last]).long())
    return descending & (at_or_before == K)


KINDS = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "integers": lambda shape, g: torch.randint(-4, 5, shape, generator=g).float(),
    "duplicated": lambda shape, g: torch.randn(shape, generator=g)[..., torch.randint(shape[-1], (shape[-1],), generator=g)],
    "bfloat16": lambda shape, g: torch.randn(shape, generator=g).bfloat16().float(),
    "magnitudes": lambda shape, g: torch.randn(shape, generator=g) * 10.0 ** torch.randint(-20, 20, shape, generator=g),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("G", "rows", "chunk", "ks"),
    [
        (1, 20_000, 20_000, [1]),
        (3, 80_000, 10_000, [1, 2, 4, 9]),
        (10, 93_600, 7_800, [1, 8, 16, 100]),
        (128, 4_800, 240, [16, 64]),
        (320, 1_600, 40, [1, 32, 128]),
    ],
)
def test_a_million_rows_are_those_of_a_full_sort(G, rows, chunk, ks, kind):
    # Five kinds of 200,000 rows.
    generator = torch.Generator().manual_seed(G)
    for n in range(rows // chunk):
        logits, K = KINDS[kind]((chunk, 2, G), generator), ks[n % len(ks)]
        assert is_the_full_sort(logits, F.route_product_key(logits, K)[1]).all()


def test_the_check_above_sees_a_wrong_selection():
    logits = halves(50, 6, ties=True)
    _, experts = F.route_product_key(logits, 8)
    assert is_the_full_sort(logits, experts).all()
    for wrong in (experts[:, torch.tensor([0, 1, 2, 3, 4, 5, 7, 6])], experts.clamp(max=30), experts[:, 1:]):
        assert not is_the_full_sort(logits, wrong).all()


def test_the_check_above_is_the_oracle():
    logits = KINDS["magnitudes"]((200, 2, 5), torch.Generator().manual_seed(1))
    _, exact = reference.route_product_key(exact_float64(logits), 7)
    assert is_the_full_sort(logits, torch.from_numpy(exact)).all()


@every_impl
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_that_round_to_one_float_are_still_ordered(impl, dtype):
    tiny = torch.finfo(dtype).eps / 8
    # 1 + tiny * n are all 1 in floating point; the last two pairs differ in the other half.
    logits = torch.tensor([[[1.0, 1.0 + 16 * tiny, 1.0], [0.0, tiny, 2 * tiny]]], dtype=dtype)
    logits = torch.cat((logits, logits.flip(1), -logits))
    _, experts = F.route_product_key(logits, 9, impl=impl)
    np.testing.assert_array_equal(experts, reference.route_product_key(logits, 9)[1])
    assert experts[0].tolist() == [5, 4, 3, 2, 8, 1, 7, 0, 6]


@every_impl
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_the_greatest_numbers(impl, dtype):
    inf, big = torch.inf, torch.finfo(dtype).max
    logits = torch.tensor(
        [
            [[0.0, -inf, 1.0, -inf], [2.0, -inf, 0.0, 1.0]],
            [[-inf, -inf, 3.0, -inf], [1.0, 2.0, 0.0, 4.0]],
            [[0.0, -big, 1.0, -big], [2.0, -big, 0.0, -inf]],
            [[big, -big, 1.0, 0.0], [big, big, 0.0, 1.0]],
            [[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0]],
        ],
        dtype=dtype,
    ).requires_grad_()
    for K in (1, 3, 5, 16):
        weights, experts = F.route_product_key(logits, K, impl=impl)
        exact_weights, exact = reference.route_product_key(exact_float64(logits), K)
        np.testing.assert_array_equal(experts, exact)
        assert_close(weights.double(), torch.from_numpy(exact_weights), rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        assert torch.isfinite(grad).all()


def test_ids_are_exact_where_a_float32_is_not():
    # 4097 ** 2 > 2 ** 24: rounded to float32, neighbouring ids would be equal.
    G = 4097
    logits = torch.zeros(1, 2, G)
    logits[0, :, -3:] = 1.0
    expected = [(G - 3 + i) * G + G - 3 + j for i in range(3) for j in range(3)]
    for impl in IMPLS:
        assert F.route_product_key(logits, 9, impl=impl)[1].tolist() == [expected]


@pytest.mark.parametrize(("K", "count"), [(8, 20), (16, 50), (32, 119), (64, 280), (128, 645)])
def test_the_candidates_are_as_few_as_the_rule_says(K, count):
    first, second = (ranks.tolist() for ranks in product_keys.candidates(K, 1000, torch.device("cpu")))
    expected = {(r, s) for r in range(K) for s in range(K) if (r + 1) * (s + 1) <= K}
    assert set(zip(first, second, strict=True)) == expected
    assert len(first) == count
    assert len(product_keys.candidates(K, 3, torch.device("cpu"))[0]) <= 9
