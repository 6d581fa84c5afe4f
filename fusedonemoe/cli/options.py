"""Values of command-line options: each type says what was expected and what came, and argparse names the option."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

# More threads than this are refused where the machine has fewer cores: each takes a stack, and the system ends the process.
MOST_THREADS = max(1024, os.cpu_count() or 1)
_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")
_LONGEST = 40


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number from ``least`` to ``most``."""

    def convert(text: str) -> int:
        if not _WHOLE.fullmatch(text):
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {_shown(text)!r}")
        # Python itself refuses to convert thousands of digits; the first hundred are as much out of range.
        value = int(text.strip()[:100])
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {_shown(text)}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {_shown(text)}")
        return value

    return convert


def above_zero(text: str) -> float:
    """The type of an option that takes a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {_shown(text)!r}")
    return value


def regex(text: str) -> re.Pattern[str]:
    """The type of an option that takes a regular expression."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{_shown(text)!r} is not a regular expression: {error}") from error


def path(text: str) -> Path:
    """The type of an option that takes the name of a file or a folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be the name of a file or a folder, got {_shown(text)!r}")
    return Path(text)
