"""The exact answers for the sampled tokens, in float64 and one expert at a time, and the errors of a peer.

The gradients of the experts' weights have as many elements as the weights; in float64 they would not fit next to them. So
each expert's gradient ``G`` is compared in its product ``G R`` with a fixed random matrix of few columns: the product of a sum
of outer products ``sum_n a_n b_n^T`` is ``sum_n a_n (b_n^T R)``, and a gradient that is wrong anywhere has another one
(Freivalds, 1977). The gradient of the output is zero outside the sample, so the gradients of the weights depend on the sample
alone although the peer computes all tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusedonemoe.bench.inputs import Inputs
from fusedonemoe.bench.peers import BUDGET, activated, relative_error, route
from fusedonemoe.bench.workloads import Cell

OUTPUT, IDS, ELSEWHERE = "outputs", "ids", "rows outside the sample"
# With one column, the rounding of a single token's gradient would be divided by a product that may be close to zero.
COLUMNS = 4
# ||g - g64|| / ||g64|| that a right gradient may have. Those of a routing are differences of nearly equal numbers. Zeros are
# off by 1, one expert of 128 that is missing by 9e-2.
# GPU kernels round more often, and sum in other orders. fp16 is measured on GPUs alone.
GRADIENT_BUDGET = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
ROUTING_BUDGET = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GPU_BUDGETS = ({**GRADIENT_BUDGET, torch.float32: 2e-5, torch.bfloat16: 3e-2}, {**ROUTING_BUDGET, torch.float32: 1e-4})
INFINITE = float("inf")

# The outputs, ids of a router, and gradients by name. A gradient may be a list with one tensor for each expert, or None.
Answer = Mapping[str, Tensor | Sequence[Tensor | None] | None]


def gradient_of(name: str) -> str:
    """Return the name of a tensor's gradient in an answer."""
    return f"gradients of {name}"


def _random_columns(weight: Tensor) -> Tensor:
    """Return the columns that the gradient of a weight matrix is multiplied by."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(weight.shape[-1], COLUMNS, generator=generator, dtype=torch.float64, device="cpu").to(weight.device)


def exact_answer(cell: Cell, inputs: Inputs) -> dict[str, Tensor]:
    """Return everything that a call computes of the first draw, restricted to the sample, in float64."""
    sample, training = inputs.sample, cell.mode == "training"
    draw = dict(zip(inputs.names, (t[sample] for t in inputs.draws[0]), strict=True))
    wide = {name: t.double().requires_grad_(training) if t.is_floating_point() else t for name, t in draw.items()}
    with torch.set_grad_enabled(training):
        if "weights" in wide:
            weights_RK, experts_RK = wide["weights"], wide["experts"]
        else:
            if "router" in inputs.weights:
                wide["router"] = inputs.weights["router"].double().requires_grad_(training)
                wide["logits"] = wide["x"] @ wide["router"].t()
            weights_RK, experts_RK = route(cell, wide["logits"])
    if cell.operator == "router":
        return {OUTPUT: weights_RK, IDS: experts_RK}
    x_RD, shares_RK = wide["x"].detach(), weights_RK.detach()
    y = x_RD.new_zeros(sample.numel(), cell.F if cell.operator == "merged" else cell.D)
    dx, dweights = torch.zeros_like(x_RD), torch.zeros_like(shares_RK)
    stacks = {name: w for name, w in inputs.weights.items() if name != "router"}
    columns = {name: _random_columns(w) for name, w in stacks.items() if w.dim() == 3}
    gradients = {n: x_RD.new_zeros(*w.shape[:2], *([COLUMNS] if n in columns else [])) for n, w in stacks.items()}
    for e in experts_RK.unique().tolist():
        row, choice = (experts_RK == e).nonzero(as_tuple=True)
        own = {name: w[e].double() for name, w in stacks.items()}
        leaves = [x_RD[row], shares_RK[row, choice, None]]
        with torch.set_grad_enabled(training):
            if training:
                # The gradient of C, which is zero, in a matrix W + C R^T is the product G R of the gradient G of W.
                added = {name: torch.zeros_like(gradient[e]) for name, gradient in gradients.items()}
                leaves = [leaf.requires_grad_() for leaf in (*leaves, *added.values())]
                own = {n: w + (added[n] @ columns[n].t() if n in columns else added[n]) for n, w in own.items()}
            out = _expert(cell, leaves[0], own) * leaves[1]
        y.index_add_(0, row, out.detach())
        if training:
            assert inputs.dy_checked is not None
            drows, dshares, *of_weights = torch.autograd.grad(out, leaves, inputs.dy_checked[sample][row].double())
            dx.index_add_(0, row, drows)
            dweights[row, choice] = dshares[:, 0]
            for gradient, of_weight in zip(gradients.values(), of_weights, strict=True):
                gradient[e] = of_weight
    if not training:
        return {OUTPUT: y}
    routing = {name: t for name, t in wide.items() if t.requires_grad and t.is_leaf}
    of_routing = torch.autograd.grad(weights_RK, list(routing.values()), dweights, allow_unused=True)
    found = dict(zip(routing, of_routing, strict=True))
    found["x"] = dx if found["x"] is None else dx + found["x"]
    return {OUTPUT: y} | {gradient_of(name): gradient for name, gradient in (found | gradients).items()}


def _expert(cell: Cell, rows: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Return one expert's result, without the routing weight."""
    if cell.operator == "merged":
        return rows @ own["proj"]
    up, down = (own[name] if cell.transposed else own[name].t() for name in ("gate_up_proj", "down_proj"))
    z = rows @ up
    out = activated(z + own["gate_up_bias"] if cell.bias else z, cell) @ down
    return out + own["down_bias"] if cell.bias else out


