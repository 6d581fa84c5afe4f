"""torch.compile: one static and one dynamic graph, eager's values and gradients, and no stale code from the disk cache."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_dynamic, mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InductorError

import fusedonemoe
from fusedonemoe import FusedOneMoE, MoE
from fusedonemoe.ops.cpu import native

D = 16
TOKEN_COUNTS = (16, 24, 7, 33, 100, 5, 2, 64)
UNBACKED_TOKEN_COUNTS = (7, 1, 2, 64, 0)


class Blocks(nn.Module):
    """MoE blocks and a FusedOneMoE with residual connections."""

    def __init__(
        self, impl: str, *, depth: int = 3, top_k: int | None = 2, dtype: torch.dtype = torch.float32, **fields: object
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": D, "intermediate_size": 8, "num_experts": 8, "top_k": top_k}
        moe = [MoE(**sizes, **fields, impl=impl, dtype=dtype) for _ in range(depth)]
        self.blocks = nn.ModuleList([*moe, FusedOneMoE(D, 8, 8, top_k is not None, top_k or 1, impl=impl, dtype=dtype)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_disk_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def compiled(model, backend):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter  # fullgraph=True raises at a graph break


def run(model, like, x, *, training):
    """The output and, when training, every gradient; ``like`` holds the parameters."""
    if not training:
        with torch.no_grad():
            return {"y": model(x)}
    y = model(x.requires_grad_())
    wanted = {"x": x} | dict(like.named_parameters())
    gradients = torch.autograd.grad(y.float().square().mean() if y.numel() else y.sum(), list(wanted.values()))
    return {"y": y} | dict(zip(wanted, gradients, strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    # Both round at the same places but for what Inductor keeps in float32, so a few units in the last place of the largest.
    tolerance = 16 * torch.finfo(dtype).eps
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        if value.numel():
            assert (actual[name] - value).abs().max() <= tolerance * value.abs().max(), name


DEEPSEEK_V3 = {"scoring": "sigmoid", "selection_bias": True, "n_group": 4, "topk_group": 2, "shared_intermediate_size": 8}


@pytest.mark.parametrize(
    ("impl", "fields", "dtype", "training"),
    [
        pytest.param("dense", {}, torch.float32, True, id="dense"),
        pytest.param("grouped", {}, torch.float32, True, id="grouped"),
        pytest.param("dense", {}, torch.bfloat16, True, id="dense-bfloat16"),
        pytest.param("grouped", {}, torch.bfloat16, True, id="grouped-bfloat16"),
        pytest.param("dense", {}, torch.float32, False, id="dense-inference"),
        pytest.param("grouped", {}, torch.bfloat16, False, id="grouped-bfloat16-inference"),
        pytest.param("auto", {"depth": 1, "top_k": None}, torch.float32, True, id="every_expert"),
        pytest.param("grouped", {"depth": 1, "save_percent": 50}, torch.float32, True, id="save_half"),
        pytest.param(
            "grouped", {"depth": 1, "save_percent": 0, "gated": False, "bias": True}, torch.float32, True, id="save_none"
        ),
        pytest.param("auto", {"depth": 1, **DEEPSEEK_V3}, torch.float32, True, id="deepseek_v3"),
    ],
)
def test_eight_token_counts_take_one_static_and_one_dynamic_graph(impl, fields, dtype, training):
    model = Blocks(impl, dtype=dtype, **fields)
    fast, counter = compiled(model, "aot_eager")
    for T in TOKEN_COUNTS:
        x = torch.randn(T, D).to(dtype)
        assert_same(run(fast, model, x, training=training), run(model, model, x, training=training), dtype)
    assert counter.frame_count == 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("impl", "fields"),
    [("dense", {}), ("grouped", {}), ("grouped", {"save_percent": 50})],
    ids=["dense", "grouped", "grouped-save_half"],
)
def test_an_unbacked_token_count_takes_one_graph_for_zero_and_one_too(impl, fields, training):
    model = Blocks(impl, depth=1, **fields)
    fast, counter = compiled(model, "aot_eager")
    for T in UNBACKED_TOKEN_COUNTS:
        x = torch.randn(T, D)
        mark_unbacked(x, 0)
        assert_same(run(fast, model, x, training=training), run(model, model, x, training=training), torch.float32)
    assert counter.frame_count == 1


def test_leading_dimensions_and_routing_output_compile_too():
    model = MoE(hidden_size=D, intermediate_size=8, num_experts=8, top_k=2, impl="grouped")
    fast, counter = compiled(model, "aot_eager")
    for shape in ((2, 6, D), (3, 9, D), (4, 5, D)):
        x = torch.randn(shape)
        for actual, expected in zip(fast(x, return_routing=True), model(x, return_routing=True), strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_disk_cache")
@pytest.mark.parametrize(
    ("impl", "dtype"), [("dense", torch.float32), ("grouped", torch.bfloat16)], ids=["dense", "grouped-bfloat16"]
)
def test_inductor_trains_like_eager(impl, dtype):
    model = MoE(hidden_size=D, intermediate_size=8, num_experts=8, top_k=2, impl=impl, dtype=dtype)
    fast, counter = compiled(model, "inductor")
    for T in TOKEN_COUNTS:
        x = torch.randn(T, D).to(dtype)
        mark_dynamic(x, 0)
        assert_same(run(fast, model, x, training=True), run(model, model, x, training=True), dtype)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(native.refusal(torch.float32, True) is not None, reason="needs the CPU kernels")
@pytest.mark.parametrize("training", [False, True])
def test_the_cpp_wrapper_gives_the_same_bits(training):
    model = MoE(hidden_size=D, intermediate_size=8, num_experts=8, top_k=2, bias=True, impl="cpu")
    x = torch.randn(6, D)
    expected = run(model, model, x, training=training)
    torch._dynamo.reset()
    with torch._inductor.config.patch(cpp_wrapper=True):
        got = run(torch.compile(model, fullgraph=True), model, x, training=training)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_disk_cache")
@pytest.mark.parametrize(
    "make_model",
    [
        pytest.param(lambda: Blocks("grouped", depth=1), id="grouped"),
        pytest.param(lambda: FusedOneMoE(D, 8, 8, True, 2, impl="dense"), id="fused_one_moe-dense"),
        pytest.param(
            lambda: MoE(hidden_size=D, intermediate_size=8, num_experts=8, top_k=2, impl="dense"),
            id="moe-dense",
            marks=pytest.mark.xfail(raises=InductorError, reason="Inductor's bmm lowering asks whether the token count is 1"),
        ),
    ],
)
def test_inductor_infers_an_unbacked_token_count_with_one_graph(make_model):
    model = make_model()
    fast, counter = compiled(model, "inductor")
    for T in UNBACKED_TOKEN_COUNTS:
        x = torch.randn(T, D)
        mark_unbacked(x, 0)
        with torch.no_grad():
            assert_same({"y": fast(x)}, {"y": model(x)}, torch.float32)
    assert counter.frame_count == 1


# torch.compile's cache on disk knows an operator by name and arguments, not by its Python; see ops/library/registration.py.

COMPILE_IN_A_NEW_PROCESS = """
import sys, torch
from torch._dynamo.utils import counters
import fusedonemoe
assert fusedonemoe.__file__.startswith(sys.argv[1]), fusedonemoe.__file__
x, experts, weights = torch.ones(3, 4, requires_grad=True), torch.tensor([[0], [1], [0]]), torch.ones(3, 1)
for impl in sys.argv[2:]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_experts": 2, "top_k": 1}
    layer = fusedonemoe.Experts(fusedonemoe.MoEConfig(**sizes, activation="relu2", gated=False, impl=impl))
    for run in (layer, torch.compile(layer, fullgraph=True)):
        y = run(x, experts, weights).sum()
        print(y.item(), torch.autograd.grad(y, x)[0].sum().item())
