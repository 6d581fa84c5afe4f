"""Reports of how evenly experts are used: counted on the device, read when asked for."""

import math
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.agreement import agree
from fusedonemoe.checks import check_ids
from fusedonemoe.layers.routers import RouterOutput, TopKRouter
from fusedonemoe.ops.exporting import is_exporting

_MOST_ROWS = 16  # of a printed table; the busiest and the idlest of more experts


def check_counts(counts: Tensor) -> None:
    """Rows of each expert, ``[E]`` integers."""
    check_ids(counts, "counts")
    if counts.dim() != 1 or counts.shape[0] < 1:
        raise ValueError(f"counts must have shape [E] with E >= 1, got {tuple(counts.shape)}")


class Usage:
    """The use that a routing made of its experts; the first number that is asked for reads them from the device.

    Args:
        counts: ``[E]`` integers, the rows of each expert, as :func:`fusedonemoe.functional.tokens_per_expert` counts them.

    Raises:
        TypeError, ValueError: ``counts`` are no integers, or have another shape.

    Example:
        >>> import torch
        >>> from fusedonemoe.balance import Usage
        >>> report = Usage(torch.tensor([6, 2, 0, 0]))
        >>> report.share
        (0.75, 0.25, 0.0, 0.0)
        >>> report.dead, report.max_over_mean
        (2, 3.0)
        >>> print(report)
        8 rows over 4 experts: entropy 0.406, max/mean 3.00, dead 2
        expert      rows    share  of even
             0         6   75.00%     3.00
             1         2   25.00%     1.00
             2         0    0.00%     0.00
             3         0    0.00%     0.00
    """

    def __init__(self, counts: Tensor) -> None:
        check_counts(counts)
        self._counts_E = counts.detach().clone()

    @property
    def num_experts(self) -> int:
        """``E``; reads nothing."""
        return self._counts_E.shape[0]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each expert. This is the one read from the device; everything else is computed from it."""
        return tuple(self._counts_E.tolist())

    @cached_property
    def total(self) -> int:
        """All rows."""
        return sum(self.counts)

    @cached_property
    def share(self) -> tuple[float, ...]:
        """Each expert's part of all rows; zeros when there are none."""
        return tuple(count / max(self.total, 1) for count in self.counts)

    @cached_property
    def entropy(self) -> float:
        """``-sum(p log p) / log E``: 1 for perfect balance, 0 when one of several experts has all; NaN without rows."""
        if not self.total:
            return math.nan
        if self.num_experts == 1:
            return 1.0
        nats = math.fsum(-p * math.log(p) for p in self.share if p > 0)
        return nats / math.log(self.num_experts)

    @cached_property
    def max_over_mean(self) -> float:
        """The busiest expert's rows in multiples of the mean; not a number without rows."""
        return max(self.counts) * self.num_experts / self.total if self.total else math.nan

    @cached_property
    def dead(self) -> int:
        """Number of experts without a row."""
        return self.counts.count(0)

    def _summary(self) -> str:
        return f"entropy {self.entropy:.3f}, max/mean {self.max_over_mean:.2f}, dead {self.dead}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_experts} experts)"  # reads nothing, unlike str()

    def __str__(self) -> str:
        ids = list(range(self.num_experts))
        if self.num_experts > _MOST_ROWS:
            ids.sort(key=lambda e: -self.counts[e])
        rows = [f"{e:>6}{self.counts[e]:>10}{self.share[e]:>9.2%}{self.share[e] * self.num_experts:>9.2f}" for e in ids]
        if self.num_experts > _MOST_ROWS:
            rows[_MOST_ROWS // 2 : -_MOST_ROWS // 2] = [f"{'...':>6}"]
        title = f"{self.total} rows over {self.num_experts} experts: {self._summary()}"
        return "\n".join([title, f"{'expert':>6}{'rows':>10}{'share':>9}{'of even':>9}", *rows])

    def picture(self, path: str | Path) -> Path:
        """Draw the shares, by expert and sorted, in multiples of the even share, into a file; its ending decides the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        return _draw({"": self}, Path(path))


def usage(experts: Tensor | None = None, num_experts: int | None = None, *, counts: Tensor | None = None) -> Usage:
    """Report how evenly a routing uses its experts; the report reads from the device when it is asked for a number.

    Args:
        experts: ids of any shape and integer dtype; those outside ``[0, num_experts)`` are not counted.
        num_experts: ``E``.
        counts: ``[E]`` rows of each expert, instead of the other two.

    Raises:
        TypeError, ValueError: an argument that does not fit, which the message names, or neither or both of the two forms.

    Example:
        >>> import torch
        >>> from fusedonemoe.balance import usage
        >>> usage(torch.tensor([[0, 1], [0, 2]]), num_experts=4).share
        (0.5, 0.25, 0.25, 0.0)
    """
    if counts is not None:
        if experts is not None or num_experts is not None:
            raise TypeError("give either experts and num_experts, or counts, got both")
        return Usage(counts)
    if experts is None or num_experts is None:
        raise TypeError("give experts and num_experts, or counts")
    return Usage(F.tokens_per_expert(experts, num_experts))


class RouterCount:
    """A forward hook that adds the rows of each expert to a tensor, recomputations of checkpointing left out.

    The tensor is no buffer of the module: DistributedDataParallel would overwrite it with that of the first rank.
    """

    def __init__(self, router: TopKRouter, training_only: bool) -> None:
        self.training_only = training_only
        self.counts: Tensor = torch.zeros(router.weight.shape[0], dtype=torch.int64, device=router.weight.device)

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: RouterOutput) -> None:
        """Count what the router returns."""
        # An exported program stands alone: it has no tensor of ours to count into.
        if (self.training_only and not router.training) or is_exporting():
            return
        if self.counts.device != output.experts.device:  # the model has moved since
            self.counts = self.counts.to(output.experts.device)
        torch.ops.fusedonemoe.count_tokens_(self.counts, output.experts)


class RouterCounts:
    """The counts of a model's routers by their names; ``biased``: of those with a selection bias, in training mode only."""

    def __init__(self, model: nn.Module, *, biased: bool) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        routers = {name: module for name, module in model.named_modules() if isinstance(module, TopKRouter)}
        if biased:
            routers = {name: router for name, router in routers.items() if router.e_score_correction_bias is not None}
        if not routers:
            raise ValueError(f"model has no TopKRouter{' with selection_bias=True' if biased else ''}")
        self.routers: dict[str, TopKRouter] = routers
        self._hooks = {name: RouterCount(router, biased) for name, router in routers.items()}
        self._handles = [router.register_forward_hook(self._hooks[name]) for name, router in routers.items()]
        self._compared = False

    @property
    def own(self) -> dict[str, Tensor]:
        """The counts of this process, ``[E]`` int64, which go on counting."""
        return {name: hook.counts for name, hook in self._hooks.items()}

    def total(self, action: str, group: Any, **settings: object) -> dict[str, Tensor]:
        """The counts, summed over the ranks of a group if there is one; the first sum compares settings and routers."""
        counts = self.own
        if group is None:
            return counts
        summed = torch.cat(list(counts.values()))  # one message for all layers
        if not self._compared and not is_capturing(summed):
            settings |= {f"experts of {name or 'the router'}": count.shape[0] for name, count in counts.items()}
            agree(action, lambda: settings, group)
            self._compared = True
        dist.all_reduce(summed, group=group)
        return dict(zip(counts, summed.split([count.shape[0] for count in counts.values()]), strict=True))

    def reset(self) -> None:
        """Start again from zero."""
        for count in self.own.values():
            count.zero_()

    def remove(self) -> None:
        """Take the hooks off the model; what was counted stays."""
        for handle in self._handles:
            handle.remove()


class UsageMeter(RouterCounts):
    """Counts what every router of a model picks, over any number of forwards, on the device.

    In training and in eval. What activation checkpointing repeats is counted once. A compiled model has to be given before
    its first call: torch.compile does not look for hooks that come later.

    Args:
        model: with at least one :class:`~fusedonemoe.TopKRouter` in it.
        group: a process group or a one-dimensional device mesh over which reports sum the counts, whose processes then all ask
            for them; None for this process alone.

    Raises:
        TypeError, ValueError: ``model`` is no module or has no router, or ``group`` is no group or has several dimensions.

    Example:
        >>> import torch
        >>> from fusedonemoe import MoE
        >>> from fusedonemoe.balance import UsageMeter
        >>> model = torch.nn.Sequential(*(MoE(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2) for _ in range(2)))
        >>> meter = UsageMeter(model)
        >>> for _ in range(3):
        ...     y = model(torch.randn(5, 16))
        >>> [(name, report.total) for name, report in meter.usage().items()]
        [('0.gate', 30), ('1.gate', 30)]
        >>> meter.remove()
    """

    def __init__(self, model: nn.Module, *, group: Any = None) -> None:
        self._group = None if group is None else process_group(group)
        super().__init__(model, biased=False)

    def usage(self) -> dict[str, Usage]:
        """Return the counts since the start or the last :meth:`reset`, by the router's name in the model; nothing is read yet.

        Raises:
            ValueError: the routers of the group's ranks differ; the message says which ranks have what.
        """
        return {name: Usage(count) for name, count in self.total("UsageMeter.usage", self._group).items()}

    def picture(self, path: str | Path) -> Path:
        """Draw every router's shares into one file; see :meth:`Usage.picture`."""
        return _draw(self.usage(), Path(path))

    def __str__(self) -> str:
        reports = self.usage()
        width = max(map(len, reports))
        return "\n".join(f"{name:<{width}}  {report._summary()}" for name, report in reports.items())


def is_capturing(total: Tensor) -> bool:
    """A CUDA graph is being captured, in which nothing is read and ranks compare nothing."""
    return total.is_cuda and torch.cuda.is_current_stream_capturing()


def process_group(group: Any) -> Any:
    """The process group of a group or of a device mesh of one dimension."""
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(f"group must have one dimension, got {group.ndim}: {group.mesh_dim_names}")
        return group.get_group()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    return group


def _draw(reports: Mapping[str, Usage], path: Path) -> Path:
    """One row of two panels for each report: shares by expert, and sorted."""
    if find_spec("matplotlib") is None:
        raise ImportError("pictures are drawn with matplotlib, which is missing: pip install 'fusedonemoe[plot]'")
    from matplotlib.figure import Figure  # here: only who draws has to have it

    figure = Figure(figsize=(9.0, 0.4 + 2.2 * len(reports)), layout="constrained")
    axes = figure.subplots(len(reports), 2, squeeze=False, sharey="row", width_ratios=(2, 1))
    for row, (name, report) in enumerate(reports.items()):
        of_even = [share * report.num_experts for share in report.share]
        for axis, heights in zip(axes[row], (of_even, sorted(of_even, reverse=True)), strict=True):
            # Steps, not bars: ten thousand bars take minutes and cannot be told apart.
            axis.stairs(heights, [e - 0.5 for e in range(report.num_experts + 1)], fill=True, color="#0072B2")
            axis.axhline(1.0, color="#D55E00", linewidth=1)
            axis.set_xlim(-0.5, report.num_experts - 0.5)
            axis.set_ylim(bottom=0)
        axes[row, 0].set_ylabel("share / even share")
        axes[row, 0].set_title(f"{name}: {report._summary()}" if name else report._summary(), loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("expert")
    axes[-1, 1].set_xlabel("expert, busiest first")
    figure.savefig(path)
    return path
