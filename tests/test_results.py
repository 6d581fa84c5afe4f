"""The figures that pages show are those of the committed result files."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = json.loads((ROOT / "docs" / "results" / "quick.json").read_text(encoding="utf-8"))
TABLES = {
    "block": ("fusedonemoe", "transformers grouped_mm", "per-expert loop"),
    "merged": ("fusedonemoe", "original einsum"),
}


def expected_rows(operator):
    """A Markdown row per cell: what was run, each peer's time in multiples of ours, and ours in multiples of the floor."""
    for cell in QUICK["cells"]:
        if cell["operator"] == operator:
            seconds = {row["peer"]: row["seconds"] for row in cell["rows"]}
            ours, *peers = (seconds[peer] for peer in TABLES[operator])
            figures = [f"{peer / ours:.1f}" for peer in peers] + [f"{ours / cell['floor_seconds']:.1f}"]
            yield f"| {cell['E']} | {cell['dtype']} | " + " | ".join(figures) + " |"


@pytest.mark.parametrize("operator", TABLES)
def test_the_readme_shows_the_committed_result(operator):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = list(expected_rows(operator))
    assert len(rows) == 6
    assert [row for row in rows if row not in readme] == []
    shape = {(cell["T"], cell["D"], cell["F"], cell["K"]) for cell in QUICK["cells"]}
    assert shape == {(512, 128, 512, 8)} and "T = 512, D = 128, F = 512, K = 8" in readme
    for package in ("torch", "transformers"):
        assert f"{package} {QUICK['versions'][package]}" in readme
    assert f"{QUICK['threads']} threads" in readme and QUICK["date"][:10] in readme
