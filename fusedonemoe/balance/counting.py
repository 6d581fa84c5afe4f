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
from torch.utils.hooks import RemovableHandle

from fusedonemoe import functional as F
from fusedonemoe.agreement import agree
from fusedonemoe.checks import check_tensor
from fusedonemoe.layers.routers import RouterOutput, TopKRouter

_MOST_ROWS = 16  # of a printed table; the busiest and the idlest of more experts


def check_counts(counts: Tensor) -> None:
    """Rows of each expert, ``[E]`` integers."""
    check_tensor("counts", counts)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"counts must have an integer dtype, got {counts.dtype}")
    if counts.dim() != 1 or counts.shape[0] < 1:
        raise ValueError(f"counts must have shape [E] with E >= 1, got {tuple(counts.shape)}")


class Usage:
    """The use that a routing made of its experts; the first number that is asked for reads them from the device.

    Args:
        counts: ``[E]`` integers, the rows of each expert, as :func:`fusedonemoe.functional.tokens_per_expert` counts them.

    Raises:
        TypeError: ``counts`` is no tensor of integers.
        ValueError: it has not the shape ``[E]``.

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
        """``-sum(p log p) / log E``: 1 for perfect balance, 0 when one expert has all; not a number without rows.

        A single expert has 1.
        """
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
        ids: list[int | None] = list(range(self.num_experts))
        if self.num_experts > _MOST_ROWS:
            by_count = sorted(range(self.num_experts), key=lambda e: -self.counts[e])
            ids = [*by_count[: _MOST_ROWS // 2], None, *by_count[-_MOST_ROWS // 2 :]]
        lines = [
            f"{self.total} rows over {self.num_experts} experts: {self._summary()}",
            f"{'expert':>6}{'rows':>10}{'share':>9}{'of even':>9}",
        ]
        for e in ids:
            if e is None:
                lines.append(f"{'...':>6}")
            else:
                even = self.share[e] * self.num_experts
                lines.append(f"{e:>6}{self.counts[e]:>10}{self.share[e]:>9.2%}{even:>9.2f}")
        return "\n".join(lines)

    def picture(self, path: str | Path) -> Path:
        """Draw the shares, by expert and sorted, in multiples of the even share.

        Args:
            path: of the file; its ending decides the format.

        Returns:
            ``path``.

        Raises:
            ImportError: matplotlib is missing.
        """
        return _draw({"": self}, Path(path))


def usage(experts: Tensor | None = None, num_experts: int | None = None, *, counts: Tensor | None = None) -> Usage:
    """Report how evenly a routing uses its experts.

    Nothing is read from the device before the report is asked for a number.

    Args:
        experts: ids of any shape and integer dtype; those outside ``[0, num_experts)`` are not counted.
        num_experts: ``E``.
        counts: ``[E]`` rows of each expert, instead of the other two.

    Returns:
        :class:`Usage`.

    Raises:
        TypeError: an argument of the wrong type or dtype, or neither or both of the two forms.
        ValueError: a shape or number that does not fit, naming the argument.

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

    Args:
        router: whose experts are counted.
        training_only: count nothing in eval mode.
    """

    def __init__(self, router: TopKRouter, training_only: bool) -> None:
        self.training_only = training_only
        self.counts: Tensor = torch.zeros(router.weight.shape[0], dtype=torch.int64, device=router.weight.device)

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: RouterOutput) -> None:
        """Count what the router returns."""
        # An exported program stands alone: it has no tensor of ours to count into.
        if (self.training_only and not router.training) or torch.compiler.is_exporting():
            return
        if self.counts.device != output.experts.device:  # the model has moved since
            self.counts = self.counts.to(output.experts.device)
        torch.ops.fusedonemoe.count_tokens_(self.counts, output.experts)


def count_routers(routers: Mapping[str, TopKRouter], training_only: bool) -> tuple[dict[str, RouterCount], list[RemovableHandle]]:
    """Hook a counter to each router."""
    hooks = {name: RouterCount(router, training_only) for name, router in routers.items()}
    return hooks, [router.register_forward_hook(hooks[name]) for name, router in routers.items()]


class UsageMeter:
    """Counts what every router of a model picks, over any number of forwards, on the device.

    In training and in eval. What activation checkpointing repeats is counted once. A compiled model has to be given before
    its first call: torch.compile does not look for hooks that come later.

    Args:
        model: with at least one :class:`~fusedonemoe.TopKRouter` in it.
        group: a process group or a one-dimensional device mesh over which reports sum the counts, whose processes then all ask
            for them; None for this process alone.

    Raises:
        TypeError: ``model`` is no module, or ``group`` no group.
        ValueError: it has no router, or ``group`` several dimensions.

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
        check_module(model)
        self._group = None if group is None else process_group(group)
        routers = {name: module for name, module in model.named_modules() if isinstance(module, TopKRouter)}
        if not routers:
            raise ValueError("model has no TopKRouter")
        self._hooks, self._handles = count_routers(routers, training_only=False)
        self._settings = settings_of(routers)
        self._compared = False

    def usage(self) -> dict[str, Usage]:
        """Return the counts since the start or the last :meth:`reset`, by the router's name in the model; nothing is read yet.

        Raises:
            ValueError: the routers of the group's ranks differ; the message says which ranks have what.
        """
        counts = {name: hook.counts for name, hook in self._hooks.items()}
        if self._group is not None:
            total = torch.cat(list(counts.values()))  # one message for all layers
            if not self._compared and not is_capturing(total):
                agree("UsageMeter.usage", lambda: self._settings, self._group)
                self._compared = True
            dist.all_reduce(total, group=self._group)
            counts = dict(zip(counts, total.split([count.shape[0] for count in counts.values()]), strict=True))
        return {name: Usage(count) for name, count in counts.items()}

    def reset(self) -> None:
        """Start again from zero."""
        for hook in self._hooks.values():
            hook.counts.zero_()

    def remove(self) -> None:
        """Take the hooks off the model; what was counted stays."""
        for handle in self._handles:
            handle.remove()

    def picture(self, path: str | Path) -> Path:
        """Draw every router's shares into one file; see :meth:`Usage.picture`."""
        return _draw(self.usage(), Path(path))

    def __str__(self) -> str:
        reports = self.usage()
        width = max(map(len, reports))
        return "\n".join(f"{name:<{width}}  {report._summary()}" for name, report in reports.items())


def settings_of(routers: Mapping[str, TopKRouter]) -> dict[str, object]:
    """The lengths of the counts that ranks sum, by the router's name."""
    return {f"experts of {name or 'the router'}": router.weight.shape[0] for name, router in routers.items()}


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


def check_module(model: object) -> None:
    """The model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


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
