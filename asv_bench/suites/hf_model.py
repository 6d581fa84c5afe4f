"""A whole transformers model with its own experts and with ours: a training step, a decoding step, and the same tokens.

One Qwen3-MoE with one set of weights gets the experts of the line whose turn it is, so attention, embeddings and losses are the
same code on the same memory for every line. Whole models are compared, as users run them, not the experts alone. Before anything
is timed, a line's greedy tokens, and the logits or gradients of the timed step, are compared with the default's.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from asv_bench.suites import lines
from asv_bench.suites.lines import LinesResult, result_of, times_of
from asv_bench.suites.model_work import EXPERTS_RANK, account_of, decode_work, training_work
from fusedonemoe.bench import report, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.peers import BUDGET, OURS, relative_error
from fusedonemoe.bench.timing import Timer, order_of_round

SIZES: dict[str, int] = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
}
BATCH, LENGTH = 4, 128  # of a training step
CONTEXT, NEW_TOKENS = 64, 64  # of decoding
ROUNDS, DECODES_PER_ROUND = 9, 20
DEFAULT = "grouped_mm"  # transformers' own default


@dataclass(frozen=True)
class ModelCell(lines.LinesCell):
    """One table.

    Attributes:
        mode: ``"training"``: forward, loss and backward; ``"decode"``: a forward of one token behind a cache.
        sizes: fields of the model's configuration.
    """

    mode: str
    sizes: dict[str, int]

    @property
    def name(self) -> str:
        """The text that ``--cells`` matches."""
        return f"qwen3-moe-{str(self.dtype)[6:]}-{self.mode}"

    @property
    def described(self) -> dict[str, Any]:
        """The operator, sizes and mode, for the file."""
        sizes = self.sizes
        return {
            "operator": "model",
            "T": BATCH * LENGTH if self.mode == "training" else 1,
            "D": sizes["hidden_size"],
            "F": sizes["moe_intermediate_size"],
            "E": sizes["num_experts"],
            "K": sizes["num_experts_per_tok"],
            "mode": self.mode,
        }


@dataclass(frozen=True)
class Line:
    """One implementation.

    Attributes:
        name: of the implementation.
        same_tokens: whether greedy generation gives the tokens that the default gives.
        error: of logits, or of the gradients of all experts, the greatest, relative to the default's.
        seconds: median; None where the numbers were wrong.
        p95_seconds: of all calls.
        p99_seconds: of all calls.
        calls: how many were timed.
        times_faster: median over the rounds of the default's time divided by its own.
        note: in place of a time.
    """

    name: str
    same_tokens: bool
    error: float
    seconds: float | None = None
    p95_seconds: float | None = None
    p99_seconds: float | None = None
    calls: int = 0
    times_faster: float | None = None
    note: str = ""

    @property
    def problem(self) -> str:
        """The problem with it; empty otherwise."""
        return self.note


def make_model(dtype: torch.dtype, sizes: dict[str, int]) -> Any:
    """A Qwen3-MoE with random weights.

    Args:
        dtype: of all parameters.
        sizes: fields of its configuration.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    settings: dict[str, Any] = {**sizes, "norm_topk_prob": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**settings))
    return model.to(dtype).eval()


@contextmanager
def _default(model: Any) -> Iterator[None]:
    model.set_experts_implementation(DEFAULT)
    yield


@contextmanager
def _ours(model: Any) -> Iterator[None]:
    from fusedonemoe.integrations.transformers import apply, unapply

    used = apply(model)
    if used.used != used.total or not used.total:
        raise RuntimeError(str(used))
    try:
        yield
    finally:
        unapply(model)


IMPLEMENTATIONS = {OURS: _ours, DEFAULT: _default}


def training_step(model: Any, tokens: Tensor) -> Tensor:
    """Forward, loss and backward; the gradients of the step before are dropped, as an optimizer's ``zero_grad`` does."""
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def decoder(model: Any, prompt: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from one token ``[1, 1]`` to its logits, behind a cache that holds the prompt and nothing after it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)

    def step(token: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-token.shape[1])
        return logits

    return step


