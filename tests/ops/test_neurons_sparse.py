"""Sparse gradients of the tables of single-neuron experts and value memory: the dense gradient's rows, and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedonemoe import FineGrainedMoE
from fusedonemoe import functional as F
from fusedonemoe.compat.flashmoe import FlashMoE, FlashMoEConfig
from fusedonemoe.ops import library
from tests.ops.test_neurons import NAMES, every_operator, make_inputs, random_like

TABLES = ("down_table", "up_table")
CASES = {
    "uniform": ((40, 17, 300, 6), "uniform"),
    "out_of_range": ((13, 21, 9, 4), "out_of_range"),
    "one_expert": ((70, 8, 5, 1), "one_expert"),
    "skewed": ((90, 33, 64, 7), "skewed"),
    "one_token": ((1, 16, 4, 4), "uniform"),
    "one_row": ((3, 1, 1, 1), "uniform"),
}


def run(inputs, impl, sparse, wanted=NAMES):
    """Outputs and gradients of both functions."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name in wanted) for name in NAMES}
    x, experts, weights, down, up = vars(replace(inputs, **leaves)).values()
    y = F.experts_neurons(x, experts, weights, down, up, activation="gelu", sparse=sparse, impl=impl)
    v = F.experts_values(experts, weights, up, sparse=sparse, impl=impl)
    dy = random_like(y)
    of_values = [name for name in ("weights", "up_table") if name in wanted]
    found = zip(wanted, torch.autograd.grad(y, [leaves[name] for name in wanted], dy), strict=True)
    found_of_values = torch.autograd.grad(v, [leaves[name] for name in of_values], dy)
    of_values = [f"values of {name}" for name in of_values]
    return {"output": y, "values": v, **dict(found), **dict(zip(of_values, found_of_values, strict=True))}


def assert_equals_the_dense_rows(inputs, impl):
    dense, sparse = run(inputs, impl, False), run(inputs, impl, True)
    E, D = inputs.up_table.shape
    ids = inputs.experts.to(torch.int64)
    touched = ids[(ids >= 0) & (ids < E)].unique()
    for name, tensor in sparse.items():
        if not name.endswith("table"):
            assert tensor.layout == torch.strided and torch.equal(tensor, dense[name]), name
            continue
        assert tensor.layout == torch.sparse_coo and tensor.is_coalesced() and tensor.dtype == dense[name].dtype, name
        assert tensor.shape == (E, D) and tensor.values().shape == (len(touched), D), name
        assert torch.equal(tensor.indices(), touched[None]), name
        assert torch.equal(tensor.values(), dense[name][touched]), name
        assert torch.equal(tensor.to_dense(), dense[name]), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_operator
def test_values_are_the_dense_rows_to_the_bit(case, dtype, impl):
    shape, routing = CASES[case]
    assert_equals_the_dense_rows(make_inputs(*shape, dtype=dtype, routing=routing), impl)


@every_operator
def test_no_token_and_no_expert_in_range_touch_no_row(impl):
    assert_equals_the_dense_rows(make_inputs(0, 6, 5, 2), impl)
    nowhere = torch.tensor([[-1, 5], [5, 2**40], [-(2**40), 7]])
    inputs = replace(make_inputs(3, 6, 5, 2), experts=nowhere)
    assert_equals_the_dense_rows(inputs, impl)
    assert run(inputs, impl, True)["down_table"]._nnz() == 0


@every_operator
def test_tables_of_many_cache_blocks_and_narrow_ids(impl):
    inputs = make_inputs(37, 64, 40_000, 50, routing="out_of_range")
    assert_equals_the_dense_rows(inputs, impl)
    small = make_inputs(20, 8, 100, 3)
    assert_equals_the_dense_rows(replace(small, experts=small.experts.to(torch.uint8)), impl)


