"""The exact answers, in float64 and one expert at a time, and how far off a peer's are.

The gradients of the experts' weights have as many elements as the weights; in float64 they would not fit beside them. So
each expert's gradient ``G`` is compared in its product ``G R`` with a fixed random matrix of few columns: that of a sum of
outer products, ``G = sum_n a_n b_n^T``, is ``sum_n a_n (b_n^T R)``, and a gradient that is wrong anywhere has another one
(Freivalds, 1977).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedonemoe.bench.peers import BUDGET, relative_error
from fusedonemoe.bench.steps import ExpertGradients, Named, Step
from fusedonemoe.bench.workloads import BlockInputs, Cell, Inputs, KeyInputs, MergedInputs, NeuronInputs
from fusedonemoe.ops import neurons
from fusedonemoe.ops.neurons import NeuronNeeds, ValueNeeds

OUTPUT = "outputs"
# With one column, the rounding of a single token's gradient would be divided by a product that may be close to zero.
COLUMNS = 4
# ||g - g64|| / ||g64|| that a right gradient may have. The router's is a difference of nearly equal numbers; a gradient with
# one expert of 128 missing is off by 9e-2, and a transposed or an empty one by 1 and more.
GRADIENT_BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROUTER_BUDGET = {torch.float32: 5e-5, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ExactStep:
    """What a training step is compared with, all in float64.

    Attributes:
        output: ``[T, D]``.
        x: gradient ``[T, D]``.
        router: gradient ``[E, D]``.
        gate_up_proj: gradient times ``random_DC``, ``[E, 2F, C]``.
        down_proj: gradient times ``random_FC``, ``[E, D, C]``.
        random_DC: ``[D, C]``, C columns.
        random_FC: ``[F, C]``.
    """

    output: Tensor
    x: Tensor
    router: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    random_DC: Tensor
    random_FC: Tensor


Exact = Tensor | ExactStep | Named


def exact_answer(cell: Cell, inputs: Inputs) -> Exact:
    """The answer for the first input, from the weights as rounded to the cell's dtype."""
    if isinstance(inputs, NeuronInputs):
        return _exact_neurons(cell, inputs)
    if isinstance(inputs, KeyInputs):
        a, b = (half.double().gather(1, ids) for half, ids in zip(inputs.xs[0].unbind(1), _keys(cell, inputs), strict=True))
        return {OUTPUT: (a + b).softmax(1), "experts": inputs.experts[0]}
    if cell.mode == "training":
        assert isinstance(inputs, BlockInputs)
        return exact_step(cell, inputs)
    return exact_output(cell, inputs)


def _keys(cell: Cell, inputs: KeyInputs) -> tuple[Tensor, Tensor]:
    keys = round(cell.E**0.5)
    return inputs.experts[0] // keys, inputs.experts[0] % keys


def _exact_neurons(cell: Cell, inputs: NeuronInputs) -> Named:
    """By the formulation in float64, which the tests hold to the oracle."""
    x, weights, dy = (stack[0].double() for stack in (inputs.xs, inputs.weights, inputs.dys))
    experts, down, up = inputs.experts[0], inputs.down_table.double(), inputs.up_table.double()
    names: tuple[str, ...] = ("weights", "up_table")
    gradients: tuple[Tensor, ...] = ()
    if cell.operator == "values":
        y = neurons.experts_values(experts, weights, up)
        if cell.mode == "training":
            gradients = neurons.experts_values_backward(dy, experts, weights, up, ValueNeeds(True, True))
    else:
        names = ("x", "weights", "down_table", "up_table")
        y, s = neurons.experts_neurons(x, experts, weights, down, up, "silu")
        if cell.mode == "training":
            needs = NeuronNeeds(True, True, True, True)
            gradients = neurons.experts_neurons_backward(dy, s, x, experts, weights, down, up, "silu", needs)
    return {OUTPUT: y} | {f"gradients of {name}": gradient for name, gradient in zip(names, gradients, strict=False)}


def _experts_in_float64(*stacks: Tensor) -> Callable[[int], list[Tensor]]:
    """A function from an expert to its weights, which holds them in the same memory every time: fresh pages cost more."""
    buffers = [torch.empty(stack.shape[1:], dtype=torch.float64, device="cpu") for stack in stacks]
    return lambda e: [buffer.copy_(stack[e]) for buffer, stack in zip(buffers, stacks, strict=True)]


def exact_output(cell: Cell, inputs: Inputs) -> Tensor:
    """The output for the first input, ``[T, F]`` when merged, else ``[T, D]``."""
    x_TD, experts_TK = inputs.xs[0].double(), inputs.experts[0]
    if isinstance(inputs, MergedInputs):
        weights_TK = inputs.weights[0].double()
        weights_of = _experts_in_float64(inputs.proj)
        y = x_TD.new_zeros(cell.T, cell.F)
    else:
        assert isinstance(inputs, BlockInputs)
        weights_TK = (x_TD @ inputs.router.double().t()).gather(1, experts_TK).softmax(1)
        weights_of = _experts_in_float64(inputs.gate_up_proj, inputs.down_proj)
        y = x_TD.new_zeros(cell.T, cell.D)
    for e in experts_TK.unique().tolist():
        token, choice = (experts_TK == e).nonzero(as_tuple=True)
        rows = x_TD[token]
        if isinstance(inputs, MergedInputs):
            (proj,) = weights_of(e)
            out = rows @ proj
        else:
            gate_up, down = weights_of(e)
            gate, up = (rows @ gate_up.t()).chunk(2, dim=1)
            out = (gate * torch.sigmoid(gate) * up) @ down.t()
        y.index_add_(0, token, out * weights_TK[token, choice, None])
    return y


