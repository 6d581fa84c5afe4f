"""Tables and figures from the committed result files for the pages and the README: records, chosen by conditions, as Markdown.

A *record* is one row of one cell of a file, as a flat dictionary.

- A condition is ``field=value``, ``field!=value``, ``field<number`` or ``field>number``; several are joined by ``;``.
- A quantity is a field, ``field[conditions]``, or a quotient of two of them. The conditions in brackets select another record,
  which differs from this one only in these fields, and its field is taken. ``peer=@yardstick`` is the peer in this record's field
  ``yardstick``. A number's format, as in Python, follows after a ``|``.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fusedonemoe.bench import IN_THE_REPOSITORY
from fusedonemoe.bench.peers import OURS, is_ours
from fusedonemoe.bench.records import DamagedError, read
from fusedonemoe.report.runs import times_ours

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "results"
SIZES = ("T", "D", "F", "E", "K")
# The fields that stay equal when `field[conditions]` looks for another record.
IDENTITY = ("operator", "system", "label", "routing", "dtype", "mode", "allocator", "dial", *SIZES, "peer")

Record = dict[str, Any]


class NotThereError(Exception):
    """A page asks for a field or a record that is not in the file."""


@cache
def results_of(suite: str) -> dict[str, Any]:
    """Return the content of the committed file of a suite."""
    try:
        return read(RESULTS / f"{suite}.json")
    except DamagedError as error:
        raise NotThereError(f"no results of the suite {suite!r} are committed: {error}") from error


def suites() -> list[str]:
    """Return the names of the suites with a committed file."""
    return sorted(path.stem for path in RESULTS.glob("*.json"))


def _of_a_cell(cell: dict[str, Any]) -> Iterator[Record]:
    others = [row for row in cell["rows"] if row.get("seconds") and not is_ours(row["peer"]) and row.get("comparable", True)]
    ratios = times_ours(cell)
    best = min(others, key=lambda row: row.get("times_best") or ratios.get(row["peer"], float("inf")), default=None)
    common = {key: value for key, value in cell.items() if key not in ("rows", "load")}
    common |= {"cell": cell["name"], "dial": cell.get("save_percent"), "best_peer": best and best["peer"]}
    for row in cell["rows"]:
        record = common | row
        record["ours"] = "yes" if is_ours(row["peer"]) else "no"
        # In half precision two right answers can pick different tokens.
        record["agree"] = {True: "the same", False: "others", None: None}[row.get("same_tokens")]
        record["times_ours"] = 1.0 if row["peer"] == OURS else ratios.get(row["peer"])
        yield record


@cache
def records_of(suite: str) -> tuple[Record, ...]:
    """Return every record of a suite's file, in order, with derived fields."""
    found = [record for cell in results_of(suite)["cells"] for record in _of_a_cell(cell)]
    for record in found:
        for name in ("seconds", "p95_seconds", "p99_seconds"):
            if record.get(name) is not None:
                record[name.replace("seconds", "ms")] = record[name] * 1e3
        for name in ("held_bytes", "peak_bytes"):
            if record.get(name) is not None:
                record[name.replace("bytes", "mb")] = record[name] / 1e6
        if record.get("bytes_per_s"):
            record["gb_per_s"] = record["bytes_per_s"] / 1e9
        if record.get("seconds") and record.get("floor_seconds"):
            record["floors"] = record["seconds"] / record["floor_seconds"]
    return tuple(found)


def _holds(record: Record, condition: str) -> bool:
    match = re.fullmatch(r"\s*(\w+)\s*(!=|=|<|>)\s*(.*?)\s*", condition)
    if match is None:
        raise NotThereError(f"not a condition: {condition!r}")
    field, sign, value = match.groups()
    if sign in "<>":
        found = record.get(field)
        return found is not None and (found < float(value) if sign == "<" else found > float(value))
    return (str(record.get(field)) == value) is (sign == "=")


def chosen(records: Sequence[Record], where: str) -> list[Record]:
    """Return the records that meet every condition."""
    conditions = [condition for condition in where.split(";") if condition.strip()]
    for condition in conditions:
        field = re.split(r"!=|[=<>]", condition)[0].strip()
        if not any(field in record for record in records):
            raise NotThereError(f"no record has the field {field!r}")
    return [record for record in records if all(_holds(record, condition) for condition in conditions)]


