"""Ranks that were given different settings or arguments: all of them say what differs, and none waits for the timeout."""

import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import fusedonemoe
from fusedonemoe import MoE, QuantizedExperts, add_lora
from fusedonemoe.agreement import differences
from fusedonemoe.balance import LossFreeBalance, UsageMeter
from fusedonemoe.integrations.distributed import (
    AllToAll,
    ExpertParallel,
    FixedCapacity,
    TensorParallel,
    average_gradients,
    data_parallel,
    description,
    expert_placement,
)
from fusedonemoe.ops.cpu import build
from tests.integrations.test_distributed import D, F, compare, make_moe
from tests.processes import run_in_processes

WORLD = 3
ODD = 1  # the rank that differs
GROUP_TIMEOUT = 90  # seconds, of which a compilation may need some; a test that waits for it has failed


def refused(call: Any, error: Any, *parts: str) -> str:
    """The call raises at once on this rank, and its message has these parts."""
    start = time.monotonic()
    try:
        call()
    except error as caught:
        message = str(caught)
    else:
        raise AssertionError(f"nothing was raised: {parts}")
    assert time.monotonic() - start < GROUP_TIMEOUT - 10, message
    assert all(part in message for part in parts), (message, parts)
    return message


def untouched(model: nn.Module) -> None:
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(getattr(m, "exchange", None) is None for m in model.modules())


# Options of make_moe that one rank has differently, and the settings that the message must name.
FIELDS = {
    "intermediate_size": (
        {"intermediate_size": F + 3},
        f"experts.config.intermediate_size = {F} on ranks 0, 2, {F + 3} on rank 1",
    ),
    "hidden_size": ({"hidden_size": 24}, f"config.hidden_size = {D} on ranks 0, 2, 24 on rank 1"),
    "num_experts": ({"num_experts": 9}, "config.num_experts = 8 on ranks 0, 2, 9 on rank 1"),
    "top_k": ({"top_k": 3}, "config.top_k = 2 on ranks 0, 2, 3 on rank 1"),
    "activation": ({"activation": "gelu"}, "config.activation = 'silu' on ranks 0, 2, 'gelu' on rank 1"),
    "gated": ({"gated": False}, "config.gated = True on ranks 0, 2, False on rank 1"),
    "gate_up_layout": ({"gate_up_layout": "interleaved"}, "config.gate_up_layout = 'gate_up' on ranks 0, 2"),
    "transposed": ({"transposed": True}, "config.transposed = False on ranks 0, 2, True on rank 1"),
    "bias": ({"bias": False}, "config.bias = True on ranks 0, 2, False on rank 1"),
    "swiglu_alpha": ({"swiglu_alpha": 1.5}, "config.swiglu_alpha = 1.702 on ranks 0, 2, 1.5 on rank 1"),
    "swiglu_limit": ({"swiglu_limit": 6.0}, "config.swiglu_limit = 7.0 on ranks 0, 2, 6.0 on rank 1"),
    "scoring": ({"scoring": "sigmoid"}, "gate.scoring = 'softmax' on ranks 0, 2, 'sigmoid' on rank 1"),
    "score_first": ({"score_first": False}, "gate.score_first = True on ranks 0, 2"),
    "norm_topk_prob": ({"norm_topk_prob": False}, "gate.norm_topk_prob = True on ranks 0, 2"),
    "routed_scaling_factor": ({"routed_scaling_factor": 2.5}, "gate.routed_scaling_factor = 1.0 on ranks 0, 2"),
    "selection_bias": ({"selection_bias": True}, "gate.e_score_correction_bias = absent on ranks 0, 2"),
    "n_group": ({"n_group": 2, "topk_group": 1}, "gate.n_group = 1 on ranks 0, 2, 2 on rank 1"),
    "impl": ({"impl": "dense"}, "config.impl = 'grouped' on ranks 0, 2, 'dense' on rank 1"),
    "dtype": ({"dtype": torch.float32}, "experts.down_proj = float64 (8, 16, 12) on cpu, trained on ranks 0, 2, float32"),
    "meta": ({"device": "meta"}, "(8, 16, 12) on cpu, trained on ranks 0, 2, float64 (8, 16, 12) on meta"),
}


def make(**changes: Any) -> MoE:
    torch.manual_seed(0)
    fields = {"hidden_size": D, "intermediate_size": F, "num_experts": 8, "top_k": 2, "bias": True, "impl": "grouped"}
    return MoE(**{**fields, "dtype": torch.float64, **changes})


