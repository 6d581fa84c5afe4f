"""Compiling the layers, and importing the library."""

import os
import shutil
import tempfile

import torch

# asv's server imports this file before it forks, so that a benchmark does not wait for them.
import torch._dynamo
import torch._inductor.compile_fx

from .layers import BACKEND, COMPILED, inputs, make, output
from .subjects import DEVICES


class Graphs:
    """The number of dynamo's graphs of a layer, forward and backward, for four numbers of tokens: 1 without graph breaks."""

    params = (DEVICES, COMPILED)
    param_names = ("device", "layer")

    def setup(self, device, layer):
        self.layer = make(layer, device)

    def track_graphs(self, device, layer):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(self.layer, dynamic=True, backend="aot_eager")
        for tokens in (48, 33, 7, 128):
            output(compiled(inputs(device, tokens))).sum().backward()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    track_graphs.unit = "graphs"


class Compile:
    """The first call of a compiled layer, with an empty cache on disk."""

    params = (DEVICES, ("MoE",))
    param_names = ("device", "layer")
    number = repeat = rounds = 1
    warmup_time = 0
    timeout = 300

    def setup(self, device, layer):
        self.before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        self.folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="asv-inductor-")
        torch._inductor.config.compile_threads = 1  # none of its worker processes outlives a benchmark
        # Headers and probes of the compiler, which any first graph pays for, are not the layer's.
        first = torch.compile(lambda x: x.sin() + x.sum(-1, keepdim=True), backend=BACKEND)
        first(inputs(device).requires_grad_()).sum().backward()
        self.layer, self.x = make(layer, device), inputs(device)
        output(self.layer(self.x)).sum().backward()

    def teardown(self, device, layer):
        shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if self.before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.before

    def time_forward_backward(self, device, layer):
        output(torch.compile(self.layer, fullgraph=True, dynamic=True, backend=BACKEND)(self.x)).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()


class Import:
    """``import fusedonemoe`` after ``import torch``."""

    number = rounds = 1
    repeat = 3

    def timeraw_import(self):
        return "import fusedonemoe", "import torch"
