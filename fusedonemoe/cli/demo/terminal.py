"""The output of the demo: live in a terminal, plain lines in a pipe or a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fusedonemoe.bench.results import CellResult
from fusedonemoe.cli.demo import Settings
from fusedonemoe.cli.demo.model import ParameterCount
from fusedonemoe.cli.demo.text import Corpus
from fusedonemoe.cli.demo.train import Trainer, smoothed

PLAIN_LINES = 10


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
