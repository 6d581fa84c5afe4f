"""Files that were written before all suites had cells: read, compared with and shown like the others, figures as they are."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from asv_bench import suites
from fusedonemoe.bench import REGISTRY
from fusedonemoe.bench.catalogue import SUITES

pytest.importorskip("rich")
records = importlib.import_module("fusedonemoe.bench.records")
comparison = importlib.import_module("fusedonemoe.bench.comparison")
page = importlib.import_module("fusedonemoe.report.page")
runs = importlib.import_module("fusedonemoe.report.runs")

RESULTS = Path(__file__).parents[2] / "docs" / "results"
LORA = "T256-D512-F256-E64-K8-L4"


def old_file(folder, suite, tables, **more):
    """In the form of those suites once."""
    file = folder / f"{suite}.json"
    described = {"schema": 1, "suite": suite, "date": "2026-11-21", "versions": {"torch": "2.13"}, "cpu": "one", "cores": 2}
    file.write_text(json.dumps(described | {"tables": tables} | more))
    return file


def adapters_line(**changes):
    return {"peak_bytes": 7, "share": 0.5, "seconds": 0.5, "relative": 1.0, "note": ""} | changes


@pytest.fixture
def files(tmp_path):
    lines = [{"name": "peft"} | adapters_line(), {"name": "fusedonemoe"} | adapters_line(note="off by 1", seconds=None)]
    lora = {f"{LORA}-bfloat16": lines}
    quantized = {
        "weight_bytes": 4.0,
        "floor_seconds": 0.25,
        "seconds": 0.5,
        "speed_up": 2.0,
        "quartiles": [1.0, 3.0],
        "weight_error": 0.1,
        "note": "",
    }
    model = {
        "training_seconds": 2.0,
        "decode_seconds": 0.5,
        "training_times_faster": 1.5,
        "decode_times_faster": 2.5,
        "same_tokens": False,
    }
    sizes = {"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2}
    models = {f"qwen3-moe-{dtype}": [{"name": "fusedonemoe", **model}] for dtype in ("float32", "bfloat16")}
    return {
        "lora": old_file(tmp_path, "lora", lora),
        "quantized": old_file(tmp_path, "quantized", {"T16-D8-F4-E6-K2": [{"name": "int8", **quantized}]}),
        "transformers": old_file(tmp_path, "transformers", models, sizes=sizes),
    }


def test_a_table_of_adapters_is_a_cell(files):
    (cell,) = records.read(files["lora"])["cells"]
    assert {name: cell[name] for name in "TDFEKL"} == {"T": 256, "D": 512, "F": 256, "E": 64, "K": 8, "L": 4}
    assert (cell["name"], cell["dtype"], cell["mode"]) == (f"{LORA}-bfloat16", "bfloat16", "training")
    peft, ours = cell["rows"]
    assert peft == adapters_line() | {"peer": "peft", "failed": False, "tokens_per_second": 512.0}
    assert (ours["note"], ours["failed"], ours["tokens_per_second"]) == ("off by 1", True, None)


def test_a_table_of_quantised_experts_is_a_cell_whose_rows_have_floors(files):
    (cell,) = records.read(files["quantized"])["cells"]
    (row,) = cell["rows"]
    assert (row["peer"], row["weights"], row["floor_seconds"], row["tokens_per_second"]) == (
        "fusedonemoe int8",
        "int8",
        0.25,
        32.0,
    )
    assert "name" not in row and "<td>2.00</td>" in page.page_of(
        [runs.load(files["quantized"])]
    )  # in multiples of the row's floor


def test_a_table_of_a_model_is_a_cell_for_training_and_one_for_decoding(files):
    cells = {cell["name"]: cell for cell in records.read(files["transformers"])["cells"]}
    assert list(cells) == [f"qwen3-moe-{dtype}-{mode}" for dtype in ("float32", "bfloat16") for mode in ("training", "decode")]
    (training,), (decode,) = (cells[f"qwen3-moe-float32-{mode}"]["rows"] for mode in ("training", "decode"))
    assert (training["seconds"], training["times_faster"], training["tokens_per_second"]) == (2.0, 1.5, 256.0)
    assert (decode["seconds"], decode["times_faster"], decode["tokens_per_second"]) == (0.5, 2.5, 2.0)
    # Other tokens are a failure in float32 alone.
    assert training["failed"] and not cells["qwen3-moe-bfloat16-decode"]["rows"][0]["failed"]


def test_tables_of_no_suite_are_refused(tmp_path):
    file = old_file(tmp_path, "seeds", {"a": []})
    with pytest.raises(ValueError, match="tables of the suite seeds"):
        records.read(file)
    with pytest.raises(runs.NoResultsError, match="tables of the suite seeds"):
        runs.load(file)


def test_files_with_cells_are_as_they_are(tmp_path):
    file = tmp_path / "new.json"
    results = {"suite": "lora", "date": "2026", "cells": [{"name": "a", "rows": [{"peer": "b", "failed": False, "new": [1]}]}]}
    file.write_text(json.dumps(results))
    assert records.read(file) == results


@pytest.mark.parametrize("suite", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_every_committed_file_can_be_shown_and_compared_with(suite, tmp_path):
    file = shutil.copy(RESULTS / f"{suite}.json", tmp_path)
    run = runs.load(Path(file))
    assert run.cells and page.page_of([run]).count("<h2") == 7
    old = comparison.load(file, run.settings)
    results = run.settings | {"cells": list(run.cells)}
    pairs = list(comparison.pairs_of(old, results))
    assert pairs and all(pair.ratio == 1.0 for pair in pairs)
    assert not comparison.print_comparison(old, results)


@pytest.mark.parametrize("suite", ["lora", "quantized", "transformers"])
def test_the_cells_of_a_committed_file_are_those_that_the_suite_has_today(suite):
    module = importlib.import_module((REGISTRY | suites.REGISTRY)[suite].module)
    committed = records.read(RESULTS / f"{suite}.json")["cells"]
    cells = SUITES[suite] if suite in SUITES else module.cells()
    assert [cell["name"] for cell in committed] == [cell.name for cell in cells]
    for then, now in zip(committed, cells, strict=True):
        named = ("operator", "T", "D", "F", "E", "K", "mode")
        described = now.described if hasattr(now, "described") else {name: getattr(now, name) for name in named}
        described = described | {"dtype": str(now.dtype).removeprefix("torch.")}
        assert {name: then[name] for name in described} == described
