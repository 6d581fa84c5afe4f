"""A block of very many very small experts: product keys find them, one neuron each is all they are."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.checks import check_flag, check_integer, check_last_dim, check_one_of
from fusedonemoe.layers.routers import ProductKeyRouter, routing_impl
from fusedonemoe.linear import uniform_by_fan_in
from fusedonemoe.ops.activation import activate
from fusedonemoe.ops.records import ACTIVATIONS, PLAIN, Activation

_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "swiglu_oai")  # which has a gate


class FineGrainedOutput(NamedTuple):
    """The output of :class:`FineGrainedMoE`.

    Attributes:
        output: ``[..., D]`` in the dtype of x.
        logits: ``[..., H, 2, G]`` router logits of the two halves, float32 (float64 for float64 x).
    """

    output: Tensor
    logits: Tensor


class FineGrainedMoE(nn.Module):
    """Product keys, single-neuron experts, and an optional dense branch.

    ``y_t = sum_j act(<x_t, d_e>) w_tj u_e [+ (act(x_t Wg) * (x_t Wu)) Wd]``, ``e = experts_tj``, over the K best pairs of keys
    of every head. Parameters: ``gate.weight`` ``[H * 2G, D]`` and ``gate.norm``, the tables ``down_embed`` and ``up_embed``
    ``[E, D]``, and ``{gate,up,down}_proj.weight`` of the dense branch.

    Args:
        hidden_size: ``D``.
        num_experts: ``E = G * G``, a square.
        top_k: ``K``, experts per token and head.
        intermediate_size: of the dense branch; None leaves it out.
        activation: of both, as in :func:`fusedonemoe.functional.experts_neurons`; so are ``sparse`` and ``impl``.
        num_heads: ``H``, as in :class:`fusedonemoe.ProductKeyRouter`; so are ``norm_topk_prob`` and ``input_norm``.

    Shape:
        x ``[..., D]`` to :class:`FineGrainedOutput`.

    Raises:
        TypeError, ValueError: an argument of another type, or a size or name out of range.

    Source:
        He 2024, "Mixture of a million experts" (arXiv 2407.04153); FlashMoE for the dense branch and the logits.

    Example:
        >>> import torch
        >>> from fusedonemoe import FineGrainedMoE
        >>> moe = FineGrainedMoE(hidden_size=32, num_experts=10000, top_k=16, intermediate_size=64)
        >>> y, logits = moe(torch.randn(2, 7, 32))
        >>> y.shape, logits.shape
        (torch.Size([2, 7, 32]), torch.Size([2, 7, 1, 2, 100]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        intermediate_size: int | None = None,
        activation: str = "silu",
        num_heads: int = 1,
        norm_topk_prob: bool = False,
        input_norm: str | None = "batch",
        sparse: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_experts", num_experts)
        num_keys = math.isqrt(max(num_experts, 0))
        if num_experts < 1 or num_keys * num_keys != num_experts:
            raise ValueError(
                f"num_experts must be the square of a number of keys, such as {max(num_keys, 1) ** 2} or {(num_keys + 1) ** 2}, "
                f"got {num_experts}"
            )
        check_one_of("activation", activation, _ACTIVATIONS)
        if intermediate_size is not None:
            check_integer("intermediate_size", intermediate_size)
            if intermediate_size < 1:
                raise ValueError(f"intermediate_size must be at least 1, or None for no dense branch, got {intermediate_size}")
        check_flag("sparse", sparse)
        made: Any = {"device": device, "dtype": dtype}
        self.activation = activation
        self.sparse = sparse
        self.impl = impl
        keys: Any = {"num_heads": num_heads, "norm_topk_prob": norm_topk_prob, "input_norm": input_norm}
        self.gate: ProductKeyRouter = ProductKeyRouter(hidden_size, num_keys, top_k, **keys, impl=routing_impl(impl), **made)
        self.down_embed: nn.Parameter = nn.Parameter(torch.empty(num_experts, hidden_size, **made))
        self.up_embed: nn.Parameter = nn.Parameter(torch.empty(num_experts, hidden_size, **made))
        width, linear = intermediate_size, {"bias": False, **made}
        self.gate_proj: nn.Linear | None = None if width is None else nn.Linear(hidden_size, width, **linear)
        self.up_proj: nn.Linear | None = None if width is None else nn.Linear(hidden_size, width, **linear)
        self.down_proj: nn.Linear | None = None if width is None else nn.Linear(width, hidden_size, **linear)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise by fan-in: D for ``down_embed``, the ``H * K`` experts of a token for ``up_embed``; the parts as theirs."""
        D = self.down_embed.shape[1]
        for table, fan_in in ((self.down_embed, D), (self.up_embed, self.gate.num_heads * self.gate.top_k)):
            uniform_by_fan_in(table, fan_in)
        for part in (self.gate, self.gate_proj, self.up_proj, self.down_proj):
            if part is not None:
                part.reset_parameters()

    def forward(self, x: Tensor) -> FineGrainedOutput:
        """Run the block on ``x`` ``[..., D]``."""
        check_last_dim("x", x, self.down_embed.shape[1])
        logits, weights, experts = self.gate(x)
        tables = (self.down_embed, self.up_embed)
        y = F.experts_neurons(*(x, experts, weights, *tables), activation=self.activation, sparse=self.sparse, impl=self.impl)
        if self.gate_proj is not None and self.up_proj is not None and self.down_proj is not None:
            y = y + self.down_proj(activate(self.gate_proj(x), Activation(self.activation, PLAIN, 0.0, 0.0)) * self.up_proj(x))
        return FineGrainedOutput(y, logits)

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        E, D = self.down_embed.shape
        return f"hidden_size={D}, num_experts={E}, top_k={self.gate.top_k}, activation={self.activation!r}"
