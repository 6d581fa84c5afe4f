"""Product keys: routing over ``G * G`` experts from two lists of G logits."""

import torch
from torch import Tensor

from fusedonemoe.checks import check_float, check_integer
from fusedonemoe.functional.calls import choose_routing
from fusedonemoe.ops import library
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.operands import check_choices_of
from fusedonemoe.ops.product_keys import route_product_key as _route_portably


def route_product_key(
    logits: Tensor,
    top_k: int,
    *,
    norm_topk_prob: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn two halves of router logits into the weights and ids of the best pairs.

    ``la, lb = log_softmax(a), log_softmax(b)``; expert ``(i, j) = i * G + j`` scores ``la_i + lb_j``; the ``K`` best of all
    ``G * G`` are picked, ``w = exp(score)``, then ``w / sum(w)`` if ``norm_topk_prob``. The selection is exact: it is that of a
    full sort by ``a_i + b_j`` in real arithmetic, equal sums by the lower id, though only about ``K ln K`` pairs are looked
    at. (Real arithmetic up to the last bit of subnormal logits.) The gradient is exact, the selection being a constant.

    Args:
        logits: ``[..., 2, G]`` float64, float32, bfloat16 or float16: ``a`` and ``b``. Any ``G``. Minus infinity masks a key.
        top_k: ``K``, from 1 to ``G * G``; experts per token, best first.
        norm_topk_prob: whether a token's weights sum to 1.
        impl: ``"auto"``, ``"dense"`` for a composite with derivatives of every order, for ``torch.func``, or ``"portable"``
            for export, without an operator of this library.

    Returns:
        ``weights`` ``[..., K]`` float32 (float64 for float64 logits) and ``experts`` ``[..., K]`` int64.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, name or count that does not fit, naming the argument.

    Source:
        Lample et al. 2019 (arXiv 1907.05242) section 3.2; He 2024, PEER (arXiv 2407.04153) section 2.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 2.5]])
        >>> weights, experts = F.route_product_key(logits, top_k=3, norm_topk_prob=True)
        >>> experts
        tensor([3, 5, 6])
        >>> weights
        tensor([0.5065, 0.3072, 0.1863])
    """
    check_float("logits", logits)
    if logits.dim() < 2 or logits.shape[-2] != 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., 2, G] with G >= 1, got {tuple(logits.shape)}")
    impl = choose_routing(impl)
    check_integer("top_k", top_k)
    G = int(logits.shape[-1])  # the candidates are listed in Python: the number of keys is no symbol of a compiled graph
    if not 1 <= top_k <= G * G:
        raise ValueError(f"top_k must be from 1 to {G * G}, the pairs of {G} keys, got {top_k}")
    check_choices_of(logits, top_k, dims=2)
    pairs = logits.reshape(-1, 2, G)
    if impl == "portable":
        weights, experts = _route_portably(pairs, top_k, norm_topk_prob)
    else:
        if impl == "auto":
            refuse_transforms()
        op = torch.ops.fusedonemoe.route_product_key_dense if impl == "dense" else library.route_product_key
        weights, experts = op(pairs, top_k, norm_topk_prob, library.BUILD)
    leading = logits.shape[:-2]
    return weights.reshape(*leading, top_k), experts.reshape(*leading, top_k)
