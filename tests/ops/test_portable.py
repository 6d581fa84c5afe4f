"""Exports without an operator of this library: what the graph holds, ONNX in onnxruntime, and packages in C++ processes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from fusedonemoe import FusedOneMoE, MoE, QuantizedExperts
from fusedonemoe import functional as F
from fusedonemoe.compat.flashmoe import FlashMoE, FlashMoEConfig
from fusedonemoe.compat.momoe import MoE as MoMoE
from fusedonemoe.export import kernel_library, portable
from fusedonemoe.layers.fine_grained import FineGrainedMoE
from fusedonemoe.ops.cpu import native
from fusedonemoe.ops.route import select, select_for_export
from fusedonemoe.testing import assert_within_budget
from tests.cpp_program import CPP, Program

D = 16
TOKEN_COUNTS = (1, 2, 3, 11, 64)
SIZES: dict[str, Any] = {"hidden_size": D, "intermediate_size": 8, "num_experts": 8, "top_k": 2}
REFUSAL = native.refusal(torch.float32, True)


class Zoo(nn.ModuleDict):
    """Every layer, each with other routing and arithmetic, on the same x; their outputs."""

    def forward(self, x):
        outputs = (layer(x) for layer in self.values())
        return tuple(y if isinstance(y, torch.Tensor) else y[0] for y in outputs)


def make_zoo(dtype=torch.float32, impl="auto") -> Zoo:
    torch.manual_seed(0)
    form: dict[str, Any] = {"dtype": dtype, "impl": impl}
    groups: dict[str, Any] = {"n_group": 4, "topk_group": 2, "selection_bias": True, "routed_scaling_factor": 2.5}
    gpt_oss: dict[str, Any] = {"activation": "swiglu_oai", "gate_up_layout": "interleaved", "bias": True, "router_bias": True}
    config = FlashMoEConfig(hidden_size=D, intermediate_size=8, hidden_act="gelu", num_experts=36, num_experts_per_tok=3)
    layers = {
        "qwen": MoE(**SIZES, **form, shared_intermediate_size=8, shared_gate=True),
        "deepseek": MoE(**SIZES, **form, scoring="sigmoid", **groups),
        "gpt_oss": MoE(**SIZES, **form, score_first=False, **gpt_oss),
        "max_groups": MoE(**SIZES, **form, n_group=2, group_score="max", norm_topk_prob=False, gated=False, activation="gelu"),
        "every_expert": MoE(**{**SIZES, "top_k": None}, **form),
        "merged": FusedOneMoE(D, 8, 8, is_sparse=True, topk=2, bias=True, **form),
        "merged_all": FusedOneMoE(D, 8, 4, **form),
        "fine_grained": FineGrainedMoE(D, 64, 4, intermediate_size=8, num_heads=2, **form),
        "rms": FineGrainedMoE(D, 25, 3, input_norm="rms", norm_topk_prob=True, activation="relu2", **form),
        "flash": FlashMoE(config, **form),
        "momoe": MoMoE(D, 8, 8, 3, 1, device="cpu", **form),
    }
    return Zoo(layers).eval()


def open_token_count(model: nn.Module, *, strict=False, dtype=torch.float32) -> ExportedProgram:
    return export(model, (torch.randn(6, D, dtype=dtype),), dynamic_shapes=({0: Dim("T")},), strict=strict)


def targets(module: torch.fx.GraphModule) -> set[str]:
    """Every operator of a graph, branches included."""
    modules = [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for m in modules for node in m.graph.nodes if node.op == "call_function"}


@pytest.fixture(scope="module")
def exported_zoo() -> tuple[Zoo, ExportedProgram]:
    """The layers and their portable graph, which takes long to trace, without strict mode and for inference."""
    zoo = make_zoo()
    with torch.no_grad(), portable(zoo):
        return zoo, open_token_count(zoo)


# Selection


def test_selection_for_export_is_the_selection():
    tiny = 2.0**-149
    top = torch.finfo(torch.float32).max
    hard = [0.0, -0.0, tiny, -tiny, 2 * tiny, 1.0, 1 + 2.0**-23, 1 - 2.0**-24, -1.0, 3.0, top, -top, torch.inf, -torch.inf]
    generator = torch.Generator().manual_seed(0)
    for E in (1, 2, 7, 300, 5000):
        kinds = [torch.tensor(hard)[torch.randint(len(hard), (40, E), generator=generator)]]
        kinds += [torch.randn(40, E, generator=generator), torch.randint(-1, 2, (40, E), generator=generator).float()]
        # Neighbours around a power of two, where float32's distances change.
        kinds.append(1.0 + torch.randint(-3, 4, (40, E), generator=generator) * 2.0**-24)
        for keys in kinds:
            assert torch.equal(select_for_export(keys, min(E, 6)), select(keys, min(E, 6)))


# Graphs


@pytest.mark.parametrize(
    "strict", [pytest.param(False, marks=pytest.mark.slow, id="non_strict"), pytest.param(True, id="strict")]
)
def test_the_graph_holds_no_operator_of_ours_and_serves_every_token_count(strict, request):
    if strict:  # the same Python, traced by dynamo, which takes longer; and with gradients
        zoo = make_zoo()
        zoo = Zoo({name: zoo[name] for name in ("gpt_oss", "merged", "fine_grained")})
        with portable(zoo):
            program = open_token_count(zoo, strict=strict)
    else:
        zoo, program = request.getfixturevalue("exported_zoo")
    before = zoo(torch.randn(1, D))
    assert not [name for name in targets(program.graph_module) if "fusedonemoe" in name]
    assert any(name == "cond" for name in targets(program.graph_module))  # few rows and many, in one graph
    exported = program.module()
    for T in (0, *TOKEN_COUNTS):
        x = torch.randn(T, D)
        for name, y, expected in zip(zoo, exported(x), zoo(x), strict=True):
            torch.testing.assert_close(y, expected, msg=f"{name} differs")
    assert all(y.abs().max() > 0 for y in before)


def test_a_fixed_token_count_takes_its_one_way():
    layer = MoE(**SIZES, impl="portable").eval()
    for T, is_few in ((1, True), (2, True), (3, False)):
        program = export(layer, (torch.randn(T, D),))
        sorts = [name for name in targets(program.graph_module) if "aten.sort" in name]
        assert bool(sorts) is not is_few and "cond" not in targets(program.graph_module)
        x = torch.randn(T, D)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_no_more_rows_than_the_fullest_expert_needs(monkeypatch):
    inputs = torch.randn(64, D), torch.rand(64, 2)
    up, down = torch.randn(8, 16, D), torch.randn(8, D, 8)
    rows: list[int] = []
    bmm = torch.bmm

    def counted(a, b):
        rows.append(a.shape[0] * a.shape[1])
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", counted)
    even = torch.arange(128).reshape(64, 2) % 8
    for experts, expected in ((even, 128), (even.clamp(max=3), 8 * 80), (torch.zeros_like(even), 8 * 128), (even[:2], 4)):
        rows.clear()
        T = len(experts)
        F.experts_mlp(inputs[0][:T], experts, inputs[1][:T], up, down, impl="portable")
        assert rows == [expected, expected]


# The context


def test_portable_switches_every_layer_and_puts_each_back():
    mixed = nn.Sequential(make_zoo(impl="dense"), MoE(**SIZES, impl="grouped"), nn.Linear(2, 2))

    def impls():
        return [getattr(getattr(m, "config", None), "impl", None) or getattr(m, "impl", None) for m in mixed.modules()]

    before = impls()
    with portable(mixed) as same:
        assert same is mixed
        assert {impl for impl in impls() if impl} == {"portable"}
    assert impls() == before and {"dense", "grouped"} <= set(before)
    with pytest.raises(ZeroDivisionError), portable(mixed):
        1 / 0  # noqa: B018
    assert impls() == before


def test_portable_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got str$"), portable("model"):
        pass
    with pytest.raises(ValueError, match=r"^model must have a layer of this library in it, got a Linear without one$"):
        portable(nn.Linear(2, 2)).__enter__()


# ONNX


def to_onnx(model, tmp_path, dtype=torch.float32):
    """The converted model and a function that runs it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    example = torch.randn(6, D, dtype=dtype)
    program = torch.onnx.export(model, (example,), dynamic_shapes=({0: Dim("T")},), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    (name,) = (given.name for given in session.get_inputs())
    return program.model, lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


@pytest.mark.slow
def test_every_layer_is_the_same_in_onnxruntime(tmp_path):
    zoo = make_zoo()
    model, run = to_onnx(zoo, tmp_path)
    assert {node.domain for node in model.graph.all_nodes()} == {""}  # standard operators
    assert not model.functions and "If" in {node.op_type for node in model.graph}
    for T in TOKEN_COUNTS:
        x = torch.randn(T, D)
        for name, y, expected in zip(zoo, run(x), zoo(x), strict=True):
            torch.testing.assert_close(y, expected.detach(), msg=f"{name} differs")


def test_half_precision_in_onnxruntime_is_as_good_as_plain_pytorch(tmp_path):
    torch.manual_seed(0)
    layers = [MoE(**SIZES, bias=True, dtype=torch.float16), FusedOneMoE(D, 8, 8, is_sparse=True, topk=2, dtype=torch.float16)]
    zoo = Zoo({str(i): layer for i, layer in enumerate(layers)}).eval()
    _, run = to_onnx(zoo, tmp_path, torch.float16)
    x = torch.randn(40, D).half()
    found = run(x)
    plain = [y.detach() for y in zoo(x)]
    exact = zoo.double()(x.double())
    for y, in_torch, truth in zip(found, plain, exact, strict=True):
        assert_within_budget(y, in_torch, truth)


def test_an_implementation_without_an_onnx_form_says_what_to_set():
    pytest.importorskip("onnxscript")
    layer = MoE(**SIZES, impl="grouped").eval()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"impl='grouped' has no ONNX form: set impl='portable', or"):
        torch.onnx.export(layer, (torch.randn(6, D),), dynamo=True, verbose=False)


