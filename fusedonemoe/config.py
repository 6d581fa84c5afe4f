"""The configuration of a mixture-of-experts block."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusedonemoe.hf import fields_of
from fusedonemoe.ops.choice import IMPLEMENTATIONS
from fusedonemoe.ops.options import ACTIVATION_OPTIONS, ActivationFields, make_activation, options_of
from fusedonemoe.ops.records import Activation
from fusedonemoe.ops.rules import ROUTE_OPTIONS, RouteFields, RouteRule, make_rule
from fusedonemoe.ops.values import check_count, check_flag, check_one_of, check_positive

_FLAGS = ("transposed", "bias", "output_bias", "router_bias", "selection_bias", "shared_gate")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(ActivationFields, RouteFields):
    """The configuration of an :class:`~fusedonemoe.MoE` block; it is validated once, when it is made.

    The fields of the routing rule, ``scoring`` and others, are those that :class:`~fusedonemoe.functional.RouteOptions` lists;
    ``activation``, ``gated``, ``gate_up_layout``, ``swiglu_alpha`` and ``swiglu_limit`` are those of
    :func:`~fusedonemoe.functional.experts_mlp`.

    Attributes:
        hidden_size: ``D``.
        intermediate_size: ``F`` of each expert.
        num_experts: ``E``.
        top_k: ``K``, experts per token; None routes every token to every expert.
        transposed: keep the expert weights as ``[E, D, 2F]`` and ``[E, F, D]`` (GPT-OSS), read as views.
        bias: expert biases.
        output_bias: one bias ``[D]`` of the block, added to each token's sum once (megablocks).
        router_bias: bias of the router's linear map (GPT-OSS).
        selection_bias: a buffer ``gate.e_score_correction_bias`` that takes part in the selection only (DeepSeek-V3).
        shared_intermediate_size: ``F`` of a shared dense branch, gated and activated as the experts are; None for no branch.
        shared_gate: scale the shared branch by ``sigmoid(x . w_s)`` (Qwen2-MoE).
        save_percent: share of pre-activation rows kept for the backward, an integer from 0 to 100.
        impl: ``auto``, ``dense``, ``grouped``, ``cpu``, ``triton`` or ``portable``.

    Raises:
        TypeError, ValueError: a value that does not fit; the message names the field, what was expected and what came.

    Example:
        >>> from fusedonemoe import MoEConfig
        >>> MoEConfig(hidden_size=64, intermediate_size=128, num_experts=8, top_k=9)
        Traceback (most recent call last):
            ...
        ValueError: top_k must be from 1 to 8, the experts that can be picked, or None, got 9
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int | None
    transposed: bool = False
    bias: bool = False
    output_bias: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    save_percent: int = 100
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts"):
            check_count(name, getattr(self, name))
        if self.shared_intermediate_size is not None:
            check_count("shared_intermediate_size", self.shared_intermediate_size)
        elif self.shared_gate:
            raise ValueError("shared_gate needs a shared branch: set shared_intermediate_size")
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        for name in ("swiglu_alpha", "swiglu_limit", "routed_scaling_factor"):
            check_positive(name, getattr(self, name))
        check_one_of("impl", self.impl, ("auto", *IMPLEMENTATIONS))
        check_count("save_percent", self.save_percent, 0)
        if self.save_percent > 100:
            raise ValueError(f"save_percent must be an integer from 0 to 100, got {self.save_percent}")
        _ = self.act, self.route_rule, self.experts_form  # made now: making a record checks it

    @cached_property
    def act(self) -> Activation:
        """The record of the experts' activation."""
        return make_activation(**options_of(self, ACTIVATION_OPTIONS))

    @cached_property
    def experts_form(self) -> str | None:
        """The experts' form, as the operator of a whole block takes it; None where Dynamo must look into the experts."""
        if self.impl == "portable":  # which may read a number from the data
            return None
        return json.dumps((self.act, self.save_percent, self.transposed, self.impl))

    @cached_property
    def route_rule(self) -> RouteRule:
        """The record of the routing rule."""
        return make_rule(self.num_experts, self.top_k, selection_bias=self.selection_bias, **options_of(self, ROUTE_OPTIONS))

    @property
    def up_rows(self) -> int:
        """``G``: rows of each expert's up-projection, 2F when gated."""
        return self.intermediate_size * (2 if self.gated else 1)

    @property
    def experts_per_token(self) -> int:
        """``K``, with ``top_k=None`` counted as every expert."""
        return self.num_experts if self.top_k is None else self.top_k

    @classmethod
    def from_hf(cls, config: Any, *, layer: int | None = None, **changes: Any) -> "MoEConfig":
        """The block of a Hugging Face model's configuration.

        A shared branch outside the block, such as Granite's, is left out.

        Args:
            config: a configuration of transformers, or any object with the same attributes. If a model has several towers,
                the configuration of its text model is read.
            layer: the index of the layer, for a configuration with ``per_layer_config``.
            **changes: fields that replace those of ``config``, or that it does not have: ``impl``, ``save_percent``, ...

        Raises:
            ValueError: the family is not known, or the fields here cannot describe its block; the message says why.

        Example:
            >>> from types import SimpleNamespace
            >>> from fusedonemoe import MoEConfig
            >>> sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4}
            >>> qwen3 = SimpleNamespace(model_type="qwen3_moe", hidden_act="silu", norm_topk_prob=True, **sizes)
            >>> MoEConfig.from_hf(qwen3) == MoEConfig(hidden_size=64, intermediate_size=32, num_experts=16, top_k=4)
            True
        """
        return cls(**(fields_of(config, layer) | changes))

    def replace(self, **changes: Any) -> "MoEConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)
