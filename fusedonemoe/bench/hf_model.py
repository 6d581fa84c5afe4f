"""A whole transformers model with its own experts and with ours: a training step, a decoding step, and the same tokens.

One Qwen3-MoE with one set of weights changes hands between the turns, so that attention, embeddings and losses, which every
line runs alike, are the same code on the same memory. What is compared is what a user sees, not the experts alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fusedonemoe.bench import report
from fusedonemoe.bench.peers import OURS
from fusedonemoe.bench.priority import RealTime
from fusedonemoe.bench.runner import order_of_round

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
class Line:
    """One implementation in one dtype.

    Attributes:
        name: of the implementation.
        training_seconds: median of a training step: forward, loss, backward.
        decode_seconds: median of a forward of one token behind a cache.
        training_times_faster: median over the rounds of the default's time divided by its own.
        decode_times_faster: likewise.
        same_tokens: whether greedy generation gives the tokens that the default gives.
    """

    name: str
    training_seconds: float
    decode_seconds: float
    training_times_faster: float
    decode_times_faster: float
    same_tokens: bool


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


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    dtype: torch.dtype, *, sizes: dict[str, int] | None = None, rounds: int = ROUNDS, real_time: bool = True
) -> list[Line]:
    """One table.

    Args:
        dtype: of the model.
        sizes: fields of the model's configuration.
        rounds: how often each implementation has its turn.
        real_time: ask for real-time priority while timing.
    """
    sizes = SIZES if sizes is None else sizes
    model, vocabulary = make_model(dtype, sizes), sizes["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(vocabulary, (BATCH, LENGTH), generator=generator)
    prompt = torch.randint(vocabulary, (1, CONTEXT), generator=generator)
    # Other tokens choose other experts: a decoding step finds its weights in memory, not in a cache that the last one filled.
    tokens = torch.randint(vocabulary, (DECODES_PER_ROUND, 1, 1), generator=generator)
    training: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    decoding: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    generated = {}
    for name, using in IMPLEMENTATIONS.items():
        with using(model):
            generated[name] = greedy_tokens(model, prompt, NEW_TOKENS)
    for turn in range(-1, rounds):  # the first is for what is allocated and compiled once
        for name in order_of_round(list(IMPLEMENTATIONS), turn):
            with IMPLEMENTATIONS[name](model), RealTime(real_time):
                step = decoder(model, prompt)
                decode = [_timed(partial(step, token)) for token in tokens]
                model.train()
                train = _timed(partial(training_step, model, batch))
                model.eval()
            if turn >= 0:
                decoding[name].append(median(decode))
                training[name].append(train)
    return [
        Line(
            name,
            median(training[name]),
            median(decoding[name]),
            _times_faster(training[DEFAULT], training[name]),
            _times_faster(decoding[DEFAULT], decoding[name]),
            torch.equal(generated[name], generated[DEFAULT]),
        )
        for name in IMPLEMENTATIONS
    ]


def _times_faster(theirs: list[float], ours: list[float]) -> float:
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def table_of(title: str, lines: list[Line]) -> Table:
    """The lines as a table.

    Args:
        title: above it.
        lines: from :func:`measure`.
    """
    table = Table(title=title, title_justify="left")
    for heading in ("experts", "training ms", "times faster", "decode ms", "times faster", f"{NEW_TOKENS} greedy tokens"):
        table.add_column(heading, justify="left" if heading == "experts" else "right")
    for line in lines:
        table.add_row(
            line.name,
            report.milliseconds(line.training_seconds),
            f"{line.training_times_faster:.2f}",
            report.milliseconds(line.decode_seconds),
            f"{line.decode_times_faster:.2f}",
            "the same" if line.same_tokens else "others",
        )
    return table


def run(args: argparse.Namespace) -> int:
    """Print the tables, in float32 and bfloat16.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status: 0; 1 when float32 generation gave other tokens; 2 without transformers.
    """
    if not find_spec("transformers"):
        print("this suite runs a model of transformers, which is missing: pip install 'fusedonemoe[bench]'", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        settings = report.describe_run(suite=args.suite)
        report.print_heading(settings)
        tables = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = f"qwen3-moe-{str(dtype)[6:]}"
            tables[name] = measure(dtype, sizes=SIZES, rounds=ROUNDS, real_time=not args.no_rt)
            report.console().print(table_of(name, tables[name]), highlight=False)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        result = {"schema": 1, **settings, "sizes": SIZES, "tables": {name: list(map(asdict, t)) for name, t in tables.items()}}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    # In bfloat16 two right answers can pick different tokens.
    if not all(line.same_tokens for line in tables["qwen3-moe-float32"]):
        print("greedy generation in float32 gave other tokens", file=sys.stderr)
        return 1
    return 0
