"""Records: the choices that describe a call, each with its fields in this one place."""

from typing import NamedTuple

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity", "swiglu_oai")
GATE_UP_LAYOUTS = ("gate_up", "up_gate", "interleaved")
PLAIN = "plain"
SCORINGS = ("softmax", "sigmoid")
GROUP_SCORES = ("top2_sum", "max")
NORM_EPS = 1e-20


class Activation(NamedTuple):
    """The function between the up and the down projection.

    Attributes:
        name: one of :data:`ACTIVATIONS`. ``swiglu_oai`` is GPT-OSS's clamped SwiGLU, gated by definition:
            ``g = min(gate, limit)``, ``u = clamp(up, -limit, limit)``, ``h = (u + 1) * g * sigmoid(alpha * g)``.
        layout: the order of gate and up along the last axis of ``z``: ``gate_up`` (halves, gate first), ``up_gate``
            (halves, up first), ``interleaved`` (gate, up, gate, up, ...), or ``plain`` for an expert without a gate.
        alpha: slope of ``swiglu_oai``.
        limit: clamp of ``swiglu_oai``.
    """

    name: str
    layout: str
    alpha: float
    limit: float


class RouteRule(NamedTuple):
    """The rule that turns logits into weights; :func:`fusedonemoe.ops.options.make_rule` makes a checked one.

    Attributes:
        top_k: experts per token; 0 selects nothing and keeps every expert, in id order.
        scoring: ``softmax`` or ``sigmoid``.
        score_first: score all logits and select among the scores (Qwen3, DeepSeek), or select among the logits and score
            the picked ones only (GPT-OSS).
        norm_topk_prob: divide the picked scores by their sum.
        scale: factor on the weights (``routed_scaling_factor``).
        n_group: number of contiguous expert groups; 1 for none.
        topk_group: groups that stay open for selection.
        group_score: a group's value is the sum of its best two keys (``top2_sum``, DeepSeek-V3) or its best (``max``).
        norm_eps: added to the sum of sigmoids that divides them; a softmax over the picked needs none.
    """

    top_k: int
    scoring: str
    score_first: bool
    norm_topk_prob: bool
    scale: float
    n_group: int
    topk_group: int
    group_score: str
    norm_eps: float = NORM_EPS
