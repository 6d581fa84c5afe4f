"""Comparison of settings between the processes of a group, once, before their results depend on each other."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

ABSENT = "absent"
_MOST_LISTED = 12  # differences in one message


def agree(action: str, describe: Callable[[], Mapping[str, object]], group: Any) -> None:
    """Raise in every process of a group if they describe themselves differently; a collective call.

    A process whose ``describe`` raises still takes part: it raises its own error, and the others hear of it at once, where they
    would have waited for it until the group's timeout.

    Args:
        action: the public call that compares, for messages: ``"ExpertParallel.apply"``.
        describe: settings by name; values are compared by their ``repr``.
        group: the process group.

    Raises:
        ValueError: the settings differ; the message names them, with the ranks that have each value.
        RuntimeError: another process failed, died or did not come.
    """
    failure: Exception | None = None
    settings: dict[str, str] = {}
    try:
        settings = {name: repr(value) for name, value in describe().items()}
    except Exception as error:
        failure = error
    # The backend "fake" has no other processes: what it gathers is memory that was never written.
    if group.size() > 1 and dist.get_backend(group) != "fake":
        ranks = dist.get_process_group_ranks(group)
        digest = hashlib.sha256(repr(sorted(settings.items())).encode("utf-8", "backslashreplace")).hexdigest()
        said = "" if failure is None else f"{type(failure).__name__}: {failure}"
        heard = dict(zip(ranks, _gather(action, (digest, said), group), strict=True))
        failed = {rank: text for rank, (_, text) in heard.items() if text}
        if failed and failure is None:
            raise RuntimeError(f"{action} failed on {_some(failed)}, so no rank can go on")
        if not failed and len({digest for digest, _ in heard.values()}) > 1:
            by_rank = dict(zip(ranks, _gather(action, settings, group), strict=True))
            raise ValueError(f"{action} needs the same settings in every process of the group, got {differences(by_rank)}")
    if failure is not None:
        raise failure


def _gather(action: str, mine: Any, group: Any) -> list[Any]:
    heard: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(heard, mine, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{action} over {group.size()} ranks failed on rank {dist.get_rank()} while settings were compared; another rank has "
            f"died, or did not come within the group's timeout: {error}"
        ) from error
    return heard


def _some(failed: Mapping[int, str]) -> str:
    listed = [f"rank {rank} ({text})" for rank, text in list(failed.items())[:_MOST_LISTED]]
    return ", ".join(listed) + (f" and {len(failed) - len(listed)} more ranks" if len(failed) > len(listed) else "")


def differences(by_rank: Mapping[int, Mapping[str, str]]) -> str:
    """The settings that differ, each with its values and their ranks.

    Where a module itself differs (the setting ``name`` of ``name.field``), its fields are not listed.
    """
    names = list(dict.fromkeys(name for settings in by_rank.values() for name in settings))
    texts: list[str] = []
    different: set[str] = set()
    for name in names:
        if any(name[:place] in different for place, letter in enumerate(name) if letter == "."):
            continue
        holders: dict[str, list[int]] = {}
        for rank, settings in by_rank.items():
            holders.setdefault(settings.get(name, ABSENT), []).append(rank)
        if len(holders) > 1:
            different.add(name)
            texts.append(f"{name} = " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items()))
    more = f"; and {len(texts) - _MOST_LISTED} more differences" if len(texts) > _MOST_LISTED else ""
    return "; ".join(texts[:_MOST_LISTED]) + more


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
