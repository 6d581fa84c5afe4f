"""Damaged files of results: each reader ends with 2, the file and the reason, or takes what is left; never a traceback."""

import argparse
import copy
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from asv_bench import suites
from fusedonemoe import bench
from fusedonemoe.__main__ import main
from fusedonemoe.bench import REGISTRY, records

pytest.importorskip("rich")
session = importlib.import_module("fusedonemoe.bench.session")
comparison = importlib.import_module("fusedonemoe.bench.comparison")
report = importlib.import_module("fusedonemoe.bench.report")
runs = importlib.import_module("fusedonemoe.report.runs")
page = importlib.import_module("fusedonemoe.report.page")

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MACHINE = {"cpu": "one", "cpu_capability": "AVX2", "cores": 4, "threads": 2}
# In place of a field: every type of JSON, and the numbers that arithmetic trips over.
INSTEAD = [
    None,
    True,
    "\ud800",
    "[/red]",
    -1,
    0,
    1e-320,
    1e308,
    10**400,
    math.nan,
    math.inf,
    [],
    [[1]],
    {"a": 1},
]
GONE = object()


def cut(suite, cells, rows):
    """The first cells and rows of a committed file, in the form of the file."""
    results = json.loads((RESULTS / f"{suite}.json").read_text(encoding="utf-8"))
    return results | {"cells": [cell | {"rows": cell["rows"][:rows]} for cell in results["cells"][:cells]]}


def of_all_suites():
    """A file with every field that a suite of today writes, and enough cells for lines in pictures."""
    results = cut("quick", 2, 2) | {"gpu": {"name": "A"}, "impl": "triton", "conditions": [{"after": "x"}], "dry": False}
    results["versions"] = {"torch": "2", "gone": None}
    results["cells"][0] |= {"dense_seconds": 1.0, "copy_seconds": 1.0}
    results["cells"][0]["rows"][0] |= {"of_dense": 0.5, "of_copy": 0.5, "mfu": 0.5, "meets_bar": True}
    results["cells"] += [cell for suite in ("cpu", "seeds", "serving", "dial") for cell in cut(suite, 1, 2)["cells"]]
    for cell in results["cells"]:
        cell |= {"load": [2.0, 1.0, 0.0]} if "load" in cell else {}
    return results


