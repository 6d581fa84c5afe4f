"""Modules with packed weights: what uses the copy, what drops it, and that a stale one is refused, compiled calls included."""

import copy
import pickle

import pytest
import torch

from fusedonemoe import Experts, MoE, MoEConfig, explain
from fusedonemoe.ops.cpu import native
from fusedonemoe.testing import make_mlp_inputs

_REFUSAL = native.refusal(torch.float32, True)
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
STALE = "changed or replaced after they were packed"


def small_block(**options):
    torch.manual_seed(0)
    return MoE(hidden_size=24, intermediate_size=20, num_experts=4, top_k=2, **{"impl": "cpu", **options})


@needs_kernels
def test_a_block_packs_and_unpacks(packed_uses):
    moe, x = small_block(), torch.randn(7, 24)
    with torch.no_grad():
        plain = moe(x)
        moe.prepack()
        assert torch.equal(moe(x), plain) and len(packed_uses) == 1
        assert moe.experts.packed_bytes == moe.experts._packed.nbytes > 0
        assert "packed for inference" in str(explain(moe, x)) and explain(moe, x).packed_bytes == moe.experts.packed_bytes
        moe.unpack()
        assert torch.equal(moe(x), plain) and len(packed_uses) == 1
        assert moe.experts.packed_bytes == explain(moe, x).packed_bytes == 0


@needs_kernels
def test_a_training_step_makes_the_copy_stale():
    moe, x = small_block(), torch.randn(7, 24)
    moe.prepack()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    moe(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad(), pytest.raises(RuntimeError, match=STALE):
        moe(x)
    moe.prepack()
    with torch.no_grad():
        packed = moe(x)
        moe.unpack()
        assert torch.equal(packed, moe(x))


@needs_kernels
def test_loading_other_weights_makes_the_copy_stale():
    moe, other, x = small_block(), small_block(), torch.randn(7, 24)
    for assign in (False, True):
        moe.prepack()
        moe.load_state_dict(other.state_dict(), assign=assign)
        with torch.no_grad(), pytest.raises(RuntimeError, match=STALE):
            moe(x)


@needs_kernels
def test_copies_casts_and_files_leave_the_packed_weights_out():
    moe, x = small_block(), torch.randn(7, 24)
    keys = set(moe.state_dict())
    moe.prepack()
    assert set(moe.state_dict()) == keys
    with torch.no_grad():
        for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
            assert other.experts.packed_bytes == 0 and torch.equal(other(x), moe(x))
        assert moe.experts.packed_bytes > 0
        assert moe.bfloat16()(x.bfloat16()).dtype == torch.bfloat16 and moe.experts.packed_bytes == 0


@needs_kernels
def test_under_autocast_the_parameters_are_read(packed_uses):
    moe, x = small_block(), torch.randn(7, 24)
    moe.prepack()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(moe(x)).all()
    assert not packed_uses


@needs_kernels
def test_other_implementations_refuse_to_pack():
    with pytest.raises(RuntimeError, match="packed weights are for impl='auto' or 'cpu', got impl='grouped'"):
        small_block(impl="grouped").prepack()


@needs_kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_reads_packed_weights_and_refuses_stale_ones(dynamic, packed_uses):
    experts = Experts(MoEConfig(hidden_size=24, intermediate_size=20, num_experts=4, top_k=2, impl="cpu"))
    inputs = make_mlp_inputs(7, 24, 20, 4, 2)
    compiled = torch.compile(experts, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(inputs.x, inputs.experts, inputs.weights)
        experts.prepack()
        assert torch.equal(compiled(inputs.x, inputs.experts, inputs.weights), plain) and len(packed_uses) == 1
        assert torch.equal(compiled(inputs.x[:3], inputs.experts[:3], inputs.weights[:3]), plain[:3]) and len(packed_uses) == 2
        experts.down_proj.mul_(2)
        with pytest.raises(RuntimeError, match=STALE):
            compiled(inputs.x, inputs.experts, inputs.weights)
        experts.prepack()
        assert torch.allclose(compiled(inputs.x, inputs.experts, inputs.weights), 2 * plain) and len(packed_uses) == 3


@needs_kernels
def test_inductor_and_inference_mode_too(packed_uses):
    moe, x = small_block(), torch.randn(7, 24)
    moe.prepack()
    with torch.inference_mode():
        assert torch.equal(moe(x), moe(x.clone()))
        torch.testing.assert_close(torch.compile(moe, fullgraph=True)(x), moe(x))
    assert len(packed_uses) == 4


@needs_kernels
def test_an_exported_graph_has_the_weights_alone():
    moe, x = small_block(impl="auto"), torch.randn(7, 24)
    moe.prepack()
    with torch.no_grad():
        names = [str(node.target) for node in torch.export.export(moe, (x,)).graph.nodes]
    assert not any("packed" in name for name in names)
