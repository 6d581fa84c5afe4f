"""Whatever writes into packed parameters writes the weights that the next call reads: optimizers, collectives, copies, views."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fusedonemoe import MoE
from fusedonemoe import functional as F
from fusedonemoe.integrations.distributed import ExpertParallel, TensorParallel
from fusedonemoe.ops.cpu import native

_REFUSAL = native.refusal(torch.float32, True)
pytestmark = pytest.mark.skipif(_REFUSAL is not None, reason=f"no CPU kernels: {_REFUSAL}")
WEIGHTS = ("gate_up_proj", "down_proj")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def small_block(seed=0, **options):
    """Odd sizes, so that pairs, columns and panels have padding."""
    torch.manual_seed(seed)
    return MoE(hidden_size=17, intermediate_size=11, num_experts=4, top_k=2, **{"impl": "cpu", **options})


def tokens(dtype=torch.float32):
    return torch.randn(7, 17, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights_of(moe):
    return [moe.experts.get_parameter(name) for name in WEIGHTS]


def plain_of(moe):
    plain = MoE(moe.config, dtype=moe.gate.weight.dtype)
    plain.load_state_dict(moe.state_dict())
    return plain


@torch.no_grad()
def assert_never_stale(moe, *calls):
    """Eager and compiled calls compute what a fresh module computes with the unpacked weights."""
    x = tokens(moe.gate.weight.dtype)
    assert moe.experts.packed_bytes
    results = [call(x) for call in (moe, *calls)]
    moe.unpack()
    expected = plain_of(moe)(x)
    assert all(torch.equal(result, expected) for result in results)
    return expected


def as_gradients(moe, gradients):
    """Home gradients as gradients of the packed parameters."""
    packed = F.pack_experts(*gradients)
    for parameter, gradient in zip(weights_of(moe), (packed.up, packed.down), strict=True):
        parameter.grad = gradient


OPTIMIZERS = {
    "AdamW": lambda p, **how: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **how),
    "SGD": lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, **how),
    "Adagrad": lambda p, **how: torch.optim.Adagrad(p, lr=0.1, **how),
}


@pytest.mark.parametrize("how", ["fused", "foreach", "plain"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimizer_steps_the_weights_themselves(kind, how, dtype):
    if (kind, how, dtype) == ("SGD", "fused", torch.bfloat16):
        pytest.skip("torch's own fused SGD leaves whole vectors of bfloat16 as they were")
    moe, plain = small_block(dtype=dtype), small_block(dtype=dtype)
    flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}[how]
    moe.prepack()
    optimizers = [OPTIMIZERS[kind](weights_of(block), **flags) for block in (moe, plain)]
    with torch.no_grad():
        before = moe(tokens(dtype))
    for step in range(20):
        gradients = [torch.randn(w.shape, generator=torch.Generator().manual_seed(step)).to(dtype) for w in weights_of(plain)]
        as_gradients(moe, gradients)
        for parameter, gradient in zip(weights_of(plain), gradients, strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    after = assert_never_stale(moe)
    assert not torch.equal(before, after)
    # Optimizers round otherwise where a vector of elements ends, which is elsewhere in panels: a few roundings in 20 steps.
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for actual, expected in zip(weights_of(moe), weights_of(plain), strict=True):
        torch.testing.assert_close(actual, expected, **close)


@pytest.mark.parametrize("how", ["fused", "foreach", "plain"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("packed_first", [False, True])
def test_optimizer_state_of_the_other_form_is_refused(packed_first, kind, how):
    flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}[how]
    moe = small_block()
    if packed_first:
        moe.prepack()
    optimizer = OPTIMIZERS[kind](weights_of(moe), **flags)
    for parameter in weights_of(moe):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    if packed_first:
        moe.unpack()
    else:
        moe.prepack()
    optimizer.step()  # without a gradient nothing is touched
    before = [parameter.detach().clone() for parameter in weights_of(moe)]
    for parameter in weights_of(moe):
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=rf"{kind} has \w+ of shape .* is {'unpacked' if packed_first else 'packed'} now"):
        optimizer.step()
    assert all(torch.equal(parameter, value) for parameter, value in zip(weights_of(moe), before, strict=True))
    if packed_first:
        moe.zero_grad()
        moe.prepack()
    else:
        moe.unpack()
    optimizer.step()  # as it was


def test_gradients_of_before_are_refused():
    moe, x = small_block(), tokens()
    optimizer = torch.optim.AdamW(moe.parameters(), fused=True)
    for _ in range(20):
        moe(x).square().sum().backward()
        with pytest.raises(RuntimeError, match="has a gradient that waits"):
            moe.prepack()
        assert not moe.experts.packed_bytes
        optimizer.step()
        optimizer.zero_grad()
        moe.prepack()
        with pytest.raises(RuntimeError, match="packed weights are for inference"):
            moe(x)
        with pytest.raises(RuntimeError, match="gradient"):
            moe.experts.down_proj.grad = torch.zeros(4, 17, 11)
        optimizer.step()  # there is no gradient, so nothing moves
        assert_never_stale(moe)


def test_a_compiled_optimizer_still_compiles():
    moe = small_block()
    moe.prepack()
    optimizer = torch.optim.AdamW(weights_of(moe), lr=0.1, foreach=True)
    for parameter in weights_of(moe):
        parameter.grad = torch.ones_like(parameter)
    torch.compile(lambda: optimizer.step(), backend="aot_eager")()
    assert_never_stale(moe)


WRITES = {
    "copy_": lambda p: p.copy_(torch.randn_like(p)),
    "data": lambda p: p.data.mul_(2),
    "data replaced": lambda p: setattr(p, "data", p.data * 2),
    "detach": lambda p: p.detach().neg_(),
    "set_": lambda p: p.set_(torch.randn_like(p)),
    "numpy": lambda p: p.detach().numpy().__imul__(2) if p.dtype != torch.bfloat16 else p.mul_(2),
    "storage": lambda p: p.detach().view(-1).untyped_storage().copy_(torch.randn(p.numel()).to(p.dtype).untyped_storage()),
    "average": lambda p: p.lerp_(torch.randn_like(p), 0.5),
    "clamp": lambda p: p.clamp_(-0.05, 0.05),
    "foreach": lambda p: torch._foreach_mul_([p], 2),
    "noise": lambda p: torch.nn.init.normal_(p),
    "broadcast": lambda p: dist.broadcast(p.mul_(2), 0),
    "all_reduce": lambda p: dist.all_reduce(p.mul_(2)),
    "gather": lambda p: dist.all_gather_into_tensor(p, torch.randn_like(p)),
    "scatter": lambda p: dist.scatter(p, [torch.randn_like(p)], 0),
}


@pytest.fixture
def group(request):
    """A gloo group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("write", WRITES)
