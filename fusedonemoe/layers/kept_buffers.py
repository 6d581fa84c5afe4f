"""Buffers whose dtype a cast of their module leaves alone: routing biases, statistics, scales and counts."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

_WIDE = (torch.float32, torch.float64)


class KeptBuffers(nn.Module):
    """A module with buffers that ``.bfloat16()``, ``.half()``, ``.to(dtype)`` and ``.type(dtype)`` move and do not round.

    Such a buffer adds up small steps, or a kernel reads it in one dtype. A cast of the module, or of one that contains it, is
    a wish about the weights. Values are those from before the cast, to the bit, on the device of after it.
    """

    #: Names of buffers that are float32, or float64 after ``.double()``, which computes everything in float64.
    float32_buffers: ClassVar[tuple[str, ...]] = ()
    #: Names of buffers that have one dtype for good.
    fixed_buffers: ClassVar[tuple[str, ...]] = ()

    def _kept(self) -> dict[str, Tensor]:
        names = (*self.float32_buffers, *self.fixed_buffers)
        return {name: tensor for name in names if (tensor := self._buffers.get(name)) is not None}

    def _restore(self, kept: dict[str, Tensor], *, loaded: bool) -> None:
        """Give buffers that have got another dtype an allowed one, with the values that were loaded or those from before."""
        for name, before in kept.items():
            after = self._buffers[name]  # another tensor after load_state_dict(assign=True)
            assert after is not None
            is_fixed = name in self.fixed_buffers
            if after.dtype not in ((before.dtype,) if is_fixed else _WIDE):
                values, dtype = after if loaded else before, before.dtype if is_fixed else torch.float32
                self._buffers[name] = values.to(after.device, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self._kept()
        super()._apply(fn, recurse)
        self._restore(kept, loaded=False)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        kept, errors = self._kept(), args[-1]
        for name, before in kept.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.is_floating_point() != before.is_floating_point():
                errors.append(f"{prefix}{name} must have a dtype like {before.dtype}, got {given.dtype}")
                state_dict[prefix + name] = before  # its values would be cut off; the dict is the caller's copy
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._restore(kept, loaded=True)
