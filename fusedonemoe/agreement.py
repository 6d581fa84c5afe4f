"""Comparison of settings between the processes of a group, before their results depend on each other."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

ABSENT = "absent"
_MOST_LISTED = 12  # differences in one message


def agree(action: str, describe: Callable[[], Mapping[str, object]], group: Any) -> None:
    """Raise in every process of a group if they describe themselves differently; a collective call.

    A process whose ``describe`` raises still takes part: it raises its own error, and the others hear of it at once, where they
    would have waited for it until the group's timeout.

    Args:
        action: the public call that compares, for messages: ``"ExpertParallel.apply"``.
        describe: settings by name; values are compared by their ``repr``, numbers by their value: 1 and 1.0 are equal.
        group: the process group.

    Raises:
        ValueError: the settings differ; the message names them, with the ranks that have each value.
        RuntimeError: another process failed, died or did not come.
    """
    failure: Exception | None = None
    settings: dict[str, tuple[str, str]] = {}
    try:
        settings = {name: (_key(value), repr(value)) for name, value in describe().items()}
    except Exception as error:
        failure = error
    # The backend "fake" has no other processes: what it gathers is memory that was never written.
    if group.size() > 1 and dist.get_backend(group) != "fake":
        ranks = dist.get_process_group_ranks(group)
        keys = sorted((name, key) for name, (key, _) in settings.items())
        digest = hashlib.sha256(repr(keys).encode("utf-8", "backslashreplace")).hexdigest()
        said = "" if failure is None else f"{type(failure).__name__}: {failure}"
        heard = dict(zip(ranks, _gather(action, (digest, said), group), strict=True))
        failed = {rank: text for rank, (_, text) in heard.items() if text}
        if failed and failure is None:
            listed = ", ".join(f"rank {rank} ({text})" for rank, text in list(failed.items())[:_MOST_LISTED])
            more = f" and {len(failed) - _MOST_LISTED} more ranks" if len(failed) > _MOST_LISTED else ""
            raise RuntimeError(f"{action} failed on {listed}{more}, so no rank can go on")
        if not failed and len({digest for digest, _ in heard.values()}) > 1:
            shown: dict[tuple[str, str], str] = {}  # one text for values that are equal
            by_rank = {
                rank: {name: shown.setdefault((name, key), text) for name, (key, text) in told.items()}
                for rank, told in zip(ranks, _gather(action, settings, group), strict=True)
            }
            raise ValueError(f"{action} needs the same settings in every process of the group, got {differences(by_rank)}")
    if failure is not None:
        raise failure


def _key(value: object) -> str:
    """Return the text by which a value is compared."""
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)


def start_comparison(action: str, mine: object, group: Any, device: torch.device) -> Callable[[], bool]:
    """Begin to compare one value across a group, in a message of eight bytes that travels while this process does other work.

    A digest of the value's ``repr`` is sent. The result is a function that waits for the others and returns whether all values
    are equal. If the group has no CPUs, nothing is read: it returns true, and unequal values fail on the device.
    """
    if group.size() == 1 or dist.get_backend(group) == "fake":
        return lambda: True
    digest = int.from_bytes(hashlib.blake2b(repr(mine).encode("utf-8", "backslashreplace"), digest_size=8).digest(), signed=True)
    on_cpu = torch.device("cpu") in group._device_types
    own = torch.full((1,), digest, dtype=torch.int64, device="cpu" if on_cpu else device)
    heard = own.new_empty(group.size())
    during = "settings were compared"
    with failures_named(action, group, during):
        work = dist.all_gather_into_tensor(heard, own, group=group, async_op=True)

    def equal() -> bool:
        with failures_named(action, group, during):
            work.wait()
        if on_cpu:
            return bool((heard == own).all())
        torch._assert_async((heard == own).all(), f"{action} needs the same settings in every process of the group")
        return True

    return equal


@contextmanager
def failures_named(action: str, group: Any, during: str) -> Iterator[None]:
    """Name the call in the error of a collective, of which a backend says at best which socket it was."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{action} over {group.size()} ranks failed on rank {dist.get_rank()} while {during}; another rank has died, or did "
            f"not come within the group's timeout: {error}"
        ) from error


def _gather(action: str, mine: Any, group: Any) -> list[Any]:
    heard: list[Any] = [None] * group.size()
    with failures_named(action, group, "settings were compared"):
        dist.all_gather_object(heard, mine, group=group)
    return heard


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
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