@every_dtype
def test_a_write_reaches_every_call(write, dtype, group):
    moe = small_block(dtype=dtype)
    moe.prepack()
    parameters = weights_of(moe)
    with torch.no_grad():
        before = moe(tokens(dtype))
        for parameter in parameters:
            WRITES[write](parameter)
    assert all(a is b for a, b in zip(parameters, weights_of(moe), strict=True))
    after = assert_never_stale(moe)
    assert not torch.equal(before, after)


def test_a_compiled_module_sees_every_write(group):
    moe = small_block()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for write in WRITES.values():
        moe.prepack()
        with torch.no_grad():
            compiled(tokens())
            for parameter in weights_of(moe):
                write(parameter)
        assert_never_stale(moe, compiled)


def test_a_vector_of_all_parameters_goes_and_comes():
    moe = small_block()
    moe.prepack()
    with torch.no_grad():
        vector = torch.nn.utils.parameters_to_vector(moe.parameters())
        torch.nn.utils.vector_to_parameters(vector * 2, moe.parameters())
    assert_never_stale(moe)
    other = small_block()
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(other.parameters()), other.parameters())
    with pytest.raises(ValueError, match="is a part of a larger piece of memory"):
        other.prepack()


def test_an_average_of_models_is_of_their_weights():
    moe = small_block()
    averaged = torch.optim.swa_utils.AveragedModel(moe)
    moe.prepack()
    packed_average = torch.optim.swa_utils.AveragedModel(moe)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.mul_(3)
    packed_average.update_parameters(moe)
    packed_average.update_parameters(moe)
    assert_never_stale(packed_average.module)
    assert_never_stale(moe)
    averaged.update_parameters(moe)  # both in home form now
    home = dict(averaged.module.named_parameters())
    assert torch.equal(home["experts.down_proj"], moe.experts.down_proj)


# Parallelism, before and after


@pytest.mark.parametrize("parallel", [ExpertParallel, TensorParallel])
def test_parallel_experts_are_refused_and_packed_ones_are_unpacked(parallel, group):
    moe, expected = small_block(), small_block()
    moe.prepack()
    parallel().apply(moe)
    assert not moe.experts.packed_bytes
    optimizer = torch.optim.AdamW(moe.parameters(), fused=True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="parallel experts cannot be packed: they have an exchange"):
            moe.prepack()
        moe(tokens()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected.load_state_dict(moe.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(moe(tokens()), expected(tokens()))
    packed = small_block()
    packed.prepack()
    packed.experts.exchange = moe.experts.exchange
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"the weights are packed, which .* cannot use: call unpack\(\) first"),
    ):
        packed(tokens())


def test_fully_sharded_experts_are_refused(group):
    mesh = init_device_mesh("cpu", (1,))
    moe = small_block(dtype=torch.float32)
    fully_shard(moe, mesh=mesh)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1, fused=True)
    moe.unshard()
    with pytest.raises(RuntimeError, match="FSDP manages these experts"):
        moe.prepack()
    moe.reshard()
    with pytest.raises(RuntimeError, match="FSDP manages these experts"):
        moe.prepack()
    for _ in range(3):
        moe(tokens()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = small_block()
    plain.load_state_dict({name: value.full_tensor() for name, value in moe.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(moe(tokens()), plain(tokens()))


def test_packed_experts_that_are_sharded_later_are_refused_at_the_call(group):
    moe = small_block()
    moe.prepack()
    fully_shard(moe, mesh=init_device_mesh("cpu", (1,)))
    for call in (lambda: moe(tokens()), moe.state_dict, moe.unpack, lambda: moe.to(torch.bfloat16)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="FSDP manages these experts"):
            call()


def test_data_parallelism_around_packed_experts(group):
    moe, x = small_block(), tokens()
    wrapped = DistributedDataParallel(moe)
    with torch.no_grad():
        expected = wrapped(x)
        moe.prepack()
        assert torch.equal(wrapped(x), expected)
    with pytest.raises(RuntimeError, match="packed weights are for inference"):
        wrapped(x)
    moe.unpack()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        wrapped(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            expected = wrapped(x)
            moe.prepack()
            assert torch.equal(wrapped(x), expected)
            assert_never_stale(moe)
    moe.prepack()
    around = DistributedDataParallel(moe)
    with torch.no_grad():
        assert torch.equal(around(x), expected)
