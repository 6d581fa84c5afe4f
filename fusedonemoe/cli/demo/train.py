"""Training both models side by side: the same batches in the same order, one step each in turn."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.cli.demo import Settings
from fusedonemoe.cli.demo.model import ByteTransformer, Loss
from fusedonemoe.cli.demo.parallel import ALONE, Processes
from fusedonemoe.cli.demo.text import Corpus, training_batches, validation_batches

BITS_PER_NAT = 1 / math.log(2)
WARM_UP_SHARE = 0.08
LAST_LEARNING_RATE = 0.05
SMOOTHING = 0.9
Batch = tuple[Tensor, Tensor]


def learning_rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak; ``step`` counts from 0."""
    warm_up = max(1, round(WARM_UP_SHARE * settings.steps))
    if step < warm_up:
        return settings.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, settings.steps - warm_up)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * (LAST_LEARNING_RATE + (1 - LAST_LEARNING_RATE) * cosine)


def smoothed(values: list[float]) -> list[float]:
    """An exponential moving average; over the first steps the plain mean, so that the very first does not linger."""
    average = 0.0
    out: list[float] = []
    for count, value in enumerate(values, start=1):
        average += max(1 - SMOOTHING, 1 / count) * (value - average)
        out.append(average)
    return out


@dataclass
class History:
    """The history of one model's training."""

    train: list[float] = field(default_factory=list)  # bits per byte of each step's batch
    val: list[tuple[int, float]] = field(default_factory=list)  # steps, and bits per byte on the validation windows
    seconds: float = 0.0  # spent in steps, validation and compilation left out
    tokens_per_expert: Tensor = field(default_factory=lambda: torch.zeros(0, 0, device="cpu"))  # ``[L, E]``, last validation

    def tokens_per_second(self, settings: Settings) -> float:
        """Bytes trained on per second of training."""
        return len(self.train) * settings.tokens_per_step / self.seconds


class Trainer:
    """One model with its optimizer and history; the processes share every batch and, from here on, the experts."""

    def __init__(
        self, name: str, model: ByteTransformer, settings: Settings, *, compiled: bool, processes: Processes = ALONE
    ) -> None:
        self.name = name
        self.model = model
        self.history: History = History()
        self._settings, self._processes = settings, processes
        options: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
        self._optimizer = torch.optim.AdamW(processes.share(model), **options)
        self._forward: Callable[[Tensor, Tensor], Loss] = model
        if compiled:
            self._forward = torch.compile(model, fullgraph=True, dynamic=False)

    def _backward(self, batch: Batch) -> float:
        """Accumulate the gradients of a batch; its cross-entropy in nats."""
        loss = self._forward(*map(self._processes.part, batch))
        (loss.cross_entropy + self._settings.balance_weight * loss.balance).backward()
        return float(self._processes.mean(loss.cross_entropy))

    def warm_up(self, batch: Batch) -> None:
        """Compile, without learning anything."""
        self._backward(batch)
        self._optimizer.zero_grad()

    def step(self, batch: Batch) -> None:
        """Learn from a batch."""
        start = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate_at(len(self.history.train), self._settings)
        cross_entropy = self._backward(batch)
        self._processes.clip_gradients(self.model, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.history.seconds += time.perf_counter() - start
        self.history.train.append(cross_entropy * BITS_PER_NAT)

    def validate(self, batches: list[Batch]) -> None:
        """Write down the bits per byte on ``batches`` and which experts they used."""
        total = 0.0
        counts: list[Tensor] = []
        for batch in batches:
            # With gradients on although none is wanted: a second graph without them would have to be compiled first.
            loss = self._forward(*map(self._processes.part, batch))
            total += float(self._processes.mean(loss.cross_entropy))
            counts.append(loss.tokens_per_expert)
        self.history.val.append((len(self.history.train), total / len(batches) * BITS_PER_NAT))
        self.history.tokens_per_expert = torch.stack(counts).sum(0).cpu()


def train_side_by_side(
    trainers: list[Trainer], corpus: Corpus, settings: Settings, *, seed: int, device: torch.device, on_step: Callable[[], None]
) -> None:
    """Take every warmed-up trainer through the same steps; ``on_step`` is called after each step that all have taken."""
    shape = {"batch": settings.batch, "window": settings.window}
    validation = validation_batches(corpus.val, **shape, batches=settings.validation_batches, device=device)
    validate_after = {round(settings.steps * (i + 1) / settings.validations) for i in range(settings.validations)}
    for step, batch in enumerate(
        training_batches(corpus.train, **shape, steps=settings.steps, seed=seed, device=device), start=1
    ):
        for trainer in trainers:
            trainer.step(batch)
            if step in validate_after:
                trainer.validate(validation)
        on_step()


def verdict(moe_bits: float, dense_bits: float) -> str:
    """Say in one sentence which model predicts the validation text better; to three digits, as printed elsewhere."""
    moe, dense = round(moe_bits, 3), round(dense_bits, 3)
    if moe == dense:
        return f"The MoE ends level with the dense baseline: {moe:.3f} bits per byte both."
    side = "below" if moe < dense else "above"
    return (
        f"The MoE ends at {moe:.3f} bits per byte on the held-out files, {abs(moe - dense):.3f} {side} the dense baseline's "
        f"{dense:.3f}: the {'better' if moe < dense else 'worse'} model at equal active parameters."
    )