def every_setting_is_compared(rank, world, folder):
    for style in (ExpertParallel, TensorParallel):
        for changes, text in FIELDS.values():
            moe = make(**(changes if rank == ODD else {}))
            refused(lambda: style().apply(moe), ValueError, f"{style.__name__}.apply needs the same settings", text)  # noqa: B023
            untouched(moe)


def _top_k_of_the_gate(moe: MoE) -> None:
    moe.gate.top_k = 3


def _freeze(moe: MoE) -> None:
    moe.experts.requires_grad_(False)


def _adapt(moe: MoE) -> None:
    add_lora(moe, r=2)


def _another_shared_expert(moe: MoE) -> None:
    moe.add_module("shared_expert", nn.Linear(D, D, bias=False, dtype=torch.float64))


CHANGES = [
    (_another_shared_expert, ValueError, "shared_expert = 'SharedExpert' on ranks 0, 2, 'Linear' on rank 1"),
    (_top_k_of_the_gate, ValueError, "gate.top_k = 2 on ranks 0, 2, 3 on rank 1"),
    (
        _freeze,
        ValueError,
        "experts.down_proj = float64 (8, 16, 12) on cpu, trained on ranks 0, 2, float64 (8, 16, 12) on cpu, not",
    ),
]


def what_was_changed_after_building_is_compared(rank, world, folder):
    for change, error, text in CHANGES:
        moe = make(shared_intermediate_size=4)
        if rank == ODD:
            change(moe)
        refused(lambda: ExpertParallel().apply(moe), error, text)  # noqa: B023
        untouched(moe)
    # Of two blocks, one rank has quantised the second, or has only one.
    blocks = nn.Sequential(make(hidden_size=32, dtype=torch.float32), make(hidden_size=32, dtype=torch.float32))
    if rank == ODD:
        blocks[1].experts = QuantizedExperts.from_experts(blocks[1].experts)
    refused(
        lambda: ExpertParallel().apply(blocks), ValueError, "1.experts = 'Experts' on ranks 0, 2, 'QuantizedExperts' on rank 1"
    )
    blocks = nn.Sequential(*(make() for _ in range(1 if rank == ODD else 2)))
    refused(lambda: ExpertParallel().apply(blocks), ValueError, "1 = 'MoE' on ranks 0, 2, absent on rank 1")
    # Options, the way of being parallel, and the library itself.
    for mine, other, text in [
        ({"capacity": 8}, {}, "capacity = None on ranks 0, 2, 8 on rank 1"),
        ({"capacity_factor": 1.5}, {"capacity_factor": 1.25}, "capacity_factor = 1.25 on ranks 0, 2, 1.5 on rank 1"),
        ({"gradients": "sum"}, {}, "gradients = 'mean' on ranks 0, 2, 'sum' on rank 1"),
    ]:
        options: Any = mine if rank == ODD else other
        refused(lambda: ExpertParallel(**options).apply(make()), ValueError, text)  # noqa: B023
    style = TensorParallel if rank == ODD else ExpertParallel
    refused(lambda: style().apply(make()), ValueError, "style = 'ExpertParallel' on ranks 0, 2, 'TensorParallel' on rank 1")
    original = fusedonemoe.__version__
    fusedonemoe.__version__ = f"0.{rank}"
    refused(lambda: ExpertParallel().apply(make()), ValueError, "version of fusedonemoe = '0.0' on rank 0, '0.1' on rank 1")
    fusedonemoe.__version__ = original
    # Through torch's own entry, and on a mesh that has some of the ranks.
    mesh = init_device_mesh("cpu", (world,))
    moe = make(activation="relu" if rank == ODD else "silu")
    refused(lambda: parallelize_module(moe, mesh, {"experts": ExpertParallel()}), ValueError, "config.activation = 'silu'")
    pair = dist.new_group([1, 2])
    if rank:
        moe = make(top_k=rank)
        refused(lambda: ExpertParallel(pair).apply(moe), ValueError, "config.top_k = 1 on rank 1, 2 on rank 2")


def shared_parameters_stay_shared(rank, world, folder):
    for style in (ExpertParallel, TensorParallel):
        blocks: Any = nn.Sequential(make(), make())
        blocks[1].experts.down_proj = blocks[0].experts.down_proj
        style().apply(blocks)
        assert isinstance(blocks[0].experts.down_proj, DTensor)
        assert blocks[0].experts.down_proj is blocks[1].experts.down_proj
        assert blocks[0].experts.gate_up_proj is not blocks[1].experts.gate_up_proj
        odd: Any = nn.ModuleList([make(), nn.Module()])
        odd[1].weight = odd[0].experts.down_proj
        refused(lambda: style().apply(odd), ValueError, "0.experts.down_proj must belong to experts alone", "1.weight too")  # noqa: B023


