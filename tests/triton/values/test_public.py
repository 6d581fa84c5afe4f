"""The public functions and modules with impl="triton": values, gradients, and which kernels a call takes."""

import pytest
import torch

from fusedonemoe import FusedOneMoE, MoE, explain, tune, tuning
from fusedonemoe import functional as F
from fusedonemoe.ops.triton import rules
from fusedonemoe.testing import make_merged_inputs, make_mlp_inputs

SIZES = {"hidden_size": 40, "intermediate_size": 24, "num_experts": 6, "top_k": 2}


def gradients(call, leaves):
    y = call()
    seed = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, leaves, seed)


def assert_close(ours, theirs, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.double(), b.double()
        assert (a - b).norm() <= tolerance * b.norm() and b.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 33])
def test_the_mlp_with_all_gradients(T, dtype, device):
    inputs = make_mlp_inputs(T, 40, 24, 6, 2, dtype=dtype, bias=True, requires_grad=True, device=device)
    leaves = [t for t in vars(inputs).values() if t is not None and t.requires_grad]

    def call(impl):
        return F.experts_mlp(
            *(inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj),
            gate_up_bias=inputs.up_bias,
            down_bias=inputs.down_bias,
            impl=impl,
        )

    assert_close(gradients(lambda: call("triton"), leaves), gradients(lambda: call("dense"), leaves), dtype)


def test_the_merged_projection_with_all_gradients(device):
    inputs = make_merged_inputs(21, 24, 40, 6, 2, requires_grad=True, device=device)
    leaves = [inputs.x, inputs.weights, inputs.proj]

    def call(impl):
        return F.experts_merged(inputs.x, inputs.experts, inputs.weights, inputs.proj, impl=impl)

    assert_close(gradients(lambda: call("triton"), leaves), gradients(lambda: call("dense"), leaves))


def test_ids_that_are_every_second_column_of_a_tensor(device):
    mlp = make_mlp_inputs(9, 16, 8, 4, 2, requires_grad=True, device=device)
    merged = make_merged_inputs(9, 16, 8, 4, 2, requires_grad=True, device=device)
    experts = mlp.experts.repeat_interleave(2, 1)[:, ::2]
    assert not experts.is_contiguous() and torch.equal(experts, mlp.experts)
    for function, inputs, parameters in (
        (F.experts_mlp, mlp, (mlp.up_proj, mlp.down_proj)),
        (F.experts_merged, merged, (merged.proj,)),
    ):
        leaves = [inputs.x, inputs.weights, *parameters]
        ours, theirs = (
            gradients(lambda ids=ids, f=function, i=inputs, p=parameters: f(i.x, ids, i.weights, *p, impl="triton"), leaves)
            for ids in (experts, mlp.experts)
        )
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("T", [1, 3, 40])
def test_without_gradients_few_rows_need_no_plan(T, device, monkeypatch):
    from fusedonemoe.ops.triton import decode, mlp

    taken = []

    def noting(name, body):
        def noted(*args, **options):
            taken.append(name)
            return body(*args, **options)

        return noted

    for name, module in {"decode": decode, "sorted": mlp}.items():
        monkeypatch.setattr(module, "experts_mlp", noting(name, module.experts_mlp))
    inputs = make_mlp_inputs(T, 40, 24, 6, 2, device=device)
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
    with torch.no_grad():
        assert_close([F.experts_mlp(*arguments, impl="triton")], [F.experts_mlp(*arguments, impl="dense")])
    assert taken == ["decode" if rules.few_rows(2 * T, 6) else "sorted"]
    assert rules.few_rows(2, 6) and not rules.few_rows(80, 6)


def test_a_whole_block_in_training(device):
    torch.manual_seed(0)
    block = MoE(**SIZES, impl="triton", shared_intermediate_size=8).to(device)
    plain = MoE(**SIZES, impl="dense", shared_intermediate_size=8).to(device)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(3, 11, 40, device=device, requires_grad=True)
    ours = gradients(lambda: block(x), [x, *block.parameters()])
    theirs = gradients(lambda: plain(x), [x, *plain.parameters()])
    assert_close(ours, theirs)
    assert block.experts.gate_up_proj.grad is None