def errors_of(cell: Cell, inputs: Inputs, answer: Answer, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute ``||v - v64|| / ||v64||`` of every tensor of an answer to the first draw.

    It is infinity for a wrong shape, wrong ids, a missing tensor, a gradient where none can be, and a value that is not finite.
    """
    if other := answer.keys() ^ exact.keys():
        return dict.fromkeys(sorted(other), INFINITE)
    outside = torch.ones(cell.T, dtype=torch.bool, device=inputs.sample.device)
    outside[inputs.sample] = False
    errors = {}
    for name, wanted in exact.items():
        value, weight = answer[name], inputs.weights.get(name.removeprefix(gradient_of("")))
        if weight is not None:
            errors[name] = _error_of_gradient(value, weight, wanted)
        elif not isinstance(value, Tensor) or value.shape != (cell.T, *wanted.shape[1:]):
            errors[name] = INFINITE
        elif name == IDS:
            errors[name] = 0.0 if torch.equal(value[inputs.sample].long(), wanted) else INFINITE
        else:
            errors[name] = relative_error(value[inputs.sample], wanted)
            rest = value[outside]
            if not (rest.isfinite().all() if name == OUTPUT else (rest == 0).all()):
                errors[ELSEWHERE] = INFINITE
    return errors


def _error_of_gradient(value: Tensor | Sequence[Tensor | None] | None, weight: Tensor, wanted: Tensor) -> float:
    shapes = [None if g is None else g.shape for g in ([] if value is None else value)]
    if len(shapes) != weight.shape[0] or any(shape not in (None, weight.shape[1:]) for shape in shapes):
        return INFINITE
    assert value is not None
    if weight.dim() == 2:
        return relative_error(value, wanted) if isinstance(value, Tensor) else INFINITE
    # float64 is slow to convert to on CPUs, and a GPU may round float32 products to TF32.
    columns = _random_columns(weight).to(torch.float64 if weight.is_cuda else torch.float32)
    found = [wanted.new_zeros(wanted.shape[1:]) if g is None else (g.to(columns.dtype) @ columns).double() for g in value]
    return relative_error(torch.stack(found), wanted)


def disagreements(errors: Mapping[str, float], dtype: torch.dtype, device_type: str) -> list[str]:
    """Return the tensors with an error that no right answer has in this dtype; NaN is one."""
    gradient, routing = GPU_BUDGETS if device_type == "cuda" else (GRADIENT_BUDGET, ROUTING_BUDGET)
    budgets = dict.fromkeys((OUTPUT, IDS, ELSEWHERE), BUDGET[dtype])
    budgets |= dict.fromkeys(map(gradient_of, ("router", "logits")), routing[dtype])
    return [name for name, error in errors.items() if not error <= budgets.get(name, gradient[dtype])]