def one_rank_that_fails_keeps_none_waiting(rank, world, folder):
    failures: list[tuple[Any, Any, type[Exception], str]] = [
        (ExpertParallel, lambda: nn.Linear(2, 2), ValueError, "model has no fusedonemoe.Experts in it"),
        (ExpertParallel, list, TypeError, "model must be a torch.nn.Module, got list"),
        (TensorParallel, lambda: make(intermediate_size=13), ValueError, "must divide the intermediate size (13)"),
    ]
    adapted = make()
    _adapt(adapted)
    failures.append((ExpertParallel, lambda: adapted, ValueError, "experts has adapters"))
    failures.append((TensorParallel, lambda: adapted, ValueError, "experts has adapters"))
    for style, bad, error, text in failures:
        model = bad() if rank == ODD else make()
        expected = (error, text) if rank == ODD else (RuntimeError, f"failed on rank 1 ({error.__name__}: ")
        refused(lambda: style().apply(model), expected[0], expected[1], text)  # noqa: B023
        if rank != ODD:
            untouched(model)


def what_may_differ_does(rank, world, folder):
    """Tokens, what is kept for the backward, and training mode are each rank's own."""
    reference, moe = make_moe(), make_moe(save_percent=[0, 50, 100][rank])
    ExpertParallel(gradients="sum").apply(moe)
    compare(moe, reference, [4, 0, 9], rank)
    moe = ExpertParallel(gradients="sum", capacity=20).apply(make_moe())
    compare(moe, reference, [2, 0, 5], rank)


def _arguments(width=D, K=2, x_dtype=torch.float32, dtype=torch.float32, T=5):
    x = torch.randn(T, width, dtype=x_dtype)
    return x, torch.randint(0, 8, (T, K)), torch.rand(T, K, dtype=dtype)


