"""Files of results, those of earlier versions included, in the one form that is read: a list of cells, each with rows.

The suites ``lora``, ``quantized`` and ``transformers`` had tables of lines in their files once. Nothing is added to them here but
what their names say: such a cell has no percentiles, and no work or floor that was not in the file.
"""

import json
import re
from pathlib import Path
from typing import Any

# What was run at that time, and stands in no file.
_BATCH_TOKENS = 4 * 128
_SIZE = re.compile(r"\b([A-Z])(\d+)\b")


def read(path: Path) -> dict[str, Any]:
    """Read a file of results.

    Args:
        path: of what ``bench --json`` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object, or its tables are none that there ever were.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict):
        raise ValueError(f"expected an object, got a {type(results).__name__}")
    if "tables" not in results:
        return results
    tables = results.pop("tables")
    cells_of = {"lora": _lora, "quantized": _quantized, "transformers": _transformers}.get(results.get("suite", ""))
    if cells_of is None:
        raise ValueError(f"tables of the suite {results.get('suite')}")
    return results | {"cells": [cell for name, lines in tables.items() for cell in cells_of(name, lines, results)]}


def _row(peer: str, line: dict[str, Any], **more: Any) -> dict[str, Any]:
    values = {name: value for name, value in line.items() if name != "name"}
    return {"peer": peer, "note": "", **values, "failed": bool(line.get("note")), **more}


def _with_rate(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    return row | {"tokens_per_second": tokens / row["seconds"] if row["seconds"] else None}


def _lora(name: str, lines: list[dict[str, Any]], _: dict[str, Any]) -> list[dict[str, Any]]:
    sizes: dict[str, int] = {letter: int(size) for letter, size in _SIZE.findall(name)}
    described = {"operator": "adapters", **sizes, "mode": "training", "dtype": name.rpartition("-")[2]}
    return [{"name": name, **described, "rows": [_with_rate(_row(line["name"], line), sizes["T"]) for line in lines]}]


def _quantized(name: str, lines: list[dict[str, Any]], _: dict[str, Any]) -> list[dict[str, Any]]:
    sizes: dict[str, int] = {letter: int(size) for letter, size in _SIZE.findall(name)}
    rows = [_with_rate(_row(f"fusedonemoe {line['name']}", line, weights=line["name"]), sizes["T"]) for line in lines]
    described = {"operator": "quantized", **sizes, "mode": "forward", "dtype": "bfloat16"}
    return [{"name": name, **described, "rows": rows}]


def _transformers(name: str, lines: list[dict[str, Any]], results: dict[str, Any]) -> list[dict[str, Any]]:
    dtype, sizes, cells = name.rpartition("-")[2], results["sizes"], []
    described = {
        "operator": "model",
        "D": sizes["hidden_size"],
        "F": sizes["moe_intermediate_size"],
        "E": sizes["num_experts"],
        "K": sizes["num_experts_per_tok"],
    }
    for mode, tokens in (("training", _BATCH_TOKENS), ("decode", 1)):
        rows = [
            {
                "peer": line["name"],
                "seconds": line[f"{mode}_seconds"],
                "times_faster": line[f"{mode}_times_faster"],
                "same_tokens": line["same_tokens"],
                # In half precision two right answers can pick different tokens.
                "failed": dtype == "float32" and not line["same_tokens"],
                "note": "",
            }
            for line in lines
        ]
        cell = {"name": f"{name}-{mode}", **described, "T": tokens, "mode": mode, "dtype": dtype}
        cells.append(cell | {"rows": [_with_rate(row, tokens) for row in rows]})
    return cells
