"""The layers, eager and compiled."""

import copy

import torch

from .layers import BACKEND, COMPILED, LAYERS, inputs, make, output
from .subjects import DEVICES, Subject, _Forward, _Operator, _Subjects


class Eager(_Operator):
    params = (DEVICES, LAYERS)
    param_names = ("device", "layer")

    def subject(self, device, layer):
        return _subject(make(layer, device), inputs(device), exact=True)


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


def _subject(run, x, module=None, exact=False):
    module = module or run
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    wide = copy.deepcopy(module).double() if exact else None
    return _LayerSubject(lambda x: output(run(x)), (x,), (lambda x: output(wide(x))) if exact else None, trained, wide)


class _LayerSubject(Subject):
    """A subject whose parameters are a module's, so that gradients reach them by ``backward``."""

    def __init__(self, call, leaves, exact, trained, wide):
        super().__init__(call, leaves, exact)
        object.__setattr__(self, "trained", trained)
        object.__setattr__(self, "wide", wide)

    def gradients(self):
        x = self.leaves[0].detach().requires_grad_()
        return self._gradients(self.call(x), [x, *self.trained])

    def in_float64(self):
        trained = [parameter for parameter in self.wide.parameters() if parameter.requires_grad]
        return _LayerSubject(self.exact, (self.leaves[0].double(),), None, trained, None)