ARGUMENTS = [
    ({"width": D + 8}, ("D = 16 on ranks 0, 2, 24 on rank 1",)),
    ({"width": D // 2, "x_dtype": torch.float64}, ("D = 16 on ranks 0, 2, 8 on rank 1", "x.dtype = torch.float32 on ranks 0, 2")),
    ({"K": 3}, ("K = 2 on ranks 0, 2, 3 on rank 1",)),
    ({"x_dtype": torch.bfloat16}, ("x.dtype = torch.float32 on ranks 0, 2, torch.bfloat16 on rank 1",)),
    ({"dtype": torch.float16}, ("weights.dtype = torch.float32 on ranks 0, 2, torch.float16 on rank 1",)),
]


def rows_of_another_form_are_named(rank, world, folder):
    group = dist.group.WORLD
    for make_dispatcher in (
        lambda: AllToAll(group, 8),
        lambda: FixedCapacity(group, 8, capacity=6),
        lambda: FixedCapacity(group, 8, capacity_factor=1.0),
    ):
        for changes, texts in ARGUMENTS:
            arguments = _arguments(**(changes if rank == ODD else {}))
            refused(lambda: make_dispatcher().dispatch(*arguments), ValueError, *texts)  # noqa: B023
        assert make_dispatcher().dispatch(*_arguments()).x.shape[1] == D  # the group is as good as before
    wrong = AllToAll(group, 9 if rank == ODD else 8)
    refused(lambda: wrong.dispatch(*_arguments()), ValueError, "num_experts = 8 on ranks 0, 2, 9 on rank 1")
    uneven = FixedCapacity(group, 8, capacity_factor=1.0)
    for T in (9, 0):
        arguments = _arguments(T=T if rank == ODD else 5)
        rows = uneven._slots(2 * T)
        texts = (f"rows for each rank = 4 on ranks 0, 2, {rows} on rank 1", "give capacity= instead")
        refused(lambda: uneven.dispatch(*arguments), ValueError, *texts)  # noqa: B023
    refused(
        lambda: FixedCapacity(group, 8, capacity=4 + rank).dispatch(*_arguments()), ValueError, "rows for each rank = 4 on rank 0"
    )


def a_refused_call_keeps_none_waiting(rank, world, folder):
    group = dist.group.WORLD
    wrong: list[tuple[Any, type[Exception], str]] = [
        ((torch.randn(5, D - 1), *_arguments()[1:]), ValueError, "x must have shape [..., 16], got (5, 15)"),
        ((torch.randn(5, D, dtype=torch.float64), *_arguments()[1:]), TypeError, "gate_up_proj must have the dtype of x"),
        ((torch.zeros(5, D, dtype=torch.int64), *_arguments()[1:]), TypeError, "x must be float64"),
        ((_arguments()[0], torch.rand(5, 2), torch.rand(5, 2)), TypeError, "experts must have an integer dtype"),
        ((_arguments()[0], torch.zeros(4, 2, dtype=torch.int64), torch.rand(4, 2)), ValueError, "experts must have shape (5, 2)"),
    ]
    for options in ({}, {"capacity": 6}):
        moe = ExpertParallel(**options).apply(make_moe(dtype=torch.float32))
        experts = moe.experts
        x = torch.randn(4, D - 1 if rank == ODD else D)
        expected: Any = (RuntimeError, "refused on ranks [1]")
        refused(lambda: moe(x), *((ValueError, "x must have shape [..., 16]") if rank == ODD else expected))  # noqa: B023
        for arguments, error, text in wrong:
            given = arguments if rank == ODD else _arguments()
            expected = (error, text) if rank == ODD else (RuntimeError, "the arguments were refused on ranks [1]")
            refused(lambda: experts(*given), *expected)  # noqa: B023
        assert experts(*_arguments()).isfinite().all()
    dispatcher = AllToAll(group, 8)
    last: Any = ([1.0], *_arguments()[1:]) if rank == ODD else _arguments()
    said: Any = (TypeError, "x must be a torch.Tensor, got list") if rank == ODD else (RuntimeError, "refused on ranks [1]")
    refused(lambda: dispatcher.dispatch(*last), *said)


def equal_numbers_of_two_types_are_equal(rank, world, folder):
    moe = ExpertParallel(capacity_factor=2 if rank else 2.0).apply(make(routed_scaling_factor=1 if rank else 1.0))
    assert moe.experts.exchange is not None


def sizes_beyond_the_message_are_refused(rank, world, folder):
    group = dist.group.WORLD
    for make_dispatcher in (lambda E: AllToAll(group, E), lambda E: FixedCapacity(group, E, capacity=6)):
        for E, K, text in ((8 + (1 << 21), 2, "num_experts must be below 2097152"), (8, 2 + (1 << 13), "K must be below 8192")):
            dispatcher = make_dispatcher(E if rank == ODD else 8)
            arguments = _arguments(K=K if rank == ODD else 2)
            said = (ValueError, text) if rank == ODD else (RuntimeError, "refused on ranks [1]")
            refused(lambda: dispatcher.dispatch(*arguments), *said)  # noqa: B023


def a_rank_without_the_kernels_says_so(rank, world, folder):
    for style in (ExpertParallel, TensorParallel):
        moe = style().apply(make(impl="cpu", dtype=torch.float32))
        # As where FUSEDONEMOE_CPU_KERNELS=0 was set before the first use, which other cases have had.
        off = {"library": None, "_load": lambda: "turned off"} if rank == ODD else {"library": build.library}
        said: Any = (ValueError, "impl='cpu' cannot run here") if rank == ODD else (RuntimeError, "refused on ranks [1]")
        with mock.patch.multiple(build, **off):
            refused(lambda: moe(torch.ones(5, D)), *said)  # noqa: B023


def tensor_parallel_calls_are_compared(rank, world, folder):
    odd = rank == ODD
    moe = TensorParallel().apply(make(dtype=torch.float32))
    text = "tensor parallelism needs the same D, K and dtypes on every rank, got T = 5 on ranks 0, 2, 70 on rank 1"
    refused(lambda: moe(torch.ones(70 if odd else 5, D)), ValueError, text, "every rank must have the same tokens")
    with torch.autocast("cpu", torch.bfloat16, enabled=odd):
        text = "x.dtype = torch.float32 on ranks 0, 2, torch.bfloat16 on rank 1"
        refused(lambda: moe(torch.ones(5, D)), ValueError, text)
    for call in (moe, lambda x: moe.experts(x, torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2))):
        said = (ValueError, "x must have shape [..., 16]") if odd else (RuntimeError, "tensor parallelism stopped", "ranks [1]")
        refused(lambda: call(torch.ones(5, D - odd)), *said)  # noqa: B023
    assert moe(torch.ones(5, D)).isfinite().all()


def compiled_calls_fail_on_every_rank(rank, world, folder):
    def rows(dispatcher, x, experts, weights):
        found = dispatcher.dispatch(x, experts, weights)
        return found.combine(found.x)

    # Inductor's graphs of both dispatchers are in test_distributed_traffic.
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for dispatcher in (AllToAll(dist.group.WORLD, 8), FixedCapacity(dist.group.WORLD, 8, capacity=6)):
            torch._dynamo.reset()
            compiled = torch.compile(rows, fullgraph=True, backend="eager")
            arguments = _arguments(x_dtype=torch.bfloat16 if rank == ODD else torch.float32)
            refused(lambda: compiled(dispatcher, *arguments), RuntimeError, "the same D, K, dtypes, gradients, experts")  # noqa: B023


def the_rest_of_the_training_loop_compares(rank, world, folder):
    odd = rank == ODD
    moe = make(activation="relu" if odd else "silu")
    refused(lambda: data_parallel(moe), ValueError, "data_parallel needs the same settings", "config.activation")
    mesh = init_device_mesh("cpu", (world,))
    refused(lambda: expert_placement(moe, mesh), ValueError, "expert_placement needs the same settings", "config.activation")
    # A gradient that one rank lacks; the same everywhere is averaged.
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model(torch.ones(1, 2)).sum().backward()
    if odd:
        model[1].bias.grad = None
    text = "gradient of 1.bias = float32 (1,) on cpu, trained on ranks 0, 2, absent on rank 1"
    refused(lambda: average_gradients(model), ValueError, text)
    model[1].bias.grad = torch.full((1,), float(rank))
    average_gradients(model)
    assert model[1].bias.grad.item() == 1.0
    # Counts of other lengths, and another step.
    for E, rate, text in ((6, 1e-3, "experts of gate = 8 on ranks 0, 2, 6 on rank 1"), (8, 0.5, "rate = 0.001 on ranks 0, 2")):
        moe = make(num_experts=E if odd else 8, selection_bias=True)
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
        balance = LossFreeBalance(moe, optimizer, rate=rate if odd else 1e-3)
        meter = UsageMeter(moe, group=dist.group.WORLD)
        moe(torch.randn(4, D, dtype=torch.float64)).sum().backward()
        refused(optimizer.step, ValueError, "LossFreeBalance.update needs", text)
        assert moe.gate.e_score_correction_bias is not None and not moe.gate.e_score_correction_bias.any()
        balance.remove()
        if E == 6:
            refused(meter.usage, ValueError, "UsageMeter.usage needs", text)


NAMES = [
    "every_setting_is_compared",
    "what_was_changed_after_building_is_compared",
    "shared_parameters_stay_shared",
    "one_rank_that_fails_keeps_none_waiting",
    "what_may_differ_does",
    "rows_of_another_form_are_named",
    "a_refused_call_keeps_none_waiting",
    "equal_numbers_of_two_types_are_equal",
    "sizes_beyond_the_message_are_refused",
    "a_rank_without_the_kernels_says_so",
    "tensor_parallel_calls_are_compared",
    "compiled_calls_fail_on_every_rank",
    "the_rest_of_the_training_loop_compares",
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_in_processes("tests.integrations.test_distributed_agreement", NAMES, WORLD, tmp_path_factory.mktemp("world3"))


@pytest.mark.parametrize("name", NAMES)
def test_in_processes(failures, name):
    assert not failures[name], failures[name]


def test_every_field_of_the_configuration_is_described():
    """A field that is added later is compared too, unless it is named as one that each rank may choose."""
    settings = description.describe_blocks(make())
    fields = set(MoE(hidden_size=2, intermediate_size=2, num_experts=2, top_k=1).config.__dataclass_fields__)
    compared = {name.removeprefix("experts.config.") for name in settings if name.startswith("experts.config.")}
    assert fields - compared == {"save_percent"}


def test_differences_are_listed_up_to_a_limit():
    by_rank = {rank: {f"setting{i}": str(rank) for i in range(30)} | {"same": "1"} for rank in range(2)}
    text = differences(by_rank)
    assert text.startswith("setting0 = 0 on rank 0, 1 on rank 1; setting1") and text.endswith("and 18 more differences")
    assert "same" not in text
    assert differences({0: {"a": "1"}, 1: {"a": "1"}, 2: {"a": "1"}, 5: {}}) == "a = 1 on ranks 0 to 2, absent on rank 5"


def test_a_backend_without_other_processes_compares_nothing():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        moe = ExpertParallel().apply(make())
        assert moe.experts.exchange is not None
    finally:
        dist.destroy_process_group()


def test_group_is_checked_before_anything_is_compared():
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group first"):
        average_gradients(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group first"):
        data_parallel(make())
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got SimpleNamespace"):
        expert_placement(make(), SimpleNamespace())
