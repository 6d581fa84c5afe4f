"""A picture of the history: a few times and an import, as multiples of what they are at the newest measured commit."""

import itertools
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

# Benchmark, its parameters as asv writes them, and what the picture calls it.
LINES = (
    ("bench_layers.Eager.time_forward_backward", ("'cpu'", "'MoE'"), "MoE layer, forward and backward"),
    ("bench_experts.MLPBlocks.time_forward", ("'cpu'", "'auto qwen3-30b bfloat16'"), "experts of Qwen3's widths, forward"),
    ("bench_experts.MLPBlocks.time_forward", ("'cpu'", "'auto decode bfloat16'"), "the same with 4 tokens"),
    ("bench_route.Route.time_forward", ("'cpu'", "'softmax E1024'"), "routing to 1024 experts"),
    ("bench_compile.Import.timeraw_import", (), "import, beside torch's"),
)


def value(result: dict, benchmark: str, parameters: tuple[str, ...]) -> float | None:
    """A benchmark's value in one of asv's result files; None where it was not measured."""
    if benchmark not in result["results"]:
        return None
    row = dict(zip(result["result_columns"], result["results"][benchmark], strict=False))
    combinations = list(itertools.product(*row["params"]))
    if parameters not in combinations or row["result"] is None:
        return None
    found = row["result"][combinations.index(parameters)]
    return None if found is None or math.isnan(found) else found


def draw(files: Sequence[Path], commits: Sequence[str], target: Path) -> None:
    """Draw the machine with the most commits.

    Args:
        files: asv's result files.
        commits: all commits in order; results of others are left out.
        target: an SVG file.
    """
    from matplotlib.figure import Figure  # here: the page without a picture needs none of it

    machines: dict[str, list[dict]] = {}
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["commit_hash"] in commits:
            machines.setdefault(path.parent.name, []).append(result)
    machine, results = max(machines.items(), key=lambda item: len(item[1]))
    results.sort(key=lambda result: commits.index(result["commit_hash"]))
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    top = 2.0
    for (benchmark, parameters, label), marker in zip(LINES, "os^Dv", strict=True):
        values = [value(result, benchmark, parameters) for result in results]
        known = [(i, found) for i, found in enumerate(values) if found]
        if known:
            newest = known[-1][1]
            top = max(top, max(found for _, found in known) / newest)
            axes.plot([i for i, _ in known], [found / newest for _, found in known], marker=marker, markersize=4, label=label)
    axes.set_yscale("log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= 2 * top]
    axes.set_yticks(ticks, labels=list(map(str, ticks)))
    axes.minorticks_off()
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set_xticks(range(len(results)), [result["commit_hash"][:8] for result in results], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("time, in multiples of the newest commit's")
    axes.set_title(f"Machine {machine}: lower is faster", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(target, format="svg", metadata={"Date": None})


def in_words(text: str) -> str:
    """An SVG picture that is one line of text."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 60" width="820" height="60">'
        '<rect width="820" height="60" fill="white"/>'
        f'<text x="10" y="35" font-family="sans-serif" font-size="12">{escape(text)}</text></svg>\n'
    )
