"""The picture: how both models learned, and which experts the text went to."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedonemoe.bench.picture import save
from fusedonemoe.cli.demo import Settings
from fusedonemoe.cli.demo.train import Trainer, smoothed

# Two of Okabe and Ito's colours, which all common forms of colour blindness tell apart; the markers differ as well.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"))
FIRST_SHOWN_SHARE = 0.05
MOST_ANNOTATED = 16


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


def draw(path: Path, trainers: list[Trainer], settings: Settings) -> None:
    """Write the picture of the trained MoE and dense baseline; raise UnwritableError where it cannot be written."""
    # Without pyplot: no window system is asked for, and nothing global stays behind.
    figure = Figure(figsize=(10, 8), layout="constrained")
    curves, usage = figure.subplots(2, 1, height_ratios=[2.2, 1])
    _draw_curves(curves, trainers, settings)
    _draw_usage(figure, usage, trainers[0], settings)
    save(figure, path)
