"""Experts of a single neuron, and value memory: tables of many small experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedonemoe import checks
from fusedonemoe.functional.calls import as_rows, records_gradients, run_portable
from fusedonemoe.ops import choice, library
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.portable import experts_neurons_portable, experts_values_portable
from fusedonemoe.ops.records import ACTIVATIONS

_ops = torch.ops.fusedonemoe
_PLAIN_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "swiglu_oai")


def _check_table(name: str, table: Tensor) -> None:
    checks.check_dim(name, table, "E, D")
    if table.shape[0] < 1 or table.shape[1] < 1:
        raise ValueError(f"{name} must have shape [E, D] with E >= 1 and D >= 1, got {tuple(table.shape)}")


def choose_tables(impl: str, *, device_type: str, dtype: torch.dtype, contiguous: bool) -> choice.Choice:
    """Choose the implementation for table experts, as :func:`fusedonemoe.ops.choose` does; ``grouped`` runs everywhere."""
    checks.check_one_of("impl", impl, ("auto", *choice.IMPLEMENTATIONS))

    reason = partial(choice.refusal, device_type=device_type, dtype=dtype, widths=(), contiguous=contiguous)
    if choice.exporting_to_onnx():
        if impl not in ("auto", "portable"):
            raise ValueError(choice.no_onnx_form(impl))
        return choice.ONNX
    if impl == "auto":
        compiled = choice.CPU_KERNELS if device_type == "cpu" else choice.GPU_KERNELS
        # What is compiled for this machine has no place in an exported graph.
        if compiled is choice.CPU_KERNELS and is_exporting():
            return choice.Choice("grouped", "an exported graph holds nothing that is compiled for this machine")
        why = reason(compiled.impl)
        return compiled if why is None else choice.Choice("grouped", f"{compiled.impl} cannot run here: {why}")
    if impl in ("cpu", "triton") and (why := reason(impl)):
        raise ValueError(f"impl={impl!r} cannot run here: {why}")
    return choice.Choice(impl, choice.ASKED_FOR)


def _gets_sparse_gradients(sparse: bool, chosen: str, *tables: Tensor) -> bool:
    """Return whether this call's gradients of the tables are sparse; raise where they were asked for and cannot be."""
    checks.check_flag("sparse", sparse)
    if not sparse or not records_gradients(*tables):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "sparse=True is for eager calls: how many rows a table's gradient has depends on the data, which torch.compile, "
            "torch.export and torch.func have no shape for. Use sparse=False there, or torch.no_grad()"
        )
    if chosen in ("dense", "portable"):
        raise ValueError(f"sparse=True needs impl='grouped', 'cpu' or 'triton': impl={chosen!r} has dense gradients only")
    return True


def _run(
    operator: str, portable: Callable[..., Tensor], flat: tuple[Any, ...], x: Tensor, *tables: Tensor, sparse: bool, impl: str
) -> Tensor:
    """Run an operator on tables in the implementation that is chosen for ``x``."""
    contiguous, device_type = all(map(Tensor.is_contiguous, tables)), x.device.type
    dtype = x.dtype if x.dtype is torch.float64 else library.autocast_dtype(device_type) or x.dtype
    chosen = choose_tables(impl, device_type=device_type, dtype=dtype, contiguous=contiguous).impl
    is_sparse = _gets_sparse_gradients(sparse, chosen, *tables)
    if chosen == "dense":
        return getattr(_ops, f"{operator}_dense")(*flat, library.BUILD)
    if chosen == "portable":
        return run_portable(operator, portable, flat)
    refuse_transforms()
    if is_sparse:
        return getattr(library, f"{operator}_sparse")(*flat, chosen)
    y = getattr(library, operator)(*flat, library.BUILD, chosen)
    return y[0] if operator == "experts_neurons" else y  # the other results are for the backward


