"""The only place that speaks to torch.library: schemas, fakes, autograd, autocast, one name for every device.

``registration`` says how an operator is made, the other files make them, one file a family. Importing this package registers
them all.
"""

from fusedonemoe.ops.formats.panels import PANEL_DIMS, PanelHome, check_panels
from fusedonemoe.ops.library import counting, lora, opaque
from fusedonemoe.ops.library.merged import experts_merged, experts_merged_backward
from fusedonemoe.ops.library.mlp import experts_mlp, experts_mlp_backward
from fusedonemoe.ops.library.neurons import (
    experts_neurons,
    experts_neurons_backward,
    experts_values,
    experts_values_backward,
)
from fusedonemoe.ops.library.packed import FOR_INFERENCE, experts_mlp_packed, pack_weight, unpack_weights
from fusedonemoe.ops.library.product_keys import route_product_key, route_product_key_backward
from fusedonemoe.ops.library.quantized import experts_mlp_quantized, experts_mlp_quantized_backward
from fusedonemoe.ops.library.registration import BUILD, NAMESPACE, autocast_dtype
from fusedonemoe.ops.library.routing import route, route_backward
from fusedonemoe.ops.library.sparse_tables import experts_neurons_sparse, experts_values_sparse

__all__ = [
    "BUILD",
    "FOR_INFERENCE",
    "NAMESPACE",
    "PANEL_DIMS",
    "PanelHome",
    "autocast_dtype",
    "check_panels",
    "counting",
    "experts_merged",
    "experts_merged_backward",
    "experts_mlp",
    "experts_mlp_backward",
    "experts_mlp_packed",
    "experts_mlp_quantized",
    "experts_mlp_quantized_backward",
    "experts_neurons",
    "experts_neurons_backward",
    "experts_neurons_sparse",
    "experts_values",
    "experts_values_backward",
    "experts_values_sparse",
    "lora",
    "opaque",
    "pack_weight",
    "route",
    "route_backward",
    "route_product_key",
    "route_product_key_backward",
    "unpack_weights",
]
