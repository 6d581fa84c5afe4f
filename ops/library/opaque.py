"""Operators that are opaque everywhere, without an implementation in other operators."""

from collections.abc import Callable

import torch
from torch import Tensor

from fusedonemoe.ops import cuda, product_keys
from fusedonemoe.ops import route as routing
from fusedonemoe.ops.cpu import grouped_gemm, selection
from fusedonemoe.ops.derivatives import no_second_derivative
from fusedonemoe.ops.library import flops
from fusedonemoe.ops.library.registration import NAMESPACE, define_compiled, define_fake, define_opaque, lib
from fusedonemoe.ops.plan import tokens_per_expert


def _grouped_mm_fake(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


def _grouped_outer_fake(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


def _selection_fake(keys: Tensor, k: int) -> Tensor:
    return keys.new_empty((keys.shape[0], k), dtype=torch.int64)


# Grouped GEMMs: opaque, because on CPU how many rows an expert has decides how they are best computed, and because torch's
# own refuses to be traced in float32 before 2.15.
grouped_mm: dict[str, Callable[..., Tensor]] = {"CPU": grouped_gemm.grouped_mm, "CUDA": cuda.grouped_mm}
define_opaque("grouped_mm", "Tensor rows, Tensor weights, Tensor offsets", _grouped_mm_fake, grouped_mm)
grouped_outer: dict[str, Callable[..., Tensor]] = {"CPU": grouped_gemm.grouped_outer, "CUDA": cuda.grouped_outer}
define_opaque("grouped_outer", "Tensor left, Tensor right, Tensor offsets", _grouped_outer_fake, grouped_outer)
for _name in ("grouped_mm", "grouped_outer"):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", no_second_derivative, lib=lib)

flops.count("grouped_mm", ("rows", "weights", "offsets"), flops.grouped_mm)
flops.count("grouped_outer", ("left", "right", "offsets"), flops.grouped_outer)

# Selections: opaque on CPU, one for its kernel, the other because rows without ties, which are nearly all, are done sooner.
define_opaque("select_experts", "Tensor keys, SymInt k", _selection_fake, {"CPU": selection.select, "CUDA": routing.select})
define_compiled("select_float32", "Tensor keys, SymInt k", _selection_fake)
define_opaque("select_product_keys", "Tensor logits, SymInt k", _selection_fake, {"CPU": product_keys.select_pairs_on_cpu})

# The counting of routed rows into a tensor outside the graph: opaque, because whether to count is known when the call runs, not
# when it is traced: activation checkpointing runs the same compiled forward again inside the backward. For that reason too a
# captured CUDA graph must not hold it.
_COUNT = "Tensor(a!) counts, Tensor experts"
lib.define(f"count_tokens_({_COUNT}) -> ()", tags=(torch.Tag.cudagraph_unsafe,))


def _count_tokens(counts: Tensor, experts: Tensor) -> None:
    # Both kinds of activation checkpointing repeat the forward inside a backward pass, and only there is a graph task active.
    if torch._C._current_graph_task_id() == -1:
        counts += tokens_per_expert(experts, counts.shape[0])


lib.impl("count_tokens_", _count_tokens, "CompositeExplicitAutograd")  # every device
define_fake("count_tokens_", _COUNT, lambda counts, experts: None)
