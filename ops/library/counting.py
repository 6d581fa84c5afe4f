"""Counting of routed rows into a tensor that lives outside the graph."""

import torch
from torch import Tensor

from fusedonemoe.ops.library.registration import NAMESPACE, lib
from fusedonemoe.ops.plan import tokens_per_expert

# Opaque, because whether to count is known when the call runs, not when it is traced: activation checkpointing runs the same
# compiled forward again inside the backward. For that reason too a captured CUDA graph must not hold it.
lib.define("count_tokens_(Tensor(a!) counts, Tensor experts) -> ()", tags=(torch.Tag.cudagraph_unsafe,))


def _count_tokens(counts: Tensor, experts: Tensor) -> None:
    # Both kinds of activation checkpointing repeat the forward inside a backward pass, and only there is a graph task active.
    if torch._C._current_graph_task_id() == -1:
        counts += tokens_per_expert(experts, counts.shape[0])


lib.impl("count_tokens_", _count_tokens, "CompositeExplicitAutograd")  # every device


@torch.library.register_fake(f"{NAMESPACE}::count_tokens_", lib=lib)
def _(counts: Tensor, experts: Tensor) -> None:
    return None
