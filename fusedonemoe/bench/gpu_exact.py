"""The exact answers for the sampled tokens, in float64 and one expert at a time, and how far off a peer's are.

The gradient of the output is zero outside the sample, so the gradients of the weights depend on the sample alone although
the peer computes all tokens. Gradients of weight matrices are compared in their products with a few random columns, as in
:mod:`fusedonemoe.bench.exact`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fusedonemoe.bench.exact import COLUMNS
from fusedonemoe.bench.gpu_cells import GpuCell
from fusedonemoe.bench.gpu_inputs import GpuInputs
from fusedonemoe.bench.peers import relative_error

OUTPUT, IDS, ELSEWHERE = "outputs", "ids", "rows outside the sample"
# ||v - v64|| / ||v64|| that a right answer may have. Peers round the routing weights and each expert's rows as well; the
# gradients of logits are differences of nearly equal numbers. Zeros are off by 1, a missing expert of 128 by 9e-2.
BUDGETS: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {OUTPUT: 1e-5, "gradients": 2e-5, "logits": 1e-4},
    torch.float16: {OUTPUT: 4e-3, "gradients": 5e-3, "logits": 1e-2},
    torch.bfloat16: {OUTPUT: 2e-2, "gradients": 3e-2, "logits": 5e-2},
}
# swiglu_oai as GPT-OSS has it.
ALPHA, LIMIT = 1.702, 7.0

# The output, ``[T, D]``, or weights and ids of a router; then gradients by the names of the tensors.
Answer = dict[str, Tensor]


def _activated(z: Tensor, cell: GpuCell) -> Tensor:
    """What an expert hands to its down-projection, written out once more: a check of our own code needs another's."""
    if not cell.gated:
        return functional.gelu(z) if cell.activation == "gelu" else functional.silu(z)
    gate, up = (z[:, 0::2], z[:, 1::2]) if cell.layout == "interleaved" else z.chunk(2, dim=1)
    if cell.activation == "swiglu_oai":
        gate = gate.clamp(max=LIMIT)
        return (up.clamp(-LIMIT, LIMIT) + 1) * gate * torch.sigmoid(ALPHA * gate)
    assert cell.activation == "silu", cell.activation
    return gate * torch.sigmoid(gate) * up


