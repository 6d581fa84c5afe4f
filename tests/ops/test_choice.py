"""Which implementation runs, what it costs, and how `explain` tells."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from fusedonemoe import Experts, FineGrainedMoE, FusedOneMoE, MoE, MoEConfig, explain, explanation
from fusedonemoe import functional as F
from fusedonemoe.ops import IMPLEMENTATIONS, Work, choose, count_work, triton
from fusedonemoe.ops.choice import refusal
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.triton import rules
from fusedonemoe.testing import make_merged_inputs, make_mlp_inputs

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "top_k": 2}


OPERATORS = ("experts_mlp", "experts_merged")


def choose_on(device_type="cpu", *, operator="experts_mlp", impl="auto", E=8, K=2, dtype=torch.float32, widths=(16, 32, 8)):
    return choose(operator, impl, top_k=K, num_experts=E, device_type=device_type, dtype=dtype, widths=widths)


@pytest.fixture
def no_kernels(monkeypatch):
    """A machine with neither CPU nor GPU kernels: the choice is among the formulations."""
    monkeypatch.setattr(native, "refusal", lambda dtype, contiguous: "no kernels here")
    monkeypatch.setattr(triton, "INSTALLED", False)


@pytest.mark.parametrize(
    ("operator", "E", "K", "expected", "reason"),
    [
        ("experts_mlp", 1, 1, "grouped", "as much arithmetic as dense"),
        ("experts_mlp", 8, 8, "grouped", "as much arithmetic as dense"),
        ("experts_mlp", 3, 2, "grouped", "E/K = 3/2 times the arithmetic"),
        ("experts_mlp", 128, 8, "grouped", "E/K = 128/8 times the arithmetic"),
        ("experts_merged", 1, 1, "dense", "takes all of the 1 experts"),
        ("experts_merged", 8, 8, "dense", "takes all of the 8 experts"),
        ("experts_merged", 4, 6, "dense", "takes all of the 4 experts"),
        ("experts_merged", 9, 8, "grouped", "E/K = 9/8 times the arithmetic"),
        ("experts_merged", 128, 8, "grouped", "E/K = 128/8 times the arithmetic"),
    ],
)
@pytest.mark.usefixtures("no_kernels")
def test_auto_is_dense_only_where_the_merged_projection_has_nothing_to_sort(operator, E, K, expected, reason):
    choice = choose_on(operator=operator, E=E, K=K)
    assert choice.impl == expected and reason in choice.reason


@pytest.mark.parametrize(
    ("device_type", "dtype", "widths", "reason"),
    [
        ("cpu", torch.float64, (5, 3), None),
        ("cpu", torch.bfloat16, (5, 3), None),
        ("cuda", torch.bfloat16, (16, 32, 8), None),
        ("cuda", torch.float16, (8,), None),
        ("cuda", torch.float32, (4, 12), None),
        ("cuda", torch.float64, (16, 32), "no float64"),
        ("cuda", torch.bfloat16, (16, 12), "multiple of 16 bytes"),
        ("cuda", torch.bfloat16, (4,), "multiple of 16 bytes"),
        ("cuda", torch.float32, (16, 6), "multiple of 16 bytes"),
        ("meta", torch.float32, (16,), "there is no grouped GEMM for device 'meta'"),
        ("mps", torch.float32, (16,), "there is no grouped GEMM for device 'mps'"),
    ],
)
@pytest.mark.usefixtures("no_kernels")
def test_where_grouped_can_run(device_type, dtype, widths, reason):
    assert refusal("dense", device_type=device_type, dtype=dtype, widths=widths) is None
    why_not = refusal("grouped", device_type=device_type, dtype=dtype, widths=widths)
    chosen = choose_on(device_type, dtype=dtype, widths=widths)
    if reason is None:
        assert why_not is None and chosen.impl == "grouped"
        assert choose_on(device_type, impl="grouped", dtype=dtype, widths=widths).impl == "grouped"
    else:
        assert why_not is not None and reason in why_not
        assert chosen.impl == "dense" and chosen.reason == f"grouped cannot run here: {why_not}"
        with pytest.raises(ValueError, match=f"^impl='grouped' cannot run here: .*{reason}"):
            choose_on(device_type, impl="grouped", dtype=dtype, widths=widths)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_named_implementation_is_taken_at_its_word(impl, monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", True)
    for operator, E in itertools.product(OPERATORS, (2, 64)):
        choice = choose_on("cuda" if impl == "triton" else "cpu", operator=operator, impl=impl, E=E)
        assert choice.impl == impl and choice.reason == "asked for by impl="


@pytest.mark.parametrize(
    ("installed", "device_type", "dtype", "reason"),
    [
        (True, "cuda", torch.bfloat16, None),
        (True, "cuda", torch.float16, None),
        (True, "cuda", torch.float32, None),
        (True, "cuda", torch.float64, "the Triton kernels have no float64"),
        (True, "cpu", torch.float32, "the Triton kernels do not run on device 'cpu'"),
        (True, "mps", torch.float32, "the Triton kernels do not run on device 'mps'"),
        (False, "cuda", torch.bfloat16, "triton is not installed"),
    ],
)
def test_where_the_gpu_kernels_can_run(installed, device_type, dtype, reason, monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", installed)
    assert refusal("triton", device_type=device_type, dtype=dtype, widths=(5, 3)) == reason
    for operator in ("experts_mlp", "experts_mlp_quantized"):
        chosen = choose_on(device_type, operator=operator, dtype=dtype)
        if reason is None:
            assert chosen.impl == "triton" and chosen.reason == "Triton kernels"
        else:
            assert chosen.impl != "triton"
    if reason is not None:
        with pytest.raises(ValueError, match=f"^impl='triton' cannot run here: {reason}$"):
            choose_on(device_type, impl="triton", dtype=dtype)


def test_an_unknown_implementation_is_refused_everywhere():
    message = r"^impl must be one of \('auto', 'dense', 'grouped', 'cpu', 'triton', 'portable'\), got 'fast'$"
    mlp, merged = make_mlp_inputs(2, 4, 3, 4, 1), make_merged_inputs(2, 4, 3, 4, 1)
    for call in (
        lambda: choose_on(impl="fast"),
        lambda: F.experts_mlp(mlp.x, mlp.experts, mlp.weights, mlp.up_proj, mlp.down_proj, impl="fast"),
        lambda: F.experts_merged(merged.x, merged.experts, merged.weights, merged.proj, impl="fast"),
        lambda: MoEConfig(**SIZES, impl="fast"),
        lambda: FusedOneMoE(16, 8, groups=4, impl="fast"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def operators_called(call):
    with torch.profiler.profile() as profile:
        call()
    return {event.key.removeprefix("fusedonemoe::") for event in profile.key_averages() if "fusedonemoe::" in event.key}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("E", "K"), [(2, 2), (8, 2)])
@pytest.mark.parametrize("impl", ["auto", "dense", "grouped", "cpu"])
def test_the_operator_that_runs_is_the_one_chosen(operator, E, K, impl):
    make = make_mlp_inputs if operator == "experts_mlp" else make_merged_inputs
    tensors = [tensor for tensor in vars(make(6, 4, 3, E, K)).values() if tensor is not None]
    called = operators_called(lambda: getattr(F, operator)(*tensors, impl=impl))
    chosen = choose_on(operator=operator, impl=impl, E=E, K=K).impl
    kernel = "experts_mlp_inference_cpu" if operator == "experts_mlp" else f"{operator}_cpu"  # no gradients are recorded
    traces = {"grouped": "grouped_mm", "dense": f"{operator}_dense", "cpu": kernel}
    assert {name for name, trace in traces.items() if trace in called} == {chosen}


@pytest.mark.usefixtures("no_kernels")
def test_the_choice_does_not_look_at_the_number_of_tokens():
    for tokens in (0, 1, 100_000):
        assert explain(MoEConfig(**SIZES), tokens=tokens).impl == "grouped"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("T", "E", "K"), [(100, 8, 2), (3, 64, 4), (7, 4, 4), (0, 8, 2)])
def test_counted_work_equals_a_direct_count(gated, T, E, K):
    D, F_, itemsize = 6, 5, 2
    up_rows = 2 * F_ if gated else F_

    def multiply_adds(expert_of_row):
        # One product per weight of the expert that a row visits: x [D] @ up [D, G], h [F] @ down [F, D].
        return sum(D * up_rows + F_ * D for _ in expert_of_row)

    rows = {"dense": [e for _ in range(T) for e in range(E)], "grouped": [(t * K + j) % E for t in range(T) for j in range(K)]}
    rows["cpu"] = rows["triton"] = rows["portable"] = rows["grouped"]
    for impl in IMPLEMENTATIONS:
        work = count_work(impl, tokens=T, top_k=K, num_experts=E, weight_numel=E * D * (up_rows + F_), itemsize=itemsize)
        assert work.flops == 2 * multiply_adds(rows[impl])
        touched = E if impl == "dense" else len(set(rows[impl]))  # at most: this routing spreads as far as it can
        assert work.weight_bytes == touched * D * (up_rows + F_) * itemsize


def test_counted_flops_equal_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    T, D, F_, E, K = 12, 6, 5, 4, 2
    inputs = make_mlp_inputs(T, D, F_, E, K)
    with FlopCounterMode(display=False) as counter:
        F.experts_mlp(inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj, impl="dense")
    numel = inputs.up_proj.numel() + inputs.down_proj.numel()
    work = count_work("dense", tokens=T, top_k=K, num_experts=E, weight_numel=numel, itemsize=4)
    assert counter.get_total_flops() == work.flops


# explain


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "make", [MoE, lambda config: Experts(config), lambda config: config], ids=["MoE", "Experts", "MoEConfig"]
)
@pytest.mark.usefixtures("no_kernels")
def test_explain_an_mlp(make, gated):
    config = MoEConfig(**SIZES, gated=gated)
    told = explain(make(config), tokens=100)
    assert (told.operator, told.impl, told.tokens, told.device, told.dtype) == (
        "experts_mlp",
        "grouped",
        100,
        "cpu",
        torch.float32,
    )
    numel = 8 * 16 * 8 * (3 if gated else 2)
    assert [c.impl for c in told.candidates] == list(IMPLEMENTATIONS)
    for candidate in told.candidates:
        expected = count_work(candidate.impl, tokens=100, top_k=2, num_experts=8, weight_numel=numel, itemsize=4)
        assert candidate.work == expected
        assert candidate.refusal == {"cpu": "no kernels here", "triton": "triton is not installed"}.get(candidate.impl)


def test_explain_counts_the_weights_that_the_module_holds():
    for layer in (MoE(**SIZES), MoE(**SIZES, gated=False)):
        held = layer.experts.down_proj.numel() + getattr(layer.experts, layer.experts._up_name).numel()
        dense = explain(layer).candidates[0]
        assert dense.work.weight_bytes == held * 4
    merged = FusedOneMoE(16, 8, groups=6, is_sparse=True, topk=2)
    assert explain(merged).candidates[0].work.weight_bytes == merged.proj.numel() * 4


@pytest.mark.usefixtures("no_kernels")
def test_explain_the_merged_layer():
    told = explain(FusedOneMoE(16, 8, groups=6, is_sparse=True, topk=2), tokens=10)
    assert (told.operator, told.impl) == ("experts_merged", "grouped")
    assert [c.work.flops for c in told.candidates] == [
        2 * 10 * 6 * 16 * 8,
        *[2 * 10 * 2 * 16 * 8] * 3,
        2 * 24 * 16 * 8,  # the fullest of 6 experts has 4 of the 20 rows, and so have all
    ]
    told = explain(FusedOneMoE(16, 8, groups=6), tokens=10)  # every expert for every token
    assert told.impl == "dense"
    assert told.candidates[0].work == told.candidates[1].work


@pytest.mark.usefixtures("no_kernels")
def test_explain_experts_of_a_single_neuron():
    layer = FineGrainedMoE(hidden_size=16, num_experts=25, top_k=2, num_heads=3)
    told = explain(layer, torch.zeros(2, 5, 16))
    assert (told.operator, told.impl, told.tokens) == ("experts_neurons", "grouped", 10)
    assert told.reason == "cpu cannot run here: no kernels here"
    rows = dict.fromkeys(IMPLEMENTATIONS, 10 * 2 * 3) | {"dense": 10 * 25}
    assert {c.impl: c.work for c in told.candidates} == {n: Work(2 * N * 2 * 16, 25 * 2 * 16 * 4) for n, N in rows.items()}
    assert {c.impl: c.refusal for c in told.candidates if c.refusal} == {
        "cpu": "no kernels here",
        "triton": "triton is not installed",
    }
    layer.impl = "dense"
    assert explain(layer).reason == "asked for by impl=" and "experts_neurons on cpu" in str(explain(layer))
    layer.impl = "cpu"
    with pytest.raises(ValueError, match="impl='cpu' cannot run here: no kernels here"):
        explain(layer)


@pytest.mark.usefixtures("no_kernels")
def test_explain_takes_tokens_dtype_and_device_from_the_input():
    told = explain(MoE(**SIZES), torch.zeros(2, 5, 16, dtype=torch.bfloat16))
    assert (told.tokens, told.dtype, told.device) == (10, torch.bfloat16, "cpu")
    assert told.candidates[0].work.weight_bytes == 8 * 16 * 24 * 2
    told = explain(MoE(**SIZES, dtype=torch.float64))
    assert (told.tokens, told.dtype) == (512, torch.float64)
    told = explain(MoE(**SIZES), torch.zeros(3, 16, device="meta"))
    assert (told.device, told.impl) == ("meta", "dense")


@pytest.mark.usefixtures("no_kernels")
def test_explain_for_another_device():
    told = explain(MoEConfig(**SIZES), dtype=torch.bfloat16, device="cuda:1")
    assert (told.device, told.impl) == ("cuda", "grouped")
    told = explain(MoEConfig(**SIZES), dtype=torch.float64, device="cuda")
    assert told.impl == "dense" and told.candidates[1].refusal == "torch's CUDA grouped GEMM has no float64"
    with pytest.raises(ValueError, match=r"^impl='grouped' cannot run here: torch's CUDA grouped GEMM has no float64$"):
        explain(MoEConfig(**SIZES, impl="grouped"), dtype=torch.float64, device="cuda")
    # F = 6 in bfloat16 is 12 bytes, and so is G = 6.
    told = explain(MoEConfig(**{**SIZES, "intermediate_size": 6}), dtype=torch.bfloat16, device="cuda")
    assert told.impl == "dense" and "multiple of 16 bytes" in told.reason


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_explain_names_what_was_asked_for(impl, monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", True)
    for layer in (MoEConfig(**SIZES, impl=impl), FusedOneMoE(16, 8, groups=6, is_sparse=True, topk=2, impl=impl)):
        told = explain(layer, device="cuda" if impl == "triton" else "cpu")
        assert told.impl == impl and told.reason == "asked for by impl="


def test_explain_names_the_tiles_of_the_gpu_kernels(monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", True)
    monkeypatch.setattr(explanation, "architecture", lambda device: "sm90")
    config = MoEConfig(hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8)
    many = explain(config, tokens=32768, dtype=torch.bfloat16, device="cuda")
    tiles = rules.tiles_for("sm90", torch.bfloat16, 2048.0, 2048, 768, gated=True)
    assert f"up {tiles.up.BLOCK_M}x{tiles.up.BLOCK_N}x{tiles.up.BLOCK_K}" in many.configuration and "sm90" in many.configuration
    assert many.configuration in str(many)
    assert "no plan" in explain(config, tokens=1, dtype=torch.bfloat16, device="cuda").configuration


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU nothing is known of it")
def test_explain_does_not_invent_a_gpu(monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", True)
    told = explain(MoEConfig(**SIZES), device="cuda")
    assert told.impl == "triton" and told.configuration == ""


@pytest.mark.usefixtures("no_kernels")
def test_explanation_as_text():
    config = MoEConfig(hidden_size=1000, intermediate_size=500, num_experts=100, top_k=10)
    assert str(explain(config, tokens=200)).splitlines() == [
        "experts_mlp on cpu, float32, 200 tokens: impl = 'grouped' (dense would do E/K = 100/10 times the arithmetic)",
        "    dense        60.000 GFLOP     600.00 MB of expert weights",
        "  * grouped       6.000 GFLOP     600.00 MB of expert weights",
        "    cpu           6.000 GFLOP     600.00 MB of expert weights  cannot run: no kernels here",
        "    triton        6.000 GFLOP     600.00 MB of expert weights  cannot run: triton is not installed",
        "    portable      6.000 GFLOP     600.00 MB of expert weights",
    ]
    config = dataclasses.replace(config, impl="dense")
    lines = str(explain(config, tokens=2, device="meta", dtype=torch.bfloat16)).splitlines()
    assert lines == [
        "experts_mlp on meta, bfloat16, 2 tokens: impl = 'dense' (asked for by impl=)",
        "  * dense         0.600 GFLOP     300.00 MB of expert weights",
        "    grouped       0.060 GFLOP      60.00 MB of expert weights  cannot run: there is no grouped GEMM for device 'meta'",
        "    cpu           0.060 GFLOP      60.00 MB of expert weights  cannot run: the CPU kernels do not run on device 'meta'",
        "    triton        0.060 GFLOP      60.00 MB of expert weights  cannot run: triton is not installed",
        "    portable      0.060 GFLOP      60.00 MB of expert weights  "
        "cannot run: it reads a number from the data, and meta tensors have none",
    ]


def test_explain_refuses_other_objects():
    with pytest.raises(
        TypeError, match=r"^layer must be a MoE, Experts, QuantizedExperts, FusedOneMoE, FineGrainedMoE or MoEConfig, got Linear$"
    ):
        explain(torch.nn.Linear(2, 2))


def test_adapters_have_no_portable_form():
    sizes: dict[str, Any] = {"top_k": 2, "num_experts": 6, "device_type": "cpu", "dtype": torch.float32, "widths": (16, 16)}
    with pytest.raises(ValueError, match=r"^impl=.portable. cannot run here: merge the adapters before exporting"):
        choose("experts_mlp_lora", "portable", **sizes)
