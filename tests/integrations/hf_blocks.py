"""Every MoE configuration that the installed transformers has, found by looking, and a small block of each."""

import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

D, F, E, K = 24, 16, 8, 3
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_dense_experts")
# Set where a configuration has it and it is not None, in this order: later names may be aliases of earlier ones.
_SIZES: dict[str, Any] = (
    dict.fromkeys(_COUNTS, E)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_experts_per_token"), K)
    | {"hidden_size": D, "ffn_hidden_size": F, "expert_ffn_hidden_size": F}
    | {"moe_intermediate_size": F, "intermediate_size": F}
    | dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "share_expert_dim"), F + 4)
    | dict.fromkeys(("shared_experts_intermediate_size", "shared_intermediate_size"), F + 4)
)


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a value for each layer, and no common one
        return True


@functools.cache
def config_classes() -> dict[str, type[PretrainedConfig]]:
    """By class name, every configuration that counts experts."""
    found = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/configuration_*.py")):
        if "expert" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for cls in vars(module).values():
            own = inspect.isclass(cls) and issubclass(cls, PretrainedConfig) and cls.__module__ == module.__name__
            if own and any(_has(cls(), name) for name in _COUNTS):
                found[cls.__name__] = cls
    return found


def small_config(cls: type[PretrainedConfig], **fields: Any) -> Any:
    """A configuration with small sizes and everything else as it is by default."""
    config: Any = cls()
    for name, value in (_SIZES | fields).items():
        if name in fields or (_has(config, name) and not isinstance(getattr(config, name, 0), list)):
            setattr(config, name, value)
    return config


def _shared_letters(a: str, b: str) -> int:
    """How long both begin alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def block_classes(cls: type[PretrainedConfig]) -> Iterator[type[nn.Module]]:
    """The modules beside a configuration's model, those first whose names share most with the configuration's."""
    module = importlib.import_module(cls.__module__.replace(".configuration_", ".modeling_"))
    modules = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    modules = [c for c in modules if c.__module__ == module.__name__ and not issubclass(c, transformers.PreTrainedModel)]
    yield from sorted(modules, key=lambda c: -_shared_letters(c.__name__, cls.__name__))


def build_block(cls: type[PretrainedConfig], config: Any) -> nn.Module:
    """The smallest module that holds experts and a router.

    Raises:
        LookupError: there is none.
    """
    tried = []
    for block_class in block_classes(cls):
        source = inspect.getsource(block_class.__init__)
        if not ("self.experts =" in source or "self.input_linear = JetMoeParallelExperts" in source):
            continue
        if not any(f"self.{name} =" in source for name in ("gate", "router")):
            continue
        for args in ((config,), (config, 0), (config, F)):
            try:
                return randomised(block_class(*args)).eval()
            except Exception as error:
                tried.append(f"{block_class.__name__}: {type(error).__name__}: {error}")
    raise LookupError(f"{cls.__name__}: no block; {tried}")


def randomised(block: nn.Module) -> nn.Module:
    """Weights of a size at which every path matters: logits of order one, selection biases that change the choice."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if tensor.is_floating_point():
                scale = 0.1 if tensor.dim() < 2 or "bias" in name else tensor.shape[-1] ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return block


def output_of(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The block's hidden states, in the shape of x."""
    y = block(x)
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
