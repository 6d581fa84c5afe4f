"""torch.export and AOTInductor with an open number of tokens: what stays in the graph, and what a package needs to run."""

import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export, load, save

from fusedonemoe import FusedOneMoE, MoE
from fusedonemoe.ops.cpu import native

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
D = 16
TOKEN_COUNTS = (1, 2, 11, 64)
# Names of the operators that each layer's graph holds, by impl.
OPERATORS = {
    ("moe", "dense"): {"route_dense", "experts_mlp_dense"},
    ("moe", "grouped"): {"route", "experts_mlp"},
    ("fused_one_moe", "dense"): {"route_dense", "experts_merged_dense"},
    ("fused_one_moe", "grouped"): {"route", "experts_merged"},
}


def make_layer(kind: str, impl: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "moe":
        return MoE(hidden_size=D, intermediate_size=8, num_experts=8, top_k=2, bias=True, impl=impl).eval()
    return FusedOneMoE(D, 8, 8, is_sparse=True, topk=2, bias=True, impl=impl).eval()


def export_with_open_token_count(layer: nn.Module, *, strict: bool = False, shape: tuple[int, ...] = (6, D)) -> ExportedProgram:
    return export(layer, (torch.randn(shape),), dynamic_shapes=({len(shape) - 2: Dim("T")},), strict=strict)


def library_operators(program: ExportedProgram) -> set[str]:
    targets = [str(node.target).split(".") for node in program.graph.nodes if node.op == "call_function"]
    return {parts[1] for parts in targets if parts[0] == "fusedonemoe"}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize(("kind", "impl"), OPERATORS)
def test_export_keeps_the_operators_and_serves_other_token_counts(kind, impl, strict):
    layer = make_layer(kind, impl)
    program = export_with_open_token_count(layer, strict=strict)
    assert library_operators(program) == OPERATORS[kind, impl]
    exported = program.module()
    for T in (*TOKEN_COUNTS, 0):
        x = torch.randn(T, D)
        torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("impl", ["dense", "grouped"])
def test_export_of_a_batch_of_sequences(impl):
    layer = make_layer("moe", impl)
    exported = export_with_open_token_count(layer, shape=(3, 6, D)).module()
    x = torch.randn(3, 17, D)
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(("kind", "impl"), OPERATORS)
def test_decomposition_opens_dense_and_keeps_grouped_whole(kind, impl):
    layer = make_layer(kind, impl)
    program = export_with_open_token_count(layer).run_decompositions()
    assert library_operators(program) == (OPERATORS[kind, impl] if impl == "grouped" else set())
    x = torch.randn(11, D)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize(("kind", "impl"), OPERATORS)
def test_exported_program_survives_save_and_load(kind, impl):
    layer = make_layer(kind, impl)
    file = io.BytesIO()
    save(export_with_open_token_count(layer), file)
    file.seek(0)
    program = load(file)
    assert library_operators(program) == OPERATORS[kind, impl]
    x = torch.randn(11, D)
    torch.testing.assert_close(program.module()(x), layer(x))


RUN_PACKAGE = """
import sys, torch
if sys.argv[2] == "import":
    import fusedonemoe
package = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")
for x, y in torch.load(sys.argv[1] + "/expected.pt"):
    torch.testing.assert_close(package(x), y)
assert ("fusedonemoe" in sys.modules) == (sys.argv[2] == "import")
print("all equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("impl", "runs_alone"),
    [("portable", True), ("dense", True), ("grouped", False), pytest.param("cpu", False, marks=needs_kernels)],
)
def test_aot_inductor_package_runs_alone_or_with_the_library(tmp_path, monkeypatch, impl, runs_alone):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = nn.Sequential(make_layer("moe", impl), make_layer("fused_one_moe", impl))
    with torch.no_grad():
        program = export_with_open_token_count(model)
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        inputs = [torch.randn(T, D) for T in TOKEN_COUNTS]
        torch.save([(x, model(x)) for x in inputs], tmp_path / "expected.pt")

    def in_a_new_process(how: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", RUN_PACKAGE, str(tmp_path), how]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    with_library = in_a_new_process("import")
    assert with_library.stdout.strip() == "all equal", with_library.stderr
    alone = in_a_new_process("alone")
    if runs_alone:
        assert alone.stdout.strip() == "all equal", alone.stderr
    else:
        assert alone.returncode != 0 and "Could not find schema for fusedonemoe::" in alone.stderr