def places(values, at=()) -> Iterator[tuple[str | int, ...]]:
    """Every field, by the keys that lead to it."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


def name_of(place):
    """Fields of one name at one level are alike, in whatever cell and row."""
    return tuple(key if isinstance(key, str) else 0 for key in place)


def mutated(results, place, value):
    """The text of a file with another value at a place; the results are left as they were."""
    *path, last = place
    inner = results
    for key in path:
        inner = inner[key]
    before = copy.copy(inner)
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    text = json.dumps(results)
    inner.clear()
    inner.update(before) if isinstance(inner, dict) else inner.extend(before)
    return text.encode()


def shown_by_report(file, settings):
    page.page_of([runs.load(file)]).encode("utf-8")


def taken_by_compare(file, settings):
    old = comparison.load(file, settings)
    comparison.print_comparison(old, settings | {"cells": old["cells"]})


def taken_by_resume(file, settings):
    results = settings | {"cells": session.finished_cells(file, settings)}
    json.dumps(results, indent=1)
    report.summary_of(results)
    report.summary_of(results)


READERS = (shown_by_report, taken_by_compare, taken_by_resume)


def is_taken(file, read, settings):
    try:
        read(file, settings)
    except records.DamagedError as reason:
        return not str(reason)
    return True


@pytest.mark.parametrize("suite", ["all", "lora", "quantized", "transformers"])
def test_no_field_ends_a_reader_in_a_traceback(suite, tmp_path, monkeypatch):
    results = of_all_suites() if suite == "all" else cut(suite, 1, 1)
    settings = {name: value for name, value in results.items() if name != "cells"}
    whole, file = json.dumps(results), tmp_path / "r.json"
    file.write_text(whole)
    assert all(is_taken(file, read, settings) for read in READERS), "the file itself is right"
    # Without the disk, and without drawing tables: this is about what is read.
    monkeypatch.setattr(report, "console", lambda: Mock())
    taken = refused = 0
    for place in {name_of(place): place for place in reversed(list(places(results)))}.values():
        for value in (GONE, *INSTEAD):
            content = mutated(results, place, value)
            monkeypatch.setattr(records, "_content_of", lambda path, content=content: content)
            for read in READERS:
                try:
                    was_taken = is_taken(file, read, settings)
                except Exception as error:
                    raise AssertionError(f"{read.__name__}, {place} = {value!r}: {type(error).__name__}: {error}") from error
                taken, refused = taken + was_taken, refused + (not was_taken)
                if not was_taken:
                    break  # one reader checks for all
    assert json.dumps(results) == whole and min(taken, refused) > 100, "some changes hurt and some do not"


DEEP = "[" * 900 + "]" * 900
GOOD = {
    "schema": 1,
    "suite": "quick",
    "date": "2026",
    **MACHINE,
    "cells": [{"name": "a", "rows": [{"peer": "fusedonemoe", "failed": False, "seconds": 1.0}]}],
}
DAMAGED = {
    "empty": (b"", "empty"),
    "blank": (b" \n", "empty"),
    "cut off": (json.dumps(GOOD).encode()[:-9], "not JSON: "),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not text in UTF-8: byte 0 is 0xff"),
    "a mark of the byte order": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "not JSON: "),
    "NUL": (bytes(100), "not JSON: "),
    "NUL at the end": (json.dumps(GOOD).encode() + bytes(100), "not JSON: "),
    "a picture": (b"\x89PNG\r\n\x1a\n", "not text in UTF-8: byte 0 is 0x89"),
    "a list": (b"[1]", "the file must be an object, got [1]"),
    "a number": (b"3", "the file must be an object, got 3"),
    "NaN": (b"NaN", "the file must be an object, got NaN"),
    "null": (b"null", "the file must be an object, got null"),
    "text": (b'"x"', 'the file must be an object, got "x"'),
    "nested by far too deep": (b"[" * 200_000, "nested deeper than 32 levels"),
    "nested too deep for a writer": (
        json.dumps(GOOD | {"x": 0}).replace(": 0}", f": {DEEP}}}").encode(),
        "nested deeper than 32",
    ),
    "a number too long": (b'{"suite": ' + b"9" * 5000 + b"}", "not JSON: "),
    "another program's": (b'{"a": 1}', "suite is missing: it must be text"),
    "two files": (json.dumps(GOOD).encode() * 2, "not JSON: "),
    "no cells": (json.dumps({**GOOD, "cells": None}).encode(), "cells must be a list, got null"),
    "a cell that is a number": (json.dumps({**GOOD, "cells": [3]}).encode(), "cells[0] must be an object, got 3"),
    "no rows": (json.dumps({**GOOD, "cells": [{"name": "a", "rows": []}]}).encode(), "cells[0].rows must be a list that is not"),
    "a row that is a list": (
        json.dumps({**GOOD, "cells": [{"name": "a", "rows": [[]]}]}).encode(),
        "cells[0].rows[0] must be an object, got []",
    ),
    "a time that is text": (json.dumps(GOOD).replace("1.0", '"fast"').encode(), "cells[0].rows[0].seconds must be 0 or a number"),
    "a time below zero": (json.dumps(GOOD).replace("1.0", "-1").encode(), ", or null, got -1"),
    "a time without an end": (json.dumps(GOOD).replace("1.0", "Infinity").encode(), ", or null, got Infinity"),
}


def resume_and_compare(argv):
    """A run of one cell, which must not begin."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    settings = {"suite": "quick", "date": "2026", "versions": {}, **MACHINE}
    cell = type("Cell", (), {"name": "a"})()
    options = {"measure": None, "to_json": None, "show": None, "order": ["a"]}
    return session.run_cells(parser.parse_args(argv), settings, [cell], **options)


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_file_ends_every_reader_with_two_and_the_reason(damage, tmp_path, capsys):
    content, told = DAMAGED[damage]
    file, made = tmp_path / "r.json", tmp_path / "r.html"
    file.write_bytes(content)
    assert main(["report", str(file), "-o", str(made)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{file}: ") and told in err and err.count("\n") == 1 and not made.exists()
    for argv in (["--compare", str(file)], ["--json", str(file), "--resume"]):
        assert resume_and_compare(argv) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"{argv[0] if 'compare' in argv[0] else '--resume'} {file}: ") and told in err
    assert file.read_bytes() == content, "a file that cannot be resumed is not lost"


def test_the_good_file_is_good(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(GOOD))
    assert main(["report", str(file), "-o", str(tmp_path / "r.html")]) == 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none", "No such file or directory"),
        ("", "Is a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("/dev/zero", "neither a file nor a pipe"),
        ("/dev/null", "neither a file nor a pipe"),
        ("n" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_read_ends_with_two_and_the_reason(name, told, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    file = tmp_path / name
    assert main(["report", str(file), "-o", str(tmp_path / "r.html")]) == 2
    assert f"{file}: no results of `bench --json` ({told})" in capsys.readouterr().err
    assert resume_and_compare(["--compare", str(file)]) == 2
    assert f"--compare {file}: no results of the benchmark ({told})" in capsys.readouterr().err


def test_a_pipe_is_not_resumed(capsys):
    assert resume_and_compare(["--json", "/dev/null", "--resume"]) == 2
    assert capsys.readouterr().err.startswith("--resume /dev/null: a pipe or a device cannot be read again")


@pytest.mark.parametrize("suite", [name for name in (*REGISTRY, *suites.REGISTRY) if name != "gpu"])
def test_every_suite_reads_its_files_before_the_first_cell(suite, tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text('{"suite": 3}')
    parser = argparse.ArgumentParser()
    of = bench if suite in REGISTRY else suites
    of.add_arguments(parser)
    asked = [*(["--suite"] if of is bench else []), suite, "--no-rt"]

    def main(argv):
        return of.run(parser.parse_args(argv))

    for argv in (["--compare", str(file)], ["--json", str(file), "--resume"]):
        assert main([*asked, *argv]) == 2
        assert f"{file}: " in capsys.readouterr().err
    for unwritable in (tmp_path, "/dev/full", file / "r.json"):
        assert main([*asked, "--json", str(unwritable)]) == 2
        assert f"cannot write {unwritable}: " in capsys.readouterr().err
    assert file.read_text() == '{"suite": 3}'


def test_the_suite_of_gpus_reads_its_files_before_the_first_cell(tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text('{"suite": 3}')
    assert main(["bench", "--suite", "gpu", "--dry", "--json", str(file), "--resume"]) == 2
    assert f"--resume {file}: suite must be text, got 3" in capsys.readouterr().err
    assert main(["bench", "--suite", "gpu", "--dry", "--json", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}: Is a directory" in capsys.readouterr().err
