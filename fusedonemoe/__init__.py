"""FusedOneMoE: the mixture-of-experts block for torch.compile-d models."""

import sys

from fusedonemoe import balance, functional, layers, ops
from fusedonemoe.config import MoEConfig
from fusedonemoe.explanation import Explanation, explain
from fusedonemoe.layers import *  # noqa: F403  # its list of public names is the one there
from fusedonemoe.tuning import Tuned, tune

__version__ = "0.1.0.dev0"

# These modules have moved. Programs import them by these names, and pickles of their classes hold the names.
_MOVED = {name: f"layers.{name}" for name in ("fine_grained", "fused_one_moe", "lora", "quantization", "quantized", "routers")}
_MOVED |= {"shared_expert": "layers.shared_expert", "usage": "balance.counting", "ops.quantized": "ops.formats.quantized_weight"}
for _old, _new in _MOVED.items():
    _module = sys.modules[f"{__name__}.{_old}"] = sys.modules[f"{__name__}.{_new}"]
    setattr(sys.modules[f"{__name__}.{_old}".rpartition(".")[0]], _old.rpartition(".")[2], _module)

__all__ = ["Explanation", "MoEConfig", "Tuned", "__version__", "balance", "explain", "functional", "ops", "tune"]
__all__ += layers.__all__