def exact_step(cell: Cell, inputs: BlockInputs) -> ExactStep:
    """Output and gradients for the first input, written out by hand."""
    x_TD, dy_TD, experts_TK = inputs.xs[0].double(), inputs.dys[0].double(), inputs.experts[0]
    router_ED = inputs.router.double()
    weights_TK = (x_TD @ router_ED.t()).gather(1, experts_TK).softmax(1)
    generator = torch.Generator().manual_seed(9)
    random_DC, random_FC = (torch.randn(n, COLUMNS, generator=generator, device="cpu").double() for n in (cell.D, cell.F))
    weights_of = _experts_in_float64(inputs.gate_up_proj, inputs.down_proj)
    y, dx, dweights_TK = torch.zeros_like(x_TD), torch.zeros_like(x_TD), torch.zeros_like(weights_TK)
    gate_up_EGC, down_EDC = (x_TD.new_zeros(cell.E, n, COLUMNS) for n in (2 * cell.F, cell.D))
    for e in experts_TK.unique().tolist():
        token, choice = (experts_TK == e).nonzero(as_tuple=True)
        gate_up, down = weights_of(e)
        rows, weights, dy = x_TD[token], weights_TK[token, choice, None], dy_TD[token]
        gate, up = (rows @ gate_up.t()).chunk(2, dim=1)
        sigmoid = torch.sigmoid(gate)
        hidden = gate * sigmoid * up
        out = hidden @ down.t()
        y.index_add_(0, token, out * weights)
        dweights_TK[token, choice] = (dy * out).sum(1)
        dout = dy * weights
        dhidden = dout @ down
        # silu'(g) = s (1 + g (1 - s))
        dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        dgate_up = torch.cat((dgate, dhidden * gate * sigmoid), dim=1)
        dx.index_add_(0, token, dgate_up @ gate_up)
        gate_up_EGC[e] = dgate_up.t() @ (rows @ random_DC)
        down_EDC[e] = dout.t() @ (hidden @ random_FC)
    # Softmax over the selected logits alone; the others have no part in the output.
    dlogits_TK = weights_TK * (dweights_TK - (weights_TK * dweights_TK).sum(1, keepdim=True))
    dlogits_TE = x_TD.new_zeros(cell.T, cell.E).scatter_(1, experts_TK, dlogits_TK)
    dx += dlogits_TE @ router_ED
    return ExactStep(y, dx, dlogits_TE.t() @ x_TD, gate_up_EGC, down_EDC, random_DC, random_FC)


def _product(gradients: ExpertGradients, random: Tensor, exact: Tensor) -> Tensor:
    """Every expert's gradient times the random matrix, in the shape of the exact one; a gradient of None is zero."""
    wanted = (exact.shape[1], random.shape[0])
    if len(gradients) != exact.shape[0] or any(g is not None and g.shape != wanted for g in gradients):
        return torch.empty(0, device="cpu")  # relative_error knows what to make of another shape
    random = random.float()
    return torch.stack([torch.zeros(exact.shape[1:], device="cpu") if g is None else g.float() @ random for g in gradients])


def errors_of(answer: Tensor | Step | Named, exact: Exact) -> dict[str, float]:
    """How far off an answer is: ``||v - v64|| / ||v64||`` of every tensor in it; ids are equal, or infinitely far off."""
    if isinstance(exact, dict):
        given = answer if isinstance(answer, dict) else {}
        return {name: _error(given[name], tensor) if name in given else float("inf") for name, tensor in exact.items()}
    if isinstance(exact, Tensor):
        return {OUTPUT: relative_error(answer, exact) if isinstance(answer, Tensor) else float("inf")}
    if not isinstance(answer, Step):
        return {
            OUTPUT: relative_error(answer, exact.output) if isinstance(answer, Tensor) else float("inf"),
            "gradients": float("inf"),
        }
    pairs = {
        OUTPUT: (answer.output, exact.output),
        "gradients of x": (answer.x, exact.x),
        "gradients of router": (answer.router, exact.router),
        "gradients of gate_up_proj": (_product(answer.gate_up_proj, exact.random_DC, exact.gate_up_proj), exact.gate_up_proj),
        "gradients of down_proj": (_product(answer.down_proj, exact.random_FC, exact.down_proj), exact.down_proj),
    }
    return {name: relative_error(*pair) for name, pair in pairs.items()}


def _error(actual: Tensor, exact: Tensor) -> float:
    if exact.dtype.is_floating_point:
        return relative_error(actual, exact)
    return 0.0 if torch.equal(actual, exact) else float("inf")


def disagreements(errors: dict[str, float], dtype: torch.dtype) -> list[str]:
    """The tensors whose error no right answer has in this dtype; NaN is one."""
    budgets = {OUTPUT: BUDGET, "gradients of router": ROUTER_BUDGET}
    return [name for name, error in errors.items() if not error <= budgets.get(name, GRADIENT_BUDGET)[dtype]]
