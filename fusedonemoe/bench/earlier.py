"""Files of the suites ``lora``, ``quantized`` and ``transformers`` of earlier versions, which had tables of lines, as cells.

Only the information of the names is added: such a cell has no percentiles, and no work or floor that was not in the file.
"""

import re
from typing import Any

from fusedonemoe.bench import records
from fusedonemoe.bench.records import DamagedError

# Tokens of a training step at that time, which are in no file.
_BATCH_TOKENS = 4 * 128
_SIZE = re.compile(r"\b([A-Z])([0-9]{1,12})\b")
_LINE: records.Fields = {"name": records.TEXT.here, "seconds": records.AMOUNT.or_null.here, "note": records.TEXT}
_MODEL_LINE: records.Fields = {
    "name": records.TEXT.here,
    "same_tokens": records.FLAG.here,
    **{f"{mode}_{what}": records.AMOUNT.or_null.here for mode in ("training", "decode") for what in ("seconds", "times_faster")},
}
_MODEL_SIZES: records.Fields = dict.fromkeys(
    ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"), records.SIZE.here
)


def in_cells(results: dict[str, Any]) -> dict[str, Any]:
    """Turn the tables of results into cells."""
    suite, tables = results["suite"], records.check(results["tables"], {}, "tables")
    cells_of = {"lora": _lora, "quantized": _quantized, "transformers": _transformers}.get(suite)
    if cells_of is None:
        raise DamagedError(f"tables of the suite {suite}")
    fields = _MODEL_LINE if suite == "transformers" else _LINE
    for name, lines in tables.items():
        records.check({name: lines}, {name: records.LIST}, "tables")
        for n, line in enumerate(lines):
            records.check(line, fields, f"tables.{name}[{n}]")
    if suite == "transformers":
        records.check(records.check(results, {"sizes": records.OBJECT.here})["sizes"], _MODEL_SIZES, "sizes")
    cells = [cell for name, lines in tables.items() for cell in cells_of(name, lines, results)]
    return {name: value for name, value in results.items() if name != "tables"} | {"cells": cells}


def _sizes_in(name: str) -> dict[str, int]:
    sizes: dict[str, int] = {letter: int(size) for letter, size in _SIZE.findall(name)}
    if not sizes.get("T"):
        raise DamagedError(f"tables.{name}: the name must have the number of tokens, as in T256-D512")
    return sizes


def _row(peer: str, line: dict[str, Any], **more: Any) -> dict[str, Any]:
    values = {name: value for name, value in line.items() if name != "name"}
    return {"peer": peer, "note": "", **values, "failed": bool(line.get("note")), **more}


def _with_rate(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    return row | {"tokens_per_second": tokens / row["seconds"] if row["seconds"] else None}


def _lora(name: str, lines: list[dict[str, Any]], _: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = _sizes_in(name)
    described = {"operator": "adapters", **sizes, "mode": "training", "dtype": name.rpartition("-")[2]}
    return [{"name": name, **described, "rows": [_with_rate(_row(line["name"], line), sizes["T"]) for line in lines]}]


def _quantized(name: str, lines: list[dict[str, Any]], _: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = _sizes_in(name)
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
