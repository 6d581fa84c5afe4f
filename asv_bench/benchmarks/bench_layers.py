"""The layers, eager and compiled."""

import copy
from dataclasses import dataclass

import torch

from .layers import BACKEND, COMPILED, LAYERS, inputs, make, output
from .subjects import DEVICES, Subject, _Forward, _Operator, _Subjects


class Eager(_Operator):
    params = (DEVICES, LAYERS)
    param_names = ("device", "layer")

    def subject(self, device, layer):
        module = make(layer, device)
        return _subject(module, inputs(device), module)


class _Compiled(_Subjects):
    """``torch.compile`` with ``fullgraph`` and a dynamic number of tokens. ``setup`` compiles what is measured, and no more."""

    params = (DEVICES, COMPILED)
    param_names = ("device", "layer")

    def subject(self, device, layer):
        torch._inductor.config.compile_threads = 1  # none of its worker processes outlives a benchmark
        module = make(layer, device)
        return _subject(torch.compile(module, fullgraph=True, dynamic=True, backend=BACKEND), inputs(device), module)


class CompiledForward(_Compiled, _Forward):
    """Without gradients."""


class CompiledTraining(_Compiled):
    def prepare(self):
        self.measured.gradients()

    def time_forward_backward(self, device, layer):
        self.measured.gradients()


def _subject(run, x, module):
    return _LayerSubject(lambda x: output(run(x)), (x,), module=module)


@dataclass(frozen=True)
class _LayerSubject(Subject):
    """A subject with a module's parameters, which get gradients too."""

    module: torch.nn.Module | None = None

    def gradients(self):
        x = self.leaves[0].detach().requires_grad_()
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return self._gradients(self.call(x), [x, *trained])

    def in_float64(self):
        wide = copy.deepcopy(self.module).double()
        return _subject(wide, self.leaves[0].double(), wide)
