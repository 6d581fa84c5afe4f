"""The only place that speaks to torch.library: one row an operator, and all the rest derived from it.

``table`` and ``experts`` hold the rows, ``registration`` derives schema, fake, autograd, autocast, dispatch by implementation
and the function that eager calls take. Importing this package registers the operators.
"""

from fusedonemoe.ops.formats.panels import PANEL_DIMS, PanelHome, check_panels
from fusedonemoe.ops.formats.panels import pack as pack_weight
from fusedonemoe.ops.library import opaque
from fusedonemoe.ops.library.experts import (
    FOR_INFERENCE,
    experts_mlp,
    experts_mlp_inference,
    experts_mlp_packed,
    experts_mlp_quantized,
    experts_mlp_quantized_inference,
    moe_inference,
    unpack_weights,
)
from fusedonemoe.ops.library.registration import BUILD, autocast_dtype, cast_arguments, register_transparent
from fusedonemoe.ops.library.sparse_tables import experts_neurons_sparse, experts_values_sparse
from fusedonemoe.ops.library.table import experts_merged, experts_neurons, experts_values, route, route_product_key

__all__ = [
    "BUILD",
    "FOR_INFERENCE",
    "PANEL_DIMS",
    "PanelHome",
    "autocast_dtype",
    "cast_arguments",
    "check_panels",
    "experts_merged",
    "experts_mlp",
    "experts_mlp_inference",
    "experts_mlp_packed",
    "experts_mlp_quantized",
    "experts_mlp_quantized_inference",
    "experts_neurons",
    "experts_neurons_sparse",
    "experts_values",
    "experts_values_sparse",
    "moe_inference",
    "opaque",
    "pack_weight",
    "register_transparent",
    "route",
    "route_product_key",
    "unpack_weights",
]