def _sibling(records: Sequence[Record], record: Record, changes: str) -> Record:
    changes = re.sub(r"@(\w+)", lambda match: str(record[match[1]]), changes)
    changed = {change.split("=")[0].strip() for change in changes.split(";")}
    changing = chosen(records, changes)
    found = [other for other in changing if all(other.get(name) == record.get(name) for name in IDENTITY if name not in changed)]
    # A peer that another cell has may be missing from this one; a name that no cell has is a mistake.
    if not changing or len(found) > 1:
        raise NotThereError(f"{len(found)} records are {record['cell']}, {record['peer']}, with {changes}")
    return found[0] if found else {}


def _term(records: Sequence[Record], record: Record, term: str) -> Any:
    match = re.fullmatch(r"\s*(\w+)(?:\[([^\]]+)\])?\s*", term)
    if match is None:
        raise NotThereError(f"not a quantity: {term!r}")
    field, changes = match.groups()
    if not any(field in other for other in records):
        raise NotThereError(f"no record has the field {field!r}")
    return (_sibling(records, record, changes) if changes else record).get(field)


def value_of(records: Sequence[Record], record: Record, quantity: str) -> Any:
    """Return a quantity of a record; None if it, or a part of it, was not measured."""
    parts = [_term(records, record, term) for term in re.split(r" / (?![^\[]*\])", quantity)]
    value = parts[0]
    for divisor in parts[1:]:
        value = None if value is None or divisor is None else value / divisor
    return value


def written(value: Any, form: str) -> str:
    """Return a value as text for a page."""
    if value is None:
        return ""
    if isinstance(value, float) and not form:
        raise NotThereError(f"{value} needs a form")
    return format(value, form).replace("%", " %") if form else str(value)


def _split(text: str) -> tuple[str, str]:
    quantity, _, form = text.partition("|")
    return quantity.strip(), form.strip()


def table(suite: str, where: str, columns: str, empty: str = "") -> list[str]:
    """Return a Markdown table with a row for every record.

    Args:
        suite: the suite whose file is read.
        where: the conditions.
        columns: one line each: ``heading: quantity | form``. Columns with a form are aligned to the right.
        empty: the line that is returned if no record is chosen, or the suite has no file; without it that is an error.
    """
    if empty and suite not in suites():
        return [empty]
    records = records_of(suite)
    rows = chosen(records, where)
    if not rows:
        if empty:
            return [empty]
        raise NotThereError(f"{suite}: no record where {where}")
    headings, quantities = zip(*(line.split(": ", 1) for line in columns.strip().splitlines()), strict=True)
    asked = [_split(quantity) for quantity in quantities]
    body = [[written(value_of(records, row, quantity), form) for quantity, form in asked] for row in rows]
    rule = ["---:" if form else "---" for _, form in asked]
    return ["| " + " | ".join(cells) + " |" for cells in ([heading.strip() for heading in headings], rule, *body)]


def figure(text: str) -> str:
    """Return one figure of ``suite | quantity | form | where``; ``min``, ``max`` or ``count`` reduce several records to one."""
    suite, quantity, form, where = (part.strip() for part in text.split("|"))
    records = records_of(suite)
    rows = chosen(records, where)
    if quantity == "count":
        return written(len(rows), form)
    if match := re.match(r"(min|max) ", quantity):
        values = [value_of(records, row, quantity[4:]) for row in rows]
        known = [value for value in values if value is not None]
        if not known:
            raise NotThereError(f"{suite}: nothing to take the {match[1]} of where {where}")
        return written((min if match[1] == "min" else max)(known), form)
    values = [value_of(records, row, quantity) for row in rows]
    if len(values) != 1 or values[0] is None:
        raise NotThereError(f"{suite}: {len(values)} records where {where}; one with {quantity} is needed")
    return written(values[0], form)


def command_of(suite: str) -> str:
    """Return the command that measures a suite again."""
    peers = results_of(suite).get("peers")
    command = "python -m asv_bench.suites" if suite in IN_THE_REPOSITORY else "python -m fusedonemoe bench --suite"
    return f"{command} {suite}{f' --peers {peers!r}' if peers else ''} --json {suite}.json"


def versions_of(suite: str) -> str:
    """Return the versions of a suite's measurement."""
    return ", ".join(f"{name} {number}" for name, number in results_of(suite)["versions"].items() if number)


def machine_of(suite: str) -> str:
    """Return the machine of a suite's measurement."""
    found = results_of(suite)
    return f"{found['cpu']} ({found['cpu_capability']}), {found['threads']} threads on {found['cores']} cores"


def measured(suite: str) -> str:
    """Return a sentence with the date, the machine, the versions and the command of a measurement."""
    found = results_of(suite)
    if found.get("dry"):
        raise NotThereError(f"{suite}: a dry run measures nothing")
    return f"Measured {found['date'][:10]} on {machine_of(suite)}, with {versions_of(suite)}, by `{command_of(suite)}`."
