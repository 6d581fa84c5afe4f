"""Operators that are opaque everywhere: grouped products and the selection."""

import torch
from torch import Tensor

from fusedonemoe.ops import cuda
from fusedonemoe.ops import route as routing
from fusedonemoe.ops.cpu import grouped_gemm, selection
from fusedonemoe.ops.library.registration import NAMESPACE, lib, no_second_derivative

# Grouped GEMMs: opaque, because on CPU how many rows an expert has decides how they are best computed, and because torch's
# own refuses to be traced in float32 before 2.15.

lib.define("grouped_mm(Tensor rows, Tensor weights, Tensor offsets) -> Tensor")
lib.impl("grouped_mm", grouped_gemm.grouped_mm, "CPU")
lib.impl("grouped_mm", cuda.grouped_mm, "CUDA")
lib.define("grouped_outer(Tensor left, Tensor right, Tensor offsets) -> Tensor")
lib.impl("grouped_outer", grouped_gemm.grouped_outer, "CPU")
lib.impl("grouped_outer", cuda.grouped_outer, "CUDA")


@torch.library.register_fake(f"{NAMESPACE}::grouped_mm", lib=lib)
def _(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@torch.library.register_fake(f"{NAMESPACE}::grouped_outer", lib=lib)
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


# The selection: opaque on CPU for its kernel.

lib.define("select_experts(Tensor keys, SymInt k) -> Tensor")
lib.impl("select_experts", selection.select, "CPU")
lib.impl("select_experts", routing.select, "CUDA")


@torch.library.register_fake(f"{NAMESPACE}::select_experts", lib=lib)
def _(keys: Tensor, k: int) -> Tensor:
    return keys.new_empty((keys.shape[0], k), dtype=torch.int64)


for _name in ("grouped_mm", "grouped_outer"):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", no_second_derivative, lib=lib)
