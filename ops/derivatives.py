"""The derivatives that the operators do not have, refused on every path: eager, traced, and inside a compiled graph.

The operators have first derivatives in reverse mode. In forward mode torch silently takes a missing rule for a zero tangent.
"""

from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

REFUSAL = (
    "forward-mode derivatives and torch.func need impl='dense'; the other implementations have first derivatives in reverse "
    "mode only"
)


def in_forward_mode() -> bool:
    """Return whether tensors may have tangents: inside ``forward_ad.dual_level`` and inside ``torch.func.jvp``."""
    return forward_ad._current_level >= 0


def refuse_forward_mode() -> None:
    """Raise inside of a level of forward mode."""
    if in_forward_mode():
        raise RuntimeError(REFUSAL)


def refuse_transforms() -> None:
    """Raise in forward mode and in a transform of torch.func.

    While Dynamo traces, this only reads the level, which guards the graph: an error would break it, and the operators raise.
    """
    forbidden = in_forward_mode()
    if not torch.compiler.is_dynamo_compiling() and (forbidden or torch._C._are_functorch_transforms_active()):
        raise RuntimeError(REFUSAL)


def refused(*_: Any, **__: Any) -> NoReturn:
    """An operator's kernel for the transforms of torch.func."""
    raise RuntimeError(REFUSAL)


def no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    """The backward of what has none."""
    raise RuntimeError("fusedonemoe's operators have first derivatives only; impl='dense' has derivatives of every order")