@pytest.mark.parametrize("impl", ["dense", "grouped", "cpu", "triton"])
def test_every_function_refuses_what_has_no_onnx_form(monkeypatch, impl):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    x, experts, weights = torch.randn(3, D), torch.randint(4, (3, 2)), torch.rand(3, 2)
    up, down, table = torch.randn(4, 8, D), torch.randn(4, D, 4), torch.randn(4, D)
    calls: list[Any] = [
        lambda impl: F.experts_mlp(x, experts, weights, up, down, impl=impl),
        lambda impl: F.experts_merged(x, experts, weights, up.transpose(1, 2).contiguous(), impl=impl),
        lambda impl: F.experts_neurons(x, experts, weights, table, table, impl=impl),
        lambda impl: F.experts_values(experts, weights, table, impl=impl),
    ]
    if impl == "dense":
        calls += [
            lambda impl: F.route(torch.randn(3, 4), 2, impl=impl),
            lambda impl: F.route_product_key(torch.randn(3, 2, 4), 2, impl=impl),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^impl='{impl}' has no ONNX form: set impl='portable', or export inside `with"):
            call(impl)
        call("auto")


# Packages


@pytest.fixture(scope="module")
def program_without_python(tmp_path_factory):
    return Program(tmp_path_factory.mktemp("program"))


@pytest.mark.slow
@pytest.mark.skipif(CPP is None, reason="no C++ compiler")
def test_a_package_runs_in_a_process_without_python(tmp_path, monkeypatch, exported_zoo, program_without_python):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    zoo, program = exported_zoo
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    for T in TOKEN_COUNTS:
        x = torch.randn(T, D)
        found = program_without_python.run(package, x).reshape(len(zoo), T, D)
        torch.testing.assert_close(list(found), [y.detach() for y in zoo(x)])


@pytest.mark.slow
@pytest.mark.skipif(CPP is None or REFUSAL is not None, reason=f"no C++ compiler, or no CPU kernels: {REFUSAL}")
def test_a_package_calls_the_cpu_kernels_without_python(tmp_path, monkeypatch, program_without_python):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.manual_seed(0)
    moe = MoE(**{**SIZES, "num_experts": 8}, impl="cpu", shared_intermediate_size=8)
    int8 = MoE(**{**SIZES, "num_experts": 8}, impl="cpu")
    int8.register_module("experts", QuantizedExperts.from_experts(int8.experts, "int8"))
    model = Zoo({"moe": moe, "int8": int8, "merged": FusedOneMoE(D, 8, 8, is_sparse=True, topk=2, impl="cpu")})
    with torch.no_grad():
        program = open_token_count(model)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for T in TOKEN_COUNTS:
            x = torch.randn(T, D)
            outputs = model(x)
            found = program_without_python.run(package, x, kernel_library()).reshape(len(outputs), T, D)
            torch.testing.assert_close(list(found), list(outputs), rtol=1e-6, atol=1e-6)
            assert all(torch.equal(a, b) for a, b in zip(found, loaded(x), strict=True)), "the bits of Python"
