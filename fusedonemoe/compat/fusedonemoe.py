"""The original FusedOneMoE's own class: the constructor that its README lists, top-p ("indefinacy") routing included.

:class:`fusedonemoe.FusedOneMoE` is the same block without top-p.
"""

from typing import Any

import torch
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.checks import check_count, check_last_dim
from fusedonemoe.compat.arguments import check_finite, check_flag
from fusedonemoe.layers.fused_one_moe import FusedOneMoE as _FusedOneMoE

_ORIGINAL_NAMES = {"WG": "gate.weight", "Wi": "proj"}


class FusedOneMoE(_FusedOneMoE):
    """``y = relu(sum_e w_te (x_t W_e) + b_up)^2 Wdown + b_down``, with ``l = x W_router`` and ``w`` by one of three routings.

    - ``is_sparse=False``: every expert, ``w = sigmoid(l)``.
    - ``is_sparse=True``: the ``topk`` largest logits, ``w = sigmoid(l)`` on them and 0 elsewhere.
    - ``is_sparse=True, is_indefinacy=True``: ``p = softmax(l / temperature)``, in training
      ``p + noise * topp * randn``; the experts with ``p > topp``, as many as there are, ``w = sigmoid(l)`` on them and 0
      elsewhere. A token whose probabilities all stay below ``topp`` takes none.

    Parameters and the arguments that are not listed are those of :class:`fusedonemoe.FusedOneMoE`; a state dict of the original
    (``WG``, ``Wi``, ``down``, biases) loads too.

    Args:
        is_indefinacy: top-p instead of top-k.
        topp: the probability that an expert has to exceed, from 0 and below 1.
        temperature: divides the logits before the softmax.
        noise: strength of the noise in training.
        training: whether the layer starts in training mode; ``train()`` and ``eval()`` change it as everywhere.

    Shape:
        ``[..., D]`` to ``[..., D]``.

    Example:
        >>> import torch
        >>> from fusedonemoe.compat.fusedonemoe import FusedOneMoE
        >>> layer = FusedOneMoE(hidden_size=16, intermediate_size=32, groups=8, is_sparse=True, is_indefinacy=True, topp=0.1)
        >>> layer(torch.randn(2, 10, 16)).shape
        torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 512,
        intermediate_size: int = 3072,
        groups: int = 12,
        is_sparse: bool = False,
        topk: int = 1,
        is_indefinacy: bool = False,
        topp: float = 0.3,
        temperature: float = 1.0,
        noise: float = 0.1,
        training: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        for name, flag in (("is_sparse", is_sparse), ("is_indefinacy", is_indefinacy), ("training", training), ("bias", bias)):
            check_flag(name, flag)
        check_count("groups", groups)
        check_count("topk", topk, 1, groups, "groups")
        check_finite("topp", topp, least=0)
        if topp >= 1:
            raise ValueError(f"topp must be below 1, where no expert can be kept, got {topp!r}")
        check_finite("temperature", temperature, above=0)
        check_finite("noise", noise, least=0)
        super().__init__(hidden_size, intermediate_size, groups, is_sparse, topk, bias, impl=impl, device=device, dtype=dtype)
        self.is_sparse: bool = is_sparse
        self.is_indefinacy: bool = is_indefinacy
        self.topp: float = topp
        self.temperature: float = temperature
        self.noise: float = noise
        if is_sparse and is_indefinacy:
            self.gate.top_k = None  # the mask over E decides
        self.register_load_state_dict_pre_hook(_read_original)
        self.train(training)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of each token's experts."""
        logits, weights, experts = self.gate(x)
        if not (self.is_sparse and self.is_indefinacy):
            return weights, experts
        return F.route_top_p(logits, self.topp, temperature=self.temperature, noise=self.noise, training=self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on ``x`` ``[..., D]``."""
        check_last_dim("x", x, self.down.shape[1])
        weights, experts = self._route(x)
        h = F.experts_merged(x, experts, weights, self.proj, impl=self.impl)
        if self.up_bias is not None:
            h = h + self.up_bias
        y = torch.matmul(torch.relu(h).square(), self.down)
        return y if self.down_bias is None else y + self.down_bias

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        routing = f", topp={self.topp}, temperature={self.temperature}, noise={self.noise}"
        return super().extra_repr() + (routing if self.is_sparse and self.is_indefinacy else "")


def _read_original(module: FusedOneMoE, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the original's parameters the names and the order that this class has."""
    for old, new in _ORIGINAL_NAMES.items():
        if prefix + old in state_dict:
            value = state_dict.pop(prefix + old)
            state_dict[prefix + new] = value.t() if old == "WG" else value
