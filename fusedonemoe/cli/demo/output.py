"""The output of the demo: live in a terminal, plain lines in a pipe or a log, and the picture of what both models learned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fusedonemoe.bench.picture import save
from fusedonemoe.bench.results import CellResult
from fusedonemoe.cli.demo import Settings
from fusedonemoe.cli.demo.model import ParameterCount
from fusedonemoe.cli.demo.text import Corpus
from fusedonemoe.cli.demo.train import Trainer, smoothed

PLAIN_LINES = 10
# Two of Okabe and Ito's colours, which all common forms of colour blindness tell apart; the markers differ as well.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"))
FIRST_SHOWN_SHARE = 0.05
MOST_ANNOTATED = 16


def show_header(
    console: Console, settings: Settings, corpus: Corpus, parameters: dict[str, ParameterCount], *, machine: str
) -> None:
    """Show the models, the text and the machine."""
    table = Table("model", "feed-forward part", box=None, pad_edge=False)
    for heading in ("parameters", "active per byte"):
        table.add_column(heading, justify="right")
    E, K, F = settings.num_experts, settings.top_k, settings.intermediate_size
    kinds = (f"{K} of {E} experts of width {F}", f"dense, width {K * F}")
    for (name, count), kind in zip(parameters.items(), kinds, strict=True):
        table.add_row(name, kind, f"{count.total:,}", f"{count.active:,}")
    text = (
        f"Text: the source of Python's standard library, {len(corpus.train) / 1e6:.1f} MB from {len(corpus.train_files)} files; "
        f"held out: {len(corpus.val) / 1e6:.1f} MB from {len(corpus.val_files)} others.\n"
        f"Task: predict the next byte. {settings.steps} steps of {settings.batch} x {settings.window} bytes, both models on the "
        f"same batches; {settings.num_layers} layers of width {settings.hidden_size}.\n"
        f"Machine: {machine}.\n"
    )
    console.print(Panel(Group(Text(text), table), title="FusedOneMoE: experts against a dense model", title_align="left"))


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Show that something takes a while."""
    if not console.is_terminal:
        console.print(what)
    with console.status(what) if console.is_terminal else nullcontext():
        yield


def _latest(trainer: Trainer, settings: Settings) -> tuple[str, str, str, str]:
    """Name, training and validation bits per byte, and tokens per second, as shown."""
    history = trainer.history
    val = f"{history.val[-1][1]:.3f}" if history.val else "-"
    return trainer.name, f"{smoothed(history.train)[-1]:.3f}", val, f"{history.tokens_per_second(settings):,.0f}"


