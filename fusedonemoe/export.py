"""Models for other runtimes: the implementation whose graph has none of this library's operators."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fusedonemoe.config import MoEConfig
from fusedonemoe.ops.cpu import build

__all__ = ["kernel_library", "portable"]


def kernel_library() -> Path:
    """Return the file of the compiled CPU kernels of this machine, which it compiles if need be.

    A process without Python that loads it and calls its function ``int fusedonemoe_load()`` has the operators that a package of
    AOTInductor with ``impl="cpu"`` calls.

    Raises:
        RuntimeError: there are no CPU kernels here; the message says why.

    Example:
        >>> from fusedonemoe.export import kernel_library
        >>> kernel_library().suffix
        '.so'
    """
    try:
        return build.library_file()
    except build.Unavailable as error:
        raise RuntimeError(f"there are no CPU kernels here: {error}") from error


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, Any]]:
    """List the places where layers name their implementation: module, attribute, its value, and the portable value."""
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), MoEConfig):
            yield module, "config", config, dataclasses.replace(config, impl="portable")
        ours = any(kind.__module__.startswith("fusedonemoe.") for kind in type(module).__mro__)
        if ours and isinstance(impl := getattr(module, "impl", None), str):
            yield module, "impl", impl, "portable"


@contextmanager
def portable(model: nn.Module) -> Iterator[nn.Module]:
    """Let every layer of this library in a model run ``impl="portable"`` inside a ``with``, which gives the model.

    What is exported there holds torch's own operators only: it has a form in ONNX, and packages of AOTInductor run where
    there is no Python. ``torch.onnx.export`` does this by itself for layers with ``impl="auto"``.

    Raises:
        TypeError, ValueError: ``model`` is no module, or has no layer of this library in it.

    Example:
        >>> import torch
        >>> from fusedonemoe import MoE
        >>> from fusedonemoe.export import portable
        >>> moe = MoE(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, impl="cpu").eval()
        >>> with portable(moe):
        ...     program = torch.export.export(moe, (torch.randn(5, 16),), dynamic_shapes=({0: torch.export.Dim("T")},))
        >>> any("fusedonemoe" in str(node.target) for node in program.graph.nodes), moe.config.impl
        (False, 'cpu')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    places = list(_places(model))
    if not places:
        raise ValueError(f"model must have a layer of this library in it, got a {type(model).__name__} without one")
    for module, name, _, switched in places:
        setattr(module, name, switched)
    try:
        yield model
    finally:
        for module, name, before, _ in places:
            setattr(module, name, before)
