"""The dense branch beside the experts of a block."""

import torch
from torch import Tensor, nn

from fusedonemoe.config import MoEConfig
from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.options import ACTIVATION_OPTIONS, make_activation, options_of


class SharedExpert(nn.Module):
    """The dense branch that every token takes: ``(act(x Wg) * (x Wu)) Wd``, or ``act(x Wu) Wd`` when plain."""

    def __init__(
        self,
        config: MoEConfig,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)

        options = options_of(config, ACTIVATION_OPTIONS) | {"gate_up_layout": "gate_up"}
        self._activation = make_activation(**options)
        self.gate_proj: nn.Linear | None = linear(config.hidden_size, intermediate_size) if config.gated else None
        self.up_proj: nn.Linear = linear(config.hidden_size, intermediate_size)
        self.down_proj: nn.Linear = linear(intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        z: Tensor = self.up_proj(x)
        if self.gate_proj is None:
            h = activate(z, self._activation)
        elif self._activation.name == "silu":  # the usual one, without joining gate and up
            h = nn.functional.silu(self.gate_proj(x)) * z
        else:
            h = activate(torch.cat((self.gate_proj(x), z), dim=-1), self._activation)
        out: Tensor = self.down_proj(h)
        return out