@contextmanager
def training_display(console: Console, trainers: list[Trainer], settings: Settings) -> Iterator[Callable[[], None]]:
    """Show the training; yields a function to call after each step."""
    if not console.is_terminal:
        every = max(1, settings.steps // PLAIN_LINES)

        def print_line() -> None:
            step = len(trainers[0].history.train)
            if step % every and step != settings.steps:
                return
            latest = [_latest(trainer, settings) for trainer in trainers]
            parts = "; ".join(f"{name} {train} (held out {val}, {speed} tokens/s)" for name, train, val, speed in latest)
            console.print(f"step {step}/{settings.steps}  bits per byte: {parts}", soft_wrap=True)

        yield print_line
        return
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TimeElapsedColumn(), TextColumn("left"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, expand=True)
    task = progress.add_task("training", total=settings.steps)
    with Live(progress, console=console, refresh_per_second=4) as live:

        def update() -> None:
            progress.advance(task)
            table = Table("bits per byte", box=None, pad_edge=False)
            for heading in ("train", "held out", "tokens/s"):
                table.add_column(heading, justify="right", min_width=9)
            for trainer in trainers:
                table.add_row(*_latest(trainer, settings))
            live.update(Group(progress, table))

        yield update


def show_throughput(console: Console, title: str, result: CellResult) -> None:
    """Show the table of one comparison; the times are relative to the first row's."""
    console.print(f"One MoE layer, forward and backward: {title}", style="bold")
    table = Table("layer")
    for heading in ("tokens/s", "time / first row's", "error"):
        table.add_column(heading, justify="right")
    first = result.rows[0].seconds
    for row in result.rows:
        shown = ("not timed", row.note)
        if row.seconds:
            shown = (f"{result.cell.T / row.seconds:,.0f}", f"{row.seconds / first:.2f}" if first else "-")
        table.add_row(row.peer, *shown, "" if row.error is None else f"{row.error:.0e}")
    console.print(table)
    console.print("error: the largest of output and gradients, relative to float64", style="dim")


def show_sample(console: Console, prompt: bytes, continuation: bytes, *, name: str) -> None:
    """Generated text, the prompt in bold; what could command the terminal is replaced."""

    def printable(text: bytes) -> str:
        decoded = text.decode("utf-8", errors="replace")
        return "".join(c if c.isprintable() or c == "\n" else "·" for c in decoded)

    text = Text(printable(prompt), style="bold").append(printable(continuation), style="not bold")
    console.print(Panel(text, title=f"What the {name} makes of a prompt", title_align="left"))


def _draw_curves(axes: Axes, trainers: list[Trainer], settings: Settings) -> None:
    for trainer, (colour, marker) in zip(trainers, STYLES, strict=True):
        history = trainer.history
        steps = range(1, len(history.train) + 1)
        axes.plot(steps, history.train, color=colour, alpha=0.15, linewidth=0.8)
        axes.plot(steps, smoothed(history.train), color=colour, linewidth=1.8, label=f"{trainer.name}, training (smoothed)")
        val_steps, val_bits = zip(*history.val, strict=True)
        line: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "--", "linewidth": 1, "markeredgecolor": "white"}
        axes.plot(val_steps, val_bits, **line, label=f"{trainer.name}, held-out files: {val_bits[-1]:.3f} at the end")
    # The first steps fall from 8 bits and would flatten everything that comes later.
    shown = [bits for t in trainers for bits in t.history.train[int(FIRST_SHOWN_SHARE * settings.steps) :]]
    shown += [bits for t in trainers for _, bits in t.history.val]
    margin = 0.05 * (max(shown) - min(shown)) + 1e-3
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(
        xlim=(0, settings.steps * 1.01),
        xlabel=f"optimizer steps ({settings.tokens_per_step:,} bytes each)",
        ylabel="bits per byte (lower is better)",
        title="Same batches, same active parameters: mixture of experts and dense baseline",
    )
    axes.grid(alpha=0.25)
    axes.legend()


def _draw_usage(figure: Figure, axes: Axes, moe: Trainer, settings: Settings) -> None:
    counts_LE = moe.history.tokens_per_expert.double()
    percent_LE = (100 * counts_LE / counts_LE.sum(1, keepdim=True)).numpy()
    L, E = percent_LE.shape
    even = 100 / E
    # From zero, so that an unused expert looks unused, and at least to twice the even share, so that noise looks like noise.
    top = max(2 * even, float(percent_LE.max()))
    image = axes.imshow(percent_LE, aspect="auto", cmap="cividis", vmin=0, vmax=top)
    axes.set_xticks(range(0, E, max(1, E // MOST_ANNOTATED)))
    axes.set_yticks(range(L), labels=[str(layer + 1) for layer in range(L)])
    title = f"Where the held-out text went: share of each layer's routed rows, even would be {even:.3g}%"
    axes.set(xlabel="expert", ylabel="layer", title=title)
    for (layer, expert), share in np.ndenumerate(percent_LE) if E <= MOST_ANNOTATED else ():
        colour = "black" if share > 0.6 * top else "white"
        axes.text(expert, layer, f"{share:.1f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label="% of rows", pad=0.01)


def draw_picture(path: Path, trainers: list[Trainer], settings: Settings) -> None:
    """Write the picture of the trained MoE and dense baseline; raise UnwritableError where it cannot be written."""
    # Without pyplot: no window system is asked for, and nothing global stays behind.
    figure = Figure(figsize=(10, 8), layout="constrained")
    curves, usage = figure.subplots(2, 1, height_ratios=[2.2, 1])
    _draw_curves(curves, trainers, settings)
    _draw_usage(figure, usage, trainers[0], settings)
    save(figure, path)
