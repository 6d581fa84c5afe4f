"""The usage report: its numbers against the oracle, what it reads and when, its table and its picture; the meter."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fusedonemoe import FusedOneMoE, MoE, balance
from fusedonemoe import functional as F
from fusedonemoe.balance import Usage, UsageMeter, usage
from fusedonemoe.ops.reference import balance as reference_balance
from fusedonemoe.testing import ROUTINGS, make_experts
from tests.layers.test_loss_free_balance import ReadsOfTheDevice

D, E, K = 16, 8, 2


@pytest.mark.parametrize("counts", [[6, 2, 0, 0], [1, 1, 1, 1], [0, 5, 0], [3, 4], [10**12, 1, 7]])
def test_the_numbers_equal_the_oracle(counts):
    report, exact = Usage(torch.tensor(counts)), reference_balance.usage(counts)
    assert report.counts == tuple(counts) and report.total == sum(counts) and report.num_experts == len(counts)
    np.testing.assert_allclose(report.share, exact.share, rtol=1e-14)
    assert report.entropy == pytest.approx(exact.entropy, rel=1e-12, abs=1e-15)
    assert report.max_over_mean == pytest.approx(exact.max_over_mean, rel=1e-14)
    assert report.dead == exact.dead


def test_perfect_balance_and_collapse():
    even, collapsed = Usage(torch.full((7,), 3)), Usage(torch.tensor([9, 0, 0]))
    assert even.entropy == pytest.approx(1.0, rel=1e-15) and even.max_over_mean == 1.0 and even.dead == 0
    assert collapsed.entropy == 0.0 and collapsed.max_over_mean == 3.0 and collapsed.dead == 2


def test_one_expert_is_balanced():
    report = Usage(torch.tensor([5]))
    assert (report.share, report.entropy, report.max_over_mean, report.dead) == ((1.0,), 1.0, 1.0, 0)


def test_without_rows_there_is_no_balance_to_speak_of():
    report = Usage(torch.zeros(3, dtype=torch.int64))
    assert report.share == (0.0, 0.0, 0.0) and report.dead == 3
    assert math.isnan(report.entropy) and math.isnan(report.max_over_mean)
    assert str(report).startswith("0 rows over 3 experts: entropy nan")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_ids_are_counted(routing, dtype):
    experts = make_experts(20, 7, 3, routing=routing).to(dtype)
    expected = [int((experts == e).sum()) for e in range(7)]
    assert usage(experts, 7).counts == tuple(expected)
    assert usage(counts=torch.tensor(expected, dtype=torch.int32)).counts == tuple(expected)


def test_nothing_is_read_before_a_number_is_asked_for_and_then_once():
    with ReadsOfTheDevice() as log:
        report = usage(make_experts(20, 7, 3), 7)
        repr(report), report.num_experts
    assert not log.found
    # tolist() of a CPU tensor does not pass the dispatcher: where it would fail is a tensor without data.
    on_meta = usage(make_experts(20, 7, 3).to("meta"), 7)
    assert repr(on_meta) == "Usage(7 experts)"
    with pytest.raises(NotImplementedError, match="meta"):
        print(on_meta.dead)
    first = report.counts
    assert report.counts is first


def test_a_report_does_not_follow_the_tensor_it_was_made_from():
    counts = torch.tensor([1, 2])
    report = Usage(counts)
    counts.zero_()
    assert report.counts == (1, 2)


def test_the_table_of_many_experts_names_the_busiest_and_the_idlest():
    lines = str(Usage(torch.arange(100))).splitlines()
    assert len(lines) == 2 + 8 + 1 + 8
    assert lines[0] == "4950 rows over 100 experts: entropy 0.957, max/mean 2.00, dead 1"
    assert lines[2].split() == ["99", "99", "2.00%", "2.00"]
    assert lines[-1].split() == ["0", "0", "0.00%", "0.00"]


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("counts", [[6, 2, 0, 0], [5], [0, 0], list(range(5000))], ids=["few", "one", "none", "many"])
def test_the_picture(counts, tmp_path):
    pytest.importorskip("matplotlib")
    assert Usage(torch.tensor(counts)).picture(str(tmp_path / "usage.png")) == tmp_path / "usage.png"
    assert is_png(tmp_path / "usage.png")


def test_the_picture_shows_the_shares(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn, stairs = [], Axes.stairs

    def watched(self, heights, *args, **kwargs):
        drawn.append(heights)
        return stairs(self, heights, *args, **kwargs)

    monkeypatch.setattr(Axes, "stairs", watched)
    Usage(torch.tensor([1, 6, 1])).picture(tmp_path / "usage.svg")
    assert drawn == [[0.375, 2.25, 0.375], [2.25, 0.375, 0.375]]
    assert b"<svg" in (tmp_path / "usage.svg").read_bytes()


def test_without_matplotlib_the_picture_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("fusedonemoe.balance.counting.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"matplotlib, which is missing: pip install 'fusedonemoe\[plot\]'"):
        Usage(torch.tensor([1, 2])).picture(tmp_path / "usage.png")


# The meter


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(MoE(hidden_size=D, intermediate_size=8, num_experts=E, top_k=K), FusedOneMoE(D, 8, 4, True, 1))


def counted(model, batches):
    totals = [torch.zeros(E, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)]
    with torch.no_grad():
        for x in batches:
            totals[0] += F.tokens_per_expert(model[0].gate(x).experts, E)
            totals[1] += F.tokens_per_expert(model[1].gate(model[0](x)).experts, 4)
    return {"0.gate": tuple(totals[0].tolist()), "1.gate": tuple(totals[1].tolist())}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["eager", "checkpoint", "compile"])
def test_the_meter_counts_every_forward_once(kind, training):
    torch._dynamo.reset()
    model = make_model().train(training)
    batches = [torch.randn(n, D, requires_grad=True) for n in (10, 7, 10)]
    expected = counted(model, batches)
    meter = UsageMeter(model)
    run = {
        "eager": model,
        "checkpoint": lambda x: checkpoint(model, x, use_reentrant=False),
        "compile": torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"),
    }[kind]
    for x in batches:
        run(x).sum().backward()
    reports = meter.usage()
    assert {name: report.counts for name, report in reports.items()} == expected
    assert sum(expected["0.gate"]) == 27 * K

    run(batches[0])
    assert reports["0.gate"].counts == expected["0.gate"]  # a report stays what it was
    meter.reset()
    run(batches[1])
    assert {name: report.counts for name, report in meter.usage().items()} == counted_alone(model, meter, batches[1])


def counted_alone(model, meter, x):
    meter.remove()
    return counted(model, [x])


def test_the_meter_collects_without_reading():
    model = make_model()
    meter = UsageMeter(model)
    with ReadsOfTheDevice() as log:
        for _ in range(3):
            model(torch.randn(10, D)).sum().backward()
        reports = meter.usage()
    assert not log.found
    assert reports["1.gate"].total == 30


def test_the_meter_stands_beside_the_balancer():
    torch.manual_seed(0)
    model = nn.Sequential(MoE(hidden_size=D, intermediate_size=8, num_experts=E, top_k=K, selection_bias=True))
    meter = UsageMeter(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = balance.LossFreeBalance(model, optimizer)
    model(torch.randn(10, D)).sum().backward()
    assert meter.usage()["0.gate"].counts == tuple(balancer.tokens_per_expert()["0.gate"].tolist())
    optimizer.step()
    assert meter.usage()["0.gate"].total == 20


def test_the_meter_follows_a_model_that_moves():
    model = make_model()
    meter = UsageMeter(model)
    model.to("meta")
    model(torch.randn(3, D, device="meta"))
    assert {report._counts_E.device.type for report in meter.usage().values()} == {"meta"}


def test_an_exported_model_counts_nothing():
    model = make_model()
    meter = UsageMeter(model)
    x = torch.randn(10, D)
    program = torch.export.export(model, (x,))
    assert "count_tokens_" not in str(program.graph)
    assert_close(program.module()(x), model(x))
    assert meter.usage()["0.gate"].total == 20  # the second call's


def test_remove_stops_the_counting():
    model = make_model()
    meter = UsageMeter(model)
    model(torch.randn(10, D))
    meter.remove()
    model(torch.randn(10, D))
    assert meter.usage()["0.gate"].total == 20
    assert not any(module._forward_hooks for module in model.modules())


def test_the_meter_prints_one_line_for_each_router():
    model = make_model()
    meter = UsageMeter(model)
    model(torch.zeros(10, D))  # every token is the same
    lines = str(meter).splitlines()
    assert lines == [
        "0.gate  entropy 0.333, max/mean 4.00, dead 6",
        "1.gate  entropy 0.000, max/mean 4.00, dead 3",
    ]


def test_the_picture_of_the_meter(tmp_path):
    pytest.importorskip("matplotlib")
    model = make_model()
    meter = UsageMeter(model)
    model(torch.randn(10, D))
    assert is_png(meter.picture(tmp_path / "meter.png"))


def test_what_the_meter_counts_is_what_moe_returns():
    torch.manual_seed(0)
    model = MoE(hidden_size=D, intermediate_size=8, num_experts=E, top_k=K)
    meter = UsageMeter(model)
    out = model(torch.randn(10, D), return_routing=True)
    assert_close(torch.tensor(meter.usage()["gate"].counts), out.tokens_per_expert)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "^give experts and num_experts, or counts$"),
        ({"experts": torch.zeros(2, 1).long()}, TypeError, "^give experts and num_experts, or counts$"),
        (
            {"counts": torch.zeros(2).long(), "num_experts": 2},
            TypeError,
            "^give either experts and num_experts, or counts, got both$",
        ),
        ({"experts": torch.zeros(2, 1), "num_experts": 2}, TypeError, "^experts must have an integer dtype, got torch.float32$"),
        ({"experts": torch.zeros(2, 1).long(), "num_experts": 0}, ValueError, "^num_experts must be at least 1, got 0$"),
        ({"counts": [1, 2]}, TypeError, "^counts must be a torch.Tensor, got list$"),
        ({"counts": torch.zeros(2)}, TypeError, "^counts must have an integer dtype, got torch.float32$"),
        ({"counts": torch.zeros(2, 2).long()}, ValueError, r"^counts must have shape \[E\] with E >= 1, got \(2, 2\)$"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        usage(**arguments)


def test_bad_models_are_named():
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got int$"):
        UsageMeter(3)
    with pytest.raises(ValueError, match=r"^model has no TopKRouter$"):
        UsageMeter(nn.Linear(2, 2))
