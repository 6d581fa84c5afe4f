"""Operators that are opaque everywhere: grouped products and the selection."""

import torch

from fusedonemoe.ops import cuda
from fusedonemoe.ops import route as routing
from fusedonemoe.ops.cpu import grouped_gemm, selection
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.library.registration import NAMESPACE, define_opaque, lib

# Grouped GEMMs: opaque, because on CPU how many rows an expert has decides how they are best computed, and because torch's
# own refuses to be traced in float32 before 2.15.

define_opaque(
    "grouped_mm(Tensor rows, Tensor weights, Tensor offsets) -> Tensor",
    lambda rows, weights, offsets: rows.new_empty(rows.shape[0], weights.shape[2]),
    CPU=grouped_gemm.grouped_mm,
    CUDA=cuda.grouped_mm,
)
define_opaque(
    "grouped_outer(Tensor left, Tensor right, Tensor offsets) -> Tensor",
    lambda left, right, offsets: left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1]),
    CPU=grouped_gemm.grouped_outer,
    CUDA=cuda.grouped_outer,
)

# The selection: opaque on CPU for its kernel.

define_opaque(
    "select_experts(Tensor keys, SymInt k) -> Tensor",
    lambda keys, k: keys.new_empty((keys.shape[0], k), dtype=torch.int64),
    CPU=selection.select,
    CUDA=routing.select,
)

for _name in ("grouped_mm", "grouped_outer"):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", no_second_derivative, lib=lib)
