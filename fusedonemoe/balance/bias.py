"""The selection bias that keeps experts evenly used without a loss."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedonemoe.balance.counting import RouterCounts, check_counts, is_capturing, process_group
from fusedonemoe.checks import check_float, check_number, check_same_device, check_shape
from fusedonemoe.ops.notice import warn


def update_selection_bias(bias: Tensor, counts: Tensor, rate: float, *, num_shared_experts: int = 0) -> Tensor:
    """Take a step of the bias that balances without a loss: ``b_i += rate * sign(mean(c) - c_i)``, in place; return it.

    Overloaded experts become a little harder to pick, idle ones a little easier. The comparison is exact, in integers.

    Args:
        bias: ``[E]`` floating, without a gradient.
        counts: ``[E]`` integers, the rows of each expert since the last step.
        rate: ``u``, from 0; DeepSeek-V3 uses 0.001.
        num_shared_experts: the last so many experts take every token: they are left out of the mean and left alone.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names.

    Source:
        Wang et al. 2024 (arXiv 2408.15664), algorithm 1; DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.

    Example:
        >>> import torch
        >>> from fusedonemoe.balance import update_selection_bias
        >>> update_selection_bias(torch.zeros(3), torch.tensor([5, 3, 1]), rate=0.5)
        tensor([-0.5000,  0.0000,  0.5000])
    """
    check_float("bias", bias)
    check_counts(counts)
    check_shape("counts", counts, tuple(bias.shape))
    check_same_device("counts", counts, "bias", bias.device)
    _check_rate(rate)
    E, S = counts.shape[0], num_shared_experts
    if isinstance(S, bool) or not isinstance(S, int) or not 0 <= S < E:
        raise ValueError(f"num_shared_experts must be an integer from 0 to {E - 1}, got {S!r}")
    routed = counts[: E - S].to(torch.int64)
    direction = (routed.sum() - routed * (E - S)).sign()
    with torch.no_grad():
        bias[: E - S].add_(direction.to(bias.dtype), alpha=rate)
    return bias


def check_step_dtype(name: str, bias: Tensor) -> None:
    """The bias can take small steps: half precision stops at 0.5, where a step of 0.001 is rounded away."""
    if bias.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(
            f"{name} must be float32 to move by small steps, got {bias.dtype}: casts of its module leave it alone, so something "
            "has replaced it, such as MixedPrecision(buffer_dtype=...) of FSDP or MoE.from_hf of a model that was cast"
        )


def _check_rate(rate: float) -> None:
    check_number("rate", rate)
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate must be at least 0 and finite, got {rate}")


class LossFreeBalance:
    """Balances the experts of a model by its routers' selection biases, once for each step of the optimizer.

    It counts on the device which rows the experts of each :class:`~fusedonemoe.TopKRouter` with a selection bias take in
    training mode; what activation checkpointing repeats is counted once. After ``optimizer.step()`` it sums the counts over the
    data-parallel ranks, if :mod:`torch.distributed` is initialised, takes one step of :func:`update_selection_bias`, and starts
    again from zero. So several forwards before a step count together, and so does a step that a gradient scaler skips.

    Give a model before the first call of its compiled form: torch.compile does not look for hooks that come later. The first
    update reads whether anything was counted, and warns if not; no other one waits for the device.

    Args:
        model: with at least one router that has a selection bias; wrapped by DistributedDataParallel or not.
        optimizer: whose steps are followed.
        rate: of the update; an attribute, which may be changed between steps.
        group: the process group, or the one-dimensional device mesh, of the ranks that have tokens of their own, which must all
            step; the default group if None. Under expert parallelism too that is every data-parallel rank.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a ``model`` without such a router.
        RuntimeError: at a step, a bias is in half precision, where small steps are lost. Casts of a model do not do that.

    Example:
        >>> import torch
        >>> from fusedonemoe import MoE
        >>> from fusedonemoe.balance import LossFreeBalance
        >>> moe = MoE(hidden_size=16, intermediate_size=8, num_experts=4, top_k=1, selection_bias=True)
        >>> optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
        >>> balance = LossFreeBalance(moe, optimizer, rate=0.01)
        >>> moe(torch.randn(10, 16)).sum().backward()
        >>> balance.tokens_per_expert()["gate"].sum()
        tensor(10)
        >>> optimizer.step()
        >>> moe.gate.e_score_correction_bias.abs().max()
        tensor(0.0100)
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, rate: float = 1e-3, group: Any = None) -> None:
        if not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        _check_rate(rate)
        self.rate = rate
        self.group: Any = None if group is None else process_group(group)
        self._counts = RouterCounts(model, biased=True)
        self._handle = optimizer.register_step_post_hook(lambda *_: self.update())
        self._looked = False

    def tokens_per_expert(self) -> dict[str, Tensor]:
        """Return the counts of this process since the last update, ``[E]`` int64 by the router's name in the model."""
        return {name: count.clone() for name, count in self._counts.own.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the biases and start counting anew; the optimizer's step calls this.

        With several ranks this is a collective call: all of them make it, or none. The first one compares rate and routers.

        Raises:
            ValueError: the ranks' rates or routers differ; the message says which ranks have what.
        """
        biases: list[Tensor] = []
        for name, router in self._counts.routers.items():
            assert router.e_score_correction_bias is not None
            check_step_dtype(f"{name}.e_score_correction_bias".lstrip("."), router.e_score_correction_bias)
            biases.append(router.e_score_correction_bias)
        is_distributed = dist.is_available() and dist.is_initialized()
        group = (self.group or dist.group.WORLD) if is_distributed else None
        total = self._counts.total("LossFreeBalance.update", group, rate=self.rate)
        if not self._looked:
            self._looked = True
            counted = torch.cat(list(total.values()))
            if not is_capturing(counted) and not counted.any():  # nothing can be read during a capture
                warn(
                    "LossFreeBalance counted nothing before the first step: it must be made before the first call of a compiled "
                    "model, and the model must be in training mode"
                )
        for bias, count in zip(biases, total.values(), strict=True):
            update_selection_bias(bias, count, self.rate)
        self._counts.reset()

    def remove(self) -> None:
        """Take the hooks off the model and the optimizer; the biases stay as they are."""
        self._counts.remove()
        self._handle.remove()
