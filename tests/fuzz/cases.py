"""Which operator a case is of, and the case itself: both follow from the seed and the number alone."""

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.fuzz import trials_blocks, trials_experts, trials_layers, trials_routing, trials_tables
from tests.fuzz.check import Outcome, check
from tests.fuzz.draw import Draw

CASES = trials_routing.CASES | trials_experts.CASES | trials_tables.CASES | trials_layers.CASES | trials_blocks.CASES
TRITON = ("experts_mlp", "experts_mlp_lora", "experts_mlp_quantized", "experts_merged", "experts_neurons", "experts_values")
COMPILED_EVERY = 150  # a compilation takes as long as that many other cases


def schedule(operators: tuple[str, ...]) -> list[str]:
    """The operators of a round, each as often as its weight says, spread over the round."""
    places = [((i + 0.5) / CASES[name][1], name) for name in operators for i in range(CASES[name][1])]
    return [name for _, name in sorted(places)]


@dataclass
class Result:
    """One case that was run.

    Attributes:
        index: its number.
        operator: its name.
        impl: the implementation.
        options: what was drawn, as text.
        offered: what could have been drawn, by name.
        outcome: what was found.
    """

    index: int
    operator: str
    impl: str
    options: dict[str, str] = field(default_factory=dict)
    offered: dict[str, list[str]] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)


def place_of(index: int, triton: bool) -> tuple[str, int]:
    """The operator of a case, and how many cases of that operator come before it."""
    order = schedule(TRITON if triton else tuple(CASES))
    round_, step = divmod(index, len(order))
    name = order[step]
    return name, round_ * order.count(name) + order[:step].count(name)


def run_case(seed: int, index: int, triton: bool = False) -> Result:
    """Draw a case and run it; an exception is a failure too."""
    operator, turn = place_of(index, triton)
    draw = Draw(seed, index, operator, turn, ("triton",) if triton else None)
    torch.manual_seed(index)
    impl, outcome = "?", Outcome()
    try:
        trial = CASES[operator][0](draw)
        impl = trial.impl
        outcome = check(trial, draw, compiled=not triton and index % COMPILED_EVERY == COMPILED_EVERY - 1)
    except Exception as error:
        outcome.failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    options: dict[str, Any] = {name: str(value) for name, value in draw.chosen.items()}
    offered = {name: sorted(values) for name, values in draw.offered.items()}
    return Result(index, operator, impl, options, offered, outcome)
