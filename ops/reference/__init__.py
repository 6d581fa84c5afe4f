"""The oracle: routing and expert layers as naive NumPy float64 loops, written to be read beside the formulas.

Nothing here shares code with an operator, so that agreement between the two is evidence. Speed is no concern.

Arrays go in (anything ``numpy.asarray`` takes), float64 and int64 arrays come out. Expert ids outside ``[0, E)``
mean "not on this rank": they contribute zero and receive zero gradients.

Shape legend: T tokens, D hidden size, F intermediate size, E experts, K experts per token, N = T * K routed rows.

Routing and the expert layers are offered here; other routing rules, capacity, losses and the usage report in ``balance``,
single-neuron experts and value memory in ``neurons``, product keys in ``product_keys``.
"""

from fusedonemoe.ops.reference.arrays import FloatArray, IntArray
from fusedonemoe.ops.reference.experts import (
    ACTIVATIONS,
    GATE_UP_LAYOUTS,
    GATED_ACTIVATIONS,
    MergedGradients,
    MLPGradients,
    activate,
    activate_backward,
    experts_merged,
    experts_merged_backward,
    experts_mlp,
    experts_mlp_backward,
    split_gate_up,
)
from fusedonemoe.ops.reference.routing import plan, route, route_backward

__all__ = [
    "ACTIVATIONS",
    "GATED_ACTIVATIONS",
    "GATE_UP_LAYOUTS",
    "FloatArray",
    "IntArray",
    "MLPGradients",
    "MergedGradients",
    "activate",
    "activate_backward",
    "experts_merged",
    "experts_merged_backward",
    "experts_mlp",
    "experts_mlp_backward",
    "plan",
    "route",
    "route_backward",
    "split_gate_up",
]