def test_the_original_block(device):
    torch.manual_seed(0)
    block, plain = (FusedOneMoE(24, 40, groups=6, is_sparse=True, topk=2, impl=impl).to(device) for impl in ("triton", "dense"))
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 9, 24, device=device, requires_grad=True)
    assert_close(gradients(lambda: block(x), [x, *block.parameters()]), gradients(lambda: plain(x), [x, *plain.parameters()]))


def test_checkpointing_repeats_the_block(device):
    torch.manual_seed(0)
    block = MoE(**SIZES, impl="triton").to(device)
    x = torch.randn(20, 40, device=device, requires_grad=True)
    leaves = [x, *block.parameters()]
    again = gradients(lambda: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False), leaves)
    assert all(map(torch.equal, again, gradients(lambda: block(x), leaves)))


def test_autocast_casts_for_the_kernels(device):
    inputs = make_mlp_inputs(12, 40, 24, 6, 2, device=device)
    arguments = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj)
    with torch.no_grad():
        with torch.autocast(device, torch.bfloat16):
            y = F.experts_mlp(*arguments, impl="triton")
        halves = [a.bfloat16() if a.is_floating_point() and a is not inputs.weights else a for a in arguments]
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.experts_mlp(*halves, impl="triton"))


def test_an_inference_call_refuses_a_backward(device):
    inputs = make_mlp_inputs(4, 16, 8, 4, 2, device=device, requires_grad=True)
    tensors = (inputs.x, inputs.experts, inputs.weights, inputs.up_proj, inputs.down_proj, None, None)
    y = torch.ops.fusedonemoe.experts_mlp_inference(*tensors, "silu", "gate_up", 1.0, 1.0, 0)
    with pytest.raises(RuntimeError, match="experts_mlp_inference keeps nothing for a backward pass; experts_mlp does"):
        y.sum().backward()


def test_tuning_measures_the_layer_itself(device, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDONEMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(rules, "_read", None)
    seen = []

    def fake_time(call):
        call()
        seen.append(rules.tiles_for("", torch.float32, 1, 1, 1, gated=True))
        return 2.0 if len(seen) == 2 else 3.0

    monkeypatch.setattr(tuning, "_median_milliseconds", fake_time)
    monkeypatch.setattr(tuning, "candidates", lambda best, name: [best._replace(up=best.up._replace(GROUP_M=7))])
    block = MoE(**SIZES, impl="triton").to(device)
    found = tune(block, 20)
    assert (found.milliseconds, found.milliseconds_by_rule, found.tried, found.complete) == (2.0, 3.0, len(seen), True)
    assert found.tiles == seen[1] and found.tiles.up.GROUP_M == 7
    assert "x16" not in explain(block, tokens=20).configuration or found.tiles.up.BLOCK_K == 16
    assert rules.tiles_for(found.layer.arch, torch.float32, 20 * 2 / 6, 40, 24, gated=True) == found.tiles
    with pytest.raises(ValueError, match=r"^tokens must be more than 3 for this layer: so few take the path without tiles$"):
        tune(block, 3, backward=False)


@pytest.mark.parametrize("T", [1, 19])
def test_single_neuron_experts_with_all_gradients(T, device):
    torch.manual_seed(0)
    x, down, up, weights = (torch.randn(*shape, device=device) for shape in ((T, 24), (30, 24), (30, 24), (T, 5)))
    experts = torch.randint(-1, 31, (T, 5), device=device)
    leaves = [t.requires_grad_() for t in (x, weights, down, up)]

    def call(impl):
        return F.experts_neurons(x, experts, weights, down, up, impl=impl)

    assert_close(gradients(lambda: call("triton"), leaves), gradients(lambda: call("dense"), leaves))


def test_the_value_memory_with_all_gradients(device):
    torch.manual_seed(0)
    table, weights = torch.randn(30, 24, device=device, requires_grad=True), torch.randn(9, 5, device=device, requires_grad=True)
    experts = torch.randint(-1, 31, (9, 5), device=device)

    def call(impl):
        return F.experts_values(experts, weights, table, impl=impl)

    assert_close(gradients(lambda: call("triton"), [weights, table]), gradients(lambda: call("dense"), [weights, table]))
