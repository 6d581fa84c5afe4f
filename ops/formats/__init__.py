"""The formats of expert weights."""

from fusedonemoe.ops.formats.format import Format, Part, Shape, Tensors
from fusedonemoe.ops.formats.int4 import GROUP_SIZES, INT4
from fusedonemoe.ops.formats.int8 import INT8
from fusedonemoe.ops.formats.panels import PANELS
from fusedonemoe.ops.formats.plain import PLAIN, TRANSPOSED
from fusedonemoe.ops.formats.quantized_weight import QuantizedWeight

FORMATS = {each.name: each for each in (PLAIN, TRANSPOSED, PANELS, INT8, INT4)}
FLOATS = (PLAIN, TRANSPOSED)  # the formats of experts_mlp and experts_mlp_lora
QUANTIZED = (INT8, INT4)  # the formats of experts_mlp_quantized

__all__ = [
    "FLOATS",
    "FORMATS",
    "GROUP_SIZES",
    "INT4",
    "INT8",
    "PANELS",
    "PLAIN",
    "QUANTIZED",
    "TRANSPOSED",
    "Format",
    "Part",
    "QuantizedWeight",
    "Shape",
    "Tensors",
]