@every_operator
def test_each_wanted_gradient_gets_the_bits_of_all(impl):
    inputs = make_inputs(7, 9, 50, 3)
    everything = run(inputs, impl, True)
    for name in TABLES:
        assert torch.equal(run(inputs, impl, True, ("weights", name))[name].values(), everything[name].values()), name


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made; views of the given ones are none."""

    def __init__(self, *given):
        super().__init__()
        self.elements = 0
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            is_strided = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            if is_strided and tensor.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, tensor.numel())
        return out


@every_operator
def test_no_gradient_of_the_size_of_the_table_exists(impl):
    inputs = make_inputs(5, 8, 1 << 20, 4)
    with Largest(inputs.down_table, inputs.up_table) as dense:
        run(inputs, impl, False)
    with Largest(inputs.down_table, inputs.up_table) as sparse:
        found = run(inputs, impl, True)
    assert dense.elements == 8 << 20
    assert 0 < sparse.elements <= 5 * 4 * 8
    assert found["up_table"].values().shape == (20, 8)


def test_gradcheck():
    inputs = make_inputs(4, 5, 6, 3, dtype=torch.float64, routing="out_of_range")
    leaves = [getattr(inputs, name).requires_grad_() for name in NAMES]

    def neurons(x, weights, down, up):  # gradcheck reads dense gradients, which those of table * 1 are not
        return F.experts_neurons(x, inputs.experts, weights, Dense.apply(down), Dense.apply(up), sparse=True, impl="grouped")

    class Dense(torch.autograd.Function):
        @staticmethod
        def forward(ctx, table):
            ctx.set_materialize_grads(False)
            return table.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None if gradient is None else gradient.to_dense()

    assert torch.autograd.gradcheck(neurons, leaves)
    values = [leaves[1], leaves[3]]
    assert torch.autograd.gradcheck(
        lambda w, t: F.experts_values(inputs.experts, w, Dense.apply(t), sparse=True, impl="grouped"), values
    )


@every_operator
@pytest.mark.parametrize(("T", "U"), [(5, 3), (5, 0), (0, 0)])
def test_opcheck_of_slots(T, U, impl):
    inputs = make_inputs(T, 6, 50, 3)
    slots = torch.randint(-1, U, (T, 3), generator=torch.Generator().manual_seed(0)) if U else torch.full((T, 3), -1)
    dy, s, ops = torch.randn(T, 6), torch.randn(T, 3), torch.ops.fusedonemoe
    for needs in ([True] * 4, [False, True, False, True]):
        arguments = (dy, s, *vars(inputs).values(), "silu", needs, library.BUILD, impl, slots, U)
        torch.library.opcheck(ops.experts_neurons_backward.default, arguments)
        assert ops.experts_neurons_backward(*arguments)[3].shape == (U, 6)
    arguments = (dy, inputs.experts, inputs.weights, inputs.up_table, [True, True], library.BUILD, impl, slots, U)
    torch.library.opcheck(ops.experts_values_backward.default, arguments)


# Training


def make_block(sparse, impl="auto", **options):
    torch.manual_seed(0)
    return FineGrainedMoE(16, 400, 4, num_heads=2, sparse=sparse, impl=impl, input_norm=None, **options)


def steps(block, make_optimizer, inputs):
    """Steps on the tables alone, with accumulation over two inputs each."""
    optimizer = make_optimizer([block.down_embed, block.up_embed])
    for first, second in inputs:
        optimizer.zero_grad()
        block(first).output.square().sum().backward()
        block(second).output.square().sum().backward()
        optimizer.step()
    return block


@every_operator
def test_sgd_with_accumulation_equals_dense(impl):
    x = torch.randn(3, 2, 9, 16, generator=torch.Generator().manual_seed(1))
    blocks = [steps(make_block(sparse, impl), lambda tables: torch.optim.SGD(tables, lr=0.1), x) for sparse in (True, False)]
    assert blocks[0].down_embed.grad.is_sparse and not blocks[1].down_embed.grad.is_sparse
    for name in ("down_embed", "up_embed"):
        sparse, dense = (getattr(block, name) for block in blocks)
        torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
        torch.testing.assert_close(sparse, dense)
        assert not torch.equal(sparse, getattr(make_block(True), name))


def test_a_step_of_sparse_adam_is_adams_on_the_touched_rows():
    x = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(1))
    fresh = make_block(True)
    # Without eps, which the two add at different places.
    sparse = steps(make_block(True), lambda tables: torch.optim.SparseAdam(tables, lr=0.1, eps=1e-30), x)
    dense = steps(make_block(False), lambda tables: torch.optim.Adam(tables, lr=0.1, eps=1e-30), x)
    for name in ("down_embed", "up_embed"):
        touched = getattr(sparse, name).grad.coalesce().indices()[0]
        assert 0 < len(touched) < 400
        torch.testing.assert_close(getattr(sparse, name)[touched], getattr(dense, name)[touched])
        rest = torch.ones(400, dtype=torch.bool)
        rest[touched] = False
        assert torch.equal(getattr(sparse, name)[rest], getattr(fresh, name)[rest])
        assert not torch.equal(getattr(sparse, name)[touched], getattr(fresh, name)[touched])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(use_reentrant):
    x = torch.randn(9, 16).requires_grad_()
    found = []
    for call in (lambda block: block(x)[0], lambda block: checkpoint(block, x, use_reentrant=use_reentrant)[0]):
        block = make_block(True)
        call(block).sum().backward()
        found.append(block.up_embed.grad.coalesce())
    assert torch.equal(found[0].indices(), found[1].indices()) and torch.equal(found[0].values(), found[1].values())


def test_autocast_and_flashmoe():
    config = FlashMoEConfig(16, 8, "silu", 100, 4)
    gradients: list[Any] = []
    for sparse in (True, False):
        torch.manual_seed(0)
        block = FlashMoE(config, sparse=sparse)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            block(torch.randn(6, 16, generator=torch.Generator().manual_seed(1)))[0].sum().backward()
        gradients.append(block.moe.down_embed.grad)
    assert gradients[0].is_sparse and gradients[0].dtype == torch.float32 and 0 < gradients[0]._nnz() <= 24
    assert torch.equal(gradients[0].to_dense(), gradients[1])


# Where there are none


def test_without_gradients_of_the_tables_it_has_no_effect():
    inputs = make_inputs(5, 8, 6, 3)
    x = inputs.x.requires_grad_()
    arguments: Any = vars(inputs).values()
    for impl in ("dense", "grouped", "portable"):
        expected = F.experts_neurons(*arguments, impl=impl)
        y = F.experts_neurons(*arguments, impl=impl, sparse=True)
        assert torch.equal(y, expected)
        gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)]
        assert torch.equal(*gradients)
    inputs.up_table.requires_grad_()
    with torch.no_grad():
        compiled = torch.compile(lambda *args: F.experts_neurons(*args, impl="grouped", sparse=True), fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), F.experts_neurons(*arguments))


def test_messages():
    inputs = make_inputs(5, 8, 6, 3)
    up = inputs.up_table.requires_grad_()
    arguments: Any = vars(inputs).values()
    for impl in ("dense", "portable"):
        with pytest.raises(ValueError, match=f"sparse=True needs impl='grouped', 'cpu' or 'triton': impl='{impl}' has dense"):
            F.experts_neurons(*arguments, sparse=True, impl=impl)
        with pytest.raises(ValueError, match=f"sparse=True needs .*: impl='{impl}' has dense gradients only"):
            F.experts_values(inputs.experts, inputs.weights, up, sparse=True, impl=impl)
    with pytest.raises(TypeError, match="sparse must be a bool, got 1"):
        F.experts_values(inputs.experts, inputs.weights, up, sparse=1)
    with pytest.raises(TypeError, match="sparse must be a bool, got 'yes'"):
        FineGrainedMoE(16, 16, 2, sparse="yes")


def test_graphs_and_transforms_are_refused():
    inputs = make_inputs(5, 8, 6, 3)
    up = inputs.up_table.requires_grad_()

    class Values(torch.nn.Module):
        def forward(self, table):
            return F.experts_values(inputs.experts, inputs.weights, table, sparse=True, impl="grouped") * 2

    message = "sparse=True is for eager calls: how many rows a table's gradient has depends on the data"
    with pytest.raises(RuntimeError, match=message):
        torch.compile(Values(), fullgraph=True)(up)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=message):
        torch.export.export(Values(), (up,))
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda table: Values()(table).sum())(up.detach())
    torch.compiler.reset()
    y = torch.compile(Values())(up)  # what may break its graph runs the call eagerly
    assert torch.autograd.grad(y.sum(), up)[0].is_sparse
