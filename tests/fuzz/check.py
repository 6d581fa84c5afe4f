"""Runs one case: forward and backward in the drawn circumstances, each result against its bound."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz import higher
from tests.fuzz.bounds import Array, Bounded
from tests.fuzz.draw import Draw, laid_out
from tests.fuzz.trial import Expected, Given, Trial, widened

SLACK = 2.0  # of each bound, which already counts every rounding once


@dataclass
class Outcome:
    """The findings of a case.

    Attributes:
        failures: one line each.
        compared: how many tensors were held against a bound.
        unmeasured: how many of them have a bound that zeros would meet, though the answer is not zero.
    """

    failures: list[str] = field(default_factory=list)
    compared: int = 0
    unmeasured: int = 0

    def hold(self, name: str, actual: Tensor, exact: Bounded | Array) -> None:
        """Compare one tensor."""
        values = widened(actual.to_dense() if actual.layout == torch.sparse_coo else actual)
        if not isinstance(exact, Bounded):
            if actual.is_floating_point() or values.size != exact.size or (values.reshape(exact.shape) != exact).any():
                self.failures.append(f"{name}: {values.tolist()}, expected {exact.tolist()}")
            return
        if values.size != exact.value.size:
            self.failures.append(f"{name}: shape {tuple(actual.shape)}, expected {exact.value.shape}")
            return
        bound = exact.written(actual.dtype)
        values, allowed = values.reshape(bound.value.shape), SLACK * bound.error
        known = np.isfinite(allowed)
        self.compared += 1
        size = np.abs(bound.value)
        self.unmeasured += bool((size[known] > 0).any() and not (size > allowed)[known].any())
        with np.errstate(invalid="ignore"):
            bad = known & ~(np.abs(values - bound.value) <= allowed)
        if bad.any():
            at = np.unravel_index(
                np.argmax(np.where(bad, np.nan_to_num(np.abs(values - bound.value), nan=np.inf), -1)), bad.shape
            )
            self.failures.append(
                f"{name}: {int(bad.sum())} of {bad.size} values are off; at {tuple(map(int, at))} it is {values[at]!r}, exact "
                f"{bound.value[at]!r}, allowed {allowed[at]:.3g}"
            )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal numbers at equal places, any NaN equal to any other."""
    a, b = (t.coalesce() if t.layout == torch.sparse_coo else t for t in (a, b))
    if a.layout == torch.sparse_coo:
        a, b = a.to_dense(), b.to_dense()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else torch.equal(a, b)


def _restrided(tensor: Tensor) -> Tensor:
    """Equal values in other strides, as an off-loader may give them back; expanded where all rows are equal."""
    if tensor.dim() == 0 or not tensor.numel():
        return tensor
    if tensor.shape[0] > 1 and bool((tensor == tensor[:1]).all()):
        return tensor[:1].clone().expand(tensor.shape)
    return laid_out(tensor, "transposed" if tensor.dim() > 1 else "stepped")


HOOKS = {"none": None, "clone": Tensor.clone, "restride": _restrided}


@contextlib.contextmanager
def circumstances(chosen: dict[str, Any], trial: Trial) -> Iterator[None]:
    """Grad mode, default device, autocast, saved-tensor hooks and threads of a call."""
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        if chosen["grad mode"] == "no_grad":
            stack.enter_context(torch.no_grad())
        elif chosen["grad mode"] == "inference_mode":
            stack.enter_context(torch.inference_mode())
        if chosen["default device"] == "meta":
            stack.enter_context(torch.device("meta"))
        if trial.autocast is not None:
            stack.enter_context(torch.autocast("cpu", dtype=trial.autocast))
        if (unpack := HOOKS[chosen["saved tensors"]]) is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack))
        torch.set_num_threads(chosen["threads"])
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _upstream(draw: Draw, output: Tensor, layout: str) -> Tensor:
    """A gradient of an output in a drawn layout."""
    scale = draw.pick("size of the upstream gradient", (1.0, 1.0, 1e-3))
    gradient = torch.from_numpy(np.asarray(scale * draw.normal(*output.shape))).to(output.dtype)
    return laid_out(gradient, layout)


@dataclass
class Run:
    """Outputs by name, the upstream gradients of those that have one, and gradients by the input's name."""

    outputs: dict[str, Tensor]
    upstream: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def run_once(trial: Trial, draw: Draw, wanted: list[str], upstream: dict[str, Tensor] | None = None) -> Run:
    """One call, with gradients of the inputs that are ``wanted``; compiled where that was drawn."""
    chosen = draw.chosen
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in trial.inputs.items()}
    call = trial.call
    if chosen["compiled"]:
        torch._dynamo.reset()
        call = torch.compile(trial.call, backend="aot_eager", fullgraph=True)
    with circumstances(chosen, trial):
        outputs = dict(zip(trial.outputs, call(leaves), strict=True))
    recorded = {name: output for name, output in outputs.items() if output.requires_grad}
    if not wanted or not recorded:
        return Run(outputs, {}, {})
    if upstream is None:
        upstream = {name: _upstream(draw, output, chosen["layout of the upstream gradient"]) for name, output in recorded.items()}
    sources = [leaves[name] for name in wanted]
    found = torch.autograd.grad(list(recorded.values()), sources, [upstream[name] for name in recorded], allow_unused=True)
    return Run(outputs, upstream, dict(zip(wanted, found, strict=True)))


