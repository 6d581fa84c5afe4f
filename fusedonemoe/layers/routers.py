"""Router modules: from hidden states to routing weights and expert ids."""

import contextlib
import json
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fusedonemoe import functional as F
from fusedonemoe.checks import check_count
from fusedonemoe.functional.calls import is_hidden, traced_build
from fusedonemoe.functional.routing import route_by
from fusedonemoe.functional.traced import route_linear
from fusedonemoe.layers.kept_buffers import KeptBuffers
from fusedonemoe.linear import in_dtype, in_routing_dtype, outside_autocast, routing_linear, uniform_by_fan_in
from fusedonemoe.ops.options import options_of
from fusedonemoe.ops.rules import ROUTE_OPTIONS, RouteAttributes, RouteOptions, RouteRule, lists_options, make_rule, with_defaults


def routing_impl(impl: str) -> str:
    """Return the ``impl`` of the router for experts with this ``impl``."""
    return impl if impl in ("dense", "portable") else "auto"


class RouterOutput(NamedTuple):
    """The output of a router.

    Attributes:
        logits: ``[..., E]`` float32 (float64 for float64 x); of product keys ``[..., H, 2, G]``.
        weights: ``[..., K]`` routing weights, dtype of the logits; of product keys ``[..., H * K]``.
        experts: ``[..., K]`` int64 ids; of product keys ``[..., H * K]``.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor


_RULE_FIELDS = ("top_k", *ROUTE_OPTIONS)


class TopKRouter(KeptBuffers, RouteAttributes):
    """A linear router: ``l = x W^T (+ b)``, then :func:`fusedonemoe.functional.route`.

    The linear map and everything after it run in float32 whatever the dtype of x and of the module, autocast included:
    which experts are picked should not hang on the last bit of a bfloat16 logit.

    The fields of the rule are attributes under the names of the arguments. A call after one was set checks the rule again.

    Args:
        hidden_size: ``D``.
        num_experts: ``E``.
        top_k: ``K``; None keeps every expert.
        bias: give the linear map a bias.
        selection_bias: keep a float32 buffer ``e_score_correction_bias`` ``[E]``, zero at first, added for the selection
            only; it is not trained by gradients. Casts to half precision leave it as it is, ``.double()`` widens it.
        impl: ``auto``, ``dense`` for derivatives of every order, or ``portable`` for export.
        **options: the other fields of the rule, as :class:`~fusedonemoe.functional.RouteOptions` lists them.

    Shape:
        x ``[..., D]`` to :class:`RouterOutput`.

    Example:
        >>> import torch
        >>> from fusedonemoe import TopKRouter
        >>> logits, weights, experts = TopKRouter(16, num_experts=4, top_k=2)(torch.randn(3, 5, 16))
        >>> logits.shape, weights.shape, experts.shape
        (torch.Size([3, 5, 4]), torch.Size([3, 5, 2]), torch.Size([3, 5, 2]))
    """

    bias: Tensor | None
    e_score_correction_bias: Tensor | None
    float32_buffers: ClassVar[tuple[str, ...]] = ("e_score_correction_bias",)  # it accumulates small steps

    @lists_options
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None,
        *,
        bias: bool = False,
        selection_bias: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[RouteOptions],
    ) -> None:
        super().__init__()
        self.top_k = top_k
        for name, value in with_defaults(options).items():
            setattr(self, name, value)
        self._check(num_experts, selection_bias)
        self.impl = impl
        self.weight: nn.Parameter = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None)
        # float32 whatever the module's or the default dtype is.
        correction = torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _RULE_FIELDS:
            self.__dict__.pop("_checked", None)
            self.__dict__.pop("_form", None)
        super().__setattr__(name, value)

    def _check(self, num_experts: int, selection_bias: bool) -> tuple[RouteRule, int, bool]:
        """Make the checked rule of the fields, and keep it with what it was checked for."""
        rule = make_rule(num_experts, selection_bias=selection_bias, **options_of(self, _RULE_FIELDS))
        checked = rule, num_experts, selection_bias
        if not torch.compiler.is_dynamo_compiling():  # a traced call changes no attribute
            self.__dict__["_checked"] = checked
            with contextlib.suppress(TypeError):  # a number that is no Python number: Dynamo looks into the rule
                self.__dict__["_form"] = json.dumps(options_of(self, _RULE_FIELDS))
        return checked

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does: uniform within ``1 / sqrt(D)``; the selection bias to zero."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                uniform_by_fan_in(parameter, self.weight.shape[1])
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Tensor) -> RouterOutput:
        """Route ``x`` ``[..., D]``."""
        parameters = self._parameters  # an attribute of a module takes a Python function
        whole = "weight" in parameters and "bias" in parameters
        if whole and is_dynamo_compiling() and (text := self.__dict__.get("_form")) is not None:
            given = parameters["weight"], parameters["bias"], self.e_score_correction_bias
            if is_hidden(*given):
                return RouterOutput(*route_linear(x, *given, text, self.impl, traced_build()))
        if whole:
            logits = routing_linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
        else:  # a parametrization or pruning has taken a name out of the parameters
            logits = routing_linear(x, self.weight, self.bias)
        selection_bias, E = self.e_score_correction_bias, logits.shape[-1]
        checked = self.__dict__.get("_checked")
        if checked is None or checked[1] != E or checked[2] != (selection_bias is not None):
            checked = self._check(E, selection_bias is not None)
        rule, *_ = checked
        weights, experts = route_by(rule, logits, selection_bias, self.impl)
        return RouterOutput(logits, weights, experts)

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        E, D = self.weight.shape
        return f"hidden_size={D}, num_experts={E}, top_k={self.top_k}, scoring={self.scoring!r}"


class _BatchNorm(KeptBuffers, nn.BatchNorm1d):
    """BatchNorm with running statistics in float32, whatever the dtype of scale and shift: they move by small steps."""

    float32_buffers: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")
    fixed_buffers: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)

    def __init__(self, num_features: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__(num_features, device=device, dtype=dtype)
        for name in self.float32_buffers:
            statistic = self._buffers[name]
            assert statistic is not None
            self._buffers[name] = in_routing_dtype(statistic)


class ProductKeyRouter(nn.Module):
    """A router over ``G * G`` experts with ``2 G`` keys.

    ``l = norm(x) W^T (+ b)``, then :func:`fusedonemoe.functional.route_product_key`.

    Every head has keys of its own and picks ``K`` of the same ``G * G`` experts. All arithmetic is float32 whatever the dtype
    of x and of the module, autocast included (float64 for float64 x).

    Args:
        hidden_size: ``D``.
        num_keys: ``G`` keys in each half; there are ``G * G`` experts.
        top_k: ``K``, experts per token and head, from 1 to ``G * G``.
        num_heads: ``H``.
        norm_topk_prob: whether the weights of a token's head sum to 1.
        input_norm: ``"batch"`` for BatchNorm over the tokens (FlashMoE, PEER), ``"rms"`` for RMSNorm over D, None for none.
            BatchNorm in training takes 2 tokens; its running statistics stay float32 when the module is cast.
        bias: whether the linear map has one.
        impl: ``auto``, ``dense`` for derivatives of every order, or ``portable`` for export.

    Shape:
        x ``[..., D]`` to :class:`RouterOutput` with logits ``[..., H, 2, G]``, weights and experts ``[..., H * K]``, one head
        after the other.

    Raises:
        TypeError, ValueError: a size that is no integer, or a size or name out of range.

    Example:
        >>> import torch
        >>> from fusedonemoe import ProductKeyRouter
        >>> logits, weights, experts = ProductKeyRouter(16, num_keys=10, top_k=4, num_heads=2)(torch.randn(3, 5, 16))
        >>> logits.shape, weights.shape, experts.shape
        (torch.Size([3, 5, 2, 2, 10]), torch.Size([3, 5, 8]), torch.Size([3, 5, 8]))
    """

    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_keys: int,
        top_k: int,
        *,
        num_heads: int = 1,
        norm_topk_prob: bool = False,
        input_norm: str | None = None,
        bias: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_keys", num_keys), ("top_k", top_k), ("num_heads", num_heads)):
            check_count(name, size)
        if top_k > num_keys * num_keys:
            raise ValueError(f"top_k must be at most {num_keys * num_keys}, the pairs of {num_keys} keys, got {top_k}")
        if input_norm not in (None, "batch", "rms"):
            raise ValueError(f"input_norm must be None, 'batch' or 'rms', got {input_norm!r}")
        self.num_keys = num_keys
        self.top_k = top_k
        self.num_heads = num_heads
        self.norm_topk_prob = norm_topk_prob
        self.input_norm = input_norm
        self.impl = impl
        rows = num_heads * 2 * num_keys
        self.norm: nn.BatchNorm1d | nn.RMSNorm | None = None
        if input_norm == "batch":
            self.norm = _BatchNorm(hidden_size, device=device, dtype=dtype)
        elif input_norm == "rms":
            self.norm = nn.RMSNorm(hidden_size, eps=1e-6, device=device, dtype=dtype)
        self.weight: nn.Parameter = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does: uniform within ``1 / sqrt(D)``; the norm as torch does, statistics included."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                uniform_by_fan_in(parameter, self.weight.shape[1])
        if self.norm is not None:
            self.norm.reset_parameters()

    def _batch_norm(self, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
        """``norm(x)`` in the dtype of x ``[T, D]``; the running statistics keep their own."""
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            raise RuntimeError("the router's BatchNorm has lost its running statistics")
        if self.training and not x.shape[0]:
            return x  # no token, no statistics
        stored = (norm.running_mean, norm.running_var)
        mean, variance = (in_dtype(statistic, x.dtype) for statistic in stored)
        scale, shift = in_dtype(norm.weight, x.dtype), in_dtype(norm.bias, x.dtype)
        y = nn.functional.batch_norm(x, mean, variance, scale, shift, self.training, norm.momentum or 0.0, norm.eps)
        if self.training:
            norm.num_batches_tracked.add_(1)
            for statistic, updated in zip(stored, (mean, variance), strict=True):
                if updated is not statistic:
                    statistic.copy_(updated)
        return y

    def _logits(self, x: Tensor) -> Tensor:
        x = in_routing_dtype(x)
        if isinstance(self.norm, nn.BatchNorm1d):
            x = self._batch_norm(self.norm, x.reshape(-1, x.shape[-1])).reshape(x.shape)
        elif isinstance(self.norm, nn.RMSNorm):
            x = nn.functional.rms_norm(x, x.shape[-1:], in_dtype(self.norm.weight, x.dtype), self.norm.eps)
        elif self.norm is not None:  # such as SyncBatchNorm, which convert_sync_batchnorm puts in its place
            raise TypeError(f"the router's norm must be BatchNorm1d, RMSNorm or None, got {type(self.norm).__name__}")
        return routing_linear(x, self.weight, self.bias).reshape(*x.shape[:-1], self.num_heads, 2, self.num_keys)

    def forward(self, x: Tensor) -> RouterOutput:
        """Route ``x`` ``[..., D]``."""
        logits = outside_autocast(self._logits, x)
        weights, experts = F.route_product_key(logits, self.top_k, norm_topk_prob=self.norm_topk_prob, impl=self.impl)
        leading, chosen = x.shape[:-1], self.num_heads * self.top_k
        return RouterOutput(logits, weights.reshape(*leading, chosen), experts.reshape(*leading, chosen))

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        D = self.weight.shape[1]
        return f"hidden_size={D}, num_keys={self.num_keys}, top_k={self.top_k}, num_heads={self.num_heads}"
