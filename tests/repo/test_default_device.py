"""The default device and the default dtype are the caller's: what is made beside given tensors is made where they are."""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

from fusedonemoe import (
    FineGrainedMoE,
    FusedOneMoE,
    LoRAExperts,
    MoE,
    MoEConfig,
    ProductKeyRouter,
    QuantizedExperts,
    TopKRouter,
    balance,
    explain,
    quantize_,
)
from fusedonemoe import functional as F
from fusedonemoe.balance.counting import UsageMeter, usage
from fusedonemoe.cli.probes import make_probes
from fusedonemoe.compat.flashmoe import FlashMoE, FlashMoEConfig
from fusedonemoe.export import portable
from fusedonemoe.integrations.checkpoints import load_experts, to_state_dict
from fusedonemoe.testing import ROUTINGS, make_experts, make_logits, make_merged_inputs, make_mlp_inputs
from tests.ops.test_operands import CALLS, gradients

ROOT = Path(__file__).resolve().parents[2]
# Functions of torch that make a tensor on the default device.
FACTORIES = {function.__name__ for function in _device_constructors()}
# Constructors of modules follow torch's default on purpose: where the function is, and its name.
FOLLOWS_THE_DEFAULT = {("fusedonemoe/cli/demo/model.py", "arange")}


def factories_without_a_device(path: Path) -> list[str]:
    """The calls of a source file that leave the device to torch, as ``file:line function``."""
    found, file = [], path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES):
            continue
        if not ast.unparse(node.func.value).startswith("torch") or (file, node.func.attr) in FOLLOWS_THE_DEFAULT:
            continue
        if not any(keyword.arg in ("device", None) for keyword in node.keywords):  # None: a dictionary of options
            found.append(f"{file}:{node.lineno} {ast.unparse(node.func)}")
    return found


def test_every_factory_names_its_device():
    paths = [path for folder in ("fusedonemoe", "ops") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100
    assert [call for path in paths for call in factories_without_a_device(path)] == []


def test_a_factory_without_a_device_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    source = tmp_path / "source.py"
    source.write_text(
        "import torch\ntorch.zeros(3, device='cpu')\ntorch.full(\n    (2,), 1\n)\nx.new_zeros(3)\n", encoding="utf-8"
    )
    assert factories_without_a_device(source) == ["source.py:3 torch.full"]


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
everywhere = pytest.mark.parametrize("defaults", DEFAULTS)
T, D, E, K = 12, 32, 8, 2
CONFIG = MoEConfig(hidden_size=D, intermediate_size=32, num_experts=E, top_k=K)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_in(item)]
    return tensors_in(list(vars(value).values())) if hasattr(value, "__dict__") and not callable(value) else []


def check_same(call: Callable[[], Any], defaults: str) -> None:
    """The call gives the same bits under other defaults."""
    expected = tensors_in(call())
    with DEFAULTS[defaults]():
        actual = tensors_in(call())
    assert expected and len(actual) == len(expected)
    for ours, exact in zip(actual, expected, strict=True):
        assert (ours.device, ours.dtype) == (exact.device, exact.dtype)
        assert torch.equal(ours, exact)


IMPLS = ("auto", "grouped", "dense")
OF_ONE_FORM = ("lora", "route", "route of sigmoids", "product keys")
OPERATORS = [
    (name, impl)
    for name in CALLS
    for impl in (IMPLS[:1] if name in OF_ONE_FORM else IMPLS[:2] if name.startswith("sparse") else IMPLS)
]


@pytest.mark.parametrize(("name", "impl"), OPERATORS)
def test_operators_answer_where_their_tensors_are(name, impl):
    leaves, call = CALLS[name](impl)

    def run():
        y = call()
        return [y, *gradients(leaves, y)]

    for defaults in DEFAULTS:
        check_same(run, defaults)


LOGITS = make_logits(T, E)
IDS = F.route(LOGITS, K)[1]
X = make_mlp_inputs(T, D, 32, E, K)
BIAS = torch.linspace(-1, 1, E)


def functions() -> dict[str, Callable[[], Any]]:
    weight = X.up_proj
    quantised = F.quantize_weight(weight, "int4", group_size=32, symmetric=False)
    return {
        "plan": lambda: F.plan(X.experts, E),
        "tokens_per_expert": lambda: F.tokens_per_expert(X.experts, E),
        "apply_capacity": lambda: F.apply_capacity(X.experts, X.weights, E, 1.0),
        "route": lambda: F.route(LOGITS, K, scoring="sigmoid", selection_bias=BIAS, n_group=4, topk_group=2),
        "route to all": lambda: F.route(LOGITS, None),
        "dense route": lambda: F.route(LOGITS, K, norm_topk_prob=False, impl="dense"),
        "portable route": lambda: F.route(LOGITS, K, n_group=4, topk_group=2, impl="portable"),
        "route in float64": lambda: F.route(LOGITS.double(), K),
        "route_top_p": lambda: F.route_top_p(LOGITS, 0.5),
        "route_with_shared": lambda: F.route_with_shared(LOGITS, 3, 1),
        "topk_softmax": lambda: F.topk_softmax(LOGITS, K),
        "int8": lambda: F.quantize_weight(weight),
        "int4": lambda: F.quantize_weight(weight, "int4", group_size=32),
        "dequantize": lambda: F.dequantize_weight(quantised, torch.float32),
        "stack": lambda: F.stack_gate_up(weight, weight),
        "portable": lambda: F.experts_mlp(X.x, X.experts, X.weights, X.up_proj, X.down_proj, impl="portable"),
        "portable neurons": lambda: F.experts_neurons(X.x, X.experts, X.weights, weight[:, 0], weight[:, 1], impl="portable"),
        "load_balancing_loss": lambda: balance.load_balancing_loss(LOGITS, IDS, E),
        "masked loss": lambda: balance.load_balancing_loss(LOGITS, IDS, E, attention_mask=LOGITS[:, 0] > 0),
        "router_z_loss": lambda: balance.router_z_loss(LOGITS),
        "update_selection_bias": lambda: balance.update_selection_bias(BIAS.clone(), F.tokens_per_expert(X.experts, E), 0.1),
        "usage": lambda: usage(X.experts, E),
        "make_logits": lambda: [make_logits(T, E, ties=ties) for ties in (False, True)],
        "make_experts": lambda: [make_experts(T, E, K, routing=routing) for routing in ROUTINGS],
        "make_mlp_inputs": lambda: make_mlp_inputs(T, D, 8, E, K, bias=True),
        "make_merged_inputs": lambda: make_merged_inputs(T, D, 8, E, K),
    }