def greedy_tokens(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """The prompt and what follows it."""
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    generated: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return generated


def _steps(model: Any, cell: ModelCell) -> Callable[[], list[Callable[[], Tensor]]]:
    """Return a function that prepares the timed calls of a turn, with the experts that the model has then."""
    vocabulary, generator = cell.sizes["vocab_size"], torch.Generator().manual_seed(1)
    batch = torch.randint(vocabulary, (BATCH, LENGTH), generator=generator, device="cpu")
    prompt = torch.randint(vocabulary, (1, CONTEXT), generator=generator, device="cpu")
    # Other tokens choose other experts: a decoding step finds its weights in memory, not in a cache that the last one filled.
    tokens = torch.randint(vocabulary, (DECODES_PER_ROUND, 1, 1), generator=generator, device="cpu")

    def prepared() -> list[Callable[[], Tensor]]:
        if cell.mode == "training":
            return [partial(training_step, model, batch)]
        step = decoder(model, prompt)
        return [partial(step, token) for token in tokens]

    return prepared


def _answer(model: Any, cell: ModelCell, steps: list[Callable[[], Tensor]]) -> list[Tensor]:
    """Return the result of the first call: logits, or a loss and the gradients of the experts."""
    with _mode(model, cell):
        outputs = [steps[0]()]
    if cell.mode == "training":
        outputs += [p.grad for p in model.parameters() if p.dim() == EXPERTS_RANK]
    return outputs


@contextmanager
def _mode(model: Any, cell: ModelCell) -> Iterator[None]:
    model.train(cell.mode == "training")
    yield
    model.eval()


def _checked(model: Any, cell: ModelCell, prepared: Callable[[], list[Callable[[], Tensor]]]) -> dict[str, Line]:
    """The lines without their times."""
    prompt = torch.randint(cell.sizes["vocab_size"], (1, CONTEXT), generator=torch.Generator().manual_seed(2), device="cpu")
    generated, answers = {}, {}
    for name, using in IMPLEMENTATIONS.items():
        with using(model):
            generated[name] = greedy_tokens(model, prompt, NEW_TOKENS)
            answers[name] = _answer(model, cell, prepared())
    found = {}
    for name, answer in answers.items():
        same = torch.equal(generated[name], generated[DEFAULT])
        error = max(relative_error(a, b) for a, b in zip(answer, answers[DEFAULT], strict=True))
        found[name] = Line(name, same, error)
        # In half precision two right answers can pick different tokens, or different experts.
        if cell.dtype == torch.float32 and not same:
            found[name] = replace(found[name], note="greedy generation in float32 gave other tokens")
        elif cell.dtype == torch.float32 and not error <= BUDGET[cell.dtype]:
            found[name] = replace(found[name], note=f"off by {error:.1e}")
    return found


def measure(cell: ModelCell, *, ceilings: Ceilings, real_time: bool = True) -> LinesResult[ModelCell, Line]:
    """One table.

    Args:
        cell: what to measure.
        ceilings: of the run; sampled between the rounds.
        real_time: ask for real-time priority while timing.
    """
    model = make_model(cell.dtype, cell.sizes)
    prepared = _steps(model, cell)
    found = _checked(model, cell, prepared)
    names = [name for name, line in found.items() if not line.note]
    medians: dict[str, list[float]] = {name: [] for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    sample, timer = ceilings.sampler(cell.dtype), Timer(real_time=real_time)
    for turn in range(-1, cell.rounds):  # the first is for what is allocated and compiled once
        with timer.turn():
            sample()
        for name in order_of_round(names, turn):
            with IMPLEMENTATIONS[name](model), timer.turn():
                calls = prepared()
                with _mode(model, cell):
                    taken = timer.seconds(calls)
            if turn >= 0:
                medians[name].append(median(taken))
                samples[name] += taken
    for name in names:
        faster = _times_faster(medians[DEFAULT], medians[name])
        found[name] = replace(found[name], times_faster=faster, **times_of(samples[name]))
    account = account_of(model)
    training = training_work(account, sequences=BATCH, length=LENGTH)
    return result_of(
        cell,
        list(found.values()),
        ceilings,
        work=training if cell.mode == "training" else decode_work(account, context=CONTEXT),
        parameters=account.parameters,
        active_parameters=account.active_parameters,
    )


def _times_faster(theirs: list[float], ours: list[float]) -> float:
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def table_of(result: LinesResult[ModelCell, Line]) -> Table:
    """The lines as a table.

    Args:
        result: of a cell.
    """
    floor, table = result.floor, Table(title=result.title, title_justify="left")
    columns = ("experts", "ms", "p95 ms", "p99 ms", "tokens/s", "x floor", "times faster", "error", f"{NEW_TOKENS} greedy tokens")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "experts" else "right")
    for line in result.lines:
        times = [report.milliseconds(t) if t else "" for t in (line.p95_seconds, line.p99_seconds)]
        table.add_row(
            line.name,
            report.milliseconds(line.seconds) if line.seconds else line.note,
            *times,
            f"{result.cell.described['T'] / line.seconds:,.0f}" if line.seconds else "",
            f"{line.seconds / floor.seconds:.2f}" if line.seconds and floor else "",
            f"{line.times_faster:.2f}" if line.times_faster else "",
            f"{line.error:.1e}",
            "the same" if line.same_tokens else "others",
            style="red" if line.problem else None,
        )
    return table


def cells() -> list[ModelCell]:
    """The tables: a training step and a decoding step, in float32 and bfloat16."""
    return [ModelCell(dtype, ROUNDS, mode, SIZES) for dtype in (torch.float32, torch.bfloat16) for mode in ("training", "decode")]


def run(args: argparse.Namespace) -> int:
    """Print the tables.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 1 when numbers or generated tokens in float32 are
        others; 2 without transformers.
    """
    if not find_spec("transformers"):
        print("this suite runs a model of transformers, which is missing: pip install 'fusedonemoe[bench]'", file=sys.stderr)
        return session.EXIT_USAGE
    ceilings = Ceilings()
    return lines.run(
        args,
        cells(),
        measure=lambda cell: measure(cell, ceilings=ceilings, real_time=not args.no_rt),
        table_of=table_of,
        described={"sizes": SIZES},
    )