def draw_circumstances(draw: Draw, trial: Trial) -> list[str]:
    """Draws how the call is made, and which inputs need gradients."""
    mode = draw.pick("grad mode", ("grad",) * 6 + ("no_grad", "inference_mode"))
    draw.pick("default device", ("cpu",) * 6 + ("meta",))
    draw.pick("saved tensors", ("none",) * 5 + ("clone", "restride", "restride"))
    draw.pick("threads", (1, 1, 1, 1, 2))
    draw.pick("layout of the upstream gradient", ("contiguous", "transposed", "stepped", "expanded"))
    draw.chosen["compiled"] = False
    if mode != "grad":
        return []
    return [name for name in trial.differentiable if draw.chance(0.7)]


def check(trial: Trial, draw: Draw, compiled: bool) -> Outcome:
    """Run a case and hold everything it gives against what it has to be."""
    outcome = Outcome()
    wanted = draw_circumstances(draw, trial)
    draw.chosen["compiled"] = compiled and trial.compiles
    if draw.chosen["compiled"]:
        draw.chosen |= {"default device": "cpu", "saved tensors": "none"}
    before = {name: tensor.clone() for name, tensor in trial.inputs.items()}
    run = run_once(trial, draw, wanted)
    for name, tensor in trial.inputs.items():
        if not same_bits(tensor, before[name]):
            outcome.failures.append(f"the call changed its input {name}")
    with np.errstate(all="ignore"):
        expected = trial.exact(Given(trial.inputs, run.outputs, run.upstream))
        outcome.failures += expected.wrong
        for name, (dtype, shape) in trial.outputs.items():
            output = run.outputs[name]
            if output.dtype != dtype or output.shape != shape:
                found = f"{output.dtype} {tuple(output.shape)}"
                outcome.failures.append(f"{name} is {found}, expected {dtype} {shape}")
        for name, answer in expected.outputs.items():
            if answer is not None:
                outcome.hold(name, run.outputs[name], answer)
        if run.upstream and not expected.wrong:
            hold_gradients(outcome, trial, run, expected.gradients)
        if not outcome.failures and run.upstream and trial.autocast is None and draw.chosen["default device"] == "cpu":
            check_higher(outcome, trial, draw, wanted, run, expected)
    if not outcome.failures and not draw.chosen["compiled"]:
        check_bits(outcome, trial, draw, wanted, run)
    return outcome


def check_higher(outcome: Outcome, trial: Trial, draw: Draw, wanted: list[str], run: Run, expected: Expected) -> None:
    """A derivative in forward mode or a second one, now and then."""
    compiled, order = draw.chosen["compiled"], draw.pick("derivative", ("first",) * 12 + ("forward mode", "second"))
    if compiled or order == "forward mode":
        outcome.failures += higher.forward_mode(trial, draw, wanted, run.upstream, expected, compiled)
    elif order == "second":
        outcome.failures += higher.second_derivative(trial, draw, wanted, run.upstream, run.outputs)


def hold_gradients(outcome: Outcome, trial: Trial, run: Run, exact: dict[str, Bounded]) -> None:
    """Dtype, shape and values of every gradient."""
    for name, gradient in run.gradients.items():
        leaf = trial.inputs[name]
        if gradient is None:
            outcome.failures.append(f"{name} has no gradient")
        elif gradient.dtype != leaf.dtype or gradient.shape != leaf.shape:
            found, asked = (f"{t.dtype} {tuple(t.shape)}" for t in (gradient, leaf))
            outcome.failures.append(f"the gradient of {name} is {found}, of an input {asked}")
        else:
            outcome.hold(f"gradient of {name}", gradient, exact[name])


def check_bits(outcome: Outcome, trial: Trial, draw: Draw, wanted: list[str], run: Run) -> None:
    """Equal bits in a second call, and of a token alone where that is promised."""
    again = run_once(trial, draw, wanted, run.upstream)
    for name, output in run.outputs.items():
        if not same_bits(output, again.outputs[name]):
            outcome.failures.append(f"{name} has other bits in a second call")
    for name, gradient in run.gradients.items():
        other = again.gradients[name]
        if gradient is not None and other is not None and not same_bits(gradient, other):
            outcome.failures.append(f"the gradient of {name} has other bits in a second call")
    if not (trial.batch_invariant and trial.tokens):
        return
    rows = {name: trial.inputs[name].reshape(-1, *trial.inputs[name].shape[-dims:]) for name, dims in trial.tokens.items()}
    count = next(iter(rows.values())).shape[0]
    if count < 2:
        return
    t = int(draw.rng.integers(count))
    alone = trial.inputs | {name: tensor[t : t + 1] for name, tensor in rows.items()}
    with circumstances(draw.chosen | {"saved tensors": "none"}, trial):
        outputs = dict(zip(trial.outputs, trial.call(alone), strict=True))
    for name, output in run.outputs.items():
        if not same_bits(output.reshape(count, -1)[t : t + 1], outputs[name].reshape(1, -1)):
            outcome.failures.append(f"{name} of token {t} has other bits alone")