@everywhere
@pytest.mark.parametrize("name", functions())
def test_functions_answer_where_their_tensors_are(name, defaults):
    check_same(functions()[name], defaults)


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    shared = MoE(MoEConfig(hidden_size=D, intermediate_size=32, num_experts=E, top_k=K, shared_intermediate_size=16))
    with_int4 = MoE(CONFIG)
    with_int4.register_module("experts", QuantizedExperts.from_experts(with_int4.experts, "int4", group_size=32))
    return {
        "MoE": shared,
        "dense": MoE(MoEConfig(hidden_size=D, intermediate_size=32, num_experts=E, top_k=K, impl="dense")),
        "int4": with_int4,
        "FusedOneMoE": FusedOneMoE(D, 32, groups=E, is_sparse=True, topk=K, bias=True),
        "FineGrainedMoE": FineGrainedMoE(D, 16, K, intermediate_size=16),
        "sparse": FineGrainedMoE(D, 16, K, sparse=True),
        "FlashMoE": FlashMoE(FlashMoEConfig(D, 16, "silu", 16, K)),
        "TopKRouter": TopKRouter(D, E, K),
        "ProductKeyRouter": ProductKeyRouter(D, 16, K),
    }


@everywhere
@pytest.mark.parametrize("name", layers())
def test_layers_answer_where_their_parameters_are(name, defaults):
    layer = layers()[name].eval()
    x = X.x.clone().requires_grad_()

    def run():
        y = layer(x)
        if isinstance(layer, TopKRouter | ProductKeyRouter):
            y = y.weights
        y = y[0] if isinstance(y, tuple) else y
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        return [y, *(g.to_dense() for g in grads if g is not None)]

    check_same(run, defaults)


@everywhere
def test_what_is_made_of_a_module_is_made_where_it_is(defaults, tmp_path):
    experts = MoE(CONFIG).experts

    def made():
        return [
            *QuantizedExperts.from_experts(experts, "int8").buffers(),
            *QuantizedExperts.from_experts(experts, "int4", group_size=32).buffers(),
        ]

    check_same(made, defaults)
    with DEFAULTS[defaults]():
        adapted = LoRAExperts(MoE(CONFIG, device="cpu", dtype=torch.float32).experts, r=2)
        with portable(MoE(CONFIG, device="cpu", dtype=torch.float32)) as exported:
            y = exported(X.x)
    assert {(p.device.type, p.dtype) for p in adapted.parameters()} == {("cpu", torch.float32)}
    assert y.device.type == "cpu" and y.dtype == torch.float32


@everywhere
def test_reports_are_the_same(defaults):
    def reports():
        torch.manual_seed(0)
        moe = MoE(CONFIG, device="cpu", dtype=torch.float32)
        report = quantize_(moe, "int8")
        return str(report), str(explain(MoE(CONFIG, device="cpu", dtype=torch.float32), X.x))

    expected = reports()
    with DEFAULTS[defaults]():
        assert reports() == expected


@everywhere
def test_a_meter_counts_on_the_device_of_the_model(defaults):
    moe = MoE(CONFIG)
    with DEFAULTS[defaults]():
        meter = UsageMeter(moe)
        moe(X.x)
        (report,) = meter.usage().values()
        assert report.total == T * K


@everywhere
@pytest.mark.parametrize("file", [False, True])
def test_a_checkpoint_is_loaded_onto_the_cpu(defaults, file, tmp_path):
    moe = MoE(CONFIG)
    state: Any = to_state_dict(moe, "mixtral", prefix="model.layers.0.block_sparse_moe")
    if file:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
        state = tmp_path
    other = MoE(CONFIG)
    with DEFAULTS[defaults]():
        loaded = load_experts(state)
        load_experts(state, into=other)
    for ours in (loaded.gate_up_proj, other.experts.gate_up_proj):
        assert ours.device.type == "cpu" and torch.equal(ours, moe.experts.gate_up_proj)


@everywhere
def test_probes_of_the_doctor_are_the_same(defaults):
    def drawn():
        return [[probe.seed, dict(probe.leaves)] for probe, _ in make_probes(torch.float32, "cpu")]

    check_same(drawn, defaults)


@everywhere
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_model_is_applied_to_as_ever(family, defaults):
    pytest.importorskip("transformers")
    from fusedonemoe.integrations import transformers as integration
    from tests.integrations.transformers_families import tiny_of

    model = tiny_of(family).eval()
    with DEFAULTS[defaults]():
        report = integration.apply(model)
    assert 0 < report.total == report.used == report.routers_fused, report
    tokens = torch.arange(8)[None]

    def run():
        with torch.no_grad():
            return model.model(inputs_embeds=model.get_input_embeddings()(tokens)).last_hidden_state

    assert torch.isfinite(run()).all()
