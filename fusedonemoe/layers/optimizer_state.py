"""Optimizer state of parameters that were packed: it has the form that the parameter had when the state was made.

Fused optimizers read state and parameter as flat memory and do not compare their shapes, so state of the other form would mix
up the elements, or reach past the end. A step with such a pair is refused.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

# The two shapes of each parameter that was packed once, as long as it lives.
_forms: Any = WeakIdKeyDictionary()


def remember_forms(parameter: nn.Parameter, home: torch.Size, panels: torch.Size) -> None:
    """Have the steps of optimizers checked for this parameter from now on."""
    _watch_steps()
    _forms[parameter] = (home, panels)


@cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_refuse_other_form)


def _refuse_other_form(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # a traced step compares shapes
        return
    for parameter, shapes in _forms.items():
        state = optimizer.state.get(parameter) if parameter.grad is not None else None
        for name, value in (state or {}).items():
            if isinstance(value, Tensor) and value.shape in shapes and value.shape != parameter.shape:
                form = "packed" if parameter.shape == shapes[1] else "unpacked"
                raise RuntimeError(
                    f"{type(optimizer).__name__} has {name} of shape {tuple(value.shape)} for a parameter that is {form} now, of "
                    f"shape {tuple(parameter.shape)}: unpack() before training, with an optimizer that has trained it unpacked"
                )