def experts_neurons(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    down_table: Tensor,
    up_table: Tensor,
    *,
    activation: str = "silu",
    sparse: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Run each token through experts of a single neuron: ``y_t = sum_j act(<x_t, d_e>) w_tj u_e``, ``e = experts_tj``.

    ``d_e`` and ``u_e`` are rows of two tables, which may have a million. They are never gathered into a tensor of T * K rows.
    An id outside ``[0, E)`` contributes zero, and gets none.

    Args:
        x: ``[..., D]`` float64, float32, bfloat16 or float16, with ``experts`` and ``weights`` as for :func:`experts_mlp`.
        down_table: ``[E, D]``, dtype of x.
        up_table: ``[E, D]``, dtype of x.
        activation: ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``relu``, ``relu2``, ``sigmoid`` or ``identity``.
        sparse: as of ``torch.nn.Embedding``: gradients of the tables are coalesced ``torch.sparse_coo`` tensors of the rows that
            were routed to, equal to those of the dense gradient; for ``torch.optim.SGD`` and ``SparseAdam``, in eager calls.
        impl: ``"auto"``, ``"dense"`` (all E experts for every token: derivatives of every order, for small E), ``"grouped"``
            (PyTorch's bags of embeddings; widens tables of half precision), ``"cpu"`` (kernels that are compiled on first
            use; contiguous tables, no float64), ``"triton"`` (GPU kernels; no float64) or ``"portable"`` (for export: gathers
            the routed rows).

    Returns:
        ``[..., D]`` in the dtype of x. Sums are accumulated in float32 for half precision and rounded once, in a fixed order.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names, or an ``impl`` that cannot run here.
        RuntimeError: ``sparse=True`` under torch.compile, torch.export or a transform of ``torch.func``.

    Source:
        He 2024, "Mixture of a million experts" (arXiv 2407.04153), section 2.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> x, down_table, up_table = torch.randn(5, 16), torch.randn(100, 16), torch.randn(100, 16)
        >>> weights, experts = F.route(torch.randn(5, 100), top_k=8)
        >>> F.experts_neurons(x, experts, weights, down_table, up_table).shape
        torch.Size([5, 16])
    """
    checks.check_routing(x, experts, weights)
    checks.check_one_of("activation", activation, _PLAIN_ACTIVATIONS)
    checks.check_like_x("down_table", down_table, x)
    checks.check_like_x("up_table", up_table, x)
    _check_table("down_table", down_table)
    checks.check_shape("up_table", up_table, tuple(down_table.shape))
    checks.check_fits(x, down_table.shape[1], "down_table")
    flat = (as_rows(x), as_rows(experts), as_rows(weights), down_table, up_table, activation)
    tables = (down_table, up_table)
    return _run("experts_neurons", experts_neurons_portable, flat, x, *tables, sparse=sparse, impl=impl).reshape(x.shape)


def experts_values(experts: Tensor, weights: Tensor, table: Tensor, *, sparse: bool = False, impl: str = "auto") -> Tensor:
    """Sum rows of a table by routing weight: ``y_t = sum_j w_tj v_e``, ``e = experts_tj``.

    The value memory of product-key networks. Rows are read where they lie. An id outside ``[0, E)`` contributes zero.

    Args:
        experts: ``[..., K]`` ids of any integer dtype.
        weights: ``[..., K]`` of any float dtype.
        table: ``[E, D]`` float64, float32, bfloat16 or float16.
        sparse: as in :func:`experts_neurons`; so are ``impl``, the errors and the rounding.
        impl: of the computation.

    Returns:
        ``[..., D]`` in the dtype of the table.

    Source:
        Lample et al. 2019, "Large memory layers with product keys" (arXiv 1907.05242), section 3.1.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> experts, weights = torch.tensor([[2, 0]]), torch.tensor([[0.5, 2.0]])
        >>> F.experts_values(experts, weights, torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 4.0]]))
        tensor([[2., 2.]])
    """
    checks.check_choices(experts)
    checks.check_float("weights", weights)
    checks.check_float("table", table)
    _check_table("table", table)
    checks.check_shape("weights", weights, tuple(experts.shape))
    checks.check_same_device("experts", experts, "table", table.device)
    checks.check_same_device("weights", weights, "table", table.device)
    flat = (as_rows(experts), as_rows(weights), table)
    y = _run("experts_values", experts_values_portable, flat, table, table, sparse=sparse, impl=impl)
    return y.reshape(*experts.shape[:-1], table.shape[1])