print(counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_disk_cache_serves_unchanged_operators_and_never_edited_ones(tmp_path):
    package = Path(fusedonemoe.__file__).parent
    shutil.copytree(package, tmp_path / "fusedonemoe", ignore=shutil.ignore_patterns("__pycache__"))  # follows the link ops
    own = {"PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}

    def new_process() -> tuple[list[float], int]:
        """Outputs and gradients in eager mode, and how many of the two layers came from the cache."""
        command = [sys.executable, "-c", COMPILE_IN_A_NEW_PROCESS, str(tmp_path), "dense", "grouped"]
        result = subprocess.run(command, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        *values, hits = (float(word) for word in result.stdout.split())
        eager, fast = [*values[:2], *values[4:6]], [*values[2:4], *values[6:]]
        assert len(eager) == len(fast) == 4
        assert min(map(abs, eager)) > 1e-6 and fast == pytest.approx(eager, rel=1e-5)
        return eager, int(hits)

    values, hits = new_process()
    assert hits == 0
    assert new_process() == (values, 2), "an unchanged library is served from the cache"

    behind_dynamo = tmp_path / "fusedonemoe" / "functional" / "experts.py"
    behind_dynamo.write_text(behind_dynamo.read_text() + "\n# edited\n")
    assert new_process() == (values, 0), "the Python that Dynamo does not look into is in the key"

    source = tmp_path / "fusedonemoe" / "ops" / "activation.py"
    text = source.read_text()
    edits = [
        ("lambda v: v.relu().square()", "lambda v: v.relu().square() * 3"),
        ("lambda dh, v: 2 * v.relu() * dh", "lambda dh, v: 6 * v.relu() * dh"),  # grouped's, where dense is left to autograd
    ]
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    source.write_text(text)
    edited, hits = new_process()
    assert edited == pytest.approx([3 * value for value in values], rel=1e-5)
    assert hits == 0
