"""The fields of a file of results, and the values that each may hold, which are checked when a file is read.

A reader may rely on the value of every field of these tables, and on needed fields being there. Other fields are not checked.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedonemoe.files import reason_of

# Charts and ratios are computed of these numbers: within the bounds no quotient of two of them overflows.
LEAST, MOST = 1e-12, 1e24
# A file of the benchmark has six levels; json itself fails somewhere in the hundreds, depending on the stack.
MOST_LEVELS = 32
TOO_DEEP = f"lists and objects must not be nested deeper than {MOST_LEVELS} levels"
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST = 60
# The largest file that was ever written has less than a hundredth of this.
_MOST_BYTES = 1 << 28


class DamagedError(ValueError):
    """A file that cannot be read as results, or has none of use here; the message says why."""


@dataclass(frozen=True)
class Kind:
    """The values that a field may hold."""

    told: str  # the same in words
    holds: Callable[[Any], bool]
    needed: bool = False  # whether the field may not be missing

    @property
    def or_null(self) -> "Kind":
        """The same, or null."""
        return Kind(f"{self.told}, or null", lambda value: value is None or self.holds(value), self.needed)

    @property
    def here(self) -> "Kind":
        """The same, for a field that may not be missing."""
        return Kind(self.told, self.holds, needed=True)


Fields = Mapping[str, Kind]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (value == 0 or LEAST <= value <= MOST)


TEXT = Kind("text", _is_text)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
# Also what is compared for being equal, and part of a key.
PLAIN = Kind("text, a number, or true or false", lambda value: _is_text(value) or isinstance(value, bool) or _is_amount(value))
AMOUNT = Kind(f"0 or a number from {LEAST:g} to {MOST:g}", _is_amount)
COUNT = Kind("a whole number from 0", lambda value: isinstance(value, int) and _is_amount(value) and value is not True)
SIZE = Kind("a whole number from 1", lambda value: COUNT.holds(value) and value >= 1)
PERCENT = Kind("a number from 0 to 100", lambda value: _is_amount(value) and value <= 100)
# An answer that is far off has an error that is infinite or no number.
ERROR = Kind("a number", lambda value: isinstance(value, float) or _is_amount(value))
AMOUNTS = Kind("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_amount, value)))
PAIR = Kind("two numbers", lambda value: AMOUNTS.holds(value) and len(value) == 2)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
FILLED = Kind("a list that is not empty", lambda value: isinstance(value, list) and bool(value))
VERSIONS = Kind(
    "an object of texts",
    lambda value: isinstance(value, dict) and all(_is_text(name) and TEXT.or_null.holds(v) for name, v in value.items()),
)

RUN: Fields = {
    "schema": COUNT,
    "suite": TEXT.here,
    "date": TEXT.here,
    "versions": VERSIONS,
    **dict.fromkeys(("cpu", "cpu_capability", "peers", "impl", "huge_pages"), TEXT.or_null),
    **dict.fromkeys(("cores", "threads"), COUNT.or_null),
    "dry": FLAG.or_null,
    **dict.fromkeys(("gpu", "allocators"), OBJECT.or_null),
    "conditions": LIST,
}
GPU: Fields = {"name": TEXT.here}
CELL: Fields = {
    "name": TEXT.here,
    "rows": FILLED.here,
    **dict.fromkeys(("T", "E", "K"), SIZE),
    **dict.fromkeys(("D", "F", "L"), COUNT),
    **dict.fromkeys(("operator", "dtype", "mode", "allocator", "label"), TEXT),
    **dict.fromkeys(("floor_bound_by", "published", "system", "yardstick"), TEXT.or_null),
    **dict.fromkeys(("routing", "activation", "gated"), PLAIN.or_null),
    "save_percent": PERCENT,
    "load": AMOUNTS,
    "real_time": FLAG.or_null,
    "experts_hit": AMOUNT,
    **dict.fromkeys(("floor_seconds", "flops_per_s", "bytes_per_s", "flops", "touched_bytes"), AMOUNT.or_null),
    **dict.fromkeys(("parameters", "active_parameters", "floor_tokens_per_second"), AMOUNT.or_null),
    **dict.fromkeys(("dense_seconds", "copy_seconds"), AMOUNT.or_null),
}
ROW: Fields = {
    "peer": TEXT.here,
    "failed": FLAG.here,
    "note": TEXT.or_null,
    "comparable": FLAG,
    **dict.fromkeys(("seconds", "p95_seconds", "p99_seconds", "paired_seconds", "floor_seconds"), AMOUNT.or_null),
    **dict.fromkeys(("tokens_per_second", "times_faster", "times_best", "of_dense", "of_copy", "mfu"), AMOUNT.or_null),
    **dict.fromkeys(("peak_bytes", "held_bytes", "formula_bytes", "promised_bytes", "weight_bytes"), AMOUNT.or_null),
    **dict.fromkeys(("relative", "share", "speed_up", "success_rate"), AMOUNT.or_null),
    **dict.fromkeys(("meets_latency", "meets_throughput", "meets_bar", "same_tokens"), FLAG.or_null),
    **dict.fromkeys(("error", "weight_error"), ERROR.or_null),
    **dict.fromkeys(("spread", "quartiles"), PAIR.or_null),
    "save_percent": PERCENT.or_null,
    "calls": COUNT,
}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check(values: Any, fields: Fields, where: str = "") -> dict[str, Any]:
    """Return an object whose fields hold what they may, else raise DamagedError with its place in the file, ``"cells[0]"``."""
    if not isinstance(values, dict):
        raise DamagedError(f"{where or 'the file'} must be an object, got {_shown(values)}")
    for name, kind in fields.items():
        place = f"{where}.{name}".lstrip(".")
        if name in values and not kind.holds(values[name]):
            raise DamagedError(f"{place} must be {kind.told}, got {_shown(values[name])}")
        if name not in values and kind.needed:
            raise DamagedError(f"{place} is missing: it must be {kind.told}")
    return values


def check_levels(values: Any) -> None:
    """Raise DamagedError where lists and objects are nested deeper than in a file of results."""
    level = [values]
    for _ in range(MOST_LEVELS):
        lists = [list(each.values()) if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        if not (level := [inner for each in lists for inner in each]):
            return
    raise DamagedError(TOO_DEEP)


def read(path: Path) -> dict[str, Any]:
    """Read a file that ``bench --json`` wrote; raise DamagedError where it cannot be read, or is no file of results."""
    content = _content_of(path)
    try:
        results = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DamagedError(f"not text in UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from error
    except RecursionError as error:
        raise DamagedError(TOO_DEEP) from error
    except ValueError as error:
        raise DamagedError(f"not JSON: {error}") from error
    check_levels(results)
    check(results, RUN)
    if results.get("gpu") is not None:
        check(results["gpu"], GPU, "gpu")
    check(results, {"cells": LIST.here})
    for n, cell in enumerate(results["cells"]):
        check(cell, CELL, f"cells[{n}]")
        for r, row in enumerate(cell["rows"]):
            check(row, ROW, f"cells[{n}].rows[{r}]")
    return dict(results)


def _content_of(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            is_readable = stat.S_ISREG(mode) or stat.S_ISFIFO(mode)  # /dev/zero would have no end
            content = file.read(_MOST_BYTES + 1) if is_readable else None
    except (OSError, ValueError) as error:
        raise DamagedError(reason_of(error)) from error
    if content is None:
        raise DamagedError("neither a file nor a pipe")
    if len(content) > _MOST_BYTES:
        raise DamagedError(f"larger than {_MOST_BYTES} bytes")
    if not content.strip():
        raise DamagedError("empty")
    return content