def exact_routing(cell: GpuCell, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids ``[T, K]``, best first, by the formula."""
    if not cell.score_first:
        picked, experts = logits_TE.topk(cell.K, dim=1)
        return picked.softmax(1), experts
    weights, experts = logits_TE.softmax(1).topk(cell.K, dim=1)
    return (weights / weights.sum(1, keepdim=True) if cell.norm_topk_prob else weights), experts


def _random_columns(cell: GpuCell, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """For every weight matrix the columns that its gradient is multiplied by."""
    found = {}
    for name, weight in weights.items():
        if weight.dim() == 3:
            generator = torch.Generator().manual_seed(9)
            columns = torch.randn(weight.shape[-1], COLUMNS, generator=generator, dtype=torch.float64, device="cpu")
            found[name] = columns.to(weight.device)
    return found


def exact_answer(cell: GpuCell, inputs: GpuInputs) -> Answer:
    """Everything a call returns for the first draw, restricted to the sample, in float64."""
    sample, draw = inputs.sample, inputs.draws[0]
    if cell.operator == "router":
        weights_RK, experts_RK = exact_routing(cell, draw[0][sample].double())
        return {OUTPUT: weights_RK, IDS: experts_RK}
    training = cell.mode == "training"
    x_RD = draw[0][sample].double().requires_grad_(training)
    given = draw[2 if cell.operator == "merged" else 1][sample].double().requires_grad_(training)
    with torch.set_grad_enabled(training):
        weights_RK, experts_RK = (given, draw[1][sample]) if cell.operator == "merged" else exact_routing(cell, given)
    width = cell.F if cell.operator == "merged" else cell.D
    y_RD = x_RD.new_zeros(sample.numel(), width)
    dx_RD, dweights_RK = torch.zeros_like(x_RD), torch.zeros_like(weights_RK)
    columns = _random_columns(cell, inputs.weights)
    gradients: dict[str, Tensor] = {}
    if training:
        for name, weight in inputs.weights.items():
            shape = (*weight.shape[:2], COLUMNS) if name in columns else weight.shape
            gradients[name] = x_RD.new_zeros(shape)
    for e in experts_RK.unique().tolist():
        row, choice = (experts_RK == e).nonzero(as_tuple=True)
        rows = x_RD.detach()[row].requires_grad_(training)
        own = {name: weight[e].double().requires_grad_(training) for name, weight in inputs.weights.items()}
        scale = weights_RK.detach()[row, choice]
        with torch.set_grad_enabled(training):
            out = _expert(cell, rows, own)
        y_RD.index_add_(0, row, out.detach() * scale[:, None])
        if training:
            assert inputs.dy is not None
            dy = inputs.dy[sample][row].double()
            dweights_RK[row, choice] = (dy * out.detach()).sum(1)
            drows, *dweights = torch.autograd.grad(out, [rows, *own.values()], dy * scale[:, None])
            dx_RD.index_add_(0, row, drows)
            for name, gradient in zip(own, dweights, strict=True):
                gradients[name][e] = gradient @ columns[name] if name in columns else gradient
    answer = {OUTPUT: y_RD}
    if training:
        dgiven = dweights_RK if cell.operator == "merged" else torch.autograd.grad(weights_RK, given, dweights_RK)[0]
        answer |= {"x": dx_RD, _given_name(cell): dgiven, **gradients}
    return answer


def _expert(cell: GpuCell, rows: Tensor, own: dict[str, Tensor]) -> Tensor:
    """One expert's result for its rows, without the routing weight."""
    if cell.operator == "merged":
        return rows @ own["proj"]
    up, down = own["gate_up_proj"], own["down_proj"]
    if not cell.transposed:
        up, down = up.t(), down.t()
    z = rows @ up
    hidden = _activated(z + own["gate_up_bias"] if cell.bias else z, cell)
    out = hidden @ down
    return out + own["down_bias"] if cell.bias else out


def _given_name(cell: GpuCell) -> str:
    return "weights" if cell.operator == "merged" else "logits"


def gradient_names(cell: GpuCell, weights: dict[str, Tensor]) -> list[str]:
    """What a training step is differentiated with respect to, in the order of its inputs."""
    return ["x", _given_name(cell), *weights]


def errors_of(cell: GpuCell, inputs: GpuInputs, answer: Answer, exact: Answer) -> dict[str, float]:
    """How far off an answer to the first draw is; in training, one to a gradient that is zero outside the sample.

    Args:
        cell: what was computed.
        inputs: of the cell.
        answer: of a peer, for all tokens.
        exact: from :func:`exact_answer`, for the sample.

    Returns:
        ``||v - v64|| / ||v64||`` of every tensor; infinity for a wrong shape, other ids, a gradient where none can be, and
        what is not finite.
    """
    if answer.keys() != exact.keys():
        return {", ".join(sorted(answer.keys() ^ exact.keys())): float("inf")}
    columns = _random_columns(cell, inputs.weights)
    outside = torch.ones(cell.T, dtype=torch.bool, device=inputs.sample.device)
    outside[inputs.sample] = False
    errors = {}
    for name, wanted in exact.items():
        value = answer[name]
        full = inputs.weights[name].shape if name in inputs.weights else (cell.T, *wanted.shape[1:])
        if value.shape != full:
            errors[name] = float("inf")
        elif name == IDS:
            errors[name] = 0.0 if torch.equal(value[inputs.sample].long(), wanted) else float("inf")
        elif name in columns:
            errors[name] = relative_error(torch.stack([v.double() @ columns[name] for v in value]), wanted)
        elif name in inputs.weights:
            errors[name] = relative_error(value, wanted)
        else:
            errors[name] = relative_error(value[inputs.sample], wanted)
            rest = value[outside]
            right = rest.isfinite().all() if name == OUTPUT else (rest == 0).all()
            if not right:
                errors[ELSEWHERE] = float("inf")
    return errors


def disagreements(errors: dict[str, float], dtype: torch.dtype) -> list[str]:
    """The tensors whose error no right answer has in this dtype; NaN is one."""
    budgets = BUDGETS[dtype]

    def budget(name: str) -> float:
        return budgets[OUTPUT] if name in (OUTPUT, IDS, ELSEWHERE) else budgets.get(name, budgets["gradients"])

    return [
        name if name in (OUTPUT, IDS, ELSEWHERE) else f"gradients of {name}"
        for name, error in errors.items()
        if not error <= budget(name)
    ]
