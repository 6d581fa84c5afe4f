"""Losses that keep experts evenly used."""

import torch
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.checks import check_choices, check_logits, check_same_device, check_shape, check_tensor
from fusedonemoe.linear import in_routing_dtype
from fusedonemoe.ops.values import check_count, check_one_of

SCORINGS = ("softmax", "sigmoid", "given")


def _tokens(logits: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | int]:
    """Logits ``[T, E]`` in the routing dtype, which tokens count ``[T]`` (None for all), and how many, at least 1.

    What stands in the logits of padding is replaced: were it not a number, so would be its gradient, mask or no mask.
    """
    rows = in_routing_dtype(logits.reshape(-1, logits.shape[-1]))
    if attention_mask is None:
        return rows, None, max(rows.shape[0], 1)
    check_tensor("attention_mask", attention_mask)
    check_same_device("attention_mask", attention_mask, "logits", logits.device)
    leading, shape = logits.shape[:-1], attention_mask.shape
    if attention_mask.numel() == rows.shape[0]:
        mask = attention_mask
    elif len(shape) <= len(leading) and all(m in (1, n) for m, n in zip(reversed(shape), reversed(leading), strict=False)):
        mask = attention_mask.expand(leading)
    else:
        raise ValueError(
            f"attention_mask must have one entry for each token, or the last dimensions of the tokens {tuple(leading)}, "
            f"got shape {tuple(shape)}"
        )
    counted = mask.reshape(-1) != 0
    return rows.masked_fill(~counted[:, None], 0.0), counted, counted.sum().clamp(min=1)


def load_balancing_loss(
    logits: Tensor,
    experts: Tensor,
    num_experts: int,
    *,
    scoring: str = "softmax",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The loss of GShard and Switch Transformers that pulls a router towards equal use of its experts.

    ``L = E * sum_i f_i P_i`` with ``f_i = c_i / (T K)``, the share of the routed rows that expert ``i`` takes, and ``P_i``
    the mean over the tokens of its probability. 1 at perfect balance, ``E`` at most. Only ``P`` has a gradient.

    transformers' ``load_balancing_loss_func`` divides the counts by ``T``, which makes it ``K`` times this, and takes a tuple
    of layers: here, stack them, ``[layers, ..., E]``. Rows that capacity dropped (id -1) count nowhere.

    Args:
        logits: ``[..., E]`` router logits; probabilities with ``scoring="given"``.
        experts: ``[..., K]`` ids of any integer dtype; those outside ``[0, num_experts)`` are not counted.
        num_experts: ``E``.
        scoring: ``"softmax"``; ``"sigmoid"``, divided by their sum as DeepSeek-V3 does; or ``"given"``, they are in ``logits``.
        attention_mask: 0 for padding, which is left out of both means; one entry for each token, or only the last of their
            dimensions (``[batch, sequence]`` for ``[layers, batch, sequence, E]``).

    Returns:
        0-dimensional, float32 (float64 for float64 logits); 0 without tokens.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Source:
        Switch Transformers (arXiv 2101.03961), equations 4 to 6, divided by K; DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.

    Example:
        >>> import torch
        >>> from fusedonemoe.balance import load_balancing_loss
        >>> load_balancing_loss(torch.zeros(4, 4), torch.tensor([[0], [1], [2], [3]]), num_experts=4)
        tensor(1.)
    """
    check_logits(logits)
    check_choices(experts)
    check_count("num_experts", num_experts)
    check_one_of("scoring", scoring, SCORINGS)
    if logits.shape[-1] != num_experts:
        raise ValueError(f"logits must have num_experts ({num_experts}) columns, got shape {tuple(logits.shape)}")
    check_shape("experts", experts, (*logits.shape[:-1], experts.shape[-1]))
    check_same_device("experts", experts, "logits", logits.device)
    rows, counted, T = _tokens(logits, attention_mask)
    K = experts.shape[-1]
    ids = experts.reshape(-1, K)
    if counted is not None:
        ids = torch.where(counted[:, None], ids.to(torch.int64), -1)
    if scoring == "softmax":
        rows = rows.softmax(-1)
    elif scoring == "sigmoid":
        rows = nn.functional.logsigmoid(rows).softmax(-1)  # s / sum(s), and no 0 / 0 when every s underflows
    if counted is not None:
        rows = rows.masked_fill(~counted[:, None], 0.0)
    share = F.tokens_per_expert(ids, num_experts).to(rows.dtype) / (T * K)
    return num_experts * (share * (rows.sum(0) / T)).sum()


def router_z_loss(logits: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
    """The loss that keeps router logits small: ``mean_t logsumexp(l_t)^2``.

    Args:
        logits: ``[..., E]``.
        attention_mask: as for :func:`load_balancing_loss`.

    Returns:
        0-dimensional, float32 (float64 for float64 logits); 0 without tokens.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Source:
        ST-MoE (arXiv 2202.08906), equation 5.

    Example:
        >>> import torch
        >>> from fusedonemoe.balance import router_z_loss
        >>> router_z_loss(torch.zeros(3, 1) + 2.0)
        tensor(4.)
    """
    check_logits(logits)
    rows, counted, T = _tokens(logits, attention_mask)
    # The gradient of torch.logsumexp is as wrong as a large sum is rounded. This one's is a softmax of differences.
    largest = rows.detach().amax(-1, keepdim=True)
    finite = torch.where(largest.isfinite(), largest, 0.0)
    squares = ((rows - finite).exp().sum(-1).log() + finite.squeeze(-1)).square()
    if counted is not None:
        squares = squares.masked_fill(~counted, 0.0)
    return squares.sum() / T
